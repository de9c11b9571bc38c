"""Driving the pages by Streamlit's own test driver; nothing in here waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

from streamlit.testing.v1 import AppTest

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
    """Run until no work is going on any more, as the page's polling does in a browser."""

    def settled() -> bool:
        if any(button.key == "cancel" for button in at.button):
            at.run()
        return not any(button.key == "cancel" for button in at.button)

    wait_until(settled)
    return at


def assert_no_exception(at: AppTest) -> None:
    """No exception is shown on the page."""
    assert not at.exception, [e.message for e in at.exception]
