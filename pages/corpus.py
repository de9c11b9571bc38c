"""Corpus: judge the methods on many recordings of your own, then look at each of them."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import streamlit as st

from app import access, links, plots, results, texts, watch
from app.cards import LEGEND_DIFFERENCE, WER, text_card
from app.corpus import Evaluation
from app.model import REAL, load_model
from app.session import session
from app.texts import t
from app.utterance import sample_manifest
from hdmole.figures import results as result_figures
from hdmole.study.results import ResultsError, load

asr = load_model()

st.title(t("How well are your own recordings heard?"))
st.caption(
    t(
        "Give recordings with what was said in them. The work goes on while you visit other pages; "
        "what is done is kept when you cancel."
    )
)
kept = session()
linked = links.take("results")
if kept.evaluation_new or linked is not None or "corpus_results" not in st.session_state:
    kept.evaluation_new = False
    mine = kept.evaluation.key if kept.evaluation is not None and kept.evaluation.of(asr) else ""
    st.session_state.corpus_results = linked if linked and linked != mine else ""
with st.sidebar:
    earlier = st.text_input(
        t("Results of an earlier evaluation"), key="corpus_results", placeholder="results/mine", persist_state="session",
        help=t(
            "Results that `hdmole evaluate` wrote, in a folder that the app was started with (`hdmole app --data FOLDER`), or of this "
            "page, as its address names them."
        ),
    ).strip()  # fmt: skip
task = None if earlier or kept.evaluation is None or not kept.evaluation.of(asr) else kept.evaluation
if kept.evaluation is not None and kept.evaluation.running and not kept.evaluation.of(asr):
    st.info(t("An evaluation of the other model goes on; choose that model to see it. Starting one here ends it."))


def go_on(cancelled: Evaluation) -> None:
    """Show a button that continues a cancelled evaluation."""
    if st.button(t("Go on"), icon=":material/play_arrow:", key="corpus_go_on"):
        kept.evaluation = Evaluation(asr, cancelled.source, cancelled.methods, cancelled.folder)
        st.rerun()


with st.expander(t("The recordings"), expanded=not (earlier or (task and not task.error)), icon=":material/folder_open:"):
    st.markdown(
        t(
            "A manifest has one line a recording: {line}, the audio's path being relative to the manifest, `general` the accent of "
            "general speech.",
            line='`{"audio": "clip.wav", "text": "what was said", "accent": "indian", "speaker": "s1"}`',
        )
    )
    left, right = st.columns(2)
    file = left.file_uploader(t("A ZIP with the recordings and a .jsonl manifest"), type="zip", key="corpus_zip")
    path = right.text_input(t("or the path of a manifest on the app's machine"), key="corpus_path", placeholder="data/test.jsonl")
    methods = st.multiselect(t("Methods"), asr.methods, asr.methods, format_func=texts.method, placeholder=t("none"))
    with st.container(horizontal=True):
        start = st.button(t("Start"), type="primary", disabled=not (methods and (file or path.strip())), key="corpus_start")
        samples = sample_manifest(asr.folder)
        try_it = samples.is_file() and st.button(
            t("Try it with synthetic voices") if session().model == REAL else t("Try it with the samples"),
            disabled=not methods, key="corpus_samples",
        )  # fmt: skip
    if start or try_it:
        try:
            source = samples if try_it else file or access.manifest_file(path.strip(), asr.folder)
        except access.AccessError as error:
            st.error(t(error))
            st.stop()
        if kept.evaluation is not None:
            kept.evaluation.cancel()
            kept.evaluation.forget()
        kept.evaluation = Evaluation(asr, source, methods, Path(tempfile.mkdtemp(prefix="hdmole-corpus-")))
        kept.evaluation_new = True
        st.rerun()
if task is not None:
    if task.running:  # so that a reload opens the same results
        links.write(results=task.key)
    watch.ended(task)
    if task.error:
        st.error(t(task.error))
    if task.summary is None:
        if not task.error:
            st.info(t("Cancelled before anything was heard."))
            go_on(task)
        st.stop()
elif not earlier:
    links.write()
    st.stop()
try:
    out = task.out if task is not None else access.results_folder(earlier, asr.folder)
except access.AccessError as error:
    st.error(t(error))
    st.stop()
name_of_results = task.key if task is not None else earlier
links.write(results=name_of_results)
if (out / "unfinished").is_dir() and not (out / "summary.json").is_file():
    st.info(t("This evaluation is not finished yet; open this address again later."))
    st.stop()
for name in ("summary.json", "recordings.parquet", "utterances.parquet"):
    if not (out / name).is_file():
        st.error(
            t(
                "{folder} has no {file}; name a folder that `hdmole evaluate` wrote.",
                folder=access.plain(name_of_results),
                file=name,
            )
        )
        st.stop()
try:
    summary = load(out)
except ResultsError as error:
    st.error(t(error))
    st.stop()

for name in ("recordings.parquet", "utterances.parquet"):
    results.read_table(out / name)  # if it is damaged, the page ends here
done, of = summary.provenance.recordings or 0, summary.provenance.of or 0
if done < of:
    st.warning(t("Cancelled after {done} of {all} recordings; the numbers are of these.", done=done, all=of))
    if task is not None:
        go_on(task)
if summary.failed:
    with st.expander(t("{count} recordings could not be read", count=len(summary.failed)), icon=":material/error:"):
        st.dataframe(
            pd.DataFrame([failure.to_dict() for failure in summary.failed]),
            hide_index=True,
            column_config={"audio": t("audio"), "error": t("error")},
        )
labels = {name: texts.label(label) for name, label in summary.labels.items()}
rates = result_figures.error_rate_data(summary)
plots.show(
    result_figures.error_rates(rates), "corpus-error-rates", rates,
    t("lower is better; thin lines are 95 % intervals over speakers."), "corpus_rates",
)  # fmt: skip
st.markdown(texts.table(summary, labels))
st.html(f"<div class='legend'>{t(WER)}</div>")


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(f for f in out.iterdir() if f.is_file()):
            if file.name == "recordings.parquet":  # without the paths on this machine
                known = results.read_table(file)
                packed.writestr(
                    file.name, known.assign(audio=known.audio.map(lambda path: Path(path).name)).to_parquet(index=False)
                )
            else:
                packed.write(file, file.name)
    return content.getvalue()


with st.container(horizontal=True, vertical_alignment="center"):
    link = links.whole(results=name_of_results)
    st.page_link("../pages/compare.py", label=t("Compare the methods"), icon=":material/bar_chart:", query_params=link)
    if summary.routing:
        st.page_link("../pages/correspondence.py", label=t("Experts and accents"), icon=":material/grid_on:", query_params=link)
    st.download_button(
        t("All results (ZIP)"), archive, "results.zip", "application/zip", on_click="ignore", icon=":material/download:"
    )


@st.cache_data(show_spinner=False, max_entries=4)
def recordings(out: str, changed: int) -> pd.DataFrame:
    """One row per recording: length, level, clipping, in-domain score and each method's WER."""
    heard = results.read_table(Path(out) / "utterances.parquet").drop_duplicates(["utterance", "method"])
    wide = heard.assign(wer=100 * heard.errors / heard.words.clip(lower=1)).pivot(
        index="utterance", columns="method", values="wer"
    )[heard.method.unique()]
    first = heard.drop_duplicates("utterance").set_index("utterance")[["reference", "words"]]
    known = results.read_table(Path(out) / "recordings.parquet").drop_duplicates("utterance").set_index("utterance")
    wide.columns = [f"WER {name} (%)" for name in wide.columns]
    table = known.join(first).join(wide.round(1)).reset_index()
    # halves what is sent to the browser
    small = {name: "category" for name in ("accent", "speaker")}
    return table.astype(small | {name: "float32" for name in table.select_dtypes("number")} | {"words": "int32"})


st.header(t("Recording by recording"))
rows = recordings(str(out), (out / "recordings.parquet").stat().st_mtime_ns)


@st.fragment  # so that choosing a row runs only this function
def one_by_one() -> None:
    accent_box, word_box, worst_box = st.columns([1, 2, 1])
    accents = accent_box.multiselect(
        t("Accents"), sorted(set(rows.accent)), placeholder=t("all"), format_func=texts.accent_name, key="corpus_accents"
    )
    text = word_box.text_input(t("Said or file name contains"), key="corpus_text")
    least = worst_box.number_input(t("WER of some method at least (%)"), 0, 100, 0, 10, key="corpus_least")
    shown = rows[rows.accent.isin(accents)] if accents else rows
    if text.strip():
        found = shown.reference.str.contains(text.strip(), case=False, regex=False)
        shown = shown[found | shown.utterance.str.contains(text.strip(), case=False, regex=False)]
    rates_of = [c for c in rows.columns if c.startswith("WER ")]
    shown = shown[shown[rates_of].max(axis=1) >= least].reset_index(drop=True)
    event = st.dataframe(
        shown.drop(columns="audio"), hide_index=True, height=320, on_select="rerun", selection_mode="single-row",
        # a new key for a new table, in which nothing is chosen yet
        key=f"corpus_rows-{name_of_results}-{accents}-{text}-{least}",
        column_order=["utterance", "accent", *rates_of, "reference", "words", "seconds", "level", "clipped", "in_domain", "speaker"],
        column_config={
            **{name: t(name) for name in ("utterance", "accent", "reference", "words", "speaker")},
            "seconds": st.column_config.NumberColumn(t("length (s)")), "level": st.column_config.NumberColumn(t("level (dBFS)")),
            "clipped": st.column_config.NumberColumn(t("clipped samples"), format="percent"),
            "in_domain": st.column_config.NumberColumn(t("in-domain score")),
        },
    )  # fmt: skip
    st.caption(
        t(
            "**How to read this:** {shown} of {all} recordings; sort by a column's head, choose a row to hear it and see the words.",
            shown=f"{len(shown):,}",
            all=f"{len(rows):,}",
        )
    )
    if event.selection.rows:
        row = shown.iloc[event.selection.rows[0]]
        if content := access.audio_of(out, str(row.audio), asr.folder):
            st.audio(content, format=access.audio_type(content))
        of = results.read_table(out / "utterances.parquet", row.utterance)
        cards = [text_card(r["method"], r["hypothesis"], r["reference"]) for r in of.to_dict("records")]
        st.html(f"<div class='cards'>{''.join(cards)}</div><div class='legend'>{t(LEGEND_DIFFERENCE)}</div>")


one_by_one()
