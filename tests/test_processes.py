"""Commands that several processes share under `torchrun`: the files are those of one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_compare import corpus
from tiny import ACCENTS, SENTENCES, speech_like, tiny_speech
from transformers import TrainerCallback

from hdmole.speech.asr import ASR
from hdmole.study.compare import compare
from hdmole.study.evaluate import BATCH, evaluate
from hdmole.training import preparation
from hdmole.training.adapt import Adaptation, adapt

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(450)  # two processes import torch


def torchrun(*command: object) -> str:
    """Run a program in two processes of one thread each; what they wrote to standard output."""
    found = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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
    said = torchrun("-m", "hdmole.cli", *command)
    assert said.count("| Method |") == 1  # the first process alone prints the table
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not (tmp_path / "two" / "unfinished").exists()


def train(model: Path, folder: Path, accumulation: int) -> list[float]:
    """Train HDMoLE on two batches of 24 utterances and one of three, twice over; the loss of every step.

    The adapter is saved in `folder`.
    """
    rows = [("train", "accent", ACCENTS[k % 3]) for k in range(51)]
    speech, losses = tiny_speech(folder / "speech", model, rows), Losses()
    rng = np.random.default_rng(0)
    speech.states.states[:] = rng.normal(size=speech.states.states.shape)
    speech.corpus.index["text"] = [" ".join(SENTENCES[k % 5].split()[: 1 + k % 4]) for k in range(51)]
    adapt(
        speech, Adaptation("HDMoLE", "hdmole", {"r": 2}), folder / "adapter", epochs=2, rate=1e-3, seed=0,
        report=lambda text: None, callbacks=[losses], accumulation=accumulation,
    )  # fmt: skip
    return losses.of


def without_dropout(model: Path, folder: Path) -> Path:
    """A copy of a model without dropout, which every part of a batch draws for itself."""
    shutil.copytree(model, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r'("\w*dropout\w*"): [0-9.]+', r"\1: 0.0", config))
    return folder


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.of: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.of += [logs["loss"]] if "loss" in logs else []


def test_processes_and_accumulation_train_as_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """Each batch is divided into four parts; of three utterances one part gets none."""
    model = without_dropout(tiny_model, tmp_path / "model")
    losses = [train(model, tmp_path / "one", 1), train(model, tmp_path / "four", 4)]
    (tmp_path / "program.py").write_text(
        f"import json, os, sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); here = Path(__file__).parent\n"
        f"from test_processes import train; losses = train(here / 'model', here / 'two', 2)\n"
        "(here / os.environ['RANK']).write_text(json.dumps(losses))\n"
    )
    torchrun(tmp_path / "program.py")
    losses += [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert (tmp_path / "two" / "adapter-training" / "checkpoint-6" / "rng_state_1.pth").is_file()  # of the second process
    assert len(losses[0]) == 6 and losses[0][0] > losses[0][-1]
    assert np.allclose(losses, losses[0], rtol=1e-5)
    one, four, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "four", "two"))
    for name in one:  # a weight has moved by up to 3e-3
        assert torch.allclose(four[name], one[name], atol=1e-6) and torch.allclose(two[name], one[name], atol=1e-6), name


def test_processes_compare_as_one_process(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process trains runs of its own, or all train each run together; two learning rates are tried."""
    monkeypatch.setattr(preparation, "RECOGNISER_EPOCHS", (1.0, 0.5))
    config = corpus(tmp_path / "speech", without_dropout(tiny_model, tmp_path / "model"), ["lora"], 1)
    compare(config, tmp_path / "one", lambda text: None)
    for name, more in (("shared", []), ("together", ["--together"])):
        shutil.copytree(tmp_path / "one" / "work" / "speech", tmp_path / name / "work" / "speech")
        torchrun("-m", "hdmole.cli", "compare", "--config", config, "--out", tmp_path / name, *more)
        assert files(tmp_path / name) == files(tmp_path / "one")
