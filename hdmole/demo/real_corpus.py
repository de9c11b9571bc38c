"""Which recordings of real people are trained and judged on, and what the synthesiser adds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hdmole.demo.corpus import split_speakers
from hdmole.demo.synth import ACCENTS, speakers
from hdmole.demo.text import is_digit_string, sentences
from hdmole.names import GENERAL
from hdmole.speech.manifest import ManifestError, manifest_rows

RECOGNISER = "recogniser"  # split of speech for the accent recogniser alone
YOUNGEST = 12  # years; younger speakers are judged, but not trained on
ADULT = 18  # years
LONGEST = 12.0  # seconds of the longest training utterance


@dataclass(frozen=True)
class Sizes:
    """How many utterances are used. The sentences of real speakers are all used."""

    composed: int = 200  # digit strings joined from single digits
    varied: int = 1  # further versions of each real sentence, with another rate, noise or room
    synthetic: int = 24  # of each accent, for the adapters
    general: int = 120  # synthetic, for the adapters
    told_apart: int = 120  # of each accent and of the general voice, for the recogniser
    orders: int = 400  # real general speech
    judged: int = 150  # at most, of each domain in test and in dev
    judged_synthetic: int = 10  # of each accent

    def scaled(self, factor: float) -> Sizes:
        """All sizes times `factor`, but at least 2."""
        return Sizes(**{name: max(2, round(value * factor)) for name, value in vars(self).items()})


def read_people(folders: Sequence[Path]) -> pd.DataFrame:
    """The recordings that the manifests in some folders list.

    Returns:
        One row per recording: `path`, `text`, `accent`, `speaker`, `age`, `source`, `split` and
        `domain` (real_adults, real_children, real_digits, real_general).

    Raises:
        ManifestError: there is no manifest, or a line of one cannot be used.
    """
    rows = []
    for manifest in [file for folder in folders for file in sorted(Path(folder).rglob("manifest.jsonl"))]:
        for _, row in manifest_rows(manifest):
            speaker = row.get("speaker") or f"line-{row['audio']}"
            rows.append(
                {"path": str(manifest.parent / row["audio"]), "text": row["text"], "accent": row["accent"], "speaker": speaker,
                 "age": row.get("age") or 99, "source": str(row.get("source", manifest.parent)), "seconds": row.get("seconds", 0.0),
                 "licence": str(row.get("licence", "not given")), "judged_only": "NC" in str(row.get("licence", "")), "alone": not row.get("speaker")}
            )  # fmt: skip
    if not rows:
        sentence = "There is no manifest.jsonl in {folders}; give --real-speech a folder of recordings."
        raise ManifestError("manifest.absent_all", sentence, folders=", ".join(map(str, folders)) or "no folder")
    table = pd.DataFrame(rows)
    parts = {name: split_speakers(list(group.speaker)) for name, group in table.groupby("source")}
    table["split"] = [parts[source][speaker] for source, speaker in zip(table.source, table.speaker, strict=True)]
    # recordings without a speaker cannot be kept apart, so that none is judged
    table.loc[table.alone, "split"] = "train"
    for _, group in table[table.judged_only].groupby("source"):
        names = sorted(set(group.speaker), key=lambda name: hashlib.md5(name.encode()).hexdigest())
        table.loc[group.index, "split"] = ["dev" if names.index(s) < len(names) // 2 else "test" for s in group.speaker]
    digits = table.text.map(is_digit_string)
    kind = np.where(table.age < ADULT, "real_children", "real_adults")
    table["domain"] = np.where(digits, "real_digits", np.where(table.accent == GENERAL, "real_general", kind))
    return table


def plan(people: pd.DataFrame, sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """What the corpus consists of, as jobs for `hdmole.demo.corpus.render`."""
    rng, jobs = np.random.default_rng(seed), []
    single = people.text.map(lambda text: is_digit_string(text) and " " not in text)
    for (split, domain), group in people[~single].groupby(["split", "domain"]):
        if split == "train":
            group = group[(group.age >= YOUNGEST) & (group.seconds <= LONGEST)]
        most = sizes.orders if domain == "real_general" else len(group)
        for i in sorted(rng.permutation(len(group))[: most if split == "train" else sizes.judged]):
            row = group.iloc[i]
            for version in range(1 + (sizes.varied if split == "train" and domain != "real_general" else 0)):
                jobs.append(dict(kind="read", split=split, domain=domain, accent=row.accent, text=row.text, speaker=row.speaker,
                                 paths=[row.path], augment=version > 0))  # fmt: skip
    groups = [g for _, g in people[single].groupby("speaker") if len(g) >= 30]
    for group in groups:
        first = group.iloc[0]
        for _ in range(max(2, sizes.composed // max(1, len(groups)))):
            picked = group.iloc[rng.integers(0, len(group), rng.integers(2, 9))]
            jobs.append(dict(kind="read", split=first.split, domain="real_digits", accent=first.accent, text=" ".join(picked.text),
                             speaker=first.speaker, paths=list(picked.path), augment=False))  # fmt: skip
    for split in ("train", "dev", "test"):
        people_ = speakers(split, 40 if split == "train" else 8, seed)
        for k, accent in enumerate(ACCENTS):
            adapted_to = sizes.general if accent == GENERAL else sizes.synthetic
            judged = sizes.judged_synthetic * (4 if accent == GENERAL else 1)
            count = max(adapted_to, sizes.told_apart) if split == "train" else judged
            domain = "synthetic_general" if accent == GENERAL else "synthetic_accents"
            for i, text in enumerate(sentences(count, seed + 31 * k + len(split), split)):
                jobs.append(dict(kind="say", split=split if i < adapted_to or split != "train" else RECOGNISER, domain=domain,
                                 accent=accent, text=text, speaker=people_[(i + k) % len(people_)], augment=split == "train"))  # fmt: skip
    return [{**job, "seed": [seed, number]} for number, job in enumerate(jobs)]
