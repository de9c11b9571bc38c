"""The app's texts in the visitor's language: English stands in the code, Chinese in `assets/ui/texts.json`.

* `t` looks a text up where it is shown; one without a Chinese text stays English
* values stand in both languages as `{name}`
* a text that is written before it is shown, such as a constant or a worker's step, is a `Text`
* what the library puts together of words and numbers is taken apart by `MADE`
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from hdmole.errors import UserError
from hdmole.names import METHOD_NAMES, accent_label
from hdmole.study.results import Results
from hdmole.study.tables import markdown_table

Language = Literal["en", "zh"]
FILE = Path(__file__).resolve().parent.parent / "assets" / "ui" / "texts.json"
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "中文"}
_FONT = "Noto Sans CJK SC, Microsoft YaHei, PingFang SC, Arial, sans-serif"
_PLACE = re.compile(r"(?<!%)\{(\w+)\}")  # of a value; plotly's own begin with %


class Text(str):
    """An English text for `t` to translate later; it remembers the values in it."""

    text: str
    values: dict[str, Any]

    def __new__(cls, text: str, /, **values: Any) -> Text:
        made = super().__new__(cls, text.format(**values) if values else text)
        made.text, made.values = text, values
        return made

    @classmethod
    def of(cls, error: UserError) -> Text:
        """What an error says; errors among its values are translated too."""
        return cls(error.sentence, **{k: cls.of(v) if isinstance(v, UserError) else v for k, v in error.values.items()})


MADE = (
    Text("{method} against {against}: {said}, {points} points [{interval}]"),
    Text("word errors, {method}"),
    Text("Global, τ = {tau}"),
    Text("Local, τ = {tau}"),
    Text("gate over τ = {tau}"),
    Text("{method}<br>general %{x:.1f} %<br>accents %{y:.1f} %<extra></extra>"),
    Text("%{y}, {run}: %{x:.2f} experts<extra></extra>"),
    Text("Accents as well as full fine-tuning with {share} % of its trainable parameters"),
    Text("Better than LoRA of equal parameters and accent mass on {speech}"),
    Text("LoRA, rank {rank}"),
    Text("LoRA times accent mass, rank {rank}"),
    Text("{method}, a tenth of the speech"),
    Text("HDMoLE, {variant}"),
    Text("it repeats itself: the same word {times} times in a row"),
    Text("it repeats itself: the same {size} words {times} times in a row"),
    Text("{count} words a second are more than anybody says"),
    Text("{name} is not audio that can be read; give a WAV, FLAC, MP3, Ogg, M4A, MP4 or WebM file."),
    Text("{name} has no sound track; give a file that holds speech."),
    Text("The sound in {name} is in a coding that is not known here; convert it to WAV, FLAC, MP3, Ogg, M4A, MP4 or WebM."),
    Text("{name} is damaged or cut off and nothing in it can be decoded; export or record it again."),
    Text("{name} is longer than the {seconds} seconds allowed; cut it into shorter pieces."),
    Text("{name} needs more than the {size} MB of memory allowed to decode; convert it to WAV or cut it."),
    Text("{name} could not be decoded within {seconds} seconds; convert it to WAV or cut it into shorter pieces."),
    Text("{name} could not be decoded ({reason}); convert it to WAV and try again."),
    Text("{name} is empty (0 bytes); record or export it again."),
    Text("{name} is too short ({length} s); give at least {seconds} seconds of speech."),
    Text("{name} is silent (nothing above -60 dBFS); check the microphone and record it again."),
    Text("There is no manifest {name}; give a JSON-lines file with audio, text and accent on each line."),
    Text("{name} is not text in UTF-8; a manifest is a JSON-lines file."),
    Text("Line {number} of {name} is not valid JSON."),
    Text("Line {number} of {name} has no {missing}; each line needs {needed}."),
    Text("Line {number} of {name} names {audio}, which does not exist beside the manifest."),
    Text("{name} is empty; give a JSON-lines file with audio, text and accent on each line."),
    Text("None of the {count} recordings of {name} could be read; the first says: {reason}"),
)

ADAPTED = {
    "encoder": Text("Every method adapts the linear layers of the encoder."),
    "projector": Text("Every method adapts the projector."),
    "llm": Text("Every method adapts the linear layers of the LLM."),
}


def language() -> Language:
    """What the visitor reads: as chosen, as the address or else the browser says; English where there is no visitor."""
    if get_script_run_ctx(suppress_warning=True) is None:
        return "en"
    wanted = st.session_state.get("language") or st.query_params.get("lang") or st.context.locale or ""
    return "zh" if str(wanted).lower().startswith("zh") else "en"


def choose_language() -> None:
    """The switch between the languages; the address keeps Chinese."""
    chosen = st.session_state.setdefault("language", language())
    st.segmented_control(
        t("Language"), list(LANGUAGES), key="language", format_func=LANGUAGES.__getitem__, required=True,
        label_visibility="collapsed", persist_state="session",
    )  # fmt: skip
    if chosen == "en":
        st.query_params.pop("lang", None)
    elif st.query_params.get("lang") != chosen:
        st.query_params["lang"] = chosen


def t(text: str, /, **values: Any) -> str:
    """The text in the visitor's language, with its values."""
    if isinstance(text, Text):
        values = {**text.values, **values}
        text = text.text
    if language() == "zh":
        text = _chinese().get(text) or _taken_apart(text)
        values = {name: t(value) if isinstance(value, Text) else value for name, value in values.items()}
    return text.format(**values) if values else text


@cache
def _chinese() -> dict[str, str]:
    texts: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return texts


def _taken_apart(text: str) -> str:
    """The Chinese of a text that is one of `MADE` with its values, which are translated too; others stay as they are."""
    for pattern, regex in _patterns().items():
        if found := regex.fullmatch(text):
            return _PLACE.sub(lambda place: t(found[place[1]]), _chinese().get(pattern, pattern))
    return text


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """Each of `MADE` as an expression with its places as groups."""
    pieces = {made.text: _PLACE.split(made.text) for made in MADE}  # text and names of places in turn
    return {
        text: re.compile("".join(f"(?P<{piece}>.+?)" if k % 2 else re.escape(piece) for k, piece in enumerate(parts)))
        for text, parts in pieces.items()
    }


def method(name: str) -> str:
    """What a method is called."""
    return t(METHOD_NAMES.get(name, name))


def accent(name: str) -> str:
    """What an accent is called, with a capital letter."""
    return t(accent_label(name))


def accent_name(name: str) -> str:
    """An accent's name among data, which is English as it stands there."""
    return name if language() == "en" else accent(name)


def table(summary: Results, labels: dict[str, str]) -> str:
    """`hdmole.study.tables.markdown_table`, with the names of its columns in the visitor's language."""
    head, _, rows = markdown_table(summary, labels).partition("\n")
    rows = re.sub(r"(?<=[\d.]) (?=[\[(×%])|(?<=,) (?=[\d.]+\])", "\u00a0", rows)  # a number stays with its interval
    return re.sub("[^|]+", lambda name: f" {t(name[0].strip())} ", head) + "\n" + rows


def adapted(summary: Results) -> str:
    """What the methods of a comparison adapt, where it is the same for all and known; else nothing."""
    places = {entry.place for entry in summary.methods.values() if entry.place}
    return t(ADAPTED[places.pop()]) if len(places) == 1 else ""


def origin(summary: Results) -> dict[str, Any]:
    """Where the numbers of a results file come from: name -> value, both as they are shown."""
    known = summary.provenance.to_dict().items()
    return {t(name.replace("_", " ")): value for name, value in known if name != "config" and not isinstance(value, dict)}


def picture(file: Path) -> str:
    """An SVG file for `st.image`; in Chinese its content with the texts in it translated."""
    if language() == "en":
        return str(file)
    return re.sub(r">([^<>]+)</text>", lambda found: f">{t(found[1])}</text>", file.read_text(encoding="utf-8"))


def drawn(plot: go.Figure) -> go.Figure:
    """The figure with the titles, names and hints in it in the visitor's language; data and words stay."""
    if language() == "en":
        return plot
    axes = [*plot.select_xaxes(), *plot.select_yaxes()]
    for titled in (*axes, *(trace.colorbar for trace in plot.data if "colorbar" in trace)):
        if titled.title.text:
            titled.title.text = t(titled.title.text)
    for axis in axes:
        if axis.ticktext and isinstance(axis.tickvals[0], str):  # names; words stand at numbers
            names = (text.partition(" <") for text in axis.ticktext)
            axis.ticktext = [t(name) + sign + colour for name, sign, colour in names]
    for note in plot.layout.annotations:
        note.text = t(note.text)
    for trace in plot.data:
        for part in ("name", "text", "hovertemplate"):
            if part in trace and isinstance(trace[part], str):
                trace[part] = t(trace[part])
    return plot.update_layout(font_family=_FONT)
