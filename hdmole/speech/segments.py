"""Segments: what of a recording is heard at once."""

from __future__ import annotations

from itertools import pairwise

import librosa
import numpy as np

from hdmole.speech.audio import SAMPLE_RATE


def cut(samples: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """Spans of the samples: all of them where they last at most `longest` seconds, else from pause to pause.

    A pause is a quarter of a second nearer to the quiet than to the loud parts. What still is too long is cut in the middle
    of the quietest quarter second of its second half.
    """
    limit, hop = int(longest * SAMPLE_RATE), SAMPLE_RATE // 100
    if len(samples) <= limit:
        return [(0, len(samples))]
    loudness = librosa.feature.rms(y=samples, frame_length=5 * hop, hop_length=hop)[0]
    level = librosa.amplitude_to_db(loudness, ref=1.0, amin=1e-5)
    low, high = np.percentile(level, [10, 95])
    quiet = level < max(low, high - 50) * 0.7 + high * 0.3  # of dB; digital silence counts as 50 dB under speech
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]))).reshape(-1, 2)
    pauses = [(a + b) // 2 * hop for a, b in edges if b - a >= 25 and a > 0 and b < len(level)]
    spans: list[tuple[int, int]] = []
    for start, end in pairwise([0, *pauses, len(samples)]):
        while end - start > limit:
            window = loudness[(start + limit // 2) // hop : (start + limit) // hop] ** 2
            cut = start + limit // 2 + (int(np.convolve(window, np.ones(25), "valid").argmin()) + 12) * hop
            spans.append((start, cut))
            start = cut
        spans.append((start, end))
    return spans


MARGIN = 0.08  # seconds of quiet around what a model hears


def framed(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """The sound alone, and where in `samples` it begins: what is quieter than 30 dB under its peak is cut off both ends.

    `MARGIN` seconds stay around it, or are put there as silence; the beginning is then below 0. A model hears every recording
    alike so, however early the microphone was switched on.
    """
    first, last = librosa.effects.trim(samples, top_db=30, frame_length=400, hop_length=160)[1].tolist()
    margin = int(MARGIN * SAMPLE_RATE)
    first, last = first - margin, last + margin
    return np.pad(samples[max(0, first) : last], (max(0, -first), max(0, last - len(samples)))), first
