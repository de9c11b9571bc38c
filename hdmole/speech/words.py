"""The words that are compared: normalisation of texts and the count of errors."""

from __future__ import annotations

import re
import unicodedata

import jiwer


def normalise(text: str) -> str:
    """Lower-case words between single spaces, without punctuation; apostrophes inside words stay."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(filter(None, (word.strip("'") for word in kept.split())))


def count_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Word errors (substitutions, deletions, insertions) and reference words.

    Chinese and Japanese characters count as a word each, so that their rate is the character error rate.
    """
    reference, hypothesis = (re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])", r" \1 ", t) for t in (reference, hypothesis))
    words = len(reference.split())
    if not words:
        return len(hypothesis.split()), 0
    result = jiwer.process_words(reference, hypothesis)
    return result.substitutions + result.deletions + result.insertions, words
