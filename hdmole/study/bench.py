"""Measuring the speed of decoding; `hdmole.study.bench_layer` measures that of a layer.

All contenders are timed in one run. In every round each of them runs once. Results are medians over
the rounds, and ratios to the first contender.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from hdmole.method.tracing import trace
from hdmole.speech.asr import ASR
from hdmole.speech.audio import Audio, decode
from hdmole.speech.transcript import AT_ONCE
from hdmole.study.results import provenance


def side_by_side(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Time functions that take turns.

    One round of warming up is not counted.

    Args:
        contenders: name -> what is timed.
        rounds: how often each is timed.

    Returns:
        For each name the median time in `seconds`, and its `ratio` to that of the first.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - started)
    first = median(next(iter(times.values())))
    return {name: {"seconds": round(median(t), 6), "ratio": round(median(t) / first, 3)} for name, t in times.items()}


def transcription(asr: ASR, rounds: int) -> dict[str, Any]:
    """Time decoding a sample of the model by every method.

    HDMoLE adapters are timed once more while a trace is recorded. `rtf` is the time divided by the
    length of the audio. Raises ValueError if the model has no samples.
    """
    clips = sorted((asr.folder / "samples").glob("*.flac"))
    if not clips:
        raise ValueError(f"{asr.folder} has no samples to time; use a model that comes with some, such as demo.")
    segments = asr.segment(decode(clips[0]))

    def traced(method: str) -> None:
        with trace(asr.models[method]):
            asr.decode_batch(segments, method)

    contenders: dict[str, Callable[[], Any]] = {m: partial(asr.decode_batch, segments, m) for m in asr.methods}
    contenders |= {f"{method}, traced": partial(traced, method) for method in asr.routed}
    found = side_by_side(contenders, rounds)
    seconds = sum(s.seconds for s in segments)
    return {name: {**times, "rtf": round(times["seconds"] / seconds, 4)} for name, times in found.items()}


def recordings(asr: ASR, audios: Sequence[Audio], rounds: int) -> dict[str, Any]:
    """Time the transcription of recordings by every method, from samples to words and in-domain
    score: one recording after the other, and all together, which `ASR.transcribe_all` does.

    `rtf` is the time divided by the length of all recordings.
    """
    contenders: dict[str, Callable[[], Any]] = {}
    for method in asr.methods:
        contenders[method] = partial(_each, asr, audios, method)
        contenders[f"{method}, together"] = partial(_together, asr, audios, method)
    found, seconds = side_by_side(contenders, rounds), sum(audio.seconds for audio in audios)
    return {name: {**times, "rtf": round(times["seconds"] / seconds, 4)} for name, times in found.items()}


def _each(asr: ASR, audios: Sequence[Audio], method: str) -> None:
    for audio in audios:
        asr.transcribe(audio, method)


def _together(asr: ASR, audios: Sequence[Audio], method: str) -> None:
    for k in range(0, len(audios), AT_ONCE):
        asr.transcribe_all(audios[k : k + AT_ONCE], method)


def bench(asr: ASR, rounds: int = 20, audios: Sequence[Audio] = ()) -> dict[str, Any]:
    """All times, with where they were measured.

    Without recordings, one sample of the model is decoded. Raises ValueError if it has none.
    """
    return {
        "transcription": recordings(asr, audios, rounds) if audios else transcription(asr, rounds),
        "recordings": len(audios),
        "audio_seconds": round(sum(audio.seconds for audio in audios), 1),
        "provenance": {
            **provenance(0, str(asr.device)).to_dict(), "rounds": rounds, "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
