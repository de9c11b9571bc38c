"""Manifests: lists of recordings with their texts and accents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hdmole.errors import UserError
from hdmole.speech.words import normalise


class ManifestError(UserError):
    """A manifest that cannot be used. The codes begin with `manifest.`

    Where one line is wrong, the value `number` is its number.
    """


@dataclass(frozen=True)
class Line:
    """One recording of a manifest."""

    number: int
    name: str  # of the audio, as the manifest has it
    audio: Path
    text: str
    accent: str
    speaker: str


def manifest_rows(path: Path, needed: Sequence[str] = ("audio", "text", "accent")) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON-lines file, each with its line number from 1. Empty lines are left out.

    Raises:
        ManifestError: there is no such file, it is not text in UTF-8, or a line is not a JSON
            object with every key in `needed` as text. The error names the first line that is wrong.
    """
    if not path.is_file():
        raise ManifestError(
            "manifest.absent",
            "There is no manifest {name}; give a JSON-lines file with audio, text and accent on each line.",
            name=path,
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        sentence = "{name} is not text in UTF-8; a manifest is a JSON-lines file."
        raise ManifestError("manifest.not_text", sentence, name=path.name) from None
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            sentence = "Line {number} of {name} is not valid JSON."
            raise ManifestError("manifest.not_json", sentence, number=number, name=path.name) from None
        missing = [name for name in needed if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if missing:
            raise ManifestError(
                "manifest.incomplete",
                "Line {number} of {name} has no {missing}; each line needs {needed}.",
                number=number,
                name=path.name,
                missing=" and no ".join(missing),
                needed=f"{', '.join(needed[:-1])} and {needed[-1]}",
            )
        yield number, row


def find_inside(path: Path, folders: Sequence[Path]) -> Path | None:
    """The path with its links followed, if it then lies inside one of the folders; else None.

    A path whose name alone leads out is not looked up, so that nothing tells whether it exists.
    """
    try:
        known = {root for folder in folders for root in (Path(os.path.abspath(folder)), folder.resolve())}
        if not any(Path(os.path.abspath(path)).is_relative_to(root) for root in known):
            return None
        found = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte, or links in a circle
        return None
    return found if any(found.is_relative_to(root) for root in known) else None


def read_manifest(path: Path, within: Sequence[Path] | None = None) -> list[Line]:
    """The recordings of a manifest.

    Each line has `audio` (a path relative to the manifest), `text`, `accent`, and optionally
    `speaker`. A recording without a speaker counts as a speaker of its own. Where the manifest is
    a stranger's, `within` are the folders in which its recordings must lie, links followed.

    Raises:
        ManifestError: the manifest cannot be read or is empty, a line lacks something, or a
            recording lies elsewhere or does not exist.
    """
    lines = []
    for number, row in manifest_rows(path):
        audio = path.parent / row["audio"]
        if within is not None and find_inside(audio, within) is None:
            raise ManifestError(
                "manifest.audio_elsewhere",
                "Line {number} of {name} names {audio}, which is no file that belongs to the manifest; name one in its folder.",
                number=number,
                name=path.name,
                audio=row["audio"],
            )
        if not audio.is_file():
            raise ManifestError(
                "manifest.no_such_audio",
                "Line {number} of {name} names {audio}, which does not exist beside the manifest.",
                number=number,
                name=path.name,
                audio=row["audio"],
            )
        speaker = row.get("speaker")
        if speaker in (None, ""):
            speaker = f"line-{number}"
        lines.append(Line(number, row["audio"], audio, normalise(row["text"]), row["accent"], str(speaker)))
    if not lines:
        sentence = "{name} is empty; give a JSON-lines file with audio, text and accent on each line."
        raise ManifestError("manifest.empty", sentence, name=path.name)
    return lines


def fingerprint(lines: list[Line]) -> str:
    """A digest of a manifest's lines and of the sizes and modification times of its recordings."""
    told = [
        (
            line.name,
            str(line.audio.resolve()),
            line.text,
            line.accent,
            line.speaker,
            (s := line.audio.stat()).st_size,
            s.st_mtime_ns,
        )
        for line in lines
    ]
    return sha256(json.dumps(told).encode()).hexdigest()
