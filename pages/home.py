"""Home: what this is, one picture of the method, a sample to start with, and a guided tour."""

from __future__ import annotations

import streamlit as st

from app import parts, state, tour
from hdmole import figures

if "sample" in st.query_params:  # links of before there was a Home page
    st.switch_page("../pages/transcribe.py", query_params=dict(st.query_params))

asr = state.load_model()
folder = state.model_folder(asr)
clips = state.samples(folder)
summary = parts.summary_of(folder / "results")

st.title("One recogniser, one small expert for each accent, and a view of who does what")
st.markdown(
    "Speech recognisers hear some accents worse than others, and those that are retrained for an accent forget the rest. "
    "**HDMoLE** adds one small LoRA expert per accent to a frozen model; two routers decide, for every utterance and every moment, "
    "how much each expert works, and learned thresholds how many of them. Here you can hear it, watch it and compare it."
)
st.image(str(state.ROOT / "assets" / "ui" / "method.svg"), width="stretch")
if clips:
    st.markdown("**Start with somebody speaking:**")
    with st.container(horizontal=True):
        for accent in dict.fromkeys(clip.accent for clip in clips):
            clip = next(c for c in clips if c.accent == accent)
            if st.button(figures.accent_label(accent), key=f"go-{accent}", help=clip.text):
                state.choose_sample(clip)
                st.switch_page("../pages/transcribe.py", query_params={"sample": clip.name})
left, right = st.columns(2)
with left:
    st.header("Show it to somebody")
    st.markdown("A tour of five steps, on one utterance, in five minutes.")
    if st.button("Start the tour", type="primary", icon=":material/play_arrow:"):
        tour.go(0)
    st.caption(f"Presentation mode, in the sidebar: large type, no controls. {tour.LEAVE}")
with right:
    st.header("What is loaded")
    made = summary.get("provenance", {})
    st.markdown(
        f"- model **{folder.name}** on **{state.device_name(asr)}**, with {', '.join(figures.METHOD_NAMES.get(m, m) for m in asr.methods)}\n"
        f"- {len(asr.accents) - 1} experts: {', '.join(map(figures.accent_label, asr.accents[1:])) or 'none'}\n"
        + (f"- results of {made.get('date', 'unknown date')}" if summary else "- no results")
        + "".join(f", {name}" for name in state.results_folders(asr) if name != "this model's own")
    )
    if folder.name == "demo":
        st.caption("The demo model is small and knows about a thousand words; the page Model says what it cannot hear.")
