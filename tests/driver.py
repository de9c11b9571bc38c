"""Driving the pages by Streamlit's own test driver; nothing in here waits for ever."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import soundfile
from streamlit.testing.v1 import AppTest
from tiny import speech_like

from app import plots
from app.session import Session


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `condition()` is true; fails where that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} seconds in vain"
        time.sleep(0.02)


def session(at: AppTest) -> Session:
    """What the driven session holds."""
    held: Session = at.session_state.session
    return held


def settle(at: AppTest) -> AppTest:
    """Run until no work is going on any more, as the page's polling does in a browser.

    The page is run again when the work has ended, and not all the time.
    """

    def settled() -> bool:
        if any(button.key == "cancel" for button in at.button):
            held = session(at)
            for task in (*held.jobs.values(), *held.trials.values(), *held.worth.values(), held.evaluation):
                if task is not None:
                    task.wait(60)
            at.run()
        return not any(button.key == "cancel" for button in at.button)

    wait_until(settled)
    return at


def assert_no_exception(at: AppTest) -> None:
    """No exception is shown on the page."""
    assert not at.exception, [e.message for e in at.exception]


def in_brackets(option: str) -> str:
    """The layer that an option of a chooser of layers stands for: "Layer 1: query (layers.0.q_proj)"."""
    return option[option.index("(") + 1 : -1]


def cards(at: AppTest) -> str:
    """The HTML of the methods' cards on a page."""
    return next(html.proto.body for html in at.get("html") if "class='cards'" in html.proto.body)


def wav(seconds: float = 1.5, seed: int = 0) -> bytes:
    """The bytes of a WAV file with speech."""
    buffer = io.BytesIO()
    soundfile.write(buffer, speech_like(seconds, seed), 16_000, format="WAV")
    return buffer.getvalue()


def said(*words: str, confidence: float = 0.9) -> list[SimpleNamespace]:
    """Words of a transcript, one every half second."""
    return [SimpleNamespace(word=w, start=k * 0.5, end=k * 0.5 + 0.4, confidence=confidence) for k, w in enumerate(words)]


def clicks(monkeypatch: pytest.MonkeyPatch, key: str, point: dict[str, object]) -> None:
    """As if `point` were clicked in figures whose key begins with `key`; the driver cannot click in a figure."""
    real = plots.show

    def show(plot: object, name: str, data: object, reading: str, of: str, **more: object) -> object:
        event = real(plot, name, data, reading, of, **more)  # type: ignore[arg-type]
        return SimpleNamespace(selection=SimpleNamespace(points=[point])) if of.startswith(key) else event

    monkeypatch.setattr(plots, "show", show)
