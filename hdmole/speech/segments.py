"""Segments: which parts of a recording a model hears at once."""

from __future__ import annotations

from itertools import pairwise

import librosa
import numpy as np

from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.words import character_disagreement

MARGIN = 0.08  # seconds of quiet around what a model hears
# Share of letters in which the texts of the CTC head and of the LLM differ. It is below this for one utterance that the model
# hears as a whole. It is above it where several utterances follow each other, which the LLM was not trained on.
AGREED = 0.4


def framed(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """The sound without the quiet before and after it.

    Whatever is quieter than 30 dB under the peak is cut off at both ends. `MARGIN` seconds of it stay; where there are fewer,
    silence is added. The model then hears every recording alike, however early the microphone was switched on.

    Args:
        samples: (S,) at 16 kHz.

    Returns:
        The samples of the sound, and where in `samples` they begin; below 0 where silence was added before them.
    """
    first, last = librosa.effects.trim(samples, top_db=30, frame_length=400, hop_length=160)[1].tolist()
    margin = int(MARGIN * SAMPLE_RATE)
    first, last = first - margin, last + margin
    return np.pad(samples[max(0, first) : last], (max(0, -first), max(0, last - len(samples)))), first


def heard_whole(ctc_text: str, text: str) -> bool:
    """Whether a recording can be heard as one segment, by what the CTC head and the LLM of the frozen base wrote of all of it."""
    return character_disagreement(ctc_text, text) < AGREED


def cut(samples: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """Where to cut a long recording.

    A pause is at least a quarter of a second that is nearer to the quiet than to the loud parts, in dB. Every pause is cut in
    its middle. What still is too long is cut in the middle of the quietest quarter second of its second half.

    Args:
        samples: (S,) at 16 kHz.
        longest: length of a segment in seconds.

    Returns:
        First sample and end of each segment. They follow each other without a gap; there is one where the recording is not
        longer than `longest`.
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
            middle = start + limit // 2 + (int(np.convolve(window, np.ones(25), "valid").argmin()) + 12) * hop
            spans.append((start, middle))
            start = middle
        spans.append((start, end))
    return spans
