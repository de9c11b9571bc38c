"""Compare: the methods on the same test speech; everything here is read from a results folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from app import parts, state
from app.words import LEGEND_DIFFERENCE, text_card
from hdmole import figures
from hdmole.results import DOMAIN_LABELS, markdown_table, verdict

asr = state.load_model()

st.title("Is HDMoLE better, by how much, and how sure are we?")
with st.sidebar:
    given = st.text_input(
        "Results folder", st.query_params.get("results", ""), placeholder="the model's own",
        help="A folder on the app's machine that `hdmole evaluate` wrote: summary.json and utterances.parquet.",
    ).strip()  # fmt: skip
folder = Path(given) if given else state.model_folder(asr) / "results"
state.write_deep_link(results=given)
try:
    summary = state.results(folder)
except ValueError as error:
    st.error(str(error))
    st.stop()
if not summary:
    where = f"{folder} has no summary.json" if given else "This model comes without results"
    st.info(f"{where}; `hdmole evaluate --manifest FILE --out DIR` writes results for a test set of yours.")
    st.stop()

parts.headline(asr, summary)
bars, plane = st.columns([1.6, 1])
with bars:
    st.header("Word error rate by accent")
    rates = figures.error_rate_data(summary)
    parts.figure(
        figures.error_rates(rates), "word-error-rates", rates,
        "lower is better; speakers and sentences no method was trained on, thin lines are 95 % intervals.", "rates",
    )  # fmt: skip
with plane:
    st.header("What it cost on general speech")
    cost = figures.forgetting_data(summary)
    if len(cost):
        parts.figure(
            figures.forgetting(cost), "accents-against-general", cost,
            "down is better on accents, right of the dotted line the general domain was forgotten.", "forgetting",
        )  # fmt: skip
st.markdown(markdown_table(summary, figures.METHOD_NAMES))
found = summary.get("differences", [])
names = list(summary["methods"])
if len(names) < 2 or not found:
    st.stop()

st.header("Is the difference real?")
left, right, middle = st.columns(3)
label = figures.METHOD_NAMES.get
method = left.selectbox("Method", names, index=len(names) - 1, format_func=lambda m: str(label(m, m)), key="compared")
others = [name for name in names if name != method]
against = right.selectbox("Against", others, format_func=lambda m: str(label(m, m)), key="against")
pair = [d for d in found if (d["method"], d["against"]) == (method, against)]
st.markdown("\n".join(f"- **{DOMAIN_LABELS.get(d['domain'], d['domain'])}.** {verdict(d, figures.METHOD_NAMES)}" for d in pair))
st.caption(
    "Points of word error rate with 95 % intervals from a bootstrap over speakers, both methods on the same speech; "
    "below zero is better. It says how far other speakers would move the difference, not other training seeds."
)

file = folder / "utterances.parquet"
if file.is_file():
    st.header("Utterance by utterance")
    table = figures.pair_data(pd.read_parquet(file), method, against)
    accent = middle.selectbox("Accent", sorted(set(table.accent)), index=None, placeholder="all", key="compared_accent")
    table = table[table.accent == accent].reset_index(drop=True) if accent else table
    event = st.dataframe(
        table, hide_index=True, height=300, on_select="rerun", selection_mode="single-row", key="utterances",
        column_order=["fewer errors", "accent", "speaker", "reference", f"hypothesis {method}", f"hypothesis {against}"],
    )  # fmt: skip
    st.caption(
        f"**How to read this:** sorted by how many fewer word errors {label(method, method)} made; choose a row to see where they "
        "differ. The audio of the test set is not part of the results."
    )
    st.download_button(
        "All utterances (CSV)", table.to_csv(index=False), f"{method}-{against}.csv", "text/csv", on_click="ignore"
    )
    if event.selection.rows:
        row = table.iloc[event.selection.rows[0]]
        heard = [text_card(name, row[f"hypothesis {name}"], row.reference) for name in (method, against)]
        st.html(f"<div class='cards'>{''.join(heard)}</div><div class='legend'>{LEGEND_DIFFERENCE}</div>")
known = {k: v for k, v in summary.get("provenance", {}).items() if not isinstance(v, dict | list)}
if known:
    st.caption("Where these numbers come from: " + " · ".join(f"{name} `{value}`" for name, value in known.items()))
