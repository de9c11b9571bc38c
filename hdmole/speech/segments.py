"""Segments: the parts of a recording that a model hears one at a time."""

from __future__ import annotations

from itertools import pairwise

import librosa
import numpy as np

from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.words import character_disagreement

MARGIN = 0.08  # seconds of quiet around what a model hears
# Share of letters in which the texts of the CTC head and the LLM differ. It is smaller for a single
# utterance, and larger for several utterances in a row, on which the LLM was not trained.
AGREED = 0.4


def framed(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """The sound without the quiet before and after it.

    Both ends are cut off where they are more than 30 dB below the peak, except for `MARGIN`
    seconds. If less than that is there, silence is added. Recordings with long and with short
    pauses around the speech are then alike to the model.

    Args:
        samples: (S,) at 16 kHz.

    Returns:
        The samples of the sound, and the index in `samples` at which they begin; negative if
        silence was added.
    """
    first, last = librosa.effects.trim(samples, top_db=30, frame_length=400, hop_length=160)[1].tolist()
    margin = int(MARGIN * SAMPLE_RATE)
    first, last = first - margin, last + margin
    return np.pad(samples[max(0, first) : last], (max(0, -first), max(0, last - len(samples)))), first


def heard_whole(ctc_text: str, text: str) -> bool:
    """Whether a recording can be heard as one segment.

    It can if the transcripts of the whole by the CTC head and the LLM of the frozen base agree.
    """
    return character_disagreement(ctc_text, text) < AGREED


def cut(samples: np.ndarray, longest: float, together: bool = False) -> list[tuple[int, int]]:
    """Where to cut a long recording.

    The recording is cut in the middle of every pause. A pause lasts at least a quarter of a second,
    and its level in dB is nearer to that of the quiet parts than to that of the loud parts. A
    stretch that is still too long is cut in the middle of the quietest quarter second in the second
    half of its first `longest` seconds.

    Args:
        samples: (S,) at 16 kHz.
        longest: length of a segment in seconds.
        together: join neighbouring segments again as long as they are not longer than that.

    Returns:
        First sample and end of each segment. Segments follow each other without a gap. There is
        only one if the recording is at most `longest` seconds long.
    """
    limit, hop = int(longest * SAMPLE_RATE), SAMPLE_RATE // 100
    if len(samples) <= limit:
        return [(0, len(samples))]
    loudness = librosa.feature.rms(y=samples, frame_length=5 * hop, hop_length=hop)[0]
    level = librosa.amplitude_to_db(loudness, ref=1.0, amin=1e-5)
    low, high = np.percentile(level, [10, 95])
    # in dB; digital silence counts as 50 dB below speech
    quiet = level < max(low, high - 50) * 0.7 + high * 0.3
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
    return _joined(spans, limit) if together else spans


def _joined(spans: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Neighbouring spans as one, from the first on, as long as they last at most `limit` samples."""
    joined = spans[:1]
    for start, end in spans[1:]:
        if end - joined[-1][0] <= limit:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
