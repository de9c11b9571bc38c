"""Transcripts as the app draws them: errors, confidence, changes, names that are escaped."""

from __future__ import annotations

import re
from types import SimpleNamespace

from driver import said

from app.cards import heard_html, method_card
from hdmole.speech.decoding import Word

HTML_TAG = re.compile(r"<[^>]+>")


def test_the_word_difference_shows_each_kind_of_error_by_more_than_colour() -> None:
    html = heard_html(said("turn", "off", "the", "big", "lights"), "Turn on the lights, now.")
    assert "<span class='said'>on</span>" in html and "wrong" in html  # substituted
    assert "extra" in html and ">big<" in html  # inserted
    assert "class='missing'" in html and ">now<" in html  # deleted
    assert HTML_TAG.sub("", html).split() == ["turn", "onoff", "the", "big", "lights", "now"]


def test_a_number_is_compared_digit_by_digit() -> None:
    html = heard_html([Word("at", 0.0, 0.5, 0.9), Word("45.", 0.5, 1.0, 0.9)], "at four six")
    assert HTML_TAG.sub("", html).split() == ["at", "4", "six5."] and html.count("class='said'") == 1
    assert HTML_TAG.sub("", heard_html([Word("45.", 0.5, 1.0, 0.9)])) == "45."


def test_confidence_is_marked_and_its_number_is_there() -> None:
    assert "class='word doubtful" in heard_html(said("lights", confidence=0.3))
    assert "class='word unsure" in heard_html(said("lights", confidence=0.7))
    assert "confidence 0.30, 0.00 to 0.40 s" in heard_html(said("lights", confidence=0.3))


def test_words_are_escaped() -> None:
    transcript = SimpleNamespace(words=said("<script>"), text="<script>", rtf=0.1)
    html = method_card("base", transcript, "<b>")
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>" not in html


def test_a_changed_transcript_is_marked_against_the_one_before() -> None:
    transcript = SimpleNamespace(words=said("turn", "of", "lights"), text="turn of lights", rtf=0.1)
    html = method_card("hdmole", transcript, "", before="turn off the lights")
    assert "class='missing'" in html and "class='said'>off" in html and "WER" not in html
    assert "class='said'" not in method_card("hdmole", transcript, "turn of lights", before="turn off the lights")
