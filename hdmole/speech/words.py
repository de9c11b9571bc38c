"""Normalisation of texts, and counting word errors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import jiwer
import regex
from rapidfuzz.distance import Levenshtein

# Characters written for an apostrophe: those that Unicode's table of confusables (UTS 39) maps to
# U+0027, without letters, and the heavy ones of the dingbats, which it leaves out. Other quotation
# marks, primes, dashes, hyphens and spaces are no letters to Unicode and divide words.
_APOSTROPHES = dict.fromkeys(
    map(
        ord,
        "\u0060\u00b4\u0384\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u02f4\u0374\u055a\u055d\u05f3\u07f4\u07f5"
        "\u1fbd\u1fbf\u1fef\u1ffd\u1ffe\u2018\u2019\u201b\u2032\u2035\u275b\u275c\ua78b\ua78c\uff07\uff40",
    ),
    "'",
)

# a Chinese or Japanese character
_HAN = r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])"

# Characters that show nothing: Unicode's property Default_Ignorable_Code_Point, as the package
# regex has it, and characters that control the text, except spaces.
_INVISIBLE = regex.compile(r"[[\p{DI}\p{Cf}\p{Cc}]--\s]", regex.V1)


def _letters(text: str) -> str:
    return "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)


def normalise(text: str) -> str:
    """Lower-case words between single spaces, without punctuation; apostrophes inside words stay.

    The same text gives the same words however it is encoded. Composed and decomposed letters, full
    and half width and ligatures are one (Unicode's NFKC), so are all characters for an apostrophe.
    Several apostrophes in a row are a quotation mark. Characters that show nothing are left out.
    Digits are read as words (`spelt`), except in Chinese and Japanese.
    """
    text = re.sub("''+", " ", _INVISIBLE.sub("", text.translate(_APOSTROPHES)))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _letters(text)).lower()).translate(_APOSTROPHES)
    text = text if re.search(_HAN, text) else spelt(text)
    return " ".join(filter(None, (word.strip("'") for word in _letters(text).split())))


_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def spelt(text: str) -> str:
    """The text with every digit as a word: "967" becomes "nine six seven"."""
    return re.sub(r"[0-9]", lambda found: f" {_DIGITS[int(found.group())]} ", text)


def count_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Number of word errors (substitutions, deletions, insertions) and of words in the reference.

    Each Chinese or Japanese character counts as a word, so that the rate for these languages is the
    character error rate. The texts are compared as they are given; `normalise` them first.
    """
    reference, hypothesis = (re.sub(_HAN, r" \1 ", t) for t in (reference, hypothesis))
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
