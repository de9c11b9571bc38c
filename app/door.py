"""The password of the app, where it has one.

The command `hdmole app --password` asks for it, or takes it from the environment variable
`HDMOLE_PASSWORD`, and hands on only a salted digest (scrypt). Whoever gives the password is let in
until the tab is closed or loaded again: nothing is kept in the browser or in an address.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections import deque

import streamlit as st

from app.texts import t
from hdmole.settings import keep_password, password_digest, settings

_wrong: deque[float] = deque()  # when wrong passwords were given in the last minute, by anybody
_lock = threading.Lock()


def right(password: str, kept: str) -> bool | None:
    """Whether this is the password; None where too many wrong ones were given in the last minute.

    The comparison takes equally long wherever the two differ. One attempt is judged at a time.
    """
    with _lock:
        now = time.monotonic()
        while _wrong and now - _wrong[0] > 60:
            _wrong.popleft()
        if len(_wrong) >= settings().passwords_a_minute:
            return None
        found = hmac.compare_digest(password_digest(password, bytes.fromhex(kept.partition(":")[0])), kept)
        if not found:
            _wrong.append(now)
        return found


def ask() -> None:
    """Ask for the password, if the app has one. Until it is given, nothing more of the page runs."""
    kept = keep_password()  # also where the app was started without `hdmole app`
    if not kept or st.session_state.get("let_in") == kept:
        return
    with st.form("door", clear_on_submit=True, width=400):
        given = st.text_input(t("Password"), type="password", autocomplete="current-password", max_chars=200)
        sent = st.form_submit_button(t("Enter"), type="primary")
    if sent:
        found = right(given, kept)
        if found:
            st.session_state.let_in = kept
            st.rerun()
        st.error(t("Too many wrong passwords were given; wait a minute.") if found is None else t("The password is wrong."))
    st.stop()
