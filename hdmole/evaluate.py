"""Evaluate methods on a manifest of recordings: errors per utterance, a summary with intervals, all in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hdmole.asr import ASR, ModelError
from hdmole.audio import AudioError, decode
from hdmole.results import count_errors, normalise, provenance, summarise, write

BATCH = 16  # utterances decoded at once


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the line and says what to do."""


@dataclass(frozen=True)
class Line:
    """One recording of a manifest."""

    number: int
    name: str  # of the audio, as the manifest has it
    audio: Path
    text: str
    accent: str
    speaker: str


def read_manifest(path: Path) -> list[Line]:
    """The lines of a JSON-lines manifest: `audio` (relative to it), `text`, `accent`, optionally `speaker`.

    Raises ManifestError naming the first line that is wrong.
    """
    if not path.is_file():
        raise ManifestError(f"There is no manifest {path}; give a JSON-lines file with audio, text and accent on each line.")
    lines = []
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ManifestError(f"{path.name} is not text in UTF-8; a manifest is a JSON-lines file.") from None
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            raise ManifestError(f"Line {number} of {path.name} is not valid JSON.") from None
        missing = [k for k in ("audio", "text", "accent") if not isinstance(row, dict) or not isinstance(row.get(k), str)]
        if missing:
            raise ManifestError(
                f"Line {number} of {path.name} has no {' and no '.join(missing)}; each line needs audio, text and accent."
            )
        audio = path.parent / row["audio"]
        if not audio.is_file():
            raise ManifestError(f"Line {number} of {path.name} names {row['audio']}, which does not exist beside the manifest.")
        speaker = row.get("speaker")
        if speaker in (None, ""):  # every recording counts as a speaker of its own
            speaker = f"line-{number}"
        lines.append(Line(number, row["audio"], audio, normalise(row["text"]), row["accent"], str(speaker)))
    if not lines:
        raise ManifestError(f"{path.name} is empty; give a JSON-lines file with audio, text and accent on each line.")
    return lines


def evaluate(
    asr: ASR,
    manifest: Path,
    methods: list[str],
    out: Path,
    *,
    accent: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Transcribe every line by every method and write `utterances.parquet` and `summary.json` to `out`.

    The domain is "general" where the manifest's accent is, else "accent". Words are compared without case and punctuation.
    `progress(done, total)` is told the number of recordings done. Returns the summary and the recordings that could not be
    read (`audio`, `error`); these are left out for all methods alike. Raises ManifestError, ModelError for a method or
    accent the model lacks, and OSError where `out` cannot be made, before anything is transcribed.
    """
    methods = list(dict.fromkeys(methods))
    if not methods:
        raise ModelError(f"No method is given; this model has {', '.join(asr.methods)}.")
    for method in methods:
        asr.check_method(method)
    asr.check_accent(accent)
    lines = read_manifest(manifest)
    out.mkdir(parents=True, exist_ok=True)
    progress(0, len(lines))
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for start in range(0, len(lines), BATCH):
        segments, owners = [], []
        for line in lines[start : start + BATCH]:
            try:
                encoded = asr.encode(decode(line.audio))
            except AudioError as error:
                failed.append({"audio": line.name, "error": str(error)})
                continue
            segments += encoded
            owners += [line] * len(encoded)
        order = sorted(range(len(segments)), key=lambda k: len(segments[k].states))
        for method in methods:
            heard: dict[int, str] = {}
            for k in range(0, len(order), BATCH):
                part = order[k : k + BATCH]
                for i, result in zip(part, asr.decode_batch([segments[i] for i in part], method, accent), strict=True):
                    heard[i] = result.text
            for line in dict.fromkeys(owners):
                hypothesis = normalise(" ".join(heard[i] for i, owner in enumerate(owners) if owner is line))
                errors, words = count_errors(line.text, hypothesis)
                rows.append(
                    dict(
                        method=method, seed=seed, domain="general" if line.accent == "general" else "accent", accent=line.accent,
                        speaker=line.speaker, utterance=line.name, reference=line.text, hypothesis=hypothesis,
                        errors=errors, words=words,
                    )
                )  # fmt: skip
        progress(min(start + BATCH, len(lines)), len(lines))
    if not rows:
        raise ManifestError(
            f"None of the {len(lines)} recordings of {manifest.name} could be read; the first says: {failed[0]['error']}"
        )
    table = pd.DataFrame(rows)
    summary = summarise(table)
    for method, entry in summary["methods"].items():
        entry["trainable"] = asr.trainable(method)
    summary["failed"] = failed
    summary["provenance"] = provenance(
        seed, str(asr.device), model=asr.folder.name, manifest=manifest.name, recordings=len(lines)
    )
    write(out, table, summary)
    return summary, failed
