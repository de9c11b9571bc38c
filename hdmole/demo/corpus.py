"""The demo corpus: synthetic sentences in nine accents, and recordings of real people.

All speech is kept as mel features in one float16 array, with an index of one row per utterance.
Training therefore reads no audio. Two splits have no synthetic sentence in common, except the ten
single digits (`hdmole.demo.text`). They have no speaker in common (`hdmole.demo.synth`, and
`split_speakers` for real people).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd
import torch
from scipy.signal import resample_poly
from transformers import ParakeetFeatureExtractor

from hdmole.demo.synth import (
    ACCENTS,
    CONFLICTING,
    EVERY,
    UNSEEN,
    Synthesiser,
    augment,
    other_language_sentences,
    out_of_domain_noise,
    speakers,
)
from hdmole.demo.text import is_digit_string, sentences
from hdmole.names import GENERAL
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.manifest import manifest_rows
from hdmole.speech.mel import stored_mel_features
from hdmole.speech.segments import framed
from hdmole.training.data import write_corpus

N_MELS = 80
CHUNK = 200  # number of utterances that one worker makes at a time


@dataclass(frozen=True)
class Sizes:
    """How many utterances of each kind the corpus has."""

    general: int = 16_000
    per_accent: int = 2_200
    real_sentence_views: int = 2
    composed_digits: int = 2_000
    test_general: int = 1_000
    test_per_accent: int = 300
    dev_general: int = 300
    dev_per_accent: int = 60
    outside: int = 240  # of each kind of sound outside the model's domain, in dev and in test

    def scaled(self, factor: float) -> Sizes:
        """All sizes times `factor`, but at least 6 of each kind."""
        return Sizes(**{name: max(6, round(value * factor)) for name, value in vars(self).items()})


@cache
def _extractor() -> ParakeetFeatureExtractor:
    return ParakeetFeatureExtractor(feature_size=N_MELS, sampling_rate=SAMPLE_RATE)


def mel(samples: np.ndarray) -> np.ndarray:
    """Mel features (T, 80) float16 of mono 16 kHz samples, by the released model's extractor."""
    return stored_mel_features(_extractor(), samples)


def _hash(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


def split_speakers(names: list[str]) -> dict[str, str]:
    """The split of each speaker: train, dev or test.

    The speakers are sorted by the MD5 of their names. The first fifth, at least one speaker, is
    test. The next tenth is dev, and the others are train.
    """
    ordered = sorted(set(names), key=_hash)
    test = max(1, round(0.2 * len(ordered)))
    dev = round(0.1 * len(ordered))
    return {name: "test" if i < test else "dev" if i < test + dev else "train" for i, name in enumerate(ordered)}


def read_real(folders: list[Path]) -> pd.DataFrame:
    """Read the manifests of real speech.

    Returns:
        One row per recording. Besides the values of the manifest it has `path`, the audio file;
        `source`, the data set; and `split`, which `split_speakers` decides.

    Raises:
        ManifestError: a folder has no manifest, or a line of it cannot be used.
    """
    rows = []
    for folder in folders:
        manifest = Path(folder) / "manifest.jsonl"
        for _, row in manifest_rows(manifest, ("audio", "text", "accent", "speaker")):
            rows.append({**row, "path": str(manifest.parent / row["audio"]), "source": row.get("source", folder.name)})
    table = pd.DataFrame(rows)
    if len(table):
        parts = {name: split_speakers(list(group.speaker)) for name, group in table.groupby("source")}
        table["split"] = [parts[source][speaker] for source, speaker in zip(table.source, table.speaker, strict=True)]
    return table


def _said(accents: list[str], sizes: Sizes, seed: int, stream: int) -> list[dict[str, Any]]:
    """Plan sentences of every split in `accents`, which may include the general one.

    `stream` is added to the seed of the sentences, so that corpora get different sentences.
    """
    jobs: list[dict[str, Any]] = []
    for k, accent in enumerate(accents):
        general = accent == GENERAL
        for number, (split, count) in enumerate(
            (
                ("train", sizes.general if general else sizes.per_accent),
                ("dev", sizes.dev_general if general else sizes.dev_per_accent),
                ("test", sizes.test_general if general else sizes.test_per_accent),
            )
        ):
            people = speakers(split, 160 if split == "train" else 12, seed)
            jobs += [
                dict(kind="say", split=split, domain=GENERAL if general else "accent", accent=accent, text=text,
                     speaker=people[i % len(people)], augment=split == "train")
                for i, text in enumerate(sentences(count, seed + stream + 100 * number + k, split))
            ]  # fmt: skip
    return jobs


def plan_conflicts(sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """Plan speech in the accents that conflict, and general speech."""
    jobs = _said([GENERAL, *CONFLICTING], sizes, seed, 500)
    return [{**job, "seed": [seed + 2, number]} for number, job in enumerate(jobs)]


def plan(sizes: Sizes, real: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Plan the corpus: the text, accent and speaker of every utterance, and how it is made."""
    jobs = _said(list(ACCENTS), sizes, seed, 100)
    rng = np.random.default_rng(seed)
    for row in real.to_dict("records"):
        digits = is_digit_string(row["text"])
        train = row["split"] == "train"
        single = digits and " " not in row["text"]
        views = (1 if single else 10 if digits else sizes.real_sentence_views) if train else 1
        if single and not train and rng.random() > 0.4:
            continue
        for view in range(views):
            jobs.append(
                dict(kind="read", split=row["split"], domain="real_digits" if digits else "real_sentences",
                     accent=row["accent"], text=row["text"], speaker=row["speaker"], paths=[row["path"]],
                     augment=train and (view > 0 or single))
            )  # fmt: skip
    if len(real):  # recordings of single digits by one speaker are joined to digit strings
        lone = real[[is_digit_string(t) and " " not in t for t in real.text]]
        groups = [g for _, g in lone.groupby("speaker") if len(g) >= 30]
        for group in groups:
            first = group.iloc[0]
            share = sizes.composed_digits // max(1, len(groups)) if first.split == "train" else 60
            for _ in range(share):
                picked = group.iloc[rng.integers(0, len(group), rng.integers(2, 11))]
                jobs.append(
                    dict(kind="read", split=first.split, domain="real_digits", accent=first.accent,
                         text=" ".join(picked.text), speaker=first.speaker, paths=list(picked.path),
                         augment=first.split == "train")
                )  # fmt: skip
    jobs += plan_outside(sizes.outside, seed)
    for number, job in enumerate(jobs):
        job["seed"] = [seed, number]
    return jobs


def plan_outside(count: int, seed: int) -> list[dict[str, Any]]:
    """Plan `count` sounds of each kind that are no English speech, in dev and in test.

    A sixth as many are silent.

    The jobs have no `seed` yet.
    """
    jobs: list[dict[str, Any]] = []
    for split in ("dev", "test"):
        people = speakers(split, 12, seed)
        foreign = other_language_sentences()
        # Dev and test get different languages.
        halves = [f for f in foreign if (_hash(f[0]) < "8") == (split == "dev")] or foreign
        for i in range(count):
            language, text = halves[i % len(halves)]
            for kind in ("silence", "noise", "music", "language"):
                if kind == "silence" and i >= count // 6:
                    continue
                jobs.append(
                    dict(kind=kind, split=split, domain=f"outside_{kind}", accent=language if kind == "language" else "",
                         text=text if kind == "language" else "", speaker=people[i % len(people)], augment=kind == "language")
                )  # fmt: skip
    return jobs


def plan_unseen(per_accent: int, seed: int) -> list[dict[str, Any]]:
    """Plan test sentences by test speakers in accents that no training utterance has."""
    people = speakers("test", 12, seed)
    jobs = [
        dict(kind="say", split="test", domain="unseen", accent=accent, text=text, speaker=people[i % len(people)], augment=False)
        for k, accent in enumerate(UNSEEN)
        for i, text in enumerate(sentences(per_accent, seed + 400 + k, "test"))
    ]
    return [{**job, "seed": [seed + 1, number]} for number, job in enumerate(jobs)]


def render(job: dict[str, Any], synthesiser: Synthesiser) -> np.ndarray:
    """The samples (float32, 16 kHz, mono) of one planned utterance."""
    rng = np.random.default_rng(job["seed"])
    if job["kind"] == "say":
        wave = synthesiser.say_language(job["text"], EVERY[job["accent"]].voice, job["speaker"])
    elif job["kind"] == "language":
        wave = synthesiser.say_language(job["text"], job["accent"], job["speaker"])
    elif job["kind"] == "read":
        clips = [librosa.load(path, sr=SAMPLE_RATE, mono=True)[0] for path in job["paths"]]
        gaps = [np.zeros(int(SAMPLE_RATE * rng.uniform(0.02, 0.35)), np.float32) for _ in clips]
        wave = np.concatenate([part for pair in zip(clips, gaps, strict=True) for part in pair][:-1])
        # Real speakers are few, so that their speech is varied in speaking rate and vocal tract.
        if job["augment"]:
            wave = resample_poly(wave, int(rng.integers(85, 119)), 100).astype(np.float32)
        wave = 0.5 * wave / max(1e-6, float(np.abs(wave).max()))
    else:
        wave = out_of_domain_noise(job["kind"], float(rng.uniform(1, 6)), rng)
    return augment(wave, rng) if job["augment"] else wave


def _make(jobs: list[dict[str, Any]]) -> list[tuple[np.ndarray, float]]:
    torch.set_num_threads(1)
    with Synthesiser() as synthesiser:
        waves = [render(job, synthesiser) for job in jobs]
    return [(mel(framed(wave)[0]), len(wave) / SAMPLE_RATE) for wave in waves]


def make(jobs: list[dict[str, Any]], folder: Path) -> Iterator[float]:
    """Make the planned utterances and write them as a corpus. Yields the share that is done."""
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    mels: list[np.ndarray] = []
    rows = []
    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        for number, (chunk, made) in enumerate(zip(chunks, pool.map(_make, chunks), strict=True)):
            for job, (features, seconds) in zip(chunk, made, strict=True):
                speaker = job["speaker"] if isinstance(job["speaker"], str) else job["speaker"].name
                rows.append(
                    {**{k: job[k] for k in ("split", "domain", "accent", "text")}, "speaker": speaker, "seconds": seconds}
                )
                mels.append(features)
            yield (number + 1) / len(chunks)
    index = pd.DataFrame(rows)
    index.insert(0, "utterance", [f"{row.domain}-{i:06d}" for i, row in enumerate(index.itertuples())])
    write_corpus(folder, zip(index.to_dict("records"), mels, strict=True))
