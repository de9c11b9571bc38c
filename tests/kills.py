"""Commands that are killed again and again, and must go on to the same bytes. `make kills` runs it.

Usage: python tests/kills.py evaluate|compare|build KILLS [SEED]. A tiny job of this kind is done once without a kill, and once
more while it is killed at random points, over and over, with a new start from nothing whenever it was finished. The exit status
is 1 if results differ.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import soundfile
import torch
from tiny import SENTENCES, build_tiny_model, speech_like

PRELOADED = ["hdmole.speech.asr", "hdmole.study.evaluate", "hdmole.study.compare", "hdmole.demo.build", "librosa.feature"]
LONGEST = 1200.0  # seconds of a job that is not killed


def prepare(kind: str, folder: Path) -> None:
    """What a job reads."""
    build_tiny_model(folder / "model")
    if kind == "compare":
        from test_compare import corpus

        config = corpus(folder / "speech", folder / "model", ["hdmole"], 15)
        text = config.read_text().replace("[2e-3, 4e-3]", "[2e-3]").replace("[1e-3, 2e-3]", "[1e-3]").replace("[0, 1]", "[0]")
        config.write_text(text)
        return
    lines = []
    for k in range(12):
        soundfile.write(folder / f"{k}.wav", speech_like(0.5 + k / 20, k), 16_000)
        text = (
            ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"][k % 10]
            if kind == "build"
            else SENTENCES[k % 3]
        )
        accent = "US" if kind == "build" else ["general", "indian"][k % 2]
        lines.append({"audio": f"{k}.wav", "text": text, "accent": accent, "speaker": f"s{k % 4}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def do(kind: str, folder: Path, out: Path, ready: Event) -> None:
    """A job, in a process of its own; `ready` is set when it begins."""
    torch.set_num_threads(1)
    sys.argv = [kind, out.name]  # which the results record
    if kind == "evaluate":
        from hdmole.speech.asr import ASR
        from hdmole.study import evaluate

        evaluate.BATCH = 2
        asr = ASR.load(folder / "model", "cpu")
        ready.set()
        evaluate.evaluate(asr, folder / "manifest.jsonl", ["base", "hdmole"], out)
    elif kind == "compare":
        from hdmole.study import analyses, compare
        from hdmole.training import preparation

        preparation.RECOGNISER_EPOCHS, compare.SPEED_ROUNDS = (1.0, 0.5), 1  # type: ignore[assignment]
        analyses.SCALES, analyses.TOP_K, analyses.TOP_P = (1,), (1,), ()  # type: ignore[assignment]
        ready.set()
        compare.compare(folder / "speech" / "config.toml", out, lambda text: None)
    else:
        from hdmole.demo import build
        from hdmole.demo.corpus import Sizes

        small = replace(
            build.Recipe(),
            sizes=Sizes(general=24, per_accent=4, real_sentence_views=1, composed_digits=4, test_general=4, test_per_accent=2,
                        dev_general=4, dev_per_accent=2, outside=6),
            vocabulary=64, llm_sentences=60, encoder_epochs=1, llm_epochs=1, base_epochs=1, recogniser_epochs=(0.3, 0.3, 0.3),
            adapter_epochs=1, rank=1, shared_rank=1,
            encoder=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                         subsampling_conv_channels=8, layerdrop=0.0),
            llm=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2),
            projector=dict(projector_hidden_size=32, projector_layers=1, projector_heads=2, projector_intermediate_size=32),
        )  # fmt: skip
        build.Recipe.scaled = lambda self, factor: small  # type: ignore[method-assign]
        ready.set()
        build.build(out, [folder], work=out.with_name(out.name + "-work"), report=lambda text: None)


def killed(kind: str, folder: Path, out: Path, seconds: float) -> float:
    """Do a job and kill it after so many seconds. The time that it took, or 0 if it was killed.

    The processes are forks of one that has imported everything and has no threads.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ready = context.Event()
    child = context.Process(target=do, args=(kind, folder, out, ready))
    child.start()
    assert ready.wait(300)
    started = time.monotonic()
    child.join(seconds)
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), f"the job ended by itself with {child.exitcode}"
    return 0.0 if child.exitcode else time.monotonic() - started


def results(out: Path) -> dict[str, Any]:
    """Path -> content of all that a job wrote and that does not depend on the time."""
    found: dict[str, Any] = {}
    for root in (out, out.with_name(out.name + "-work")):
        for file in sorted(
            f for f in root.rglob("*") if f.is_file() and f.suffix in (".parquet", ".safetensors", ".npy", ".json")
        ):
            name = f"{root.name.replace(out.name, 'out')}/{file.relative_to(root)}"
            if "/speed/" in name or file.name in ("seconds.json", "run.json") or "-training/" in name:
                continue
            found[name] = file.read_bytes()
            if file.name == "summary.json":
                summary = json.loads(found[name])
                found[name] = {key: value for key, value in summary.items() if key not in ("provenance", "decoding_time")}
    return found


def main(kind: str, kills: int, seed: int) -> int:
    chance, done, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(kind, folder)
        needed = killed(kind, folder, folder / "whole", LONGEST)
        assert needed, "the job takes too long"
        known = results(folder / "whole")
        print(f"{kind}: {needed:.1f} s, {len(known)} files", flush=True)
        for number in range(kills):
            out, times = folder / f"killed-{number}", 0
            while not killed(kind, folder, out, chance.uniform(0.05, 0.5 + 0.1 * times) * needed):
                times += 1
            done, found = done + times, results(out)
            differing = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
            wrong += bool(differing)
            print(f"killed {times} times: " + (", ".join(differing) or "the same"), flush=True)
            if done >= kills:
                break
    print(f"{kind}: {done} kills, {wrong} results that differ")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
