"""The layer's speed: what is timed computes what it should, and how times become ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from typer.testing import CliRunner

from hdmole import HDMoLEConfig, intervene, route
from hdmole.cli import app
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.study.bench_layer import (
    adamole,
    contenders,
    dispatched,
    expert_loop,
    mixlora,
    operations,
    peak_memory,
    rows,
    speed_tables,
)


def layer_of(size: int = 6) -> tuple[Any, HDMoLELinear]:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(size, 5)), HDMoLEConfig.extended(["a", "b", "c"], r=2, target_modules=["0"])
    )
    layer = next(m for m in model.modules() if isinstance(m, HDMoLELinear))
    torch.nn.init.normal_(layer.hdmole_B["default"])
    return model, layer


def test_the_loops_that_are_timed_compute_what_the_layer_does() -> None:
    model, layer = layer_of()
    x, gate = torch.randn(2, 4, 6), torch.tensor([0.2, 0.0, 0.9])
    with route(torch.full((2, 4), 0.25)), intervene(model, gate=gate):
        expected = model(x)
    torch.testing.assert_close(expert_loop(layer, x, gate.expand(2, 4, 3)), expected)
    torch.testing.assert_close(dispatched(layer, x, gate.expand(2, 4, 3)), expected)


@pytest.mark.parametrize(
    ("other", "weights"),
    [
        ("mixlora", [[0.0, 2 / 3, 1 / 3], [0.5, 0.0, 0.5]]),
        ("adamole", [[0.0, 0.35 / 0.4, 0.05 / 0.4], [0.3 / 0.7, 0.1 / 0.7, 0.3 / 0.7]]),
    ],
)
def test_the_other_mixtures_choose_as_their_papers_say(other: str, weights: list[list[float]]) -> None:
    """Of the probabilities 0.1, 0.6, 0.3 and 0.4, 0.2, 0.4, by thresholds of 1/4 and 0.1."""
    _, layer = layer_of(2)
    layer.hdmole_router["default"].data = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4]]).log().T.contiguous()
    x = torch.eye(2)[None]
    threshold = torch.nn.Linear(2, 1, bias=False)
    threshold.weight.data = torch.tensor([[3.0, 3 / 7]]).log()  # sigmoid: 3/4 and 0.3, of 1/3
    got: Tensor = mixlora(layer, x) if other == "mixlora" else adamole(layer, x, threshold)
    torch.testing.assert_close(got, expert_loop(layer, x, torch.tensor([weights])))


def test_all_contenders_but_the_frozen_layer_learn() -> None:
    with route(torch.full((1, 9), 1 / 9)):
        for name, layer in contenders(16, 3, "cpu", torch.float32).items():
            x = torch.randn(1, 3, 16, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            assert y.shape == (1, 3, 16) and x.grad is not None, name


def test_a_ratio_is_the_median_over_rounds_of_the_times_in_one_round() -> None:
    lora, other = rows({"LoRA": [1.0, 2.0, 4.0, 1.0, 1.0], "HDMoLE": [2.0, 2.0, 2.0, 1.0, 3.0]}, width=8)
    assert (lora["ratio"], lora["low"], lora["high"], lora["seconds"], lora["rounds"]) == (1, 1, 1, 1, 5)
    # 2, 1, 0.5, 1, 3
    assert (other["ratio"], other["low"], other["high"], other["seconds"]) == (1, 1, 2, 2)
    assert other["width"] == 8 and other["contender"] == "HDMoLE"


def test_operations_are_counted_without_views() -> None:
    a = torch.ones(4)
    assert operations(lambda: (a + a) * a) == 2
    assert operations(lambda: a.view(2, 2).sum()) == 1


def test_peak_memory_is_what_is_needed_at_once() -> None:
    size = 1 << 20  # a tensor of four bytes each

    def work() -> None:
        for _ in range(3):  # one after the other
            a = torch.zeros(size)
            b = a + 1
            del a, b

    assert peak_memory(work, "cpu") == pytest.approx(8 * size, rel=0.01)


def test_bench_layer_prints_every_case_and_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    done = CliRunner().invoke(app, ["bench", "layer", "--width", "16", "--seconds", "0", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert len(done.stdout.splitlines()) == 5 and not found["failed"]
    cases = {(row["what"], row["frames"]) for row in found["rows"]}
    assert cases == {("token", 1), ("forward", 250), ("forward", 3000), ("training", 250), ("training", 3000)}
    assert {row["contender"] for row in found["rows"]} == set(contenders(16, 1, "cpu", torch.float32))
    assert all(row["low"] <= row["ratio"] <= row["high"] and row["rounds"] == 5 for row in found["rows"])
    [memory] = found["memory"]
    assert memory["HDMoLE"] > memory["frozen layer"] >= 4 * 16 * 3000
    assert found["origin"]["torch"] == torch.__version__


def test_the_page_about_speed_has_what_was_measured() -> None:
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "speed.md").read_text()
    found = page.split("<!-- speed -->\n")[1].split("\n<!-- /speed -->")[0]
    assert found == speed_tables(root / "assets" / "results" / "bench") and "| floor |" in found


def test_the_tables_of_speed(tmp_path: Path) -> None:
    times = {"frozen layer": [1.0] * 5, "LoRA": [2.0] * 5, "HDMoLE": [2.0, 2.0, 2.5, 3.0, 3.0], "loop": [5.0] * 5}
    case = {"width": 64, "what": "token", "frames": 1, "precision": "float32"}
    found = {
        "origin": {
            "machine": "Chip", "threads": 1, "torch": "2", "date": "today", "commit": "0123456789abcdef", "experts": 8, "rank": 4,
        },
        "rows": rows(times, **case, way="eager"), "memory": [{**case, "LoRA": 2_000_000, "HDMoLE": 2_100_000}],
        "operations": [{**case, "LoRA": 5, "HDMoLE": 14}], "failed": [],
    }  # fmt: skip
    (tmp_path / "layer-cpu.json").write_text(json.dumps(found))
    assert (
        speed_tables(tmp_path)
        == """\
**Chip**, 1 threads, torch 2, today, commit 0123456789ab.

| HDMoLE / LoRA | budget | 64 wide |
|---|---:|---:|
| floor | | 1.062 |
| one token | 1.15 | 1.25 (1.00 to 1.50) |

| time / HDMoLE's | loop |
|---|---:|
| one token | 2.0 to 2.0 |

- Peak memory of a training step, 64 wide, 3000 frames, float32: 1.050 of LoRA's 2 MB (budget 1.05).
- Operations of one token, float32: 14, LoRA 5."""
    )
