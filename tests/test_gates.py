"""What the app says and draws of a gate: its words, its scale, and the picture on Home."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from app.gates import carriers, even_weight, in_words, largest_weight
from hdmole import HDMoLEConfig
from hdmole.method.gate import THRESHOLDS, dynamic

ROOT = Path(__file__).resolve().parent.parent
ACCENTS = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, [0.7, 0.5, 0.375]),  # the second layer has 0.5 + 0.2, the first 0.25 + 0.375
        ({"routing": "global"}, [0.5, 0.5, 0.375]),
        ({"routing": "local"}, [0.375, 0.5, 0.375]),
        ({"combination": "convex"}, [0.5, 0.5, 0.375]),
        ({"combination": "product"}, [1, 0.5, 0.375]),
        ({"thresholds": "relu"}, [2, 1, 1]),
        ({"thresholds": "relu", "routing": "local"}, [1, 1, 1]),
        ({"thresholds": "top_k", "combination": "convex"}, [1, 1, 1]),
        ({"thresholds": "dense", "combination": "product"}, [1, 1, 1]),
    ],
)
def test_the_scale_of_a_gate_ends_at_the_weight_of_an_expert_alone(switches: dict[str, Any], expected: list[float]) -> None:
    table = pd.DataFrame({"layer": ["x", "y"], "tau_global": [0.25, 0.5], "tau_local": [0.375, 0.2], "gate": [0.01, 0.02]})
    gate = HDMoLEConfig(accents=ACCENTS, **switches)
    assert [largest_weight(gate, table, which) for which in ("gate", "global_gate", "local_gate")] == expected
    dead = table.assign(tau_global=-0.1, tau_local=0.0)
    assert largest_weight(HDMoLEConfig(accents=ACCENTS), dead, "gate") == 0.01  # a scale must have a length


def test_evenly_shared_weights_are_those_of_the_caption() -> None:
    """The paper's weights sum to 0.25 + 0.375 in the layer; ours sum to 2, times the mass."""
    layer = pd.DataFrame({"tau_global": [0.25, 0.25], "tau_local": [0.375, 0.375], "mass": [0.5, 0.7]})
    assert even_weight(HDMoLEConfig(accents=ACCENTS), layer, "gate") == pytest.approx(0.625 / 4)
    ours = HDMoLEConfig.extended(ACCENTS)
    assert even_weight(ours, layer, "gate") == pytest.approx(0.6 * 2 / 4)
    assert even_weight(ours, layer, "local_gate") == pytest.approx(1 / 4)  # the mass scales the sum of both


def test_who_carries_most_is_said_in_percent() -> None:
    carried = pd.DataFrame({"accent": ["german", "indian", "shared"], "carried": [20.4, -5.0, 84.6]})
    assert carriers(carried) == "Shared expert (85 %), then German (20 %)"


def test_each_gate_is_described() -> None:
    said = {}
    for thresholds in THRESHOLDS:
        routing = "local" if thresholds == "sparsegen" else "hierarchical"
        said[thresholds] = in_words(HDMoLEConfig(accents=ACCENTS, thresholds=thresholds, routing=routing, top_k=3, top_p=0.8))
    assert len(set(said.values())) == len(THRESHOLDS) and not any("{" in words for words in said.values())
    assert "The 3 experts of" in said["top_k"] and "reach 0.8 in all" in said["top_p"]
    assert "local" not in in_words(HDMoLEConfig(accents=ACCENTS, routing="global"))
    ours = in_words(HDMoLEConfig.extended(ACCENTS, shared_expert_rank=4))
    assert "accented at all" in ours and "shared expert" in ours
    assert "accented" not in said["dynamic"] and "shared expert" not in said["dynamic"]


def test_the_picture_on_home_is_of_the_papers_gate() -> None:
    """Its bars are P_g and P_l of eight experts in six moments, its lines the thresholds, its discs the gate."""
    drawn = (ROOT / "assets" / "ui" / "method.svg").read_text()
    number = r"[\d.]+"

    def bars(top: bool) -> torch.Tensor:
        found = []
        for height, moments in re.findall(
            rf'<rect x="{number}" width="20" y="{number}" height="({number})"[^>]*>(.*)</rect>', drawn
        ):
            animated = re.search(r'attributeName="height" values="([^"]+)"', moments)
            if bool(animated) != top:
                found.append([float(v) for v in animated[1].split(";")] if animated else [float(height)] * 6)
        return torch.tensor(found, dtype=torch.float64).T / 130  # (moments, experts); a bar of 130 is a probability of 1

    lines = [float(y) for y in re.findall(rf'<line x1="234" x2="456" y1="({number})"[^>]*dasharray', drawn)]
    tau_global, tau_local = (128 - lines[0]) / 130, (284 - lines[1]) / 130
    weights = dynamic(bars(True), tau_global) + dynamic(bars(False), tau_local)
    assert weights.shape == (6, 8) and bars(True).sum(1).tolist() == pytest.approx([1] * 6, abs=1e-3)
    assert bars(False).sum(1).tolist() == pytest.approx([1] * 6, abs=1e-3)
    discs = re.findall(r'<circle [^>]*><animate attributeName="opacity" values="([^"]+)"', drawn)
    opacity = torch.tensor([[float(v) for v in values.split(";")] for values in discs], dtype=torch.float64).T
    share = weights / (tau_global + tau_local)
    torch.testing.assert_close(opacity, torch.where(weights > 0, 0.3 + 0.7 * share, 0.08), atol=0.006, rtol=0)
    assert weights.sum(1).tolist() == pytest.approx([tau_global + tau_local] * 6)  # both routers have experts on
