"""Which parts of a recording are heard at once: the frame of quiet, the choice whole or cut, the cuts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdmole.speech.segments import cut, framed, heard_whole

RATE = 16_000


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


def test_what_is_short_enough_is_not_cut() -> None:
    assert cut(loud(3.0), 3.0) == [(0, 3 * RATE)]
    assert len(cut(loud(3.1), 3.0)) == 2


def test_long_audio_is_cut_where_it_is_quietest() -> None:
    samples = loud(50.0)
    for second in (14, 33):
        samples[second * RATE : second * RATE + 6_000] *= 0.9  # hardly quieter, but longer than any chance
    spans = cut(samples, 20.0)
    assert [end for _, end in spans[:-1]] == pytest.approx([14.19 * RATE, 33.19 * RATE], abs=0.1 * RATE)


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_long_audio_is_cut_at_its_pauses(noise: float) -> None:
    rng = np.random.default_rng(0)
    spoken = [(k * 2.5 + 0.3, k * 2.5 + 2.2) for k in range(6)]  # 0.6 s between them
    samples = rng.normal(0, noise, 15 * RATE) if noise else np.zeros(15 * RATE)
    for start, end in spoken:
        samples[int(start * RATE) : int(end * RATE)] += rng.normal(0, 0.1, int(end * RATE) - int(start * RATE))
        samples[int(start * RATE) + RATE :][:1600] = 0  # the closure of a consonant is no pause
    spans = np.array(cut(samples.astype(np.float32), 8.0)) / RATE
    assert spans[:-1, 1] == pytest.approx([2.5 * k for k in range(1, 6)], abs=0.05)
    assert cut(samples.astype(np.float32), 20.0) == [(0, 15 * RATE)]


@given(st.lists(st.tuples(st.floats(0.4, 4.0), st.floats(0.05, 0.8)), min_size=1, max_size=6), st.floats(1.0, 3.0))
@settings(max_examples=25, deadline=None)
def test_segments_cover_the_recording_and_none_is_too_long(stretches: list[tuple[float, float]], longest: float) -> None:
    """Loud stretches with pauses of 0.05 to 0.8 s after each; those of at least 0.4 s are sure to be found."""
    samples = np.concatenate([part for k, (a, b) in enumerate(stretches) for part in (loud(a, k), quiet(b))])
    spans = cut(samples, longest)
    assert spans[0][0] == 0 and spans[-1][1] == len(samples) and all(one[1] == other[0] for one, other in pairwise(spans))
    assert all(0 < end - start <= int(longest * RATE) for start, end in spans)
    if len(samples) > int(longest * RATE):
        cuts, at = [end for _, end in spans[:-1]], 0.0
        for spoken, pause in stretches[:-1]:
            at += spoken
            if pause >= 0.4:
                assert any(at * RATE < c < (at + pause) * RATE for c in cuts), (at, pause)
            at += pause
