"""The guard that lets torchaudio import beside a CPU build of torch, both ways."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from hdmole import _torchaudio


def test_where_the_extension_cannot_load_a_stand_in_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchaudio._extension", raising=False)
    monkeypatch.setattr(_torchaudio, "loads", lambda: False)
    assert _torchaudio.guard() is False
    stand_in = sys.modules["torchaudio._extension"]
    with pytest.raises(RuntimeError, match="compiled extension"):
        stand_in.fail_if_no_align(print)()
    assert _torchaudio.guard() is False  # a second call finds it


def test_where_it_loads_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchaudio._extension", raising=False)
    monkeypatch.setattr(_torchaudio, "loads", lambda: True)
    assert _torchaudio.guard() is True
    assert "torchaudio._extension" not in sys.modules


@pytest.mark.parametrize(
    ("torch_has_cuda", "linked_to_cuda", "expected"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_it_knows_from_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_has_cuda: bool, linked_to_cuda: bool, expected: bool
) -> None:
    for package in ("torch", "torchaudio"):
        (tmp_path / package / "lib").mkdir(parents=True)
    if torch_has_cuda:
        (tmp_path / "torch" / "lib" / "libc10_cuda.so").touch()
    (tmp_path / "torchaudio" / "lib" / "libtorchaudio.so").write_bytes(
        b"ELF libc10_cuda.so" if linked_to_cuda else b"ELF libc10.so"
    )
    monkeypatch.setattr(_torchaudio, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))
    assert _torchaudio.loads() is expected


@pytest.mark.skipif(find_spec("torchaudio") is None, reason="torchaudio is not installed")
def test_after_hdmole_torchaudio_imports_and_works() -> None:
    code = "import hdmole, torch, torchaudio; print(torchaudio.transforms.MelSpectrogram()(torch.zeros(1, 1600)).shape[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "128", done.stderr[-500:]
