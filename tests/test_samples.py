"""The samples of the demo model: how they are chosen, and that what the app says of them holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app import voices
from app.utterance import Sample, chosen_because, opening_sample
from hdmole.demo.samples import differs, gain, pairs_of, ranked, shared_sentences
from hdmole.names import SHARED
from hdmole.speech.asr import ASR
from hdmole.speech.loading import find_model
from hdmole.speech.manifest import Line, read_manifest
from hdmole.speech.words import score
from hdmole.study.results import load

FOLDER = find_model("demo")
LINES = [json.loads(line) for line in (FOLDER / "samples" / "manifest.jsonl").read_text().splitlines()]
NAMES = [Path(line["audio"]).stem for line in LINES]


def rows(*told: tuple[str, str, str, int, int, int]) -> pd.DataFrame:
    """Utterances of test speech: name, accent, text, and the errors of base, HDMoLE and LoRA."""
    return pd.DataFrame(
        {"utterance": name, "accent": accent, "domain": "general" if accent == "general" else "accent", "speaker": f"of {name}",
         "reference": text, "method": method, "errors": errors}
        for name, accent, text, *counts in told
        for method, errors in zip(("base", "hdmole", "lora"), counts, strict=True)
    )  # fmt: skip


def test_the_utterances_on_which_hdmole_gains_or_loses_most_come_first() -> None:
    table = pairs_of(
        rows(
            ("a", "german", "one two three four five", 3, 1, 3),
            ("b", "german", "one two three four six", 4, 2, 4),  # the same gain of 2, with more errors left
            ("c", "german", "one two three four seven", 0, 1, 0),
            ("d", "german", "too short", 9, 0, 9),
            ("e", "indian", "one two three four five", 5, 0, 5),
        )
    )
    assert [speaker for _, speaker in ranked(table, "german", worse=False)] == ["of a", "of b", "of c"]
    assert ranked(table, "german", worse=True)[0] == ("one two three four seven", "of c")


def test_the_sentence_in_all_accents_is_one_on_which_hdmole_differs_most_often() -> None:
    table = pairs_of(
        rows(
            ("a", "german", "they differ on this once", 9, 0, 9),
            ("b", "german", "they differ on this twice", 0, 1, 0),  # HDMoLE is worse here, which counts as well
            ("c", "indian", "they differ on this twice", 1, 0, 1),
            ("d", "indian", "they differ on this never", 2, 2, 0),
        )
    )
    assert shared_sentences(table) == ["they differ on this twice", "they differ on this once", "they differ on this never"]


def test_methods_differ_on_at_least_twelve_of_the_samples_and_in_both_directions() -> None:
    errors = load(FOLDER / "results").samples
    assert len(NAMES) == 18 and set(errors) == set(NAMES)
    assert sum(differs(errors[name]) for name in NAMES) >= 12
    gains = [gain(errors[name]) for name in NAMES]
    assert min(gains) < 0 < max(gains)


@pytest.mark.parametrize("line", LINES, ids=NAMES)
def test_what_methods_hear_of_a_sample_has_the_errors_of_the_results(line: dict[str, Any]) -> None:
    heard = line["heard"]
    errors = score([line["text"]] * len(heard), heard.values())["errors"]
    assert dict(zip(heard, errors, strict=True)) == load(FOLDER / "results").samples[Path(line["audio"]).stem]


def test_a_sentence_in_every_accent_is_shown_with_what_each_method_hears() -> None:
    """Of two accents: the base hears the German one wrong, LoRA drops a word of both, HDMoLE hears every word."""
    clips = [
        Sample(
            accent, Path(), "Call Anna at six", accent, "", "everywhere",
            heard={"base": said, "lora": "call anna six", "hdmole": "call anna at six"},
        )
        for accent, said in (("general", "call anna at six"), ("german", "fall anna at <six>"))
    ]  # fmt: skip
    assert voices.spoken_alike([*clips, Sample("other", Path(), "other", "german", "", "better", heard={"base": "a"})]) == clips
    rows = voices.heard_by_all(clips).split("<tr>")[1:]
    assert [row.count("✓") for row in rows] == [0, 1, 0, 2]
    assert rows[0].count("<button") == 2 and ["1 of 2 right" in row for row in rows] == [False, True, False, False]
    assert "<span class='said'>call</span>" in rows[1] and "&lt;six&gt;" in rows[1] and "<six>" not in rows[1]
    assert rows[2].count("<span class='missing' title='said, not heard'>at</span>") == 2


@pytest.mark.parametrize("line", LINES, ids=NAMES)
def test_a_sample_is_what_its_reason_says(line: dict[str, str]) -> None:
    errors = load(FOLDER / "results").samples[Path(line["audio"]).stem]
    if line["because"] == "everywhere":
        assert {other["accent"] for other in LINES if other["text"] == line["text"]} == {other["accent"] for other in LINES}
    else:
        assert {"better": 1, "worse": -1}[line["because"]] * gain(errors) > 0


def test_the_reason_gives_the_errors_of_the_results() -> None:
    clips = [
        Sample(Path(line["audio"]).stem, FOLDER / "samples" / line["audio"], line["text"], line["accent"], "", line["because"])
        for line in LINES
    ]
    errors = load(FOLDER / "results").samples
    for clip in clips:
        said = chosen_because(clip, clips)
        if clip.because == "everywhere":
            count = sum(gain(errors[other.name]) != 0 for other in clips if other.because == "everywhere")
            assert f"in {count} of 9 HDMoLE" in said
        else:
            assert f"{errors[clip.name]['hdmole']} against {errors[clip.name]['base']}" in said
            assert ("fewer" in said) == (gain(errors[clip.name]) > 0)
    assert chosen_because(Sample("unknown", clips[0].path, "", "", "", "better"), clips) == ""


def test_each_accent_on_home_opens_a_sample_on_which_methods_differ() -> None:
    results = load(FOLDER / "results")
    for accent in {line["accent"] for line in LINES}:
        clips = [
            Sample(name, Path(), "", accent, "") for name, line in zip(NAMES, LINES, strict=True) if line["accent"] == accent
        ]
        assert differs(results.samples[opening_sample(clips, results).name])


@pytest.fixture(scope="module")
def asr() -> ASR:
    return ASR.load("demo")


@pytest.mark.parametrize("clip", read_manifest(FOLDER / "samples" / "manifest.jsonl"), ids=NAMES)
def test_with_all_experts_off_every_sample_reads_as_by_the_base(asr: ASR, clip: Line) -> None:
    """Of the released model, whose extended adapter has a shared expert."""
    audio = clip.decode()
    base = asr.transcribe(audio, method="base")
    for method in asr.routed:
        gate = asr.gate(method)
        assert bool(gate.shared_expert_rank) == (method == "hdmole-extended")
        off = [*gate.accents, *([SHARED] if gate.shared_expert_rank else [])]
        heard = asr.transcribe(audio, method=method, encoded=base.encoded, intervention={"mask": off})
        assert heard.text == base.text, method
