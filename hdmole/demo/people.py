"""Speech for a comparison whose target is real people, and whose source is synthetic speech."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hdmole.files import written
from hdmole.names import GENERAL
from hdmole.speech.loading import ModelError
from hdmole.training.adapt import load_base
from hdmole.training.data import Corpus
from hdmole.training.preparation import encode_corpus, recogniser_stages, train_recogniser

KINDS = {"real_sentences": "sentences", "real_digits": "digits"}  # domain -> the kind that an expert is for
RATE = 1.5e-3  # of the recogniser


def people(work: Path, out: Path, seed: int, report: Callable[[str], None]) -> None:
    """Make the data folder of a comparison that adapts the demo's base to real people.

    Sentences and digits that people read take the place of accents: there is one expert for each.
    Their speakers have too few first languages in common for experts by accent. The general domain
    is the synthetic general speech, so that a comparison shows what is forgotten there. The base
    has been trained on real digits, but not on real sentences; its encoder heard both.

    Args:
        work: work folder of `hdmole demo build` with real speech.
        out: the new folder, for the line `data` of a configuration.
        seed: random seed of the general speech that the recogniser learns from, and of its
            training.
        report: called with each line about the progress.

    Raises:
        ModelError: `work` has no base, or no speech of real people.
    """
    if not all((work / file).is_file() for file in ("base/config.json", "corpus/index.parquet")):
        raise ModelError("model.no_base", "{work} has no base; run 'hdmole demo build --work {work}' first.", work=work)
    index = Corpus(work / "corpus").index
    real = index.domain.isin(KINDS)
    if not (real & (index.split == "train")).any():
        sentence = "{work} has no speech of real people; run 'hdmole demo build' with --real-speech."
        raise ModelError("model.no_people", sentence, work=work)
    for part in ("base", "tokenizer"):
        shutil.copytree(work / part, out / part, dirs_exist_ok=True)
    folder = out / "corpus"
    if not (folder / "index.parquet").is_file():
        train = index.split == "train"
        general = np.flatnonzero((index.domain == GENERAL) & train)
        count = min(len(general), int((real & train).sum()) // 2)
        drawn = np.random.default_rng(seed).permutation(general)[:count]
        kept = real | ((index.domain == GENERAL) & ~train) | index.index.isin(drawn)
        table = index[kept].reset_index(drop=True)
        kinds = table.domain.map(KINDS)
        table = table.assign(domain=table.domain.where(kinds.isna(), "accent"), accent=kinds.fillna(GENERAL))
        folder.mkdir(parents=True, exist_ok=True)
        mels = folder / "mels.npy"  # the rows of the index say where in it their features are
        mels.unlink(missing_ok=True)
        mels.symlink_to((work / "corpus" / "mels.npy").resolve())
        with written(folder / "index.parquet") as file:
            table.to_parquet(file)
    corpus, base = Corpus(folder), load_base(out / "base", "cuda" if torch.cuda.is_available() else "cpu")
    encoder: Any = base.audio_tower
    encode_corpus(corpus, encoder.encoder, out / "states", corpus.select("train", "accent"), seed, report)
    train_recogniser(
        corpus, [GENERAL, *KINDS.values()], recogniser_stages(corpus.select("train")), out / "recogniser",
        rate=RATE, seed=seed, report=report, device=str(base.device),
    )  # fmt: skip
