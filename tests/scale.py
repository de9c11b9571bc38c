"""Memory and time of training by hours of speech. `make scale` runs it, and writes docs/scaling.json and docs/scaling.md.

Usage: python tests/scale.py [HOURS ...]. Made-up mel features of utterances of ten seconds are written, encoded and trained on
with a tiny random model, in a process of its own for each number of hours. What grows with the hours is then the speech, not the
model. How long it takes to read recordings is measured on a few of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tiny import ACCENTS, SENTENCES, build_tiny_model, speech_like

from hdmole.files import write_between, write_json
from hdmole.method.recogniser import AccentRecogniser
from hdmole.speech.asr import ASR
from hdmole.speech.manifest import read_manifest
from hdmole.study.results import provenance
from hdmole.training.adapt import Adaptation, Speech, adapt
from hdmole.training.data import Corpus, write_corpus
from hdmole.training.preparation import corpus_of, encode_corpus

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10  # of an utterance
READ = 12  # recordings that are read
STAGES = {"write": "Mel features written", "encode": "Two views encoded", "train": "20 steps of training"}


def private() -> float:
    """Memory of this process in MB, without pages of files, which the system can drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1000


@contextmanager
def measured(into: dict[str, Any]) -> Iterator[None]:
    """Puts the seconds of the block and its highest memory into a dict."""
    into["mb"], ended, started = private(), threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(0.05):
            into["mb"] = max(into["mb"], private())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)
        into["seconds"] = round(time.monotonic() - started, 1)
        into["mb"] = round(into["mb"], 1)


def measure(hours: float, folder: Path, results: Any) -> None:
    """Write, encode and train, and put the figures into a queue."""
    torch.set_num_threads(1)
    asr, rng, count = ASR.load(folder / "model", "cpu"), np.random.default_rng(0), round(hours * 3600 / SECONDS)
    found: dict[str, Any] = {"hours": hours} | {stage: {} for stage in STAGES}

    def rows() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for k in range(count):
            about = {
                "split": "train",
                "domain": "accent",
                "accent": ACCENTS[k % 3],
                "text": SENTENCES[k % 5],
                "speaker": f"s{k % 40}",
            }
            yield (
                {**about, "utterance": f"u{k}", "seconds": SECONDS},
                rng.random((100 * SECONDS, 80), np.float32).astype(np.float16),
            )

    with measured(found["write"]):
        write_corpus(folder / f"corpus-{hours}", rows())
        corpus = Corpus(folder / f"corpus-{hours}")
    with measured(found["encode"]):
        states = encode_corpus(corpus, asr.models["base"], folder / f"states-{hours}", corpus.select("train"), 0, print)
    recogniser = AccentRecogniser(["general", *ACCENTS], channels=16)
    posteriors = np.full((count, 4), 0.25, np.float32)
    speech = Speech(corpus, states, asr.tokenizer, folder / "model", recogniser, posteriors)
    with measured(found["train"]):
        method = Adaptation("HDMoLE", "hdmole", {"r": 2})
        epochs = 20 / len(speech.batches(corpus.select("train"), 0, lambda rows: {}))
        adapt(speech, method, folder / f"adapter-{hours}", epochs=epochs, rate=1e-3, seed=0, report=print)
    results.put(found)


def reading(folder: Path) -> float:
    """Seconds in which an hour of recordings is read: decoded, cut to its speech, and made mel features."""
    for k in range(READ):
        soundfile.write(folder / f"{k}.wav", speech_like(SECONDS, k), 16_000)
    lines = [{"audio": f"{k}.wav", "text": SENTENCES[k % 5], "accent": ACCENTS[k % 3]} for k in range(READ)]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = {"train": read_manifest(folder / "m.jsonl"), "dev": [], "test": []}
    extractor, started = ASR.load(folder / "model", "cpu").extractor, time.monotonic()
    corpus_of(splits, ACCENTS, extractor, folder / "read", print)
    return round((time.monotonic() - started) * 3600 / SECONDS / READ, 1)


def table(found: list[dict[str, Any]], read: float) -> str:
    """The table of docs/scaling.md."""
    first, last = found[0], found[-1]
    hours = last["hours"] - first["hours"]
    lines = [
        "| Stage | " + " | ".join(f"Memory at {row['hours']:g} h" for row in found) + " | Growth an hour | Time an hour |",
        "|---|" + "---:|" * (len(found) + 2),
        f"| Recordings read |{' |' * (len(found) + 1)} {read:.0f} s |",
    ]
    for stage, name in STAGES.items():
        growth, took = ((last[stage][of] - first[stage][of]) / hours for of in ("mb", "seconds"))
        memory = " | ".join(f"{row[stage]['mb']:.0f} MB" for row in found)
        lines.append(f"| {name} | {memory} | {growth:.1f} MB | {'' if stage == 'train' else f'{took:.0f} s '}|")
    return "\n".join(lines)


def main(hours: list[float]) -> None:
    found: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        build_tiny_model(Path(name) / "model")
        context = get_context("spawn")
        for each in hours:
            results = context.Queue()
            child = context.Process(target=measure, args=(each, Path(name), results))
            child.start()
            found.append(results.get(timeout=3600))
            child.join(60)
            print(json.dumps(found[-1]), flush=True)
        read = reading(Path(name))
    origin = provenance(0, "cpu").to_dict()
    write_json(ROOT / "docs" / "scaling.json", {"measured": found, "read_seconds_an_hour": read, "provenance": origin})
    write_between(ROOT / "docs" / "scaling.md", "scaling", table(found, read))
    print(table(found, read))


if __name__ == "__main__":
    main([float(hours) for hours in sys.argv[1:]] or [1.0, 4.0])
