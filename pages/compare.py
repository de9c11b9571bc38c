"""Compare: the methods on the same test speech. Everything here is read from a results folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from app import links, plots, results, texts
from app.access import audio_type, plain
from app.cards import LEGEND_DIFFERENCE, text_card
from app.model import ROOT, load_model
from app.session import session
from app.texts import Text, t
from hdmole.figures import results as result_figures
from hdmole.figures.utterance import METHOD_COLOURS
from hdmole.names import DOMAIN_LABELS, GENERAL, GENERAL_OF
from hdmole.study.bootstrap import accent_differences
from hdmole.study.claims import verdict

asr = load_model()


def kind(domain: str) -> str:
    """The name of a kind of speech, translated."""
    return t("Accents" if domain == "accent" else DOMAIN_LABELS.get(domain, plain(domain)))


def spoken_name(accent: str, domain: str) -> str:
    """The name of an accent in a kind of speech; that of the kind alone where it says all."""
    if domain in ("accent", accent):
        return texts.accent(accent)
    return kind(domain) if domain in GENERAL_OF.values() else f"{texts.accent(accent)} · {kind(domain)}"


st.title(t("Is HDMoLE better, by how much, and how sure are we?"))
folder, summary = results.choose(asr)
ours = folder.resolve().is_relative_to(ROOT / "assets")
labels = {name: texts.label(label) for name, label in summary.labels.items()}
plain_labels = {name: plain(label) for name, label in labels.items()}

st.markdown(results.message(summary))
if note := results.trained_anew(asr, folder, summary):
    st.caption(note)
bars, plane = st.columns([1.6, 1])
with bars:
    domains = [d for d in summary.domains if d in DOMAIN_LABELS and d not in GENERAL_OF.values()] or ["accent"]
    links.set_widget("speech", "speech", domains, domains[0])
    speech = st.segmented_control(t("Word error rate by accent"), domains, required=True, key="speech", format_func=kind)
    rates = result_figures.error_rate_data(summary, str(speech))
    plots.show(
        result_figures.error_rates(rates), "word-error-rates", rates,
        t("lower is better; speakers and sentences no method was trained on, thin lines are 95 % intervals, of five speakers or more.")
        if ours
        else t("lower is better; thin lines are 95 % intervals, of five speakers or more."),
        "rates",
    )  # fmt: skip
with plane:
    # where the kind of speech has no general speech of its own, that of the target is shown
    against_general = str(speech) if speech in GENERAL_OF else summary.target
    cost = result_figures.forgetting_data(summary, against_general)
    if len(cost):
        against_what = st.segmented_control(
            t("Accents against"), ["general", "parameters"], default="general", required=True, key="plane",
            format_func={"general": t("Cost on general speech"), "parameters": t("Trained parameters")}.__getitem__,
        )  # fmt: skip
        named = cost.assign(label=cost.label.map(texts.label))
        if against_what == "general":
            plots.show(
                result_figures.forgetting(named, against_general), "accents-against-general", cost,
                t(
                    "down is better on accents; right of the dotted line a method makes more errors on general speech than the frozen base. "
                    "Whether that is more than chance is said below."
                ), "forgetting",
            )  # fmt: skip
        else:
            plots.show(
                result_figures.parameters(named, against_general), "accents-against-parameters", cost,
                t("down is better on accents, left is smaller; the dotted line is the frozen base."), "parameters",
            )  # fmt: skip
results.verdicts(summary.claims)
if adapted := texts.adapted(summary):
    st.caption(adapted)
main = {name: entry for name, entry in summary.methods.items() if name in result_figures.MAIN_METHODS} or summary.methods
with st.expander(t("All numbers")):
    st.markdown(texts.table(summary.model_copy(update={"methods": main}), labels, across=True))
    if len(main) < len(labels):
        st.markdown(t("All {count} methods", count=len(labels)))
        st.markdown(texts.table(summary, labels))

curves = result_figures.curve_data(summary)
if len(curves):
    with st.expander(t("Learning accents, forgetting general speech")):
        plots.show(
            result_figures.curves(curves), "forgetting-curves", curves,
            t("left, how fast a method learns the accents; right, what happens to general speech meanwhile."), "curves",
        )  # fmt: skip
names = list(summary.methods)
address = {"results": session().results, "speech": str(speech) if speech != domains[0] else ""}
if len(names) < 2:
    links.write(**address)
    st.stop()

if links.names("method", "against", "accent"):
    st.session_state.pair_open = True
pair_box = st.expander(t("Any two methods: is the difference real, and in which utterances?"), key="pair_open", on_change="rerun")
left, right, middle = pair_box.columns(3)
label = labels.__getitem__
first = "hdmole" if "hdmole" in names else names[-1]
links.set_widget("compared", "method", names, first)
method = left.selectbox(t("Method"), names, format_func=label, key="compared")
others = [name for name in names if name != method]
links.set_widget("against", "against", others, others[0])
against = right.selectbox(t("Against"), others, format_func=label, key="against")
address |= {"method": method if method != first else "", "against": against if against != others[0] else ""}
said = []
pair = [d for d in summary.differences if (d.method, d.against) == (method, against)]
for difference in sorted(pair, key=lambda d: summary.domains.index(d.domain)):
    speech_said = Text(DOMAIN_LABELS.get(difference.domain, plain(difference.domain)))
    if few := summary.few_speakers(difference.domain):
        said.append(
            t(
                "- **{speech}.** {method} against {against}: {points} points; too few speakers ({speakers}) to say how sure",
                speech=speech_said, method=plain_labels[method], against=plain_labels[against], points=f"{difference.points:+z.1f}", speakers=few,
            )
        )  # fmt: skip
    else:
        said.append(t("- **{speech}.** {verdict}", speech=speech_said, verdict=verdict(difference, plain_labels)))
pair_box.markdown("\n".join(said))
accent_rates = {name: summary.methods[name].domains.get("accent") for name in (str(method), str(against))}
by_seed = {name: rate.per_seed or {} if rate else {} for name, rate in accent_rates.items()}
if all(len(rates) > 1 for rates in by_seed.values()):
    each = "; ".join(f"{plain(label(name))} {', '.join(f'{v:.1f}' for v in rates.values())}" for name, rates in by_seed.items())
    pair_box.markdown(t("- **By training seed**, word error rate on accents in %: {rates}.", rates=each))
pair_box.caption(
    t(
        "Points of word error rate with 95 % intervals from a bootstrap over speakers, both methods on the same speech; "
        "below zero is better. It says how far other speakers would move the difference, not other training seeds."
    )
)


@st.cache_data(show_spinner=False, max_entries=16)
def by_accent(file: Path, method: str, against: str, changed: int) -> pd.DataFrame:
    return accent_differences(results.read_table(file), method, against)


file = folder / "utterances.parquet"
if file.is_file():
    where = by_accent(file, str(method), against, file.stat().st_mtime_ns)
    names_of = [spoken_name(a, d) for a, d in zip(where.accent, where.domain, strict=True)]
    with pair_box:
        plots.show(
            result_figures.accent_differences(where.assign(label=names_of), str(method)),
            f"{method}-{against}-by-accent", where,
            t(
                "left of zero {method} is better than {against}; a ring says that no difference is established, one without a line "
                "that fewer than five speakers were heard.",
                method=plain_labels[method], against=plain_labels[against],
            ),
            "where",
        )  # fmt: skip
if len(names) > len(main):
    variants = result_figures.variant_data(summary, str(method))
    with st.expander(t("Every method against {method}", method=plain_labels[str(method)])):
        plots.show(
            result_figures.variants(variants.assign(label=variants.label.map(texts.label))), "variants", variants,
            t("left of zero a method is better than {method}; a ring says that no difference is established.", method=plain(label(method))),
            "variants",
        )  # fmt: skip
if summary.frontier:
    with st.expander(t("More experts or fewer")):
        frontier = result_figures.frontier_data(summary)
        plots.show(
            result_figures.frontier(frontier), "threshold-frontier", frontier,
            t("HDMoLE's word error rate on accents when its thresholds are scaled, or replaced by another way of choosing experts."),
            "frontier",
        )  # fmt: skip
trials = pd.DataFrame([trial.to_dict() for trial in summary.trials])
if len(trials):
    with st.expander(t("Learning rates tried on dev speech")):
        trials = trials.rename(
            columns={
                "accent": "accents, word error rate (%)",
                "general": "general, word error rate (%)",
                "learning_rate": "learning rate",
            }
        )
        st.dataframe(trials, hide_index=True, column_config={name: t(name) for name in trials.columns})

if file.is_file():
    with pair_box:
        st.subheader(t("Utterance by utterance"))
        table = result_figures.pair_data(results.read_table(file), method, against)
        if any(domain.startswith("synthetic_") for domain in summary.domains):
            # speech of people and of a synthesiser is never counted together
            together = [str(speech), *filter(None, [GENERAL_OF.get(str(speech))])]
            table = table[table.domain.isin(together)].reset_index(drop=True)
            st.caption(t("Speech: {kinds}. It is chosen above.", kinds=t(", ").join(map(kind, together))))
        seeds = sorted(set(table.seed))
        several = len(seeds) > 1
        spoken = table.accent.where(table.domain.isin(["accent", GENERAL]), table.domain + "/" + table.accent)
        accents = dict(sorted(zip(spoken, zip(table.accent, table.domain, strict=True), strict=True)))
        links.set_widget("compared_accent", "accent", list(accents), None)
        accent = middle.selectbox(
            t("Accent"), list(accents), index=None, placeholder=t("all"), key="compared_accent",
            format_func={
                key: spoken_name(name, domain) for key, (name, domain) in accents.items()
            }.__getitem__,
        )  # fmt: skip
        address["accent"] = accent or ""
        table = table.loc[spoken == accent].reset_index(drop=True) if accent else table
        if table.empty:
            st.info(t("The two methods have no utterance in common of one training seed."))
            links.write(**address)
            st.stop()
        counts = result_figures.pair_counts(table, str(method), str(against))
        reading = (
            t(
                "a disc is as many decodings as it is large; below the diagonal {method} makes fewer errors.",
                method=plain(label(method)),
            )
            if several
            else t(
                "a disc is as many utterances as it is large; below the diagonal {method} makes fewer errors.",
                method=label(method),
            )
        )
        paint, paint_against = (METHOD_COLOURS.get(name, METHOD_COLOURS["hdmole"]) for name in (str(method), str(against)))
        picked = plots.show(
            result_figures.pair_scatter(counts, label(method), label(against), len(seeds), (paint, paint_against)), f"{method}-{against}-errors", counts,
            reading + " " + t("Click one to list it alone, click twice beside it to list all again."), f"pairs-{method}-{against}-{accent}",
            on_select="rerun",
        )  # fmt: skip
        mine, theirs = f"errors {method}", f"errors {against}"
        cell = ""
        if points := picked.selection.points:
            cell = f"{points[0]['x']}-{points[0]['y']}"
            table = table[(table[mine] == points[0]["y"]) & (table[theirs] == points[0]["x"])].reset_index(drop=True)
        count, of_seeds = f"{len(table):,}", ", ".join(map(str, seeds))
        st.caption(
            t("{count} decodings, of the training seeds that both have: {seeds}", count=count, seeds=of_seeds)
            if several
            else t("{count} utterances, of the training seed that both have: {seeds}", count=count, seeds=of_seeds)
        )
        shown = {
            name: t(name) for name in ("fewer errors", "accent", "domain", *(["seed"] if several else []), "speaker", "reference")
        }
        shown |= {f"hypothesis {name}": t("hypothesis {method}", method=name) for name in (str(method), str(against))}
        event = st.dataframe(
            table, hide_index=True, height=300, on_select="rerun", selection_mode="single-row",
            key=f"utterances-{folder.name}-{method}-{against}-{accent}-{cell}",
            column_order=list(shown), column_config=shown,
        )  # fmt: skip
        st.caption(
            t(
                "**How to read this:** sorted by how many fewer word errors {method} made; choose a row to hear it and see where they "
                "differ.",
                method=plain(label(method)),
            )
        )
        st.download_button(
            t("All decodings (CSV)") if several else t("All utterances (CSV)"), table.to_csv(index=False), f"{method}-{against}.csv",
            "text/csv", on_click="ignore",
        )  # fmt: skip
        if event.selection.rows:
            row = table.iloc[event.selection.rows[0]]
            heard = [text_card(name, row[f"hypothesis {name}"], row.reference) for name in (method, against)]
            if sound := results.sound_of(asr, folder, row.utterance, row.reference, row.accent, row.speaker):
                st.audio(sound[1], format=audio_type(sound[1]) or "audio/wav")
            else:
                st.caption(t("The audio of this utterance is not part of the results."))
            st.html(f"<div class='cards'>{''.join(heard)}</div><div class='legend'>{t(LEGEND_DIFFERENCE)}</div>")
links.write(**address)
results.origin(summary)
