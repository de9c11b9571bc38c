"""Manifests: lists of recordings with their texts and accents."""

from __future__ import annotations

import contextlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from hdmole.errors import UserError
from hdmole.speech.audio import SAMPLE_RATE, SHORTEST, Audio, AudioError, decode
from hdmole.speech.words import normalise

LARGEST = 2_000_000_000  # bytes of a manifest; a million lines have about 200 MB
_STRANGER = 100_000_000  # bytes of a stranger's manifest
_LONG = 21_600.0  # seconds of a file of which lines name parts


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
    offset: float = 0.0  # seconds into the file at which the recording begins
    duration: float | None = None  # its length in seconds; None for all that follows
    first_channel: bool = False  # whether the line means the first channel only
    long: bool = False  # whether the file may be up to six hours long

    def decode(self) -> Audio:
        """The recording's sound. Raises AudioError.

        The file that was decoded last is kept, so that a long file is decoded once for lines in a
        row that name its parts.
        """
        audio = decode(self.audio) if not self.is_part else _decode_whole(self.audio, _state(self.audio), self.long)
        if self.first_channel and audio.channels > 1:
            sentence = "{name} has {count} channels, of which the manifest names one; give a file with this channel only."
            raise AudioError("audio.one_channel", sentence, name=audio.source, count=audio.channels)
        if not self.is_part:
            return audio
        first = round(self.offset * SAMPLE_RATE)
        last = len(audio.samples) if self.duration is None else first + round(self.duration * SAMPLE_RATE)
        samples = audio.samples[first:last]
        if len(samples) < SHORTEST * SAMPLE_RATE:
            sentence = (
                "{name} is {length} s long and has nothing at the offset {offset} s that the manifest names; mend the line."
            )
            raise AudioError("audio.no_such_part", sentence, name=audio.source, length=f"{audio.seconds:.2f}", offset=self.offset)
        return replace(audio, samples=samples.copy(), seconds=len(samples) / SAMPLE_RATE)

    @property
    def is_part(self) -> bool:
        """Whether the recording is a part of its file."""
        return bool(self.offset) or self.duration is not None


@lru_cache(maxsize=1)
def _decode_whole(file: Path, state: tuple[int, int], long: bool) -> Audio:
    """A file of which lines name parts. `state` tells whether it has changed since."""
    return decode(file, max_seconds=_LONG, timeout=600, memory_mb=8192) if long else decode(file)


def _state(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:  # `decode` says what is wrong
        return 0, 0
    return found.st_size, found.st_mtime_ns


# Fields of other toolkits that would change what a line means, without "_" and capitals, and the
# value that changes nothing. Others are refused, not passed over.
_UNKNOWN = dict.fromkeys(
    (
        "start", "end", "begin", "stop", "starttime", "endtime", "begintime", "stoptime", "startms", "endms", "startsec", "endsec",
        "starts", "ends", "startseconds", "endseconds", "startsample", "endsample", "startframe", "endframe", "startoffset",
        "endoffset", "offsetms", "offsetsec", "offsetseconds", "sampleoffset", "frameoffset", "onset", "tmin", "tmax", "trim",
        "channel", "channelselector", "channelid", "segments", "gain", "gaindb", "volumedb",
    ),
    0,
) | dict.fromkeys(("channels", "speed", "tempo", "speedfactor", "volume"), 1)  # fmt: skip


def manifest_rows(
    path: Path, needed: Sequence[str] = ("audio", "text", "accent"), largest: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON-lines file, each with its line number from 1. Empty lines are left out.

    The file is read line by line. `largest` is the largest file accepted, in bytes.

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
    largest = LARGEST if largest is None else largest
    if path.stat().st_size > largest:
        sentence = "{name} is larger than {size} MB, so it is no manifest; a manifest is a JSON-lines file."
        raise ManifestError("manifest.too_large", sentence, name=path.name, size=largest // 10**6)
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _row(number, path.name, text, needed)
        except UnicodeDecodeError:
            sentence = "{name} is not text in UTF-8; a manifest is a JSON-lines file."
            raise ManifestError("manifest.not_text", sentence, name=path.name) from None


def _row(number: int, name: str, text: str, needed: Sequence[str]) -> dict[str, Any]:
    """A line of JSON as an object with every key in `needed` as text. Raises ManifestError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        sentence = "Line {number} of {name} is not valid JSON."
        raise ManifestError("manifest.not_json", sentence, number=number, name=name) from None
    missing = [key for key in needed if not isinstance(row, dict) or not isinstance(row.get(key), str)]
    if missing or not isinstance(row, dict):
        raise ManifestError(
            "manifest.incomplete",
            "Line {number} of {name} has no {missing}; each line needs {needed}.",
            number=number,
            name=name,
            missing=" and no ".join(missing),
            needed=f"{', '.join(needed[:-1])} and {needed[-1]}",
        )
    return row


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
    """The recordings of a manifest, as `manifest_lines` gives them.

    Raises:
        ManifestError: the manifest cannot be read or is empty, a line lacks something, or a
            recording lies elsewhere or does not exist.
    """
    lines = list(manifest_lines(path, within))
    if not lines:
        sentence = "{name} is empty; give a JSON-lines file with audio, text and accent on each line."
        raise ManifestError("manifest.empty", sentence, name=path.name)
    return lines


def manifest_lines(
    path: Path, within: Sequence[Path] | None = None, wrong: Callable[[ManifestError], None] | None = None
) -> Iterator[Line]:
    """The recordings of a manifest, one after the other.

    Each line has `audio` (a path relative to the manifest), `text`, `accent`, and optionally
    `speaker`, `offset` and `duration` (seconds; the part of the file that is meant). A recording
    without a speaker counts as a speaker of its own. A name may differ from its file's in capitals,
    where only one file fits. Where the manifest is a stranger's, `within`
    are the folders in which its recordings must lie, links followed.

    Args:
        path: the manifest.
        within: see above.
        wrong: called with the error of each line whose recording cannot be used; such lines are
            then left out.

    Raises:
        ManifestError: the manifest cannot be read or, without `wrong`, a line lacks something, or a
            recording lies elsewhere or does not exist.
    """
    names: set[str] = set()  # each recording has a name of its own, also where several lie in one file
    files = _Files(path.parent)
    for number, row in manifest_rows(path, largest=None if within is None else _STRANGER):
        try:
            audio = _audio(path, number, row, within, files)
            offset, duration = part(number, path.name, row)
        except ManifestError as error:
            if wrong is None:
                raise
            wrong(error)
            continue
        speaker = row.get("speaker")
        if speaker in (None, ""):
            speaker = f"line-{number}"
        name = row["audio"] if not offset else f"{row['audio']} from {offset:g} s"
        if name in names:
            name = f"{name} (line {number})"
        names.add(name)
        first = row.get("channel") not in (None, "")
        yield Line(
            number, name, audio, normalise(row["text"]), row["accent"], str(speaker), offset, duration, first, within is None
        )


def _audio(path: Path, number: int, row: dict[str, Any], within: Sequence[Path] | None, files: _Files) -> Path:
    """The file of a line. Raises ManifestError."""
    spelt, said = _spelt(path.parent, row["audio"]), dict(number=number, name=path.name, audio=row["audio"])
    if within is not None and any(find_inside(file, within) is None for file in spelt):
        sentence = "Line {number} of {name} names {audio}, which is no file that belongs to the manifest; name one in its folder."
        raise ManifestError("manifest.audio_elsewhere", sentence, **said)
    audio = next((file for file in spelt if file.is_file()), None)
    if audio is None and len(others := files.in_other_case(row["audio"])) > 1:
        sentence = (
            "Line {number} of {name} names {audio}, and files beside the manifest differ from it in capitals ({others}); "
            "write the name as the file has it."
        )
        raise ManifestError("manifest.several_cases", sentence, **said, others=", ".join(sorted(f.name for f in others)))
    audio = next(iter(others), None) if audio is None else audio
    if audio is None or (within is not None and find_inside(audio, within) is None):
        sentence = "Line {number} of {name} names {audio}, which does not exist beside the manifest."
        raise ManifestError("manifest.no_such_audio", sentence, **said)
    return audio


def _spelt(folder: Path, name: str) -> list[Path]:
    """A name in a manifest as the systems spell it.

    Letters are composed or not, and either slash stands between folders.
    """
    composed = unicodedata.normalize("NFC", name)
    return [folder / spelt for spelt in (name, composed, unicodedata.normalize("NFD", name), composed.replace("\\", "/"))]


class _Files:
    """The files in a folder and below it, by names without capitals, as Windows and Macs take them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def in_other_case(self, name: str) -> list[Path]:
        """The files whose name differs in capitals only from a name in a manifest."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if any(part in ("/", "..") for part in parts):
            return []
        found = [self._folder]
        for part in parts:
            found = [file for folder in found for file in self._list(folder).get(_folded(part), [])]
        return [file for file in found if file.is_file()]

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listed:
            listed: dict[str, list[Path]] = {}
            with contextlib.suppress(OSError):
                for file in folder.iterdir():
                    listed.setdefault(_folded(file.name), []).append(file)
            self._listed[folder] = listed
        return self._listed[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def part(number: int, name: str, row: dict[str, Any]) -> tuple[float, float | None]:
    """Offset and duration of a line in seconds.

    Raises ManifestError where a field cannot be obeyed.
    """
    for field, value in row.items():
        known = field.lower().replace("_", "").replace("-", "")
        changes = known in _UNKNOWN and value not in (None, "", _UNKNOWN[known])
        if changes or (known in ("offset", "duration") and field != known):
            sentence = (
                "Line {number} of {name} has the field {field}, which is not known here; give offset and duration in seconds."
            )
            raise ManifestError("manifest.unknown_field", sentence, number=number, name=name, field=field)
    found: dict[str, float | None] = {}
    for field in ("offset", "duration"):
        value = row.get(field)
        try:
            seconds = None if value in (None, "") or isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if isinstance(value, bool) or (
            seconds is not None and not (math.isfinite(seconds) and seconds >= (field == "duration") * 1e-9)
        ):
            sentence = "Line {number} of {name} has the {field} {value}; it must be a number of seconds."
            raise ManifestError("manifest.bad_seconds", sentence, number=number, name=name, field=field, value=repr(value))
        found[field] = seconds
    return found["offset"] or 0.0, found["duration"]


def fingerprint(lines: list[Line]) -> str:
    """A digest of a manifest's lines and of the sizes and modification times of its recordings."""
    told = [
        (
            line.name,
            str(line.audio.resolve()),
            line.text,
            line.accent,
            line.speaker,
            *((line.offset, line.duration) if line.offset or line.duration is not None else ()),
            (s := line.audio.stat()).st_size,
            s.st_mtime_ns,
        )
        for line in lines
    ]
    return sha256(json.dumps(told).encode()).hexdigest()
