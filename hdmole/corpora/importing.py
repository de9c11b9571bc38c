"""Turning a corpus into a manifest."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hdmole.corpora.kinds import read_corpus
from hdmole.corpora.rows import CorpusError, Row, table_rows
from hdmole.files import written
from hdmole.names import plain_accent

ALL_OTHERS = "*"  # in a mapping file: accents that it does not name
_TAG = re.compile(r"<[\w/+-]+>")  # of what is no speech, such as <NOISE>
_IGNORED = "ignore_time_segment_in_scoring"  # a text by which corpora say that a segment is not scored
_EVERY = 500  # recordings after which progress is reported


@dataclass
class Imported:
    """What came into a manifest, and what was left out."""

    recordings: int = 0
    speakers: int = 0
    accents: dict[str, int] = field(default_factory=dict)  # accent -> recordings
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> recordings
    first_left_out: dict[str, str] = field(default_factory=dict)  # reason -> the first that was left out

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


class AccentMap:
    """Groups accents by a table with the columns `from` and `to`.

    Names are compared as `plain_accent` does. The name `*` stands for all that the table does not
    name, an empty `from` for no accent. Recordings whose `to` is empty are left out. Corpora that
    let people describe their accents join several by "|" or by commas. Such a description is looked
    up as a whole, then its parts; where these lead to two groups, it has none.

    Raises CorpusError if the file is no such table.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._to: dict[str, str] = {}
        for row in table_rows(file) if file else ():
            if not {"from", "to"} <= set(row):
                sentence = "{name} needs a heading with the columns from and to; it has {columns}."
                raise CorpusError("corpus.bad_map", sentence, name=file, columns=", ".join(row))
            self._to[plain_accent(row["from"])] = row["to"].strip()
        self._spelt: dict[str, str] = {}

    def group(self, accent: str) -> str | None:
        """The group of an accent; None if its recordings are left out.

        An accent that the table does not name stays as it was first spelt.
        """
        found = {self._to[name] for name in [plain_accent(accent)] if name in self._to}
        found = found or {self._to[name] for name in map(plain_accent, _pieces(accent)) if name in self._to}
        if len(found) == 1:
            return next(iter(found)) or None
        if found:
            return None
        if not accent or ALL_OTHERS not in self._to:
            return self._spelt.setdefault(plain_accent(accent), accent)
        return self._to[ALL_OTHERS] or None


def _pieces(accent: str) -> list[str]:
    """The accents that a description joins by "|" or, outside of brackets, by commas."""
    pieces = accent.split("|") if "|" in accent else re.split(r",(?![^(]*\))", accent)
    return [piece.strip() for piece in pieces if piece.strip()]


def import_corpus(
    kind: str,
    folder: Path,
    out: Path,
    *,
    split: str = "",
    accents: Path | None = None,
    accent: str = "",
    columns: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Imported:
    """Write the recordings of a corpus, or of a part of it, as a manifest.

    Paths are relative where the audio lies below the manifest's folder. Embedded audio is written
    into a folder beside the manifest, named like it. Tags such as <NOISE> are taken out of texts.
    Recordings without a file, a text or an accent are left out and counted.

    Args:
        kind, folder, split, columns: see `read_corpus`.
        out: the manifest, a file that is written whole or not at all.
        accents: table that groups accents; see `AccentMap`.
        accent: that of recordings for which the corpus names none.
        progress: called now and then with the number of recordings so far.

    Raises:
        CorpusError: the corpus or the table of accents cannot be read, or nothing is left.
        ManifestError: a line of the corpus's own manifest cannot be obeyed.
        OutputError: the disk is full.
        OSError: `out` cannot be written.
    """
    groups, result = AccentMap(accents), Imported()
    speakers: set[str] = set()
    embedded = out.with_name(f"{out.stem}-audio")
    counted: Counter[str] = Counter()
    with written(out) as part, part.open("w", encoding="utf-8") as file:
        for number, row in enumerate(read_corpus(kind, folder, split, columns), 1):
            if number % _EVERY == 0:
                progress(number)
            text = " ".join(_TAG.sub(" ", row.text).split())
            group = groups.group(row.accent or accent)
            reason = _left_out(row, text, group)
            if reason:
                counted[reason] += 1
                result.first_left_out.setdefault(reason, str(row.audio))
                continue
            audio = row.audio
            if row.content is not None:
                audio = embedded / row.audio
                audio.parent.mkdir(exist_ok=True)
                audio.write_bytes(row.content)
            told: dict[str, Any] = {"audio": _named(audio, out.parent), "text": text, "accent": group, "speaker": row.speaker}
            told |= {"offset": row.offset, "duration": row.duration}
            file.write(json.dumps({k: v for k, v in told.items() if v not in ("", None, 0.0)}, ensure_ascii=False) + "\n")
            result.recordings += 1
            result.accents[str(group)] = result.accents.get(str(group), 0) + 1
            if row.speaker:
                speakers.add(row.speaker)
        result.left_out, result.speakers = dict(counted), len(speakers)
        if not result.recordings:
            raise _nothing(folder, result)
    return result


def _left_out(row: Row, text: str, group: str | None) -> str:
    """Why a recording is left out; empty if it is not."""
    if row.content is None and not row.audio.is_file():
        return "audio missing"
    if not text or text.casefold() == _IGNORED:
        return "no text"
    if group is None:
        return "accent left out by the map"
    return "" if group else "no accent"


def _named(audio: Path, folder: Path) -> str:
    """The path of a recording as a manifest in `folder` has it."""
    audio, folder = Path(os.path.abspath(audio)), Path(os.path.abspath(folder))
    return audio.relative_to(folder).as_posix() if audio.is_relative_to(folder) else str(audio)


def _nothing(folder: Path, result: Imported) -> CorpusError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in result.left_out.items()) or "there are none"
    hint = " Say with --accent which accent they have." if "no accent" in result.left_out else ""
    first = next(iter(result.first_left_out.values()), "")
    sentence = "No recording of {folder} can be taken ({reasons}){first}.{hint}"
    return CorpusError(
        "corpus.nothing", sentence, folder=folder, reasons=reasons, first=first and f", the first is {first}", hint=hint
    )
