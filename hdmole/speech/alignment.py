"""Alignment of tokens to the frames of a CTC head."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor


def align(log_probs: Tensor, tokens: list[int], blank: int = 0) -> tuple[list[tuple[int, int]], float] | None:
    """The most probable alignment of tokens to frames.

    It is found by Viterbi search over the CTC states of Graves et al. (2006).

    Args:
        log_probs: (T, vocabulary) log-probabilities of a CTC head.
        tokens: ids of the tokens that were said; none of them is the blank.
        blank: id of the CTC head's blank.

    Returns:
        The first and the last frame of each token, and the mean log-probability per frame (nats) of
        the path. None if there is no path: there are no tokens, there are too few frames for them
        (equal neighbours need a blank between them), or a token lies outside the vocabulary.
    """
    scores = log_probs.detach().float().cpu().numpy()
    frames, count = len(scores), len(tokens)
    repeats = sum(a == b for a, b in pairwise(tokens))
    if count == 0 or frames < count + repeats or max(tokens) >= scores.shape[1]:
        return None
    states = np.full(2 * count + 1, blank)  # blank, token, blank, token, ..., blank
    states[1::2] = tokens
    # a token may follow the one before it directly, unless it is the same
    skip = np.zeros(len(states), bool)
    skip[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), -np.inf)  # score of the best path that ends in each state
    best[:2] = scores[0, states[:2]]
    # how many states the best path advanced to get here
    back = np.zeros((frames, len(states)), np.int8)
    for t in range(1, frames):
        options = np.full((3, len(states)), -np.inf)
        options[0] = best
        options[1, 1:] = best[:-1]
        options[2, 2:] = np.where(skip[2:], best[:-2], -np.inf)
        back[t] = options.argmax(0)
        best = options.max(0) + scores[t, states]
    state = len(states) - 1 if best[-1] > best[-2] else len(states) - 2
    total = float(best[state]) / frames
    path = np.zeros(frames, int)
    for t in range(frames - 1, -1, -1):
        path[t] = state
        state -= int(back[t, state])
    spans = []
    for k in range(count):
        inside = np.flatnonzero(path == 2 * k + 1)
        spans.append((int(inside[0]), int(inside[-1])))
    return spans, total
