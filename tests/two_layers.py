"""A model of two linear layers with an adapter of three experts: what the tests of the method look
at.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from hdmole import HDMoLEConfig

ACCENTS = ["a", "b", "c"]


class Two(nn.Module):
    """Two linear layers, so that there is something to adapt."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size + 1), nn.Linear(size + 1, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        return y if labels is None else {"loss": functional.mse_loss(y, labels), "logits": y}


def adapted(model: nn.Module | None = None, seed: int = 0, **switches: Any) -> PeftModel:
    """`Two` with an adapter whose every parameter is random."""
    torch.manual_seed(seed)
    peft: Any = get_peft_model(model or Two(), HDMoLEConfig.extended(ACCENTS, target_modules=["first", "second"], **switches))  # type: ignore[arg-type]
    for name, parameter in peft.named_parameters():
        if "hdmole_" in name and "threshold" not in name:
            nn.init.normal_(parameter, std=0.5)
    return peft.eval()


def posteriors(count: int, experts: int = 3, seed: int = 0) -> Tensor:
    """Random accent posteriors (count, experts + 1)."""
    return torch.rand(count, experts + 1, generator=torch.Generator().manual_seed(seed)).softmax(1)
