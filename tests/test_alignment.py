"""The alignment of tokens to frames, against every path there is and by numbers computed by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hdmole.speech.alignment import align


def frames(*likely: int, size: int = 3) -> Tensor:
    """Log-probabilities (T, size): 0.9 for the likely token of each frame, the rest shared out."""
    scores = torch.full((len(likely), size), 0.1 / (size - 1)).log()
    scores[range(len(likely)), list(likely)] = math.log(0.9)
    return scores


def collapsed(path: tuple[int, ...], blank: int) -> list[int]:
    """What CTC reads from a path: repeats once, then no blanks."""
    return [token for k, token in enumerate(path) if token != blank and (k == 0 or path[k - 1] != token)]


def spans_of(path: tuple[int, ...], blank: int) -> list[tuple[int, int]]:
    """First and last frame of each token of a path."""
    starts = [k for k, token in enumerate(path) if token != blank and (k == 0 or path[k - 1] != token)]
    ends = [k for k, token in enumerate(path) if token != blank and (k + 1 == len(path) or path[k + 1] != token)]
    return list(zip(starts, ends, strict=True))


@pytest.mark.parametrize(
    ("likely", "tokens", "spans"),
    [
        ([0, 1, 1, 0, 2, 0], [1, 2], [(1, 2), (4, 4)]),
        ([1, 2], [1, 2], [(0, 0), (1, 1)]),  # no blank between different tokens
        ([1, 0, 1], [1, 1], [(0, 0), (2, 2)]),
        ([1, 1, 1], [1, 1], [(0, 0), (2, 2)]),  # equal ones need a blank, likely or not
        ([0, 0, 1], [1], [(2, 2)]),
        ([1, 0, 0], [1], [(0, 0)]),
        ([1, 1, 2, 2, 1, 1], [1, 2, 1], [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_each_token_lies_where_it_is_likely(likely: list[int], tokens: list[int], spans: list[tuple[int, int]]) -> None:
    found = align(frames(*likely), tokens)
    assert found is not None
    assert found[0] == spans
    assert all(type(frame) is int for span in found[0] for frame in span)


def test_the_score_is_the_mean_over_all_frames() -> None:
    found = align(frames(0, 1, 1, 0), [1])
    assert found is not None and found[1] == pytest.approx(math.log(0.9))
    found = align(frames(0, 1, 1, 0), [2])  # blanks at 0.9 around two frames of 0.05
    assert found is not None and found[1] == pytest.approx((2 * math.log(0.9) + 2 * math.log(0.05)) / 4)
    assert type(found[1]) is float


def test_of_equally_good_paths_a_token_lasts_longest() -> None:
    found = align(torch.full((2, 2), 0.5).log(), [1])
    assert found == ([(0, 1)], pytest.approx(math.log(0.5)))


def test_another_blank() -> None:
    found = align(frames(2, 0, 2, 1), [0, 1], blank=2)
    assert found == ([(1, 1), (3, 3)], pytest.approx(math.log(0.9)))


def test_what_does_not_fit_is_not_aligned() -> None:
    assert align(frames(1, 1, 1, 1), []) is None
    assert align(frames(1), [1, 2]) is None
    assert align(frames(1, 1), [1, 1]) is None  # needs a frame for the blank between
    assert align(frames(1, 2), [1, 3]) is None  # there is no token 3
    assert align(frames(1, 2), [1, 2]) is not None
    assert align(frames(1, 2, 1, 1), [1, 1, 2]) is not None  # three tokens and one blank in four frames
    assert align(frames(1, 2, 1), [1, 1, 2]) is None


def test_scores_of_half_precision_and_with_a_gradient_are_read_and_left_alone() -> None:
    scores = frames(0, 1, 2).bfloat16().requires_grad_()
    before = scores.detach().clone()
    found = align(scores, [1, 2])
    assert found is not None and found[0] == [(1, 1), (2, 2)]
    assert torch.equal(scores.detach(), before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.lists(st.integers(1, 2), min_size=1, max_size=4))
def test_the_alignment_is_the_best_of_all_paths(seed: int, count: int, tokens: list[int]) -> None:
    scores = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    paths = [path for path in product(range(3), repeat=count) if collapsed(path, 0) == tokens]
    found = align(scores, tokens)
    if not paths:
        assert found is None
        return
    best = max(paths, key=lambda path: sum(float(scores[k, token]) for k, token in enumerate(path)))
    assert found is not None
    assert found[0] == spans_of(best, 0)
    assert found[1] == pytest.approx(sum(float(scores[k, token]) for k, token in enumerate(best)) / count, abs=1e-5)


def test_a_transcript_of_hundreds_of_tokens() -> None:
    found = align(frames(*[1, 2] * 200), [1, 2] * 200)
    assert found is not None and found[0] == [(k, k) for k in range(400)]
