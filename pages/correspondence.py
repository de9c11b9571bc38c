"""Correspondence: which expert works for which accent in a corpus, and what it is worth."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pandas as pd
import streamlit as st

from app import links, plots, results, texts, watch
from app.access import audio_type, plain
from app.clips import keep
from app.jobs import Utterance
from app.model import load_model
from app.session import session
from app.texts import t
from app.utterance import choose, sample_manifest, samples
from hdmole.figures import results as result_figures
from hdmole.names import layer_label
from hdmole.study.results import FEW_SPEAKERS, Measure
from hdmole.study.routing_table import ROUTERS

KINDS = {"purity": "match", "nmi": "agreement"}  # the measures' plain names

asr = load_model()


def hear(folder: Path, name: str) -> None:
    """Show a clicked utterance with its words, its sound, and links to pages about it."""
    file = folder / "utterances.parquet"
    said = results.read_table(file, name) if file.is_file() else pd.DataFrame()
    if not len(said):
        return
    row = said.iloc[0]
    st.markdown(f"**{plain(texts.accent(row.accent))}**, {plain(row.speaker)}: {plain(row.reference)}")
    clips = samples(asr.folder)
    same = (row.reference, row.accent, row.speaker)
    clip = next((c for c in clips if (c.text, c.accent, c.speaker) == same and c.path.is_file()), None)
    sound = results.sound_of(asr, folder, name, row.reference, row.accent, row.speaker)
    if sound is None and clip is None:
        st.caption(t("The audio of this utterance is not part of the results."))
        return
    chosen = clip.utterance() if clip else keep(Utterance(*sound, row.reference, row.accent)) if sound else None
    assert chosen is not None
    with st.container(horizontal=True, vertical_alignment="center"):
        st.audio(chosen.data, format=audio_type(chosen.data) or "audio/wav", width=180)
        for page, label, icon in (
            ("transcribe", t("Transcribe"), ":material/graphic_eq:"), ("routing", t("Routing"), ":material/account_tree:"),
        ):  # fmt: skip
            if st.button(label, icon=icon, key=f"open-{page}"):
                choose(chosen)
                st.switch_page(f"../pages/{page}.py")


st.title(t("Does each expert serve its accent?"))
found = results.chosen(asr, routing=True)
of_samples = found is None or not found[1].routing or not (found[0] / "routing.parquet").is_file()
folder, summary = watch.routed_samples(asr, sample_manifest(asr.folder)) if found is None or of_samples else found
file = folder / "routing.parquet"
if summary.routing is None:
    st.info(t("These results hold no routing; `hdmole compare --config FILE --out DIR` writes results that do."))
    st.stop()

measured = summary.routing
shown = texts.label(summary.labels.get(measured.method or "hdmole", "HDMoLE"))
routing = results.read_table(file)
layers = {layer_label(name): name for name in routing.sort_values("layer_index").layer.unique()}


speakers = routing[routing.domain == "accent"].speaker.nunique()


def number(measure: Measure) -> str:
    interval = f" [{measure.interval[0]:.2f}, {measure.interval[1]:.2f}]" if speakers >= FEW_SPEAKERS else ""
    chance = t(" (by chance {chance})", chance=f"{measure.chance:.2f}") if measure.chance is not None else ""
    return f"{measure.value:.2f}{interval}{chance}"


def told(router: str) -> str:
    """In how many utterances the strongest expert of a router tells the accent, and whether that is
    more than chance.
    """
    match = measured.routers[router].all.purity
    chance = match.chance
    said = t("in **{count} of 100**", count=f"{100 * match.value:.0f}")
    if chance is None:
        return said
    by_chance = f"{100 * chance:.0f}"
    if speakers < FEW_SPEAKERS:
        return t("{said} (by chance {chance})", said=said, chance=by_chance)
    return (
        t("{said}, more than the {chance} of chance", said=said, chance=by_chance)
        if match.interval[0] > chance
        else t("{said}, no more than by chance ({chance})", said=said, chance=by_chance)
    )


st.markdown(
    t(
        "The strongest expert tells the accent of an utterance: by the global router {recognised}; by the local router {found}.",
        recognised=told("global_gate"), found=told("local_probability"),
    )
)  # fmt: skip
st.caption(
    t(
        "Routing of **{method}**. The global router is given the accent by a recogniser, so its correspondence is no discovery; the "
        "local router's would be.",
        method=plain(shown),
    )
)  # fmt: skip
which, where = st.columns(2)
links.set_widget("router", "router", ROUTERS, "gate")
links.set_widget("corpus_layer", "layer", layers, None)
router = which.segmented_control(
    t("Router"), list(ROUTERS), required=True, format_func=lambda name: t(ROUTERS[name]), key="router"
)
layer = where.selectbox(
    t("Layer"), list(layers), index=None, placeholder=t("mean over all"), key="corpus_layer",
    format_func=lambda label: f"{texts.layer(label)} ({label})",
)  # fmt: skip
links.write(results="" if of_samples else session().results, router=str(router) if router != "gate" else "", layer=layer or "")
left, right = st.columns(2)
with left:
    data = result_figures.correspondence_data(routing, str(router), layers[layer] if layer else None)
    most = result_figures.largest_row(data)
    plots.show(
        result_figures.correspondence(data), "correspondence", data,
        t(
            "a row is an accent as spoken, a column an expert; a bright diagonal means that each expert has most weight where its own "
            "accent is spoken. The scale ends at {most}, all the weight of the row with the most; shared evenly, each has {even} in it. "
            "Here {count} of {all} experts have their accent's largest weight.",
            most=f"{most:.2f}", even=f"{most / data.expert.nunique():.3f}", **result_figures.on_the_diagonal(data),
        ),
        "matrix",
    )  # fmt: skip
    unseen = sorted(set(routing[routing.domain == "unseen"].spoken))
    if unseen:
        st.caption(
            t(
                "No expert was trained on {accents}: their rows say whom they are taken for.",
                accents=t(", ").join(plain(texts.accent(name)) for name in unseen),
            )
        )
with right:
    clicked = st.container()
    points = result_figures.map_data(routing, str(router))
    event = plots.show(
        result_figures.utterance_map(points, list(routing.sort_values("expert").accent.unique())), "utterance-map", points,
        t(
            "a mark is an utterance, near to those that are routed alike; grey marks that are no discs are accents no expert was "
            "trained on. Click one to hear it."
        ),
        "map", on_select="rerun",
    )  # fmt: skip
    named = st.selectbox(  # for visitors who cannot click
        t("Utterance"), sorted(points.utterance.unique()), index=None, placeholder=t("none"), key="map_utterance"
    )
    if event.selection.points or named:
        with clicked:
            marks = event.selection.points
            hear(folder, unescape(marks[0]["customdata"][0]) if marks else str(named))
recogniser = summary.accent_recogniser
# other results may come from another recogniser
if not recogniser and folder in results.folders(asr).values():
    own = results.summary_of(asr.folder / "results")
    recogniser = own.accent_recogniser if own else None
if recogniser:
    with st.expander(t("What the accent recogniser hears")):
        results.confusion(recogniser)
worth = result_figures.attribution_data(summary)
if len(worth):
    with st.expander(t("What an expert is worth")):
        plots.show(
            result_figures.attribution(worth), "attribution", worth,
            t(
                "leave one expert out and score the right words again: below zero they become less likely, so the expert helped. "
                "Cells without colour are not established. Of {all} cells {count} are established.",
                all=len(worth), count=int(((worth.low > 0) | (worth.high < 0)).sum()),
            ),
            "worth",
        )  # fmt: skip
per_layer = pd.DataFrame(
    [
        {
            "layer": texts.layer(layer_label(name)),
            **{
                f"{label}: {KINDS[kind]}": number(measure)
                for router, label in ROUTERS.items()
                for kind, measure in measured.routers[router].layers[name]
            },
            **{f"experts with any weight, {domain}": active[name] for domain, active in measured.active.items()},
        }
        for name in layers.values()
    ]
)
with st.expander(t("All numbers, layer by layer")):
    st.markdown(
        "\n".join(
            t(
                "- **{router}**: match {purity}, agreement {information}", router=t(label),
                purity=number(measured.routers[name].all.purity), information=number(measured.routers[name].all.nmi),
            )
            for name, label in ROUTERS.items()
        )
    )  # fmt: skip
    st.caption(
        t(
            "Match: the share of utterances whose strongest expert is mostly that of their accent. Agreement: 1 where expert and accent "
            "tell each other, 0 where they know nothing of each other (normalised mutual information)."
        )
    )
    heads = {"layer": t("layer")}
    for router in ROUTERS.values():
        heads[f"{router}: match"] = t("{router}: match", router=t(router))
        heads[f"{router}: agreement"] = t("{router}: agreement", router=t(router))
    for domain in measured.active:
        heads[f"experts with any weight, {domain}"] = t("experts with any weight, {speech}", speech=t(domain))
    st.dataframe(per_layer, hide_index=True, column_config=heads)
    st.download_button(t("Layers (CSV)"), per_layer.to_csv(index=False), "layers.csv", "text/csv", on_click="ignore")
results.origin(summary)
