"""Transcribe: what every method hears in one utterance, side by side."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import streamlit as st

from app import links, plots, texts, watch
from app.access import audio_type, plain
from app.cards import show_cards, show_legend
from app.model import REAL, load_model
from app.session import session
from app.texts import Text, t
from app.utterance import address, choose_linked, choose_stretch, choose_utterance, overview, reference_input, samples
from hdmole.figures import utterance as figures
from hdmole.speech.audio import SAMPLE_RATE

asr = load_model()
clips = samples(asr.folder)
choose_linked(clips)

st.title(t("What each method hears in accented speech"))
st.caption(
    t("Whisper base as OpenAI released it, and adapted to accents in {count} ways.", count=len(asr.methods) - 1)
    if session().model == REAL
    else t(
        "One small speech model: as it was trained on general speech, and adapted to accents in {count} ways.",
        count=len(asr.methods) - 1,
    )
)
choose_utterance(clips)
chosen = session().utterance
if chosen is None:
    links.write()
    st.info(t("Upload a file or record a sentence: it is then transcribed by every method this model has."))
    st.stop()

job = watch.job_of(asr, chosen)
job.wait(0.3)  # most samples are done by then, so that the page does not flicker
if job.error and job.audio is None:  # there is nothing to play
    watch.show_trouble(job)
    st.stop()
player, text = st.columns([1, 2], vertical_alignment="bottom")
player.audio(chosen.data, format=audio_type(chosen.data) or "audio/wav")
with text:
    reference = reference_input(chosen)

links.write(**address(chosen))
links.show_notes()
if job.running:
    watch.watch(job, reference)
    st.stop()
watch.show_trouble(job)
if job.transcripts:
    show_cards(job, reference)
    show_legend(reference)
    if all(transcript.in_domain.get("verdict") is None for transcript in job.transcripts.values()):
        st.caption(t("This model has no in-domain score: it may invent words for noise, music and other languages."))
if job.audio is None:
    st.stop()

overview(job)
best = next((job.transcripts[m] for m in [*asr.routed, *job.methods] if m in job.transcripts), None)
with st.expander(t("The sound")):
    stretch = choose_stretch(job, best)

    def later(table: pd.DataFrame) -> pd.DataFrame:
        """The table with times counted from the start of the whole recording, as in the figure."""
        return table.assign(time=table.time + stretch.start)

    tables: dict[str, Callable[[], pd.DataFrame]] = {
        Text("Waveform"): lambda: later(figures.envelope(stretch.samples, SAMPLE_RATE)),
        Text("Mel spectrogram"): lambda: later(figures.spectrogram_data(stretch.samples, SAMPLE_RATE)),
    }
    plot = figures.sound(stretch.samples, SAMPLE_RATE, stretch.words, stretch.start)
    plots.show(
        plot, f"{chosen.stem}-sound", tables,
        t("loudness over time, above how strong each frequency is (bright is strong); words stand where they were heard."),
        "sound",
    )  # fmt: skip
if best is not None and len(best.accent) > 1:
    likeliest = max(best.accent, key=best.accent.__getitem__)
    share = f"{100 * best.accent[likeliest]:.0f}"
    with st.expander(t("The accent it hears: {accent}, {share} % sure", accent=plain(texts.accent(likeliest)), share=share)):
        told = t(" This sample is {accent}.", accent=plain(texts.accent(chosen.accent))) if chosen.accent else ""
        plots.show(
            figures.accent_posterior(best.accent), f"{chosen.stem}-accent",
            pd.DataFrame({"accent": list(best.accent), "posterior": list(best.accent.values())}),
            t("how sure the accent recogniser is; this routes HDMoLE.{told}", told=told), "accent",
        )  # fmt: skip
if job.transcripts:
    plots.transcript_downloads(job)
    st.page_link("../pages/routing.py", label=t("See which experts worked on this utterance"), icon=":material/account_tree:")
