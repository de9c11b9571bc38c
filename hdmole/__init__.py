"""HDMoLE: mixture of LoRA experts with hierarchical routing and dynamic thresholds (arXiv 2409.19878)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import hdmole._torchaudio  # noqa: F401  (before anything imports peft or transformers)

__version__ = "0.1.0"

_EXPORTS = {
    "HDMoLEConfig": "hdmole.tuner",
    "HDMoLEModel": "hdmole.tuner",
    "AccentRecogniser": "hdmole.recogniser",
    "export_lora": "hdmole.tuner",
    "route": "hdmole.tuner",
    "warm_start": "hdmole.tuner",
    "trace": "hdmole.tracing",
    "Trace": "hdmole.tracing",
    "intervene": "hdmole.intervention",
    "ASR": "hdmole.asr",
    "decode": "hdmole.audio",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:  # PEP 562: `import hdmole` stays light: torch is imported on first use
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hdmole' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
