"""Normalisation of texts, and counting word errors."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

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
_HAN = r"([\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
_KANA = r"[\u3040-\u30ff]"

# Characters that show nothing: Unicode's property Default_Ignorable_Code_Point, as the package
# regex has it, and characters that control the text, except spaces.
_INVISIBLE = regex.compile(r"[[\p{DI}\p{Cf}\p{Cc}]--\s]", regex.V1)


def _letters(text: str, marks: str = "'") -> str:
    """The text without characters that are no letters, no digits and none of some marks."""
    return "".join(c if c in marks or unicodedata.category(c)[0] in "LMN" else " " for c in text)


def normalise(text: str) -> str:
    """Lower-case words between single spaces, without punctuation; apostrophes inside words stay.

    The same text gives the same words however it is encoded. Composed and decomposed letters, full
    and half width and ligatures are one (Unicode's NFKC), so are all characters for an apostrophe.
    Several apostrophes in a row are a quotation mark. Characters that show nothing are left out.
    Digits are read as words (`spelt`), in Chinese as numbers (`chinese_numbers`); in Japanese they
    stay.
    """
    text = re.sub("''+", " ", _INVISIBLE.sub("", text.translate(_APOSTROPHES)))
    if re.search(_HAN, text) and not re.search(_KANA, unicodedata.normalize("NFKC", text)):
        text = chinese_numbers(text)
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _letters(text)).lower()).translate(_APOSTROPHES)
    text = text if re.search(_HAN, text) else spelt(text)
    return " ".join(filter(None, (word.strip("'") for word in _letters(text).split())))


_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def spelt(text: str) -> str:
    """The text with every digit as a word: "967" becomes "nine six seven"."""
    return re.sub(r"[0-9]", lambda found: f" {_DIGITS[int(found.group())]} ", text)


# Marks that belong to numbers, in full width too. Others are left out before numbers are read.
_MARKS = "'.,-/%\uff0e\uff0c\uff0d\uff0f\uff05\u2103"
_CHINESE_DIGITS = str.maketrans("0123456789\u3007", "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u96f6")
# What is counted with 两 in place of 二: 个只条张块位名次本件份杯瓶辆台种家天周
_COUNTED = "\u4e2a\u53ea\u6761\u5f20\u5757\u4f4d\u540d\u6b21\u672c\u4ef6\u4efd\u676f\u74f6\u8f86\u53f0\u79cd\u5bb6\u5929\u5468"


def chinese_numbers(text: str) -> str:
    """Chinese with digits as they are read: "2024年" is "二零二四年", "3.5%" is "百分之三点五".

    Dates, fractions, percents and numbers are those of the package cn2an. Long numbers and those
    that begin with zero are read digit by digit. 〇 becomes 零.
    """
    if not re.search("[0-9]", unicodedata.normalize("NFKC", text)):
        return text.replace("\u3007", "\u96f6")
    import cn2an

    text = unicodedata.normalize("NFKC", _letters(text, _MARKS)).replace("\u00b0C", "\u6444\u6c0f\u5ea6")
    text = re.sub("(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub("(?<![A-Za-z0-9])-(?=[0-9])", "\u8d1f", text).replace("-", " ")
    text = re.sub(f"(?<![0-9./])2(?=[{_COUNTED}])", "\u4e24", text)
    text = re.sub(r"(?<![0-9.])0[0-9]+|[0-9]{9,}", lambda found: found.group().translate(_CHINESE_DIGITS), text)
    parts = re.split(r"([^\D0-9]+)", text)  # cn2an takes digits of other scripts for its own
    parts[::2] = [cn2an.transform(part, "an2cn").translate(_CHINESE_DIGITS) for part in parts[::2]]
    return "".join(parts)


def rate_name(references: Iterable[str]) -> Literal["WER", "CER", "MER"]:
    """What the field calls the rate of errors in some texts: "WER", "CER" or "MER".

    It is the character error rate where at least nine of ten words, as `count_errors` counts them,
    are Chinese or Japanese characters, the word error rate where at most one of ten is, and
    otherwise the mixed error rate.
    """
    characters = words = 0
    for text in references:
        characters += len(re.findall(_HAN, text))
        words += len(re.sub(_HAN, r" \1 ", text).split())
    return "WER" if 10 * characters <= words else "CER" if 10 * characters >= 9 * words else "MER"


def count_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Number of word errors (substitutions, deletions, insertions) and of words in the reference.

    Each Chinese or Japanese character counts as a word, words in Latin letters count whole, as in
    WeNet's and KeSpeech's character error rate. The texts are compared as they are given;
    `normalise` them first.
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
