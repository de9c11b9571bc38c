"""The model that all sessions share, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app.texts import t
from hdmole.errors import UserError
from hdmole.figures.utterance import mel_spectrogram

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

ROOT = Path(__file__).resolve().parent.parent


@st.cache_resource(show_spinner=False)
def _load(model: str) -> ASR:
    from hdmole.speech.asr import ASR

    asr = ASR.load(model)
    noise = np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32)
    for method in asr.methods:  # first calls compile and cache; without this the first visitor would wait for it
        asr.transcribe(noise, method=method)
    mel_spectrogram(noise, 16_000)
    return asr


def load_model() -> ASR:
    """The model named by `HDMOLE_MODEL`, or the demo model; where it cannot be loaded, ends the page with a sentence."""
    model = os.environ.get("HDMOLE_MODEL", "demo")
    try:
        return _load(model)
    except (UserError, OSError) as error:
        st.error(t(error) if isinstance(error, UserError) else str(error))
        if model == "demo":
            st.info(
                t(
                    "The demo model comes with the repository, in assets/demo. Where it is missing, train it with "
                    "`hdmole demo build`, or start the app with another model: `HDMOLE_MODEL=FOLDER make app`."
                )
            )
        st.stop()


def device_name(asr: ASR) -> str:
    """CPU, or the GPU's name."""
    if asr.device.type != "cuda":
        return asr.device.type.upper()
    import torch

    return torch.cuda.get_device_name(asr.device)


def model_card(path: Path) -> str:
    """A model card's text without the metadata block that hubs put before it."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].split("\n---\n", 1)[1]
    return text
