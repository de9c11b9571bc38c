"""Deep links. The address of a page leads back to what the page shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping

import streamlit as st

from app.access import plain
from app.session import session
from app.texts import language, t
from hdmole.names import layer_label


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


def write(**values: str | Iterable[str]) -> None:
    """Make the address of the page lead back to what it shows, by the same model and in the same language."""
    wanted = address({**values, "model": session().model})
    if language() != "en":
        wanted["lang"] = language()
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def write_model() -> None:
    """Put the model into the address of a page that has nothing else to write there."""
    if (name := session().model) and st.query_params.get("model") != name:
        st.query_params["model"] = name


def show_notes() -> None:
    """Show the session's notes on the address, until another utterance is chosen."""
    for text in session().notes:
        st.warning(text)


def set_once(name: str, options: list[str]) -> None:
    """Set the widget `name`, "adapter", "layer" or "gate", to what the opened address says.

    This happens once, so that the visitor can change it. If the address names no option, a note of
    the session says so (`show_notes`).
    """
    linked = session().linked.pop(name, None)
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
    if found is not None or st.session_state.get(name) not in options:
        st.session_state[name] = found or options[0]


def set_widget(linked: Mapping[str, str], key: str, name: str, options: Collection[str], default: str | None) -> None:
    """Set the widget `key` when its page is opened.

    Its value is what the address `linked` has under `name`, or else the default.
    """
    if key not in st.session_state or st.session_state[key] not in (*options, default):
        st.session_state[key] = linked[name] if linked.get(name) in options else default
