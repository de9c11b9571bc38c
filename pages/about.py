"""Model: what it can and cannot hear; everything here is read from the model's folder."""

from __future__ import annotations

import streamlit as st

from app import parts, state
from app.texts import t
from hdmole import result_figures

asr = state.load_model()
folder = state.model_folder(asr)
summary = parts.summary_of(folder / "results")

st.title(t("What the model can hear, and what it cannot"))
if recogniser := summary.get("accent_recogniser"):
    st.header(t("What the accent recogniser hears"))
    confusion = result_figures.confusion_data(recogniser["confusion"], recogniser["labels"])
    parts.figure(
        result_figures.confusion_matrix(confusion), "accent-confusion", confusion,
        t("a row is an accent as spoken by unseen speakers, a column what it was taken for, in percent of the row."), "confusion",
    )  # fmt: skip
card = folder / "README.md"
if card.is_file():
    st.divider()
    st.markdown(state.model_card(card))
else:
    st.info(t("This model comes without a model card (README.md in its folder)."))
