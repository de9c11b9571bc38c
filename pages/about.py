"""Model and results: everything here is read from the model's folder."""

from __future__ import annotations

import json

import streamlit as st

from app import parts, state
from hdmole import figures
from hdmole.results import markdown_table

asr = state.load_model()
folder = state.model_folder(asr)
card, results = folder / "README.md", folder / "results" / "summary.json"

st.title("The model and what it reaches")
columns = st.columns(4)
facts = {
    "Methods": str(len(asr.methods)),
    "Accents": str(len(asr.accents)),
    "Device": state.device_name(asr),
    "HDMoLE trains": state.trained_share(asr),
}
for column, (label, value) in zip(columns, facts.items(), strict=True):
    column.metric(label, value)

if results.is_file():
    summary = json.loads(results.read_text(encoding="utf-8"))
    rates = figures.error_rate_data(summary)
    parts.figure(
        figures.error_rates(rates), "word-error-rates", rates,
        "word error rate on test speakers and sentences the model never saw; lower is better, thin lines are 95 % intervals.",
        "rates",
    )  # fmt: skip
    st.markdown(markdown_table(summary, figures.METHOD_NAMES))
    known = {k: v for k, v in summary.get("provenance", {}).items() if not isinstance(v, (dict, list))}
    if known:
        st.caption("Where these numbers come from: " + " · ".join(f"{name} `{value}`" for name, value in known.items()))
else:
    st.info("This model comes without results; `hdmole evaluate` writes them for a test set of yours.")

if card.is_file():
    st.divider()
    st.markdown(state.model_card(card))
else:
    st.info("This model comes without a model card (README.md in its folder).")
