"""The sentence grammar: form, length, shares, splits and vocabulary."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from hdmole.demo.text import DIGITS, is_digit_string, sentences, split_of, vocabulary

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return {split: sentences(3000, 7, split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_lower_case_words_with_single_spaces(found: dict[str, list[str]], split: str) -> None:
    assert len(found[split]) == 3000
    assert not [text for text in found[split] if not re.fullmatch(r"[a-z']+( [a-z']+)*", text)]


@pytest.mark.parametrize("split", SPLITS)
def test_only_single_digits_are_said_twice(found: dict[str, list[str]], split: str) -> None:
    longer = [text for text in found[split] if text not in DIGITS]
    assert len(longer) == len(set(longer))
    assert set(found[split]) >= set(DIGITS)


@pytest.mark.parametrize("split", SPLITS)
def test_a_sentence_is_in_the_split_of_its_hash(found: dict[str, list[str]], split: str) -> None:
    assert {split_of(text) for text in found[split] if text not in DIGITS} == {split}


def test_the_hash_sends_a_tenth_of_the_sentences_to_dev_and_to_test() -> None:
    splits = [split_of(f"call number {i}") for i in range(5000)]
    assert 0.77 < splits.count("train") / 5000 < 0.83
    assert 0.08 < splits.count("dev") / 5000 < 0.12
    assert 0.08 < splits.count("test") / 5000 < 0.12


def test_a_split_never_moves() -> None:
    """A changed hash would put sentences a released model was trained on into its test set."""
    splits = {"call john smith": "train", "call chris jones": "dev", "set a timer for ten minutes": "test"}
    assert {text: split_of(text) for text in splits} == splits


def test_phrases_without_a_slot_are_for_training() -> None:
    assert {split_of(text) for text in ("yes please", "i forgot my password", "skip this song", "hello")} == {"train"}


def test_lengths_and_shares(found: dict[str, list[str]]) -> None:
    lengths = [len(text.split()) for text in found["train"]]
    assert 6.5 < sum(lengths) / len(lengths) < 8.5
    assert max(lengths) <= 20
    assert all(0.005 < sum(text in DIGITS for text in texts) / 3000 < 0.06 for texts in found.values())
    counts = {len(text.split()) for text in found["train"] if is_digit_string(text)}
    assert counts == set(range(1, 12))  # one digit to a telephone number with its country code


def test_digits_are_uniform(found: dict[str, list[str]]) -> None:
    said = [word for text in found["train"] if is_digit_string(text) for word in text.split()]
    assert all(0.07 < said.count(digit) / len(said) < 0.13 for digit in DIGITS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("seven", True), ("one zero two", True), ("", False), ("ten", False), ("dial one two", False), ("twenty five", False)],
)
def test_digit_strings(text: str, expected: bool) -> None:
    assert is_digit_string(text) is expected


def test_vocabulary_is_sorted_plain_and_has_no_word_that_is_never_said() -> None:
    words = vocabulary()
    assert words == sorted(set(words)) and 1000 <= len(words) <= 1300
    assert all(re.fullmatch(r"[a-z']+", word) for word in words)
    assert set(words) == {word for text in sentences(20_000, 1, "train") for word in text.split()}


def test_names_and_words_have_one_spelling() -> None:
    """No two spellings of one sound that the context could not tell apart."""
    words = set(vocabulary())
    for pair in ("john jon", "sarah sara", "steven stephen", "philip phillip", "eric erik", "gray grey",
                 "anna ana", "clark clarke", "davis davies", "lewis louis", "check cheque", "week weak"):  # fmt: skip
        assert len(words & set(pair.split())) <= 1, pair


def test_the_same_seed_gives_the_same_sentences_in_every_process(found: dict[str, list[str]]) -> None:
    program = "from hdmole.demo.text import sentences; print('|'.join(sentences(40, 7, 'test')))"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            timeout=60,
        )
        assert done.stdout.strip().split("|") == found["test"][:40]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="no split 'validation'; the splits are train, dev and test"):
        sentences(1, 0, "validation")
