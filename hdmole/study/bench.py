"""Measuring speed.

All contenders are timed in one run. In every round each of them runs once. Results are medians over
the rounds, and ratios to the first contender.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hdmole.method.routing import route
from hdmole.method.tracing import trace
from hdmole.method.tuner import HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.speech.asr import ASR
from hdmole.speech.audio import decode
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


def expert_loop(layer: HDMoLELinear, x: Tensor, gate: Tensor, adapter: str = "default") -> Tensor:
    """The output of an HDMoLE layer, computed by a loop over its experts.

    Computing all experts at once is compared with it.

    Args:
        layer: the layer; its adapter has no shared expert.
        x: (..., d_in) its input.
        gate: (..., N) gate of each expert.
        adapter: name of the adapter.
    """
    config = layer.configs[adapter]
    y: Tensor = layer.base_layer(x)
    for i in range(config.experts):
        rows = slice(i * config.r, (i + 1) * config.r)
        y = y + config.scale * gate[..., i, None] * (x @ layer.hdmole_A[adapter][rows].T @ layer.hdmole_B[adapter][:, rows].T)
    return y


def layer(experts: int, rank: int, width: int, frames: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Time one linear layer, forward and backward.

    The contenders are the frozen layer, LoRA of rank `experts` * `rank`, HDMoLE, and a loop over
    HDMoLE's experts. The input is (`batch`, `frames`, `width`).
    """
    torch.manual_seed(0)
    x = torch.randn(batch, frames, width, device=device)
    posterior = torch.rand(batch, experts + 1, device=device).softmax(1)
    gate = torch.rand(batch, frames, experts, device=device)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width)).to(device)

    frozen = model().requires_grad_(False)
    lora: Any = get_peft_model(model(), LoraConfig(r=experts * rank, target_modules=["0"]))
    config = HDMoLEConfig(accents=[f"a{i}" for i in range(experts)], r=rank, target_modules=["0"])
    mixed: Any = get_peft_model(model(), config)
    inner = next(m for m in mixed.modules() if isinstance(m, HDMoLELinear))

    def step(forward: Callable[[Tensor], Tensor], routed: bool = False) -> Callable[[], None]:
        def work() -> None:
            leaf = x.clone().requires_grad_()
            if routed:
                with route(posterior):
                    forward(leaf).square().mean().backward()
            else:
                forward(leaf).square().mean().backward()

        return work

    return side_by_side(
        {
            "frozen linear": step(frozen), "LoRA": step(lora), "HDMoLE": step(mixed, True),
            "HDMoLE, loop over experts": step(lambda leaf: expert_loop(inner, leaf, gate)),
        },
        rounds,
    )  # fmt: skip


def transcription(asr: ASR, rounds: int) -> dict[str, Any]:
    """Time decoding a sample of the model by every method.

    HDMoLE adapters are timed once more while a trace is recorded. `rtf` is the time divided by the length of the audio. Raises ValueError if the model has no
    samples.
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


def bench(asr: ASR, rounds: int = 20) -> dict[str, Any]:
    """All times, with where they were measured. Raises ValueError if the model has no samples."""
    device = str(asr.device)
    return {
        "layer": layer(8, 2, 512, 120, 16, rounds, device),
        "transcription": transcription(asr, rounds),
        "provenance": {**provenance(0, device).to_dict(), "rounds": rounds, "threads": torch.get_num_threads()},
    }
