"""Home: what the app is, a picture of the method, a sample to start with, and a guided tour."""

from __future__ import annotations

import streamlit as st

from app import links, results, texts, tour, voices
from app.access import plain
from app.model import REAL, ROOT, device_name, load_model
from app.session import session
from app.texts import t
from app.utterance import choose_sample, chosen_because, opening_sample, sample_results, samples

if "sample" in st.query_params:  # old links, from before there was a Home page
    st.switch_page("../pages/transcribe.py", query_params=dict(st.query_params))

links.write()
asr = load_model()
folder = asr.folder
clips = samples(folder)
summary = results.summary_of(folder / "results")

st.title(t("One recogniser, one small expert for each accent, and a view of who does what"))
st.markdown(
    t(
        "Speech recognisers hear some accents worse than others, and those that are retrained for an accent forget the rest. "
        "**HDMoLE** adds one small LoRA expert per accent to a frozen model; two routers decide, for every utterance and every "
        "moment, how much each expert works, and learned thresholds how many of them. Here you can hear it, watch it and compare it."
    )
)
real = session().model == REAL
if real and st.button(t("Speak, or upload a recording"), type="primary", icon=":material/mic:"):
    st.session_state.way = "Microphone"
    st.switch_page("../pages/transcribe.py")
voices.show(clips)
if clips:
    st.markdown(t("**Open one, to see who did what in it:**"))
    with st.container(horizontal=True):
        for accent in dict.fromkeys(clip.accent for clip in clips):
            clip = opening_sample([c for c in clips if c.accent == accent], sample_results(clips))
            if st.button(plain(texts.accent(accent)), key=f"go-{accent}", help=chosen_because(clip, clips) or plain(clip.text)):
                choose_sample(clip)
                st.switch_page("../pages/transcribe.py")
with st.container(key="method"):  # on a phone it scrolls to the side
    st.image(texts.picture(ROOT / "assets" / "ui" / "method.svg"), width="stretch")
left, right = st.columns(2)
with left:
    st.header(t("Show it to somebody"))
    st.markdown(t("A tour of five steps, on one utterance, in five minutes."))
    if st.button(t("Start the tour"), type="primary", icon=":material/play_arrow:"):
        tour.go(0)
    st.caption(
        t("Presentation mode, in the sidebar: large type, the pages on top, and no buttons for files. {leave}", leave=tour.LEAVE)
    )
with right:
    st.header(t("What is loaded"))
    experts = t(", ").join(plain(texts.accent(name)) for name in asr.accents[1:]) or t("none")
    dated = t("results of {date}", date=summary.provenance.date) if summary else t("no results")
    loaded = (
        t(
            "model **{model}** on **{device}**, with {methods}",
            model=plain(folder.name), device=device_name(asr), methods=" · ".join(plain(texts.method(name)) for name in asr.methods),
        ),
        t("{count} experts: {experts}", count=len(asr.accents) - 1, experts=experts),
        t(", ").join([dated, *(name for name in results.folders(asr) if name != "this model's own")]),
    )  # fmt: skip
    st.markdown("\n".join(f"- {line}" for line in loaded))
