"""Correspondence: which expert works for which accent over a whole corpus, and what it is worth there."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app import parts, state, texts
from app.texts import t
from hdmole import figures, result_figures
from hdmole.analysis import ROUTERS

asr = state.load_model()

st.title(t("Does each expert serve its accent?"))
folder, summary = parts.choose_results(asr, "routing")
file = folder / "routing.parquet"
if "routing" not in summary or not file.is_file():
    st.info(t("These results hold no routing; `hdmole compare --config FILE --out DIR` writes results that do."))
    st.stop()

measured = summary["routing"]
routing = state.read_table(file)
layers = {figures.layer_label(name): name for name in routing.sort_values("layer_index").layer.unique()}
columns = st.columns(3)
for column, router in zip(columns, ROUTERS, strict=True):
    purity, nmi = (measured["routers"][router]["all"][name] for name in ("purity", "nmi"))
    title = t(result_figures.ROUTERS[ROUTERS[router]])
    column.metric(
        t("{router}: purity", router=title),
        f"{purity['value']:.2f}",
        f"[{purity['interval'][0]:.2f}, {purity['interval'][1]:.2f}]",
        delta_color="off",
        delta_arrow="off",
    )
    information = f"{nmi['value']:.2f} [{nmi['interval'][0]:.2f}, {nmi['interval'][1]:.2f}]"
    column.caption(t("Mutual information {value}", value=information))
st.caption(
    t(
        "Purity: the share of utterances whose strongest expert serves mostly their accent; mutual information, normalised: 1 where "
        "expert and accent tell each other, 0 where they know nothing of each other. The global router is given the accent by its "
        "recogniser, so its correspondence is no discovery; the local router's would be."
    )
)
which, where = st.columns(2)
router = which.segmented_control(
    t("Router"),
    list(result_figures.ROUTERS),
    default="gate",
    required=True,
    format_func=lambda r: t(result_figures.ROUTERS[r]),
    key="router",
)
layer = where.selectbox(t("Layer"), list(layers), index=None, placeholder=t("mean over all"), key="corpus_layer")
left, right = st.columns(2)
with left:
    data = result_figures.correspondence_data(routing, str(router), layers[layer] if layer else None)
    parts.figure(
        result_figures.correspondence(data), "correspondence", data,
        t("a row is an accent as spoken, a column an expert; a bright diagonal means that each expert serves its own accent."),
        "matrix",
    )  # fmt: skip
    unseen = sorted(set(routing[routing.domain == "unseen"].spoken))
    if unseen:
        st.caption(
            t(
                "No expert was trained on {accents}: their rows say whom they are taken for.",
                accents=t(", ").join(map(texts.accent, unseen)),
            )
        )
with right:
    points = result_figures.map_data(routing, str(router))
    event = parts.figure(
        result_figures.utterance_map(points, list(routing.sort_values("expert").accent.unique())), "utterance-map", points,
        t(
            "a mark is an utterance, near to those that are routed alike; crosses are accents no expert was trained on. Click one "
            "to hear it."
        ),
        "map", on_select="rerun",
    )  # fmt: skip
    if chosen := event.selection.points:
        name = chosen[0]["customdata"][0]
        file = folder / "utterances.parquet"
        said = state.read_table(file, name) if file.is_file() else pd.DataFrame()
        if len(said):
            row = said.iloc[0]
            st.markdown(f"**{texts.accent(row.accent)}**, {row.speaker}: {row.reference}")
            parts.listen(row.reference, row.accent, row.speaker)

worth = result_figures.attribution_data(summary)
if len(worth):
    st.header(t("What an expert is worth"))
    parts.figure(
        result_figures.attribution(worth), "attribution", worth,
        t("leave one expert out and score the right words again: below zero they become less likely, so the expert helped."),
        "worth",
    )  # fmt: skip
per_layer = pd.DataFrame(
    [
        {
            "layer": figures.layer_label(name),
            **{
                f"{result_figures.ROUTERS[column]}: {kind}": f"{values[name][kind]['value']:.2f} [{values[name][kind]['interval'][0]:.2f}, {values[name][kind]['interval'][1]:.2f}]"
                for r, column in ROUTERS.items()
                if (values := measured["routers"][r]["layers"])
                for kind in ("purity", "nmi")
            },
            **{f"experts at work, {domain}": active[name] for domain, active in measured["active"].items()},
        }
        for name in layers.values()
    ]
)
with st.expander(t("Layer by layer")):
    heads = {"layer": t("layer")}
    for router in map(result_figures.ROUTERS.__getitem__, ROUTERS.values()):
        heads[f"{router}: purity"] = t("{router}: purity", router=t(router))
        heads[f"{router}: nmi"] = t("{router}: nmi", router=t(router))
    for domain in measured["active"]:
        heads[f"experts at work, {domain}"] = t("experts at work, {speech}", speech=t(domain))
    st.dataframe(per_layer, hide_index=True, column_config=heads)
    st.download_button(t("Layers (CSV)"), per_layer.to_csv(index=False), "layers.csv", "text/csv", on_click="ignore")
parts.origin(summary)
