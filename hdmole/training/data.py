"""Speech as training sees it: a corpus of mel features, cached encoder outputs, batches of utterances of like length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset


class Corpus:
    """A corpus folder: `index` (DataFrame) and `features(i)` (T, 80) of utterance i."""

    def __init__(self, folder: Path) -> None:
        self.index = pd.read_parquet(folder / "index.parquet")
        self.mels = np.load(folder / "mels.npy", mmap_mode="r")
        self._spans = list(zip(self.index.offset, self.index.frames, strict=True))

    def features(self, i: int) -> np.ndarray:
        offset, frames = self._spans[i]
        features: np.ndarray = self.mels[offset : offset + frames]
        return features

    def select(self, split: str, *domains: str) -> list[int]:
        """Row numbers of a split, of the given domains (all where none is named)."""
        keep = self.index.split == split
        if domains:
            keep &= self.index.domain.isin(domains)
        return list(np.flatnonzero(keep))


def write_corpus(folder: Path, index: pd.DataFrame, mels: list[np.ndarray]) -> None:
    """Write a corpus: `index.parquet`, one row an utterance, and `mels.npy`, the features (T, n_mels) of all of them.

    `index` has the columns split, domain, accent, text, speaker, utterance and seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frames = np.array([len(m) for m in mels])
    np.save(folder / "mels.npy", np.concatenate(mels))
    part = folder / "index.part"  # what is there is whole
    index.assign(frames=frames, offset=frames.cumsum() - frames).to_parquet(part)
    part.replace(folder / "index.parquet")


class States:
    """Encoder outputs computed once: `get(i)` (T, d) of utterance i, in any of the `views` there are of it.

    Parameters
    ----------
    states : (sum T, d) float16, all utterances one after the other
    spans : (views, utterances, 2), offset and length of each; a view without frames is not there
    """

    def __init__(self, states: np.ndarray, spans: np.ndarray) -> None:
        self.states, self.spans = states, spans

    def get(self, i: int, view: int = 0) -> np.ndarray:
        offset, length = self.spans[view if view < len(self.spans) and self.spans[view, i, 1] else 0, i]
        return self.states[offset : offset + length]

    @classmethod
    def load(cls, folder: Path) -> States:
        return cls(np.load(folder / "states.npy", mmap_mode="r"), np.load(folder / "spans.npy"))


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Batches of utterances of like length, as dicts of padded tensors; the batch is the item.

    Parameters
    ----------
    rows : utterances to use
    fetch : row -> dict of 2-D arrays (time, features) to be padded with zeros; the first gets a mask
    lengths : length of each row's first array, in frames
    max_frames : padded frames a batch may hold
    extra : called with the batch's rows, to add labels or posteriors
    multiple : lengths are padded to multiples of it, so that batches come in few shapes

    `epoch` is set by `hdmole.training.loop.fit` as it goes.
    """

    epoch = 0

    def __init__(self, rows, fetch, lengths, max_frames, extra, seed=0, max_rows=128, multiple=1) -> None:  # type: ignore[no-untyped-def]
        rng = np.random.default_rng(seed)
        order = sorted(rows, key=lambda i: lengths[i] * rng.uniform(0.95, 1.05))
        self.batches: list[list[int]] = [[]]
        longest = 0
        for i in order:
            longest = max(longest, _up(lengths[i], multiple))
            if self.batches[-1] and (longest * (len(self.batches[-1]) + 1) > max_frames or len(self.batches[-1]) >= max_rows):
                self.batches.append([])
                longest = _up(lengths[i], multiple)
            self.batches[-1].append(i)
        self.fetch, self.extra, self.multiple = fetch, extra, multiple

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        rows = self.batches[number]
        items = [self.fetch(i) for i in rows]
        batch: dict[str, torch.Tensor] = {}
        for name in items[0]:
            longest = _up(max(len(item[name]) for item in items), self.multiple)
            padded = np.zeros((len(items), longest, items[0][name].shape[1]), np.float32)
            mask = np.zeros((len(items), longest), bool)
            for k, item in enumerate(items):
                padded[k, : len(item[name])] = item[name]
                mask[k, : len(item[name])] = True
            batch[name] = torch.from_numpy(padded)
            batch["encoder_mask" if name == "encoder_states" else "attention_mask"] = torch.from_numpy(mask)
        return {**batch, **self.extra(rows)}


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def spec_augment(features: np.ndarray, rng: np.random.Generator, times: int = 2, width: float = 0.08) -> np.ndarray:
    """SpecAugment (Park et al. 2019): two frequency bands of up to 15 mels and `times` stretches of time set to zero."""
    features = np.array(features, np.float32)
    for _ in range(2):
        size = int(rng.integers(0, 16))
        start = int(rng.integers(0, features.shape[1] - size))
        features[:, start : start + size] = 0
    for _ in range(times):
        size = int(rng.integers(0, max(1, int(width * len(features))) + 1))
        start = int(rng.integers(0, max(1, len(features) - size)))
        features[start : start + size] = 0
    return features


def mel_batches(
    corpus: Corpus, rows: list[int], max_frames: int, extra: Any, seed: int = 0, masks: int = 0, width: float = 0.08
) -> Batches:
    """Batches of mel features; with `masks`, each of every epoch through another `spec_augment`, the same after a resume."""

    def fetch(i: int) -> dict[str, np.ndarray]:
        features = corpus.features(i)
        rng = np.random.default_rng((seed, batches.epoch, i))
        return {"input_features": spec_augment(features, rng, masks, width) if masks else features}

    multiple = 32 if torch.cuda.is_available() else 1  # on a GPU every new shape of a convolution is planned first
    batches = Batches(rows, fetch, corpus.index.frames.to_numpy(), max_frames, extra, seed=seed, multiple=multiple)
    return batches
