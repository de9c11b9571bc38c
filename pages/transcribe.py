"""Transcribe: one utterance, heard by every method side by side."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable

import pandas as pd
import streamlit as st

from app import parts, state, texts
from app.texts import Text, t
from hdmole.figures import utterance as figures
from hdmole.speech.audio import SAMPLE_RATE

asr = state.load_model()
clips = state.samples(state.model_folder(asr))
state.read_deep_link(clips, state.model_folder(asr))

st.title(t("What each method hears in accented speech"))
st.caption(t("One small speech model, four times: as it was trained on general speech, and adapted to accents in three ways."))
parts.choose_utterance(clips)
chosen = state.utterance()
if chosen is None:
    st.info(t("Upload a file or record a sentence: it is then transcribed by every method this model has."))
    st.stop()
state.write_deep_link(sample=chosen.sample)

job = state.job_of(asr, chosen)
job.wait(0.3)  # most samples are done by then, and the page need not flicker
if job.error and job.audio is None:  # there is nothing to play
    parts.show_trouble(job)
    st.stop()
player, text = st.columns([1, 2], vertical_alignment="bottom")
player.audio(chosen.data, format=mimetypes.guess_type(chosen.name)[0] or "audio/wav")
with text:
    reference = parts.reference_input(chosen)

state.show_notes()
if job.running:
    parts.watch(job, reference)
    st.stop()
parts.show_trouble(job)
if job.transcripts:
    parts.show_cards(job, reference)
    parts.show_legend(reference)
if job.audio is None:
    st.stop()

best = job.transcripts.get("hdmole") or next(iter(job.transcripts.values()), None)
sound, accent = st.columns([1.7, 1])
with sound:
    st.header(t("The sound"))
    stretch = parts.choose_stretch(job, best)
    samples = stretch.samples

    def later(table: pd.DataFrame) -> pd.DataFrame:
        """With the seconds of the whole recording, as the figure has them."""
        return table.assign(time=table.time + stretch.start)

    tables: dict[str, Callable[[], pd.DataFrame]] = {
        Text("Waveform"): lambda: later(figures.envelope(samples, SAMPLE_RATE)),
        Text("Mel spectrogram"): lambda: later(figures.spectrogram_data(samples, SAMPLE_RATE)),
    }
    plot = figures.sound(samples, SAMPLE_RATE, stretch.words, stretch.start)
    parts.figure(
        plot, f"{chosen.stem}-sound", tables,
        t("loudness over time, above how strong each frequency is (bright is strong); words stand where they were heard."),
        "sound",
    )  # fmt: skip
if best is not None and len(best.accent) > 1:
    with accent:
        st.header(t("The accent it hears"))
        told = t(" This sample is {accent}.", accent=texts.accent(chosen.accent)) if chosen.accent else ""
        parts.figure(
            figures.accent_posterior(best.accent), f"{chosen.stem}-accent",
            pd.DataFrame({"accent": list(best.accent), "posterior": list(best.accent.values())}),
            t("how sure the accent recogniser is; this routes HDMoLE.{told}", told=told), "accent",
        )  # fmt: skip
if job.transcripts:
    parts.transcript_downloads(job)
    st.page_link("../pages/routing.py", label=t("See which experts worked on this utterance"), icon=":material/account_tree:")
