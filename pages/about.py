"""Model: what it can and cannot do. Everything here is read from the model's folder."""

from __future__ import annotations

import streamlit as st

from app import links, results
from app.model import load_model, model_card
from app.texts import language, t
from hdmole import __version__

links.write()
asr = load_model()
folder = asr.folder
summary = results.summary_of(folder / "results")

st.title(t("What the model can hear, and what it cannot"))
st.caption(t("This is HDMoLE {version}.", version=__version__))
if summary and summary.accent_recogniser:
    st.header(t("What the accent recogniser hears"))
    results.confusion(summary.accent_recogniser)
card = folder / "README.md"
if card.is_file():
    st.divider()
    if language() != "en":
        st.caption(t("The model card is written in English."))
    st.markdown(model_card(card))
else:
    st.info(t("This model comes without a model card (README.md in its folder)."))
