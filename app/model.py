"""The model that all sessions share, and its description."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app.access import hide_folders
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
    # first calls compile and cache; without this, the first visitor would wait
    for method in asr.methods:
        asr.transcribe(noise, method=method)
    mel_spectrogram(noise, 16_000)
    return asr


def load_model() -> ASR:
    """The model that `HDMOLE_MODEL` names, or the demo model.

    If it cannot be loaded, the page ends with a sentence that says why.
    """
    model = os.environ.get("HDMOLE_MODEL", "demo")
    try:
        return _load(model)
    except (UserError, OSError) as error:
        st.error(t(error) if isinstance(error, UserError) else hide_folders(str(error)))
        if model == "demo":
            st.info(
                t(
                    "The demo model comes with the repository, in assets/demo. Where it is missing, train it with "
                    "`hdmole demo build`, or start the app with another model: `HDMOLE_MODEL=FOLDER make app`."
                )
            )
        st.stop()


def device_name(asr: ASR) -> str:
    """Name of the device: CPU, or the name of the GPU."""
    if asr.device.type != "cuda":
        return asr.device.type.upper()
    import torch

    return torch.cuda.get_device_name(asr.device)


def model_card(path: Path) -> str:
    """The text of a model card without the block of metadata at its beginning."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].split("\n---\n", 1)[1]
    return text
