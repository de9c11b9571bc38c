"""The app's texts in the visitor's language.

* The English is in the code, the Chinese in `assets/ui/texts.json`.
* `t` translates a text when it is shown. A text without a Chinese translation stays English.
* `{name}` marks the place of a value in both languages.
* A text that is made before it is shown is a `Text`: a constant, the step of a task, or a message
  of the library. A `UserError` is translated in the same way, by its sentence and values.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from app.access import hide_folders, plain
from hdmole.errors import UserError
from hdmole.names import accent_label, layer_name, layer_words, method_label
from hdmole.study.results import Results
from hdmole.study.tables import markdown_table
from hdmole.texts import Text as Text

Language = Literal["en", "zh"]
FILE = Path(__file__).resolve().parent.parent / "assets" / "ui" / "texts.json"
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "中文"}
_FONT = "Noto Sans CJK SC, Microsoft YaHei, PingFang SC, Arial, sans-serif"


ADAPTED = {
    "encoder": Text("Every method adapts the linear layers of the encoder."),
    "projector": Text("Every method adapts the projector."),
    "llm": Text("Every method adapts the linear layers of the LLM."),
}


def language() -> Language:
    """The visitor's language: the chosen one, or else that of the address or of the browser.

    It is English if there is no visitor.
    """
    if get_script_run_ctx(suppress_warning=True) is None:
        return "en"
    wanted = st.session_state.get("language") or st.query_params.get("lang") or st.context.locale or ""
    return "zh" if str(wanted).lower().startswith("zh") else "en"


def choose_language() -> None:
    """Show the switch between the languages. `app.links.write` puts the choice into the address."""
    st.session_state.setdefault("language", language())
    st.segmented_control(
        t("Language"), list(LANGUAGES), key="language", format_func=LANGUAGES.__getitem__, required=True,
        label_visibility="collapsed", persist_state="session",
    )  # fmt: skip


def translate_streamlit() -> None:
    """Put the visitor's language in the place of the file uploader's English."""
    if language() == "en":
        return
    box = "[data-testid='stFileUploaderDropzone']"
    parts = {
        f"{box} button p": t("Upload"),
        f"{box} [data-testid='stFileUploaderDropzoneInstructions'] span": t("up to 100 MB per file"),
    }
    st.html(
        "<style>"
        + "".join(
            f"{part} {{ font-size: 0; }} {part}::after {{ font-size: .875rem; content: '{text}'; }}"
            for part, text in parts.items()
        )
        + "</style>"
    )


def t(text: str | UserError, /, **values: Any) -> str:
    """A text or the sentence of an error in the visitor's language, with its values in place."""
    if isinstance(text, Text | UserError):
        values = {**text.values, **values} if isinstance(text, Text) else {**without_folders(text), **values}
        text = text.sentence
    if language() == "zh":
        text = _chinese().get(text, text)
    values = {name: t(value) if isinstance(value, Text | UserError) else value for name, value in values.items()}
    return text.format(**values) if values else text


def without_folders(error: UserError) -> dict[str, Any]:
    """The values of an error's sentence as visitors may read them: of paths only the file's name."""
    return {name: _shown(value) for name, value in error.values.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, Text | UserError):
        return value
    return plain(value.name if isinstance(value, Path) else hide_folders(value)) if isinstance(value, Path | str) else value


@cache
def _chinese() -> dict[str, str]:
    texts: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return texts


def label(name: str) -> str:
    """The label of a method in results, translated.

    If there is no text for the whole of "HDMoLE, top-1", say, it is translated part by part.
    """
    head, comma, last = name.rpartition(", ")
    if language() == "en" or name in _chinese() or not comma:
        return t(name)
    return f"{label(head)}，{t(last)}"


def method(name: str) -> str:
    """The name of a method, translated."""
    return label(method_label(name))


def accent(name: str) -> str:
    """The name of an accent with a capital letter, translated."""
    return t(accent_label(name))


def accent_name(name: str) -> str:
    """The name of an accent in a figure's data, where it stands in English, translated."""
    return name if language() == "en" else accent(name)


def layer(label: str) -> str:
    """A layer's name in plain words (`hdmole.names.layer_name`), translated."""
    place, number, part = layer_name(label)
    name, _, block = part.rpartition(" ") if part[-1:].isdigit() else (part, "", "")
    said = t(name) + (f" {block}" if block else "")
    return t("{place} {number}: {part}", place=t(place), number=number, part=said) if place else said


def table(summary: Results, labels: dict[str, str], across: bool = False) -> str:
    """`hdmole.study.tables.markdown_table` with translated column names.

    If `across` is true, a column is a method and a row a kind of speech, which is narrower.
    """
    head, _, rows = markdown_table(
        _plain_domains(summary), {plain(name): plain(label) for name, label in labels.items()}
    ).partition("\n")
    # keeps a number and its interval on one line
    rows = re.sub(r"(?<=[\d.]) (?=[\[(×%])|(?<=,) (?=[\d.]+\])", "\u00a0", rows)
    head = re.sub("[^|]+", lambda name: f" {t(name[0].strip())} ", head)
    if not across:
        return head + "\n" + rows
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, *rows.split("\n")[1:])]
    first, *turned = ("|" + "|".join(row) + "|" for row in zip(*cells, strict=True))
    return "\n".join([first, "|---|" + "---:|" * (len(cells) - 1), *turned])


def _plain_domains(summary: Results) -> Results:
    methods = {
        plain(name): entry.model_copy(update={"domains": {plain(domain): rate for domain, rate in entry.domains.items()}})
        for name, entry in summary.methods.items()
    }
    return summary.model_copy(update={"methods": methods})


def adapted(summary: Results) -> str:
    """The part of the model that all methods of a comparison adapt.

    The text is empty if the part is unknown or not the same for all.
    """
    places = {entry.place for entry in summary.methods.values() if entry.place}
    return t(ADAPTED[places.pop()]) if len(places) == 1 and places <= set(ADAPTED) else ""


def origin(summary: Results) -> dict[str, Any]:
    """Where results come from: name -> value, both as they are shown."""
    known = summary.provenance.to_dict().items()
    return {t(name.replace("_", " ")): value for name, value in known if name != "config" and not isinstance(value, dict)}


def picture(file: Path) -> str:
    """An SVG file for `st.image`, or its translated content in Chinese."""
    if language() == "en":
        return str(file)
    return re.sub(r">([^<>]+)</text>", lambda found: f">{t(found[1])}</text>", file.read_text(encoding="utf-8"))


def drawn(plot: go.Figure) -> go.Figure:
    """A copy of the figure with its titles, names and hints translated.

    Data and spoken words stay, as text.
    """
    plot = _without_markup(plot)
    if language() == "en":
        return plot
    axes = [*plot.select_xaxes(), *plot.select_yaxes()]
    for titled in (*axes, *(trace.colorbar for trace in plot.data if "colorbar" in trace)):
        if titled.title.text:
            titled.title.text = t(titled.title.text)
    for axis in axes:
        # these are names; words stand at numbers
        if axis.ticktext and isinstance(axis.tickvals[0], str):
            names = (text.partition(" <") for text in axis.ticktext)
            axis.ticktext = [
                (layer(value) if name == layer_words(value) else t(name)) + sign + colour
                for value, (name, sign, colour) in zip(axis.tickvals, names, strict=True)
            ]
    for trace in plot.data:
        if "colorbar" in trace and trace.colorbar.ticktext:
            trace.colorbar.ticktext = [t(text) for text in trace.colorbar.ticktext]
    for note in plot.layout.annotations:
        note.text = t(note.text)
    for trace in plot.data:
        for part in ("text", "hovertemplate"):
            if part in trace and isinstance(trace[part], str):
                trace[part] = t(trace[part])
        if trace.name:
            trace.name = label(trace.name)
    return plot.update_layout(font_family=_FONT)


def _without_markup(figure: go.Figure) -> go.Figure:
    """A copy in which the names in the data are text.

    Plotly takes `<` and `&` in them for HTML, links among it.

    It may be called once. What a click selects in the copy has these names as HTML writes them.
    """
    figure = go.Figure(figure)
    for trace in figure.data:
        for part in ("x", "y", "customdata", "name", "text"):
            if part in trace and trace[part] is not None:
                trace[part] = _as_text(trace[part])
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if axis.tickvals is not None:
            axis.tickvals = _as_text(axis.tickvals)
    if figure.layout.meta:
        figure.layout.meta = {name: _as_text(value) for name, value in figure.layout.meta.items()}
    return figure


def _as_text(values: Any) -> Any:
    """A string, or all strings in an array, as HTML writes them."""
    if isinstance(values, str):
        return escape(values, quote=False)
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind not in "OU" or not any(isinstance(v, str) and ("<" in v or "&" in v) for v in array.flat):
        return values
    return np.vectorize(lambda value: _as_text(value) if isinstance(value, str) else value, otypes=[object])(array)
