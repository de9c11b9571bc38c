"""The moment that a visitor clicked in a figure over time: what was said, and how it sounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import streamlit as st

from app import texts
from app.access import plain
from app.session import session
from app.texts import t
from hdmole.figures.utterance import GATES, frame_at
from hdmole.speech.audio import SAMPLE_RATE, Audio

if TYPE_CHECKING:
    from hdmole.speech.decoding import Word

_AROUND = 0.3  # seconds on either side of a moment that lies in no word
_MARGIN = 0.03  # seconds on either side of a word
_MOST_WORDS = 40  # words that are shown in a row


@dataclass(frozen=True)
class Moment:
    """A clicked time and the stretch around it that is played, in seconds."""

    time: float
    start: float
    end: float
    word: str

    def sound(self, samples: np.ndarray) -> np.ndarray:
        """The stretch of `samples` (S,), at least one of them."""
        first = round(self.start * SAMPLE_RATE)
        return samples[first : max(first + 1, round(self.end * SAMPLE_RATE))]


def moment_of(time: float, words: Sequence[Word], seconds: float) -> Moment:
    """The moment at `time`: the word that is spoken then, or else a short stretch around it.

    The audio ends at `seconds`.
    """
    for word in words:
        if word.start <= time < word.end:
            return Moment(time, max(0.0, word.start - _MARGIN), min(seconds, word.end + _MARGIN), word.word)
    return Moment(time, max(0.0, time - _AROUND), min(seconds, time + _AROUND), "")


def remember_click(chart: str, utterance: str, words: Sequence[Word]) -> Callable[[], None]:
    """A callback for a chart over time. It keeps the clicked time for the utterance of this key."""

    def clicked() -> None:
        points = st.session_state[chart].selection.points
        time = max(0.0, float(points[0]["x"])) if points else None
        session().moment = None if time is None else (utterance, time)
        inside = [i for i, word in enumerate(words) if time is not None and word.start <= time < word.end]
        st.session_state[f"word-{utterance}"] = inside[0] if inside else None

    return clicked


def choose_word(utterance: str, words: Sequence[Word]) -> None:
    """Show the words in a row. The visitor can play one with the mouse or the keyboard."""
    key = f"word-{utterance}"

    def chosen() -> None:
        index = st.session_state[key]
        session().moment = None if index is None else (utterance, (words[index].start + words[index].end) / 2)

    label = t("Choose a word, or click a cell, to hear that moment")
    if 0 < len(words) <= _MOST_WORDS:
        st.pills(
            label,
            range(len(words)),
            key=key,
            format_func=lambda i: plain(words[i].word),
            on_change=chosen,
            persist_state="session",
        )
    else:
        st.caption(t(":material/touch_app: Click a cell to hear that moment."))


def clicked_moment(utterance: str, words: Sequence[Word], start: float, end: float) -> Moment | None:
    """The moment last clicked in this stretch of the utterance.

    It stays when another layer or gate is chosen.
    """
    kept = session().moment
    return moment_of(kept[1], words, end) if kept and kept[0] == utterance and start <= kept[1] < end else None


def show_moment(moment: Moment | None, audio: Audio, table: pd.DataFrame, layer: str, which: str) -> None:
    """Show a player for the moment, and the experts that are active in it."""
    if moment is None:
        return
    rows = frame_at(table[table.layer == layer], moment.time)
    at_work = rows[rows[which] != 0].sort_values(which, ascending=False)
    pairs = zip(at_work.accent, at_work[which], strict=True)
    names = t(", ").join(f"{plain(texts.accent(accent))} {gate:.3f}" for accent, gate in pairs) or t("no expert")
    said = f"“{plain(moment.word)}”" if moment.word else t("between words")
    player, text = st.container(key="moment").columns([1, 2], vertical_alignment="center")
    player.audio(moment.sound(audio.samples), sample_rate=SAMPLE_RATE, autoplay=True)
    text.markdown(
        t(
            "**{time} s**, {said}: {experts} ({gate})",
            time=f"{moment.time:.2f}",
            said=said,
            experts=names,
            gate=t(GATES[which]).lower(),
        )
    )
