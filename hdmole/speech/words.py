"""Normalisation of texts, and counting word errors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import jiwer
from rapidfuzz.distance import Levenshtein


def normalise(text: str) -> str:
    """Lower-case words with single spaces and no punctuation. Apostrophes inside words stay."""
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(filter(None, (word.strip("'") for word in kept.split())))


def count_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Number of word errors (substitutions, deletions, insertions) and of words in the reference.

    Each Chinese or Japanese character counts as a word, so that the rate for these languages is the
    character error rate. The texts are compared as they are given; `normalise` them first.
    """
    reference, hypothesis = (re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])", r" \1 ", t) for t in (reference, hypothesis))
    words = len(reference.split())
    if not words:
        return len(hypothesis.split()), 0
    result = jiwer.process_words(reference, hypothesis)
    return result.substitutions + result.deletions + result.insertions, words


def score(references: Iterable[str], hypotheses: Iterable[str]) -> dict[str, list[Any]]:
    """Score what was heard in many utterances.

    Args:
        references: what was said in each utterance, normalised.
        hypotheses: what was heard in each, as the model wrote it.

    Returns:
        Three columns with one row per utterance: `hypothesis`, normalised; `errors` and `words`, as
        `count_errors` returns them.

    Raises:
        ValueError: the numbers of references and hypotheses differ.
    """
    heard = [normalise(text) for text in hypotheses]
    counted = [count_errors(reference, text) for reference, text in zip(references, heard, strict=True)]
    return {"hypothesis": heard, "errors": [errors for errors, _ in counted], "words": [words for _, words in counted]}


def character_disagreement(one: str, other: str) -> float:
    """Character-level Levenshtein distance of two texts over the length of `other`; at most 2."""
    return float(min(2.0, Levenshtein.distance(one, other) / max(1, len(other))))
