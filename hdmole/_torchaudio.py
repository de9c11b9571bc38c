"""Lets torchaudio import beside a CPU build of torch.

The torchaudio wheel for Linux is linked against CUDA. Beside a CPU build of torch, `import
torchaudio` raises OSError, and peft and most of transformers import it whenever it is installed.
If its compiled extension cannot load, an empty stand-in takes its place, so that the Python part of
torchaudio works. No import is needed to find that out.
"""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path

_NAME = "torchaudio._extension"


def loads() -> bool:
    """Whether torchaudio's compiled extension can load beside the installed torch."""
    torch, torchaudio = find_spec("torch"), find_spec("torchaudio")
    if torch is None or torch.origin is None or torchaudio is None or torchaudio.origin is None:
        return False
    if list((Path(torch.origin).parent / "lib").glob("*c10_cuda*")):
        return True
    libraries = (Path(torchaudio.origin).parent / "lib").glob("*torchaudio*.so")
    return not any(b"libc10_cuda" in library.read_bytes() for library in libraries)


def guard() -> bool:
    """Put the stand-in in place if it is needed.

    Returns False if the stand-in is used, else True.
    """
    if _NAME in sys.modules:
        return bool(getattr(sys.modules[_NAME], "_IS_TORCHAUDIO_EXT_AVAILABLE", False))
    if find_spec("torchaudio") is None or loads():
        return True

    def absent(_function: object) -> object:
        def fail(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError("This needs torchaudio's compiled extension, which cannot load beside this build of torch.")

        return fail

    stand_in = types.ModuleType(_NAME)
    stand_in.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _IS_RNNT_AVAILABLE=False,
        fail_if_no_align=absent,
        fail_if_no_rnnt=absent,
        _check_cuda_version=lambda: None,
    )
    sys.modules[_NAME] = stand_in
    return False


AVAILABLE = guard()
