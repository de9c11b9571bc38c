"""The state of one visitor's session, apart from that of Streamlit's widgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

if TYPE_CHECKING:
    from app.changes import Pin
    from app.corpus import Evaluation
    from app.jobs import Job, Trial, Utterance, Worth


@dataclass
class Session:
    """One visitor's session, from opening the app to closing the page.

    Attributes:
        model: name of the model that the pages show, if there is a choice (`app.model.CHOICES`).
        utterance: the utterance that the pages show.
        jobs: utterance key -> its transcription; the one used last comes last.
        trials: utterance key, method and change of routing -> the transcription under that change.
        worth: utterance key, method and stretch -> what each expert was worth there.
        stopped: key of the utterance whose work the visitor cancelled. It does not start again by
            itself.
        notes: warnings to show until another utterance is chosen.
        written: the address that the app wrote or read last, without the language.
        written_before: the one before it.
        written_at: when `written` was written, as `time.monotonic()`.
        opened: the address that the visitor opened, until another one is opened or written by a
            choice; None if there is none.
        used: names in `opened` that a page has used.
        changes: changes of routing on the page Thresholds, the present one last, each as its
            address.
        changes_in: utterance key and method that these changes belong to.
        pins: changes that are kept to compare.
        thresholds: utterance key, method and name of a threshold -> the value that the visitor has
            set.
        moment: key of an utterance and the time in it, in seconds, that was clicked last.
        results: name or folder of the results shown last.
        evaluation: the running or finished work of the page Corpus.
        evaluation_new: whether it was started just now.
        tour: step of the guided tour, from 0; None outside it.
    """

    model: str = ""
    utterance: Utterance | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    worth: dict[tuple[str, str, int], Worth] = field(default_factory=dict)
    stopped: str = ""
    notes: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    written_before: dict[str, str] = field(default_factory=dict)
    written_at: float = 0.0
    opened: dict[str, str] | None = None
    used: set[str] = field(default_factory=set)
    changes: list[dict[str, str]] = field(default_factory=list)
    changes_in: tuple[str, str] = ("", "")
    pins: list[Pin] = field(default_factory=list)
    thresholds: dict[tuple[str, str, str], float] = field(default_factory=dict)
    moment: tuple[str, float] | None = None
    results: str = ""
    evaluation: Evaluation | None = None
    evaluation_new: bool = False
    tour: int | None = None


def session_id() -> str:
    """The name of the session for which the script runs; empty outside of one."""
    context = get_script_run_ctx(suppress_warning=True)
    return context.session_id if context is not None else ""


def session_open(name: str) -> bool:
    """Whether the tab of a session is open. Any thread may ask."""
    try:
        return not name or runtime.get_instance().is_active_session(name)
    except RuntimeError:  # no server runs
        return True


def session() -> Session:
    """The session of the visitor for whom the page runs."""
    found: Session = st.session_state.setdefault("session", Session())
    return found
