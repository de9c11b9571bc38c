"""Commands that several processes share under `torchrun`: the files are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from tiny import SENTENCES, speech_like

from hdmole.speech.asr import ASR
from hdmole.study.evaluate import BATCH, evaluate

pytestmark = pytest.mark.timeout(450)  # two processes import torch


def torchrun(*arguments: object, processes: int = 2) -> str:
    """Run a command of hdmole in several processes of one thread each; what they wrote to standard output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run(
        [*launcher, "-m", "hdmole.cli", *map(str, arguments)], capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def files(out: Path) -> dict[str, Any]:
    """Name -> content of the files of a results folder, without what tells when and how they were made."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    found["summary.json"] = {**json.loads(found["summary.json"]), "provenance": None}
    return found


def test_two_processes_finish_an_evaluation_that_one_began(tiny_model: Path, tmp_path: Path) -> None:
    """Three batches; one is done when it is interrupted, and each process does one of the others."""
    lines = []
    for k in range(2 * BATCH + 3):
        soundfile.write(tmp_path / f"{k}.wav", speech_like(0.4 + 0.01 * k, k), 16_000)
        accent = ["general", "indian"][k % 2]
        lines.append({"audio": f"{k}.wav", "text": SENTENCES[k % 5], "accent": accent, "speaker": f"s{k % 4}"})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asr, methods = ASR.load(tiny_model, "cpu"), ["base", "hdmole"]
    evaluate(asr, manifest, methods, tmp_path / "one")

    def interrupt(done: float, total: int) -> None:
        if done == BATCH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(asr, manifest, methods, tmp_path / "two", progress=interrupt)
    command = [
        "evaluate",
        "--manifest",
        manifest,
        "--methods",
        ",".join(methods),
        "--model",
        tiny_model,
        "--out",
        tmp_path / "two",
    ]
    said = torchrun(*command)
    assert said.count("| Method |") == 1  # the first process alone prints the table
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not (tmp_path / "two" / "unfinished").exists()
