"""Lets torchaudio import beside a CPU build of torch.

The torchaudio wheel for Linux is linked against CUDA. Beside a CPU build of torch, `import torchaudio` raises OSError,
and peft and most of transformers import it whenever it is installed. Where its compiled extension does not load, an
empty stand-in takes its place, and the Python half of torchaudio works.
"""

from __future__ import annotations

import importlib.util
import sys
import types


def guard() -> bool:
    """Put the stand-in in place if it is needed; True where torchaudio's own extension works."""
    name = "torchaudio._extension"
    if name in sys.modules:
        return bool(getattr(sys.modules[name], "_IS_TORCHAUDIO_EXT_AVAILABLE", False))
    if importlib.util.find_spec("torchaudio") is None:
        return False
    try:
        import torchaudio  # noqa: F401
    except (OSError, ImportError, RuntimeError):
        for loaded in [m for m in sys.modules if m == "torchaudio" or m.startswith("torchaudio.")]:
            del sys.modules[loaded]

        def absent(function: object) -> object:
            def fail(*_args: object, **_kwargs: object) -> None:
                raise RuntimeError("This needs torchaudio's compiled extension, which does not load beside this torch.")

            return fail

        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, _IS_RNNT_AVAILABLE=False,
            fail_if_no_align=absent, fail_if_no_rnnt=absent, _check_cuda_version=lambda: None,
        )  # fmt: skip
        sys.modules[name] = stand_in
        return False
    return True


AVAILABLE = guard()
