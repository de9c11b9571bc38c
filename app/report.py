"""One utterance and the results as an HTML file that opens offline, and as a ZIP of data."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from app import gates, texts
from app.access import audio_type
from app.cards import WER, legend_html, method_card
from app.jobs import Job
from app.texts import Text, drawn, language, t
from hdmole.figures import results as result_figures
from hdmole.figures import utterance as figures
from hdmole.names import layer_label
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.study.claims import claim_line
from hdmole.study.results import Results

STYLE = Path(__file__).resolve().parent.parent / "assets" / "ui" / "style.css"
_PAGE = """<!doctype html><html lang="{language}"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}
body {{ font: 16px/1.5 Arial, Helvetica, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #23272e; background: #fff; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }} audio {{ width: 100%; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }} td, th {{ padding: .25rem .7rem; border-bottom: 1px solid #ccd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} .note, footer {{ color: #5a6472; font-size: .85rem; }}
.warning {{ border-left: 5px solid #B7791F; padding: .4rem .8rem; background: #fdf6e3; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ color-scheme: dark; }}
  body {{ color: #e3e6ea; background: #15181d; }} .note, footer {{ color: #a4adb8; }} .warning {{ background: #2c2617; }}
}}
</style><script>{plotly}</script></head><body>{body}<script>
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const paint = () => document.querySelectorAll(".js-plotly-plot").forEach(plot => {{
  const [paper, text, lines] = dark.matches ? ["#15181d", "#e3e6ea", "#3a424d"] : ["#ffffff", "#23272e", "#dfe3e8"];
  const change = {{ paper_bgcolor: paper, plot_bgcolor: paper, "font.color": text }};
  for (const axis of Object.keys(plot.layout).filter(name => /^[xy]axis/.test(name))) {{
    change[axis + ".gridcolor"] = change[axis + ".zerolinecolor"] = lines;
  }}
  Plotly.relayout(plot, change);
}});
if (dark.matches) paint();
dark.addEventListener("change", paint);
</script></body></html>
"""


def pictures(job: Job, method: str, layer: str) -> dict[str, tuple[str, go.Figure, pd.DataFrame]]:
    """File name -> title, figure and data of everything that the pages show of an utterance.

    The routing is that of the HDMoLE adapter `method` in `layer`.
    """
    assert job.audio is not None
    best = job.transcripts.get(method) or next(iter(job.transcripts.values()))
    start, end = job.segments[0]  # the first stretch of a long recording
    samples, words = job.audio.samples[: round(end * SAMPLE_RATE)], [w for w in best.words if w.start < end]
    found = {}
    sound = figures.sound(samples, SAMPLE_RATE, words, start)
    found["sound"] = t("The sound, with the words where they were heard"), sound, figures.envelope(samples, SAMPLE_RATE)
    if len(best.accent) > 1:
        accents = pd.DataFrame({"accent": list(best.accent), "posterior": list(best.accent.values())})
        found["accent"] = t("The accent it hears"), figures.accent_posterior(best.accent), accents
    table, config = job.routing(method), job.gate(method)
    if table is not None and config is not None:
        name, most = layer_label(layer), gates.largest_weight(config, table, "gate")
        combined, working = figures.gate_data(table, layer), figures.effective_data(table)
        cut, overview = figures.threshold_data(table, layer), figures.overview_data(table)
        heat = figures.gate_heatmap(combined, most, words=words)
        gate = t(figures.GATES["gate"])
        found["gates"] = (
            t("{gate} of {layer}: which expert worked when", gate=gate, layer=f"{texts.layer(name)} ({name})"),
            heat,
            combined,
        )
        found["thresholds"] = (
            t("Thresholds and what they cut: {layer}", layer=f"{texts.layer(name)} ({name})"),
            figures.threshold_bars(cut, config.learned),
            cut,
        )
        mean = t("All layers: {gate}, mean", gate=gate.lower())
        found["layers"] = mean, figures.layer_overview(overview, most), overview
        dense = figures.effective_heatmap(working, table.expert.nunique(), words)
        found["effective"] = t("All layers: experts at work, over time"), dense, working
    if len(job.segments) > 1:
        where = t(" (the first stretch, {start} to {end} s)", start=f"{start:.1f}", end=f"{end:.1f}")
        found = {name: (title + where, plot, data) for name, (title, plot, data) in found.items()}
    return found


def html(
    job: Job, reference: str, method: str, layer: str, summary: Results | None, about: dict[str, str], note: str = ""
) -> str:
    """The whole report, with the routing of the HDMoLE adapter `method` in `layer`.

    `note` stands above the results. At the foot stand `about` and the provenance of the results.
    """
    utterance = job.utterance
    kind = audio_type(utterance.data) or "audio/wav"
    audio = base64.b64encode(utterance.data).decode()
    cards = "".join(method_card(method, job.transcripts.get(method), reference, t("not transcribed")) for method in job.methods)
    title = t("{name}: who heard what, and which expert did the work", name=utterance.name)
    parts = [f"<h1>{escape(title)}</h1>"]
    if job.judged and job.judged.in_domain.get("verdict") is False:
        reasons = t("; ").join(map(t, job.judged.in_domain.get("reasons") or []))
        warning = t("This does not sound like what the model was made for. {reasons}", reasons=reasons)
        parts.append(f"<p class='warning'>{escape(warning)}</p>")
    for name, transcript in job.transcripts.items():
        if transcript.flags:
            flags = t("; ").join(map(t, transcript.flags))
            parts.append(f"<p class='warning'>{escape(texts.method(name))}: {escape(flags)}.</p>")
    parts.append(f"<audio controls src='data:{kind};base64,{audio}'></audio>")
    if reference.strip():
        parts.append(f"<p>{t('<b>What was said:</b> {words}', words=escape(reference))}</p>")
    parts.append(f"<div class='cards'>{cards}</div>{legend_html(reference)}")
    if (config := job.gate(method)) is not None:
        routed = t("<b>Routing of {method}.</b> {gate}", method=escape(texts.method(method)), gate=escape(gates.in_words(config)))
        parts.append(f"<p>{routed}</p>")
    shown = [(title, plot) for title, plot, _ in pictures(job, method, layer).values()]
    if summary:
        rates = result_figures.error_rate_data(summary, summary.target)
        cost = result_figures.forgetting_data(summary, summary.target)
        shown.append((t("Word error rate by accent, on a whole test set"), result_figures.error_rates(rates)))
        if len(cost):
            shown.append((t("What adapting cost on general speech"), result_figures.forgetting(cost, summary.target)))
    for title, plot in shown:
        parts.append(f"<h2>{escape(title)}</h2>{figures.exported(drawn(plot)).to_html(full_html=False, include_plotlyjs=False)}")
    if summary:
        parts.append(f"<h2>{t('Results')}</h2>")
        if note:
            parts.append(f"<p class='warning'>{escape(note)}</p>")
        parts.append(f"<p>{texts.adapted(summary)}</p>{_table(summary)}")
        if not reference.strip():  # else it stands under the cards
            parts.append(f"<p class='note'>{t(WER)}</p>")
        for claim in summary.claims:
            line = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(t(claim_line(claim))))
            parts.append(f"<p>{line}</p>")
    lines = {t(k): v for k, v in about.items()} | {t("written"): datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if summary:
        lines |= {t("results: {name}", name=name): value for name, value in texts.origin(summary).items()}
    parts.append(
        f"<footer><h2>{t('Where this comes from')}</h2>" + "<br>".join(f"{escape(k)}: {escape(str(v))}" for k, v in lines.items())
    )
    return _PAGE.format(
        title=escape(utterance.name),
        language=language(),
        style=STYLE.read_text(),
        plotly=get_plotlyjs(),
        body="".join(parts) + "</footer>",
    )


def _table(summary: Results) -> str:
    """The main methods as an HTML table."""
    labels, rows = summary.labels, []
    for method in dict.fromkeys(result_figures.error_rate_data(summary, summary.target).method):
        entry = summary.methods[method]
        row = {t("Method"): texts.label(labels[method]), t("Trainable"): f"{entry.trainable or 0:,}"}
        for domain, rate in entry.domains.items():
            name = t("WER {speech} (%)", speech=Text(domain.replace("_", " ")))
            row[name] = rate.mean_text() if domain == "accent" else rate.text()
        rows.append(row)
    return str(pd.DataFrame(rows).to_html(index=False, border=0))


def data(job: Job, method: str, layer: str, results: Path) -> bytes:
    """A ZIP of what the report shows.

    It holds the audio, transcripts, the full routing of each HDMoLE adapter, each figure's data,
    and the results if there are any.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("audio/" + (re.sub(r"[^\w .-]", "_", job.utterance.name).lstrip(".") or "audio"), job.utterance.data)
        heard = [{"file": job.utterance.name, **t.to_dict()} for t in job.transcripts.values()]
        packed.writestr("transcripts.json", json.dumps(heard, indent=1))
        for name, (_, _, table) in pictures(job, method, layer).items():
            packed.writestr(f"figures/{name}.csv", table.to_csv(index=False))
        for name, transcript in job.transcripts.items():
            if transcript.trace is not None:
                routing = io.BytesIO()
                transcript.trace.save(routing)
                packed.writestr(f"routing/{name}.parquet", routing.getvalue())
        for name in ("summary.json", "utterances.parquet"):
            if (results / name).is_file():
                packed.write(results / name, f"results/{name}")
    return content.getvalue()
