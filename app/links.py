"""Deep links. The address of a page leads back to what the page shows.

A page writes its address with `write`. Where the address is another one when the script runs, the
visitor has opened a link, loaded the page again, or gone back. `read` notices this, and `take`
gives each choice in that address to the page once. An address without choices, as the sidebar's
links have, leaves everything as it is.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import streamlit as st

from app.access import plain
from app.session import session
from app.texts import language, t
from hdmole.names import layer_label

_ON_ITS_WAY = 0.5  # seconds in which a browser may still ask with the address before the last one


def address(values: Mapping[str, str | Iterable[str]]) -> dict[str, str]:
    """The query of an address for these values: name -> text. Empty values are left out."""
    texts = {name: value if isinstance(value, str) else joined(value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text}


def joined(names: Iterable[str]) -> str:
    """Several names as one text, separated by commas.

    Names with commas or quotes are quoted as in a CSV file.
    """
    line = io.StringIO()
    if found := list(names):
        # with this line end, names that hold one are quoted too
        csv.writer(line, lineterminator="\r\n").writerow(found)
    return line.getvalue().removesuffix("\r\n")


def names_in(text: str) -> list[str]:
    """The names in a text of `joined`. A text that it cannot have written gives none."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:
        return []
    return rows[0] if len(rows) == 1 else []


def number_in(text: str | None, default: float, low: float, high: float) -> float:
    """The number in a text, clipped to the range from `low` to `high`.

    It is the default if the text holds no number.
    """
    try:
        value = float(default if text is None else text)
    except ValueError:
        return default
    return float(min(max(value, low), high)) if math.isfinite(value) else default


def whole(**values: str | Iterable[str]) -> dict[str, str]:
    """The address of a page that shows this, by the same model and in the same language."""
    return address({**values, "model": session().model, "lang": language() if language() != "en" else ""})


def write(**values: str | Iterable[str]) -> None:
    """Make the address of the page lead back to what it shows.

    Call it once in a run: each new address is a step back.
    """
    kept, wanted = session(), whole(**values)
    known = _choices(wanted)
    if known != kept.written:
        kept.written_before, kept.written, kept.written_at = kept.written, known, time.monotonic()
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def read() -> None:
    """Notice that the visitor opened an address: a link, this page once more, or one that they went
    back to.
    """
    kept, here = session(), _choices(st.query_params.to_dict())
    if here == kept.written or (here == kept.written_before and time.monotonic() - kept.written_at < _ON_ITS_WAY):
        return
    kept.written = here
    reset(**here)


def reset(**choices: str) -> None:
    """Take these choices for an address that was just opened."""
    kept = session()
    kept.opened = choices or None
    kept.used.clear()


def take(name: str) -> str | None:
    """What the opened address says under `name`, once; empty if it says nothing.

    None if no address was opened.
    """
    kept = session()
    if kept.opened is None or name in kept.used:
        return None
    kept.used.add(name)
    return kept.opened.get(name, "")


def names(*choices: str) -> bool:
    """Whether the opened address says one of these, which no page has taken yet."""
    kept = session()
    return any((kept.opened or {}).get(name) and name not in kept.used for name in choices)


def _choices(query: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in query.items() if name != "lang"}


def show_notes() -> None:
    """Show the session's notes on the address, until another utterance is chosen."""
    for text in session().notes:
        st.warning(text)


def set_once(name: str, options: list[str]) -> None:
    """Set the widget `name`, "adapter", "layer" or "gate", to what the opened address says.

    This happens once, so that the visitor can change it. Without an address it is the first option.
    If the address names no option, a note of the session says so (`show_notes`).
    """
    linked = take(name)
    found = next((option for option in options if linked in (option, layer_label(option))), None)
    if linked and found is None:
        session().notes.append(
            t(
                "This link names the {choice} {name}, which is not there; the choices are {choices}.",
                choice=t(name),
                name=plain(repr(linked)),
                choices=t(", ").join(plain(layer_label(option)) for option in options),
            )
        )
    if linked is not None or st.session_state.get(name) not in options:
        st.session_state[name] = found or options[0]


def set_widget(key: str, name: str, options: Collection[Any], default: Any) -> None:
    """Set the widget `key` to what the opened address has under `name`, once; else it keeps its
    value.

    What is none of the options is the default, as is the value of a widget that has none yet.
    """
    linked = take(name)
    if linked is not None:
        st.session_state[key] = next((option for option in options if str(option) == linked), default)
    elif key not in st.session_state or st.session_state[key] not in (*options, default):
        st.session_state[key] = default
