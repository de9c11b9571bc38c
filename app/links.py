"""Deep links: the address of a page leads back to what it shows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping

import streamlit as st

from app.session import session
from app.texts import language, t
from hdmole.names import layer_label


def address(values: Mapping[str, str | Iterable[str]]) -> dict[str, str]:
    """What stands in the address for these values: name -> text. A value that is empty is left out."""
    texts = {name: value if isinstance(value, str) else joined(value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text}


def joined(names: Iterable[str]) -> str:
    """Several names as one text, with commas between them; quoted as in a CSV file where a name has commas or quotes."""
    line = io.StringIO()
    if found := list(names):
        csv.writer(line, lineterminator="\r\n").writerow(found)  # only so are names with line ends quoted
    return line.getvalue().removesuffix("\r\n")


def names_in(text: str) -> list[str]:
    """The names in what `joined` wrote; of a text that it cannot have written, none."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:
        return []
    return rows[0] if len(rows) == 1 else []


def number_in(text: str | None, default: float, low: float, high: float) -> float:
    """The number that a text holds, moved into the range from `low` to `high`; the default where it holds none."""
    try:
        value = float(default if text is None else text)
    except ValueError:
        return default
    return float(min(max(value, low), high)) if math.isfinite(value) else default


def write(**values: str | Iterable[str]) -> None:
    """Make the address lead back to what is shown, in the language shown."""
    wanted = address(values)
    if language() != "en":
        wanted["lang"] = language()
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def show_notes() -> None:
    """What is to be said of the address, until another utterance is chosen."""
    for text in session().notes:
        st.warning(text)


def set_once(name: str, options: list[str]) -> None:
    """Set the widget `name`, "layer" or "gate", as the opened address says; once, so that the visitor can change it.

    An address that names something that is not there is said, not followed.
    """
    linked = session().linked.pop(name, None)
    found = next((option for option in options if linked in (option, layer_label(option))), None)
    if linked and found is None:
        st.warning(
            t(
                "This link names the {choice} {name}, which is not there; the choices are {choices}.",
                choice=t(name),
                name=repr(linked),
                choices=t(", ").join(map(layer_label, options)),
            )
        )
    if found is not None or st.session_state.get(name) not in options:
        st.session_state[name] = found or options[0]


def set_widget(linked: Mapping[str, str], key: str, name: str, options: Collection[str], default: str | None) -> None:
    """Set the widget `key` when its page is opened: as the address `linked` says under `name`, or else to its default."""
    if key not in st.session_state or st.session_state[key] not in (*options, default):
        st.session_state[key] = linked[name] if linked.get(name) in options else default
