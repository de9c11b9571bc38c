"""Words as HTML: how sure the model was of each, and where it departs from a reference text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from types import SimpleNamespace
from typing import Any

import jiwer

from hdmole.figures import METHOD_COLOURS, METHOD_NAMES
from hdmole.results import count_errors, normalise

SURE, UNSURE = 0.8, 0.5  # word confidence above which nothing is marked, and below which it is marked strongly
LEGEND_CONFIDENCE = (
    "The model's confidence in a word: <span class='word unsure' style='--method: currentColor'>word</span> "
    f"under {SURE} · <span class='word doubtful' style='--method: currentColor'>word</span> under {UNSURE} · "
    "point at a word for its number and time"
)
LEGEND_DIFFERENCE = (
    "Against the reference: <span><span class='said'>said</span><span class='wrong'>heard</span></span> substituted · "
    "<span class='extra'>heard</span> inserted · <span class='missing'>said</span> deleted"
)


def word_html(word: Any, kind: str = "") -> str:
    """One heard word (`word`, `start`, `end`, `confidence`), underlined the more the less sure the model was of it."""
    mark = "sure" if word.confidence >= SURE else "unsure" if word.confidence >= UNSURE else "doubtful"
    title = f"title='confidence {word.confidence:.2f}, {word.start:.2f} to {word.end:.2f} s'" if word.end else ""
    return f"<span class='word {mark} {kind}' {title}>{escape(word.word)}</span>"


def heard_html(words: Sequence[Any], reference: str = "") -> str:
    """The heard words; with a reference, substitutions, insertions and deletions are shown by frame and sign."""
    if not normalise(reference):
        return " ".join(word_html(word) for word in words)
    said = normalise(reference).split()
    # a heard word that normalises to several or to none stays one word here
    heard = [normalise(word.word).replace(" ", "") or word.word for word in words]
    parts: list[str] = []
    for chunk in jiwer.process_words([" ".join(said)], [" ".join(heard)]).alignments[0]:
        mine = words[chunk.hyp_start_idx : chunk.hyp_end_idx]
        theirs = said[chunk.ref_start_idx : chunk.ref_end_idx]
        if chunk.type == "equal":
            parts += [word_html(word) for word in mine]
        elif chunk.type == "insert":
            parts += [word_html(word, "extra") for word in mine]
        elif chunk.type == "delete":
            parts += [f"<span class='missing' title='said, not heard'>{escape(word)}</span>" for word in theirs]
        else:
            parts += [
                f"<span title='said: {escape(s)}'><span class='said'>{escape(s)}</span>{word_html(word, 'wrong')}</span>"
                for s, word in zip(theirs, mine, strict=True)
            ]
    return " ".join(parts)


def text_card(method: str, heard: str, reference: str) -> str:
    """What one method heard where only the text was kept, against what was said."""
    words = [SimpleNamespace(word=word, start=0.0, end=0.0, confidence=1.0) for word in heard.split()]
    errors, count = count_errors(normalise(reference), normalise(heard))
    body = heard_html(words, reference) or "<span class='nothing'>no words heard</span>"
    return (
        f"<article class='card' style='--method: {METHOD_COLOURS.get(method, '#8A8A8A')}'>"
        f"<header><span>{METHOD_NAMES.get(method, method)}</span></header>"
        f"<div class='heard'>{body}</div><footer>{errors} errors in {count} words</footer></article>"
    )


def method_card(method: str, transcript: Any | None, reference: str = "", missing: str = "…", title: str = "") -> str:
    """What one method heard (an `hdmole.asr.Transcript`); `missing` stands in the place of one that is not there."""
    rate = ""
    if transcript is None:
        body, foot = f"<span class='nothing'>{missing}</span>", ""
    else:
        body = heard_html(transcript.words, reference) or "<span class='nothing'>no words heard</span>"
        foot = f"{transcript.rtf:.2f} × real time"
        if normalise(reference):
            errors, words = count_errors(normalise(reference), normalise(transcript.text))
            rate = f"WER {100 * errors / max(words, 1):.0f} %"
            foot = f"{errors} {'error' if errors == 1 else 'errors'} in {words} words · {foot}"
    waiting, colour = "waiting" if transcript is None else "", METHOD_COLOURS.get(method, "#8A8A8A")
    return (
        f"<article class='card {waiting}' style='--method: {colour}'>"
        f"<header><span>{title or METHOD_NAMES.get(method, method)}</span><span class='rate'>{rate}</span></header>"
        f"<div class='heard'>{body}</div><footer>{foot}</footer></article>"
    )
