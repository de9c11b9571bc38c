"""The PEFT tuner. Importing this package makes PEFT know `HDMoLEConfig`."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hdmole.method.routing import RoutingError, checkpoint_contexts, route
from hdmole.method.tuner.config import HDMOLE, HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.method.tuner.lora import export_lora, warm_start
from hdmole.method.tuner.model import HDMoLEModel

PEFT_TYPE_TO_CONFIG_MAPPING[HDMOLE] = HDMoLEConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[HDMOLE] = HDMoLEModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[HDMOLE] = HDMoLEModel.prefix  # type: ignore[index]

__all__ = [
    "HDMoLEConfig",
    "HDMoLELinear",
    "HDMoLEModel",
    "RoutingError",
    "checkpoint_contexts",
    "export_lora",
    "route",
    "warm_start",
]
