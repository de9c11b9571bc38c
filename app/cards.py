"""Cards that show what each method heard.

Marks on the words show how sure the model was, and where the text differs from a reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

import jiwer
import streamlit as st

from app import texts
from app.access import plain
from app.jobs import Job
from app.texts import Text, t
from app.utterance import clock
from hdmole.figures.utterance import METHOD_COLOURS
from hdmole.speech.words import count_errors, normalise

if TYPE_CHECKING:
    from hdmole.speech.decoding import Word
    from hdmole.speech.transcript import Transcript

_LAST = 40  # words that are shown while more come
_MOST_SPANS = 8  # spans of a long recording that a warning lists
# word confidence above which words have no mark, and below which they have a strong one
SURE, UNSURE = 0.8, 0.5
LEGEND_CONFIDENCE = Text(
    "Confidence: <span class='word unsure' style='--method: currentColor'>word</span> "
    "under {sure} · <span class='word doubtful' style='--method: currentColor'>word</span> under {unsure} · "
    "point at a word to read it",
    sure=SURE,
    unsure=UNSURE,
)
WER = Text("<b>WER</b> is the word error rate: words heard wrong, added or missing, per word that was said.")
LEGEND_DIFFERENCE = Text(
    "Against the reference: <span><span class='said'>said</span><span class='wrong'>heard</span></span> substituted · "
    "<span class='extra'>heard</span> inserted · <span class='missing'>said</span> deleted"
)
LEGEND_CHANGE = Text(
    "Against the untouched run: <span><span class='said'>before</span><span class='wrong'>now</span></span> substituted · "
    "<span class='extra'>now</span> inserted · <span class='missing'>before</span> deleted"
)


def legend_html(reference: str = "") -> str:
    """What the marks on words mean.

    Error rates and marks of differences are explained only with a reference.
    """
    difference = f"<div>{t(LEGEND_DIFFERENCE)}</div><div>{t(WER)}</div>" if reference.strip() else ""
    return f"<div class='legend'>{difference}<div>{t(LEGEND_CONFIDENCE)}</div></div>"


def word_html(word: Word, kind: str = "") -> str:
    """One heard word. The less sure the model was of it, the stronger it is underlined."""
    mark = "sure" if word.confidence >= SURE else "unsure" if word.confidence >= UNSURE else "doubtful"
    sure, start, end = (f"{number:.2f}" for number in (word.confidence, word.start, word.end))
    hint = t("confidence {sure}, {start} to {end} s", sure=sure, start=start, end=end)
    title = f"title='{hint}'" if word.end > 0 else ""
    return f"<span class='word {mark} {kind}' {title}>{escape(word.word)}</span>"


def heard_html(words: Sequence[Word], reference: str = "") -> str:
    """The heard words. With a reference, substitutions, insertions and deletions are marked."""
    if not normalise(reference):
        return " ".join(word_html(word) for word in words)
    said = normalise(reference).split()
    words = [part for word in words for part in _digits(word)]
    # a heard word stays one word here, even if it normalises to none or to several
    heard = [normalise(word.word).replace(" ", "") or word.word for word in words]
    parts: list[str] = []
    unheard = t("said, not heard")
    for chunk in jiwer.process_words([" ".join(said)], [" ".join(heard)]).alignments[0]:
        mine = words[chunk.hyp_start_idx : chunk.hyp_end_idx]
        theirs = said[chunk.ref_start_idx : chunk.ref_end_idx]
        if chunk.type == "equal":
            parts += [word_html(word) for word in mine]
        elif chunk.type == "insert":
            parts += [word_html(word, "extra") for word in mine]
        elif chunk.type == "delete":
            parts += [f"<span class='missing' title='{unheard}'>{escape(word)}</span>" for word in theirs]
        else:
            parts += [
                f"<span title='{t('said: {word}', word=escape(s))}'><span class='said'>{escape(s)}</span>{word_html(word, 'wrong')}</span>"
                for s, word in zip(theirs, mine, strict=True)
            ]
    return " ".join(parts)


def _digits(word: Word) -> list[Word]:
    """A heard number as its digits, because `normalise` reads it so; another word as it is."""
    parts = re.findall(r"[^\w]*[0-9][^\w]*|[^0-9]+", word.word)
    return [replace(word, word=part) for part in parts] if len(parts) > 1 else [word]


def text_card(method: str, heard: str, reference: str) -> str:
    """A card for a text without word times and confidences, compared with what was said."""
    errors, count = count_errors(normalise(reference), normalise(heard))
    foot = t("{errors} errors in {words} words", errors=errors, words=count)
    return (
        f"<article class='card' style='--method: {METHOD_COLOURS.get(method, '#8A8A8A')}'>"
        f"<header><span>{escape(texts.method(method))}</span></header>"
        f"<div class='heard'>{text_html(heard, reference)}</div><footer>{foot}</footer></article>"
    )


def text_html(heard: str, reference: str) -> str:
    """A text without word times and confidences, with marks where it differs from what was said."""
    # slow to import; by the time this runs a model is loaded
    from hdmole.speech.decoding import Word

    words = [Word(word, start=0.0, end=0.0, confidence=1.0) for word in heard.split()]
    return heard_html(words, reference) or f"<span class='nothing'>{t('no words heard')}</span>"


def method_card(
    method: str, transcript: Transcript | None, reference: str = "", missing: str = "…", title: str = "", before: str = ""
) -> str:
    """A card with what one method heard, or with `missing` if there is no transcript.

    Without a reference, the words are compared with what was heard `before`.
    """
    rate = ""
    if transcript is None:
        body, foot = f"<span class='nothing'>{missing}</span>", ""
    else:
        body = heard_html(transcript.words, reference or before) or f"<span class='nothing'>{t('no words heard')}</span>"
        foot = t("{factor} × real time", factor=f"{transcript.rtf:.2f}")
        if normalise(reference):
            errors, words = count_errors(normalise(reference), normalise(transcript.text))
            rate = f"WER {100 * errors / max(words, 1):.0f} %"
            counted = t(
                "{errors} error in {words} words" if errors == 1 else "{errors} errors in {words} words",
                errors=errors, words=words,
            )  # fmt: skip
            foot = f"{counted} · {foot}"
    waiting, colour = "waiting" if transcript is None else "", METHOD_COLOURS.get(method, "#8A8A8A")
    return (
        f"<article class='card {waiting}' style='--method: {colour}'>"
        f"<header><span>{escape(title or texts.method(method))}</span><span class='rate'>{rate}</span></header>"
        f"<div class='heard'>{body}</div><footer>{foot}</footer></article>"
    )


def so_far_html(words: Sequence[Word]) -> str:
    """The last words that were heard so far, of a recording that is not finished; empty if there
    are none.
    """
    return ("… " if words[_LAST:] else "") + " ".join(escape(word.word) for word in words[-_LAST:]) + " …" if words else ""


def warn_if_outside(job: Job) -> None:
    """Warn, before any transcript is shown, if the audio is not what the model was made for."""
    flagged = []
    for method, transcript in job.transcripts.items():
        if transcript.flags:
            flags = t("; ").join(map(t, transcript.flags))
            flagged.append(t("**{method}:** {flags}.", method=plain(texts.method(method)), flags=flags))
    if flagged:
        st.warning("\n\n".join(flagged), icon=":material/repeat:")
    in_domain = job.judged.in_domain if job.judged else {}
    if in_domain.get("verdict") is False:
        reasons = t("; ").join(map(t, in_domain.get("reasons") or []))
        st.warning(
            t("**This does not sound like what the model was made for.** What it writes is likely to be invented.")
            + (t(" Why: {reasons}.", reasons=reasons) if reasons else ""),
            icon=":material/hearing_disabled:",
        )
    elif outside := in_domain.get("outside"):
        spans = t(", ").join(f"{clock(start)}–{clock(end)}" for start, end in outside[:_MOST_SPANS])
        st.info(
            t(
                "{count} of {all} stretches do not sound like what the model was made for: {spans}", count=len(outside),
                all=len(job.segments), spans=spans + (" …" if len(outside) > _MOST_SPANS else ""),
            ),
            icon=":material/hearing_disabled:",
        )  # fmt: skip


def show_cards(job: Job, reference: str) -> None:
    """What each method heard, side by side."""
    warn_if_outside(job)
    missing = "…" if job.running else t("not transcribed")
    cards = [
        method_card(
            method, job.transcripts.get(method), reference,
            (method == job.listening and so_far_html(job.heard)) or missing,
        )
        for method in job.methods
    ]  # fmt: skip
    st.html(f"<div class='cards'>{''.join(cards)}</div>")


def show_legend(reference: str) -> None:
    """What the marks on the words of the cards mean."""
    st.html(legend_html(reference))
