"""The models that all sessions share: which of them a session looks at, and their descriptions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from app import links
from app.access import hide_folders
from app.session import session
from app.texts import Text, t
from hdmole.errors import UserError
from hdmole.figures.utterance import mel_spectrogram
from hdmole.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

ROOT = Path(__file__).resolve().parent.parent
REAL, SMALL = "real", "demo"
CHOICES = {REAL: Text("Real people (Whisper base)"), SMALL: Text("Controlled experiment (small model)")}
LINES = {
    REAL: Text("You are looking at the model for **real people**: Whisper base by OpenAI, adapted with recordings of people."),
    SMALL: Text(
        "You are looking at the **controlled experiment**: a small model of a thousand words, trained on synthetic speech."
    ),
}
# widgets whose values belong to one model, by the beginnings of their keys
_OF_A_MODEL = ("change_", "stretch-", "word-")


# -- choosing --------------------------------------------------------------------------------------


def missing() -> UserError | None:
    """What the model for real people lacks on this machine, with the command that brings it; None
    if nothing.
    """
    from hdmole.speech.loading import ModelError, find_model, weights_folder

    try:
        weights_folder(find_model(REAL))
    except ModelError as error:
        return error
    return None


def choose_model() -> None:
    """Show the choice of the model, unless `HDMOLE_MODEL` names a folder or a repository.

    The address may name one (`?model=`). By default it is the one for real people where that is
    on this machine.
    """
    kept, started = session(), os.environ.get("HDMOLE_MODEL") or REAL
    if started not in CHOICES:
        return
    possible = [SMALL] if missing() else [REAL, SMALL]
    wanted = links.take("model")
    if wanted is not None and wanted in possible and wanted != kept.model:
        look_at(wanted)
    if kept.model not in possible:
        look_at(started if started in possible else SMALL)
    st.session_state.model_choice = kept.model

    def chosen() -> None:
        look_at(st.session_state.model_choice)
        # what else the address says is of the other model, but both may have this sample
        links.write()
        links.reset(sample=kept.utterance.sample if kept.utterance else "")

    st.radio(t("Model"), possible, key="model_choice", format_func=lambda name: t(CHOICES[name]), on_change=chosen)


def look_at(name: str) -> None:
    """Make this the session's model: work and choices that belong to the former one are dropped."""
    kept = session()
    if kept.model and kept.model != name:
        for task in (*kept.jobs.values(), *kept.trials.values(), *kept.worth.values()):
            task.cancel()
        for results in (kept.jobs, kept.trials, kept.worth, kept.thresholds):
            results.clear()
        kept.moment, kept.results, kept.stopped = None, "", ""
        for key in [key for key in st.session_state if str(key).startswith(_OF_A_MODEL)]:
            del st.session_state[key]
    kept.model = name


def show_model() -> None:
    """Say in one line which model the page is about, and what the one for real people lacks."""
    if line := LINES.get(session().model):
        lacking = missing() if session().model == SMALL else None
        st.caption(
            t(line) + (" " + t("The model for real people cannot be shown: {reason}", reason=t(lacking)) if lacking else "")
        )


# -- loading ---------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _load(model: str) -> ASR:
    from app.corpus import keep_forgetting  # slow to import
    from hdmole.speech.asr import ASR

    keep_forgetting()
    asr = ASR.load(model)
    noise = np.random.default_rng(0).normal(0, 0.05, SAMPLE_RATE).astype(np.float32)
    # first calls compile and cache; without this, the first visitor would wait
    for method in asr.methods:
        asr.transcribe(noise, method=method)
    mel_spectrogram(noise, SAMPLE_RATE)
    return asr


def load_model() -> ASR:
    """The model that the session looks at, or the one that `HDMOLE_MODEL` names.

    If it cannot be loaded, the page ends with a sentence that says why.
    """
    model = session().model or os.environ["HDMOLE_MODEL"]
    try:
        return _load(model)
    except (UserError, OSError) as error:
        st.error(t(error) if isinstance(error, UserError) else hide_folders(str(error)))
        if model == SMALL:
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
