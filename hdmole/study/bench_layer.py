"""The speed of one HDMoLE layer, beside LoRA of the same rank and other mixtures of LoRA experts.

All contenders of a case take turns. A ratio is the median over the rounds of a contender's time
divided by LoRA's in the same round, with its quartiles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hdmole.files import write_text
from hdmole.method.gate import relu, top_k
from hdmole.method.routing import route
from hdmole.method.tuner import HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.study.machine import commit, processor

EXPERTS, RANK = 8, 8
WIDTHS = (512, 1024, 2048, 4096)
CASES = (("token", 1), ("forward", 250), ("forward", 3000), ("training", 250), ("training", 3000))
FROZEN, LORA, HDMOLE = "frozen layer", "LoRA", "HDMoLE"
FEWEST, MOST = 5, 200  # rounds
Layer = Callable[[Tensor], Tensor]


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


def dispatched(layer: HDMoLELinear, x: Tensor, weights: Tensor, adapter: str = "default") -> Tensor:
    """The same output, but an expert gets only the frames whose weight (..., N) for it is not 0.

    AdaMoLE and MixLoRA compute their layers in this way.
    """
    config = layer.configs[adapter]
    y: Tensor = layer.base_layer(x)
    flat, out = x.flatten(0, -2), y.flatten(0, -2)
    for i, weight in enumerate((config.scale * weights).flatten(0, -2).to(x.dtype).unbind(-1)):
        frames, rows = weight.nonzero()[:, 0], slice(i * config.r, (i + 1) * config.r)
        expert = flat[frames] @ layer.hdmole_A[adapter][rows].T @ layer.hdmole_B[adapter][:, rows].T
        out = out.index_add(0, frames, weight[frames, None] * expert)
    return out.view_as(y)


def adamole(layer: HDMoLELinear, x: Tensor, threshold: nn.Linear, adapter: str = "default") -> Tensor:
    """AdaMoLE (arXiv 2405.00361): the experts whose probability exceeds a threshold of the frame.

    The threshold is sigmoid(w x + b) / N. Weights are in proportion to what exceeds it.
    """
    probabilities = functional.linear(x, layer.hdmole_router[adapter]).float().softmax(-1)
    tau = torch.sigmoid(threshold(x)[..., 0].float()) / layer.configs[adapter].experts
    return dispatched(layer, x, relu(probabilities, tau), adapter)


def mixlora(layer: HDMoLELinear, x: Tensor, adapter: str = "default") -> Tensor:
    """MixLoRA (arXiv 2404.15159): the two most probable experts of a frame, renormalised."""
    return dispatched(layer, x, top_k(functional.linear(x, layer.hdmole_router[adapter]).float().softmax(-1), 2), adapter)


def contenders(width: int, frames: int, device: str, dtype: torch.dtype) -> dict[str, Layer]:
    """Every layer of the comparison, `width` wide, for inputs (1, `frames`, `width`).

    All have 8 experts of rank 8, and LoRA has rank 64. X-LoRA is PEFT's layer with given scalings,
    so that its classifier, a second pass of the whole model, is not counted.
    """
    torch.manual_seed(0)

    def adapted(config: Any) -> Any:
        with torch.device(device):
            return get_peft_model(nn.Sequential(nn.Linear(width, width)), config).to(dtype)

    config = HDMoLEConfig(accents=[f"a{i}" for i in range(EXPERTS)], r=RANK, target_modules=["0"])
    inner = adapted(config).base_model.model[0]
    nn.init.normal_(inner.hdmole_B["default"], std=0.02)
    several = adapted(LoraConfig(r=RANK, target_modules=["0"]))
    for i in range(1, EXPERTS):
        several.add_adapter(str(i), LoraConfig(r=RANK, target_modules=["0"]))
    of_peft = several.to(device, dtype).base_model.model[0]
    of_peft.set_adapter(list(of_peft.lora_A))
    scalings = torch.rand(1, frames, 1, EXPERTS, device=device).softmax(-1).to(dtype)
    owner: Any = SimpleNamespace(disabled=False)
    xlora = XLoraLinearLayer(
        owner, of_peft, of_peft.forward, 0, XLoraConfig(hidden_size=width, adapters={name: "" for name in of_peft.lora_A})
    )
    gate = torch.rand(1, frames, EXPERTS, device=device).to(dtype)
    threshold = nn.Linear(width, 1).to(device, dtype)
    return {
        FROZEN: nn.Linear(width, width).requires_grad_(False).to(device, dtype),
        LORA: adapted(LoraConfig(r=EXPERTS * RANK, target_modules=["0"])).base_model.model[0],
        HDMOLE: inner,
        "loop over experts": lambda x: expert_loop(inner, x, gate),
        "X-LoRA": lambda x: xlora.forward(x, scalings=scalings),
        "AdaMoLE": lambda x: adamole(inner, x, threshold),
        "MixLoRA": lambda x: mixlora(inner, x),
    }


def step(layer: Layer, x: Tensor, what: str) -> Callable[[], None]:
    """One pass of a layer. "training" is forward and backward, all else has no gradients."""
    upstream = torch.ones_like(x)

    def train() -> None:
        leaf = x.detach().requires_grad_()
        layer(leaf).backward(upstream)

    @torch.no_grad()
    def infer() -> None:
        layer(x)

    return train if what == "training" else infer


class _Count(TorchDispatchMode):
    """Counts the operations that compute something. Views do not."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not (function.is_view or any(part in str(function) for part in ("view", "detach", "empty")))
        return function(*args, **(kwargs or {}))


def operations(work: Callable[[], Any]) -> int:
    """How many operations of PyTorch `work` runs, which on a GPU are launches of kernels."""
    work()
    count: Any = _Count()  # type: ignore[no-untyped-call]
    with count:
        work()
    return int(count.number)


def peak_memory(work: Callable[[], Any], device: str) -> int:
    """The most bytes that `work` needs at once, in addition to what was there before."""
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events: Any = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(np.cumsum([size for _, size in sorted(changes)]).tolist(), default=0)


def in_turns(works: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """The times of functions that take turns, for about `seconds`.

    On a GPU a time is the mean of five calls.
    """
    calls = 5 if device.startswith("cuda") else 1

    def once(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls

    for work in works.values():  # the first call of each is slower
        once(work)
    begun, times = time.perf_counter(), {name: [once(work)] for name, work in works.items()}
    round_of = time.perf_counter() - begun
    for _ in range(min(MOST, max(FEWEST, round(seconds / round_of))) - 1):
        for name, work in works.items():
            times[name].append(once(work))
    return times


def rows(times: dict[str, list[float]], **case: Any) -> list[dict[str, Any]]:
    """One row for each contender: median time, and its ratio to LoRA's with quartiles."""
    found = []
    for name, own in times.items():
        ratio = np.array(own) / np.array(times[LORA])
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75]).round(3).tolist()
        found.append(
            {
                **case, "contender": name, "seconds": round(float(np.median(own)), 7), "ratio": middle, "low": low, "high": high,
                "rounds": len(own),
            }
        )  # fmt: skip
    return found


def _graph(work: Callable[[], Any]) -> Callable[[], None]:
    """`work` as a CUDA graph, which starts all its kernels at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def bench_layer(
    device: str = "cpu",
    seconds: float = 1.0,
    widths: tuple[int, ...] = WIDTHS,
    within: float = 1e9,
    file: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the layer in every case.

    The cases are one token, and 250 and 3000 frames forward, and forward and backward. LoRA,
    HDMoLE and the frozen layer run in all of them, the other mixtures with one token and 250
    frames. On a GPU they run in float32 and bfloat16, then LoRA and HDMoLE also compiled, and one
    token as a CUDA graph.

    Args:
        device: "cpu" or "cuda".
        seconds: how long a case is measured, at least 5 rounds.
        widths: d_in and d_out of the layer.
        within: no case begins after so many seconds.
        file: JSON file that is written after every case.
        report: gets a line of text for every case.

    Returns:
        `rows`, `memory` (bytes of a training step) and `operations` by contender, the cases that
        `failed` with their error, and `origin`.
    """
    begun, gpu = time.perf_counter(), device.startswith("cuda")
    processor_name = torch.cuda.get_device_name(device) if gpu else processor()
    found: dict[str, Any] = {
        "origin": {
            "commit": commit(Path(__file__).resolve().parent.parent.parent),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": processor_name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "experts": EXPERTS, "rank": RANK,
        },
        "rows": [], "memory": [], "operations": [], "failed": [],
    }  # fmt: skip
    posterior = torch.rand(1, EXPERTS + 1, device=device).softmax(1)

    def save() -> None:
        if file is not None:
            write_text(file, json.dumps(found, indent=1) + "\n")

    def keep(new: list[dict[str, Any]]) -> None:
        found["rows"] += new
        named = {row["contender"]: row for row in new}
        case = new[0]
        ratios = ", ".join(f"{name} {row['ratio']:.2f}" for name, row in named.items() if name != LORA)
        report(
            f"{case['width']:5} {case['what']:8} {case['frames']:5} {case['precision']:8} {case['way']:8} "
            f"LoRA {1e3 * named[LORA]['seconds']:9.3f} ms; in multiples of it: {ratios}"
        )
        save()

    def measure(width: int, what: str, frames: int, dtype: torch.dtype, way: str) -> None:
        layers = contenders(width, frames, device, dtype)
        if frames > 250 or way != "eager":
            layers = {name: layers[name] for name in (FROZEN, LORA, HDMOLE)}
        if way == "compiled":
            torch._dynamo.reset()
            layers = {name: torch.compile(layer, dynamic=False) for name, layer in layers.items()}
        x = torch.randn(1, frames, width, device=device).to(dtype)
        case = {"width": width, "what": what, "frames": frames, "precision": str(dtype).removeprefix("torch.")}
        works = {name: step(layer, x, what) for name, layer in layers.items()}
        if way == "graph":
            works = {name: _graph(work) for name, work in works.items()}
        keep(rows(in_turns(works, seconds, device), **case, way=way))
        if way == "eager" and what != "forward":
            own = {name: works[name] for name in (FROZEN, LORA, HDMOLE)}
            if frames == 3000:
                found["memory"].append({**case, **{name: peak_memory(work, device) for name, work in own.items()}})
            elif width == widths[0]:
                found["operations"].append({**case, **{name: operations(work) for name, work in own.items()}})

    precisions = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
    cases = [(w, *case, precisions[0], "eager") for w in widths for case in CASES]
    if gpu:
        cases += [(w, *CASES[0], torch.bfloat16, "graph") for w in widths]
        cases += [
            (w, *case, torch.bfloat16, "compiled") for case in (CASES[0], CASES[3], CASES[1]) for w in (widths[0], widths[-1])
        ]
        cases += [(w, *case, torch.float32, "eager") for w in widths for case in CASES]
    with route(posterior):
        for case in cases:
            if time.perf_counter() - begun < within:
                try:
                    measure(*case)
                except RuntimeError as error:  # out of memory, or code that the compiler does not understand
                    found["failed"].append({"case": str(case), "error": str(error)[:500]})
                    report(f"{case} failed: {error}"[:200])
    found["origin"]["took"] = round(time.perf_counter() - begun, 1)
    save()
    return found


def speed_tables(folder: Path) -> str:
    """What the files `layer-*.json` of `bench_layer` in `folder` say, as markdown.

    There is a section for each file.

    A cell of the first table is the time of HDMoLE divided by LoRA's, with its quartiles. "Floor"
    is the same ratio of multiplications, 1 + N / (d + 2 N r).
    """
    return "\n\n".join(_section(json.loads(file.read_text())) for file in sorted(folder.glob("layer-*.json")))


def _section(found: dict[str, Any]) -> str:
    origin = found["origin"]
    by_case: dict[tuple[str, int, str, str], dict[str, dict[int, Any]]] = {}
    for row in found["rows"]:
        case = (row["what"], row["frames"], row["precision"], row["way"])
        by_case.setdefault(case, {}).setdefault(row["contender"], {})[row["width"]] = row
    widths = sorted({row["width"] for row in found["rows"]})
    others = list(dict.fromkeys(r["contender"] for r in found["rows"] if r["contender"] not in (FROZEN, LORA, HDMOLE)))
    gpu = any(row["precision"] == "bfloat16" for row in found["rows"])
    budget = {"token": 1.15, **dict.fromkeys(("forward", "training"), 1.15 if gpu else 1.10)}
    floor = [1 + origin["experts"] / (width + 2 * origin["experts"] * origin["rank"]) for width in widths]
    lines = [
        f"**{origin['machine']}**, {origin['threads']} threads, torch {origin['torch']}, {origin['date']}, commit "
        f"{origin['commit'][:12]}{' with local changes' if 'local' in origin['commit'] else ''}.", "",
        "| HDMoLE / LoRA | budget | " + " | ".join(f"{width} wide" for width in widths) + " |",
        "|---|---:|" + "---:|" * len(widths),
        "| floor | | " + " | ".join(f"{value:.3f}" for value in floor) + " |",
    ]  # fmt: skip

    def name(case: tuple[str, int, str, str]) -> str:
        what, frames, precision, way = case
        kind = {"token": "one token", "training": "forward and backward"}.get(what, what)
        how = ", ".join(part for part in (precision if gpu else "", "" if way == "eager" else way) if part)
        return kind + ("" if what == "token" else f", {frames} frames") + (f" ({how})" if how else "")

    for case, cells in by_case.items():
        own = [cells[HDMOLE].get(width) for width in widths]
        shown = [f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if row else "" for row in own]
        lines.append(f"| {name(case)} | {budget[case[0]]:.2f} | " + " | ".join(shown) + " |")
    lines += ["", "| time / HDMoLE's | " + " | ".join(others) + " |", "|---|" + "---:|" * len(others)]
    for case, cells in by_case.items():
        if not set(others) <= set(cells):
            continue
        spans = []
        for other in others:
            times = [cells[other][w]["ratio"] / cells[HDMOLE][w]["ratio"] for w in widths if w in cells[other]]
            spans.append(f"{min(times):.1f} to {max(times):.1f}")
        lines.append(f"| {name(case)} | " + " | ".join(spans) + " |")
    lines += [""]
    for entry in found["memory"]:
        lines.append(
            f"- Peak memory of a training step, {entry['width']} wide, 3000 frames, {entry['precision']}: "
            f"{entry[HDMOLE] / entry[LORA]:.3f} of LoRA's {entry[LORA] / 1e6:.0f} MB (budget 1.05)."
        )
    for entry in found["operations"]:
        kind = "one token" if entry["what"] == "token" else "forward and backward"
        lines.append(f"- Operations of {kind}, {entry['precision']}: {entry[HDMOLE]}, LoRA {entry[LORA]}.")
    lines += [f"- Not measured: {entry['case']}: {entry['error'].splitlines()[0]}" for entry in found["failed"]]
    return "\n".join(lines)
