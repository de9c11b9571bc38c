"""Model and results: everything here is read from the model's folder."""

from __future__ import annotations

import streamlit as st

from app import parts, state
from hdmole import figures
from hdmole.results import DOMAIN_LABELS, markdown_table, verdict

asr = state.load_model()
folder = state.model_folder(asr)
summary = state.results(folder)

st.title("The model and what it reaches")
parts.headline(asr, summary)
if summary:
    rates = figures.error_rate_data(summary)
    parts.figure(
        figures.error_rates(rates), "word-error-rates", rates,
        "word error rate on test speakers and sentences the model never saw; lower is better, thin lines are 95 % intervals.",
        "rates",
    )  # fmt: skip
    st.markdown(markdown_table(summary, figures.METHOD_NAMES))
    found = summary.get("differences", [])
    if found:
        st.header("Is the difference real?")
        names = list(dict.fromkeys(d["method"] for d in found))
        left, right = st.columns(2)
        label = figures.METHOD_NAMES.__getitem__
        method = left.selectbox("Method", names, index=len(names) - 1, format_func=label, key="compared")
        others = [name for name in names if name != method]
        against = right.selectbox("Against", others, format_func=label, key="against")
        pair = [d for d in found if (d["method"], d["against"]) == (method, against)]
        st.markdown(
            "\n".join(f"- **{DOMAIN_LABELS.get(d['domain'], d['domain'])}.** {verdict(d, figures.METHOD_NAMES)}" for d in pair)
        )
        st.caption(
            "Points of word error rate with 95 % intervals from a bootstrap over speakers, both methods on the same speech; "
            "below zero is better. It says how far other speakers would move the difference, not other training seeds."
        )
    known = {k: v for k, v in summary.get("provenance", {}).items() if not isinstance(v, dict | list)}
    if known:
        st.caption("Where these numbers come from: " + " · ".join(f"{name} `{value}`" for name, value in known.items()))
    recogniser = summary.get("accent_recogniser")
    if recogniser:
        st.header("What the accent recogniser hears")
        confusion = figures.confusion_data(recogniser["confusion"], recogniser["labels"])
        parts.figure(
            figures.confusion_matrix(confusion), "accent-confusion", confusion,
            "a row is an accent as spoken by unseen speakers, a column what it was taken for, in percent of the row.", "confusion",
        )  # fmt: skip
else:
    st.info("This model comes without results; `hdmole evaluate` writes them for a test set of yours.")

card = folder / "README.md"
if card.is_file():
    st.divider()
    st.markdown(state.model_card(card))
else:
    st.info("This model comes without a model card (README.md in its folder).")
