"""HDMoLE, arXiv 2409.19878: LoRA experts with hierarchical routing and dynamic thresholds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import hdmole._torchaudio  # noqa: F401  (before anything imports peft or transformers)

__version__ = "0.2.0"

_EXPORTS = {
    "HDMoLEConfig": "hdmole.method.tuner",
    "HDMoLEModel": "hdmole.method.tuner",
    "HDMoLELinear": "hdmole.method.tuner",
    "AccentRecogniser": "hdmole.method.recogniser",
    "auxiliary_losses": "hdmole.method.routing",
    "export_lora": "hdmole.method.tuner",
    "route": "hdmole.method.tuner",
    "warm_start": "hdmole.method.tuner",
    "trace": "hdmole.method.tracing",
    "Trace": "hdmole.method.tracing",
    "intervene": "hdmole.method.intervention",
    "ASR": "hdmole.speech.asr",
    "Audio": "hdmole.speech.audio",
    "AudioError": "hdmole.speech.audio",
    "decode": "hdmole.speech.audio",
    "read_manifest": "hdmole.speech.manifest",
    "normalise": "hdmole.speech.words",
    "count_errors": "hdmole.speech.words",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:  # PEP 562; torch is imported only on first use
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hdmole' has no attribute {name!r}")
    try:
        module = import_module(_EXPORTS[name])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"hdmole.{name} needs {error.name}, which is not installed; install it with: pip install 'hdmole[study]'",
            name=error.name,
        ) from error
    return getattr(module, name)
