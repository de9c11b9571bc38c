"""Driving the pages by Streamlit's own test driver."""

from __future__ import annotations

import time
from collections.abc import Callable

from streamlit.testing.v1 import AppTest


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until `condition()` is true; fails where that takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} seconds in vain"
        time.sleep(0.02)


def settle(at: AppTest) -> AppTest:
    """Run until no job is running any more, as the page's polling does in a browser."""
    for _ in range(200):
        if not any(button.label == "Cancel" for button in at.button):
            return at
        time.sleep(0.1)
        at.run()
    raise AssertionError("the job did not end")


def assert_no_exception(at: AppTest) -> None:
    assert not at.exception, [e.message for e in at.exception]
