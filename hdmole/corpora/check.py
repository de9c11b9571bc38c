"""Checking manifests: what is in them, what cannot be used, and what is on both sides of a split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hdmole.names import accent_named, plain_accent
from hdmole.speech.audio import AudioError
from hdmole.speech.manifest import Line, ManifestError, manifest_lines

_SHOWN = 5  # examples of each problem
_RARE = 40  # characters of the texts that are listed, the rarest first


@dataclass
class AccentCount:
    """What a manifest has of one accent."""

    recordings: int = 0
    hours: float = 0.0
    speakers: int = 0


@dataclass
class ManifestCheck:
    """What is in a manifest, and what is wrong with it."""

    name: str
    recordings: int = 0  # that can be read
    hours: float = 0.0
    speakers: int = 0  # that are named
    without_speaker: int = 0
    accents: dict[str, AccentCount] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # shortest, median, longest
    rates: dict[str, int] = field(default_factory=dict)  # Hz in the file -> recordings
    characters: dict[str, int] = field(default_factory=dict)  # the rarest of the normalised texts
    problems: dict[str, int] = field(default_factory=dict)  # what -> recordings
    examples: dict[str, list[str]] = field(default_factory=dict)  # what -> the first of them


@dataclass
class Overlap:
    """What two manifests have in common."""

    one: str
    other: str
    speakers: list[str]
    audio: list[str]  # names of recordings of `other` whose sound is in `one`
    texts: int  # recordings of `other` whose text is in `one`


@dataclass
class Check:
    """The check of one or several manifests."""

    manifests: list[ManifestCheck]
    overlaps: list[Overlap]

    @property
    def bad(self) -> bool:
        """Whether a recording cannot be used, or manifests share speakers or sound."""
        return any(m.problems.get(what) for m in self.manifests for what in UNUSABLE) or any(
            o.speakers or o.audio for o in self.overlaps
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self) | {"bad": self.bad}


UNREADABLE, MISSING, EMPTY, WRONG = "unreadable audio", "missing audio", "no text", "wrong lines"
UNUSABLE = (MISSING, UNREADABLE, WRONG, EMPTY)
_TWICE, _SPELT, _UNKNOWN = "sound of an earlier recording", "accent spelt in another way before", "accent unknown to the model"


class _Seen:
    """What is kept of a manifest to compare it with others."""

    def __init__(self) -> None:
        self.speakers: set[str] = set()
        self.sounds: dict[bytes, str] = {}  # digest -> name of the first recording
        self.texts: Counter[str] = Counter()


def check_manifests(
    paths: Sequence[Path], accents: Collection[str] = (), progress: Callable[[str, int], None] = lambda name, done: None
) -> Check:
    """Decode every recording of some manifests once, and count.

    Args:
        paths: manifests, such as those of train, dev and test.
        accents: those of a model; others are then counted as a problem.
        progress: called with a manifest's name and the number of its recordings so far.

    Raises:
        ManifestError: a manifest cannot be read at all, or is empty.
    """
    found = [_check(path, accents, progress) for path in paths]
    overlaps = [_overlap(one, other) for one, other in combinations(found, 2)]
    return Check([about for about, _ in found], overlaps)


def _check(path: Path, accents: Collection[str], progress: Callable[[str, int], None]) -> tuple[ManifestCheck, _Seen]:
    about, seen = ManifestCheck(path.name), _Seen()
    problems: dict[str, list[str]] = defaultdict(list)
    counts: Counter[str] = Counter()

    def problem(what: str, example: str) -> None:
        counts[what] += 1
        if len(problems[what]) < _SHOWN:
            problems[what].append(example)

    def wrong(error: ManifestError) -> None:
        problem(MISSING if error.code == "manifest.no_such_audio" else WRONG, str(error))

    lengths: list[float] = []
    rates: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    said_by: dict[str, set[str]] = defaultdict(set)
    spelt: dict[str, str] = {}
    done = 0
    for done, line in enumerate(manifest_lines(path, wrong=wrong), 1):
        progress(path.name, done)
        if not line.text:
            problem(EMPTY, line.name)
        if accents and accent_named(line.accent, list(accents)) not in accents:
            problem(_UNKNOWN, f"{line.name}: {line.accent}")
        first = spelt.setdefault(plain_accent(line.accent), line.accent)
        if first != line.accent:
            problem(_SPELT, f"{line.name}: {line.accent}, before {first}")
        try:
            audio = line.decode()
        except AudioError as error:
            problem(UNREADABLE, str(error))
            continue
        digest = sha256(audio.samples.tobytes()).digest()
        if digest in seen.sounds:
            problem(_TWICE, f"{line.name}: {seen.sounds[digest]}")
        seen.sounds.setdefault(digest, line.name)
        seen.texts[line.text] += 1
        characters.update(line.text.replace(" ", ""))
        lengths.append(audio.seconds)
        rates[audio.original_rate] += 1
        count = about.accents.setdefault(first, AccentCount())
        count.recordings += 1
        count.hours += audio.seconds / 3600
        if _has_speaker(line):
            seen.speakers.add(line.speaker)
            said_by[first].add(line.speaker)
        else:
            about.without_speaker += 1
    if not done and not counts:
        sentence = "{name} is empty; give a JSON-lines file with audio, text and accent on each line."
        raise ManifestError("manifest.empty", sentence, name=path.name)
    for accent, count in about.accents.items():
        count.hours, count.speakers = round(count.hours, 4), len(said_by[accent])
    about.recordings, about.hours, about.speakers = len(lengths), round(sum(lengths) / 3600, 4), len(seen.speakers)
    if lengths:
        about.seconds = {"shortest": min(lengths), "median": float(np.median(lengths)), "longest": max(lengths)}
    about.rates = {str(rate): count for rate, count in rates.most_common()}
    about.characters = dict(sorted(characters.items(), key=lambda item: (item[1], item[0]))[:_RARE])
    repeated = sum(seen.texts.values()) - len(seen.texts)
    if repeated:
        counts["text of an earlier recording"] = repeated
    about.problems, about.examples = dict(counts), dict(problems)
    return about, seen


def _has_speaker(line: Line) -> bool:
    return line.speaker != f"line-{line.number}"  # what a line without a speaker gets


def _overlap(one: tuple[ManifestCheck, _Seen], other: tuple[ManifestCheck, _Seen]) -> Overlap:
    (first, seen), (second, also) = one, other
    audio = [name for digest, name in also.sounds.items() if digest in seen.sounds]
    texts = sum(count for text, count in also.texts.items() if text in seen.texts)
    return Overlap(first.name, second.name, sorted(seen.speakers & also.speakers), audio, texts)


def report(check: Check) -> str:
    """The check as plain tables."""
    parts = [_report(manifest) for manifest in check.manifests]
    for overlap in check.overlaps:
        lines = [f"{overlap.one} and {overlap.other}"]
        for what, names in (("speakers on both sides", overlap.speakers), ("recordings on both sides", overlap.audio)):
            more = f": {', '.join(names[:_SHOWN])}" + (", ..." if len(names) > _SHOWN else "") if names else ""
            lines.append(f"  {what:<34} {len(names):>9,}{more}")
        lines.append(f"  {'texts on both sides':<34} {overlap.texts:>9,}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _report(about: ManifestCheck) -> str:
    lines = [f"{about.name}: {about.recordings:,} recordings, {about.hours:,.2f} hours, {about.speakers:,} speakers"]
    if about.without_speaker:
        lines[0] += f", {about.without_speaker:,} recordings without a speaker"
    if about.seconds:
        lines.append("  length in s: " + ", ".join(f"{name} {value:.1f}" for name, value in about.seconds.items()))
        lines.append("  sample rate: " + ", ".join(f"{rate} Hz {count:,}" for rate, count in about.rates.items()))
        lines.append("  rarest characters: " + " ".join(f"{c} {n}" for c, n in [*about.characters.items()][: _RARE // 2]))
        lines.append(f"  {'accent':<34} {'recordings':>10} {'hours':>9} {'speakers':>9}")
        for accent, count in sorted(about.accents.items(), key=lambda item: -item[1].recordings):
            lines.append(f"  {accent:<34} {count.recordings:>10,} {count.hours:>9.2f} {count.speakers:>9,}")
    for what, times in about.problems.items():
        lines.append(f"  {what:<34} {times:>10,}")
        lines += [f"    {example}" for example in about.examples.get(what, [])]
    return "\n".join(lines)
