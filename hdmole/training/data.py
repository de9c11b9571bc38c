"""The data of training: a corpus of mel features, cached encoder outputs, and batches of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from hdmole.files import written


class Corpus:
    """A corpus folder, as `write_corpus` writes it.

    `index` is a table with one row per utterance. `features(i)` gives the mel features (T, n_mels)
    of utterance i.
    """

    def __init__(self, folder: Path) -> None:
        self.index = pd.read_parquet(folder / "index.parquet")
        self.mels = np.load(folder / "mels.npy", mmap_mode="r")
        self._spans = self.index[["offset", "frames"]].to_numpy()

    def features(self, i: int) -> np.ndarray:
        offset, frames = self._spans[i]
        features: np.ndarray = self.mels[offset : offset + frames]
        return features

    def select(self, split: str, *domains: str) -> list[int]:
        """Row numbers of a split's utterances in the given domains, or in all if none is given."""
        keep = self.index.split == split
        if domains:
            keep &= self.index.domain.isin(domains)
        return list(np.flatnonzero(keep))


@contextmanager
def frames_written(path: Path) -> Iterator[Callable[[np.ndarray], int]]:
    """Gives a function that appends frames (T, width) to a file and returns how many it had.

    `np.load` reads the file as one array. So an array can be written that does not fit into memory.
    """
    count, first = 0, np.zeros((0, 0), np.float16)

    def head(file: BinaryIO) -> None:  # numpy leaves room for more frames
        about = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, first.shape[1])}
        np.lib.format.write_array_header_1_0(file, about)

    with written(path) as part, part.open("wb") as file:

        def append(frames: np.ndarray) -> int:
            nonlocal count, first
            if file.tell() == 0:
                first = frames[:0].copy()
                head(file)
            file.write(frames.tobytes())
            count += len(frames)
            return count - len(frames)

        yield append
        file.seek(0)
        head(file)


def write_corpus(folder: Path, rows: Iterable[tuple[Mapping[Any, Any], np.ndarray]]) -> None:
    """Write a corpus as `index.parquet` and `mels.npy`. One utterance is in memory at a time.

    Args:
        folder: the corpus folder; made if it does not exist.
        rows: of each utterance what the index holds, with the keys split, domain, accent, text,
            speaker, utterance and seconds, and its mel features (T, n_mels).
    """
    with frames_written(folder / "mels.npy") as append:
        index = [{**row, "frames": len(mels), "offset": append(mels)} for row, mels in rows]
    with written(folder / "index.parquet") as part:  # last, because it says that the corpus is there
        pd.DataFrame(index).to_parquet(part)


class States:
    """Cached encoder outputs.

    `get(i, view)` gives the outputs (T, d) of utterance i. Each view of a training
    utterance has other SpecAugment masks. If an utterance lacks the view, `get` gives view 0.

    Args:
        states: outputs of all utterances one after the other, (sum of T, d) float16.
        spans: offset and length of each, (views, utterances, 2). Length 0 means that the utterance
            lacks this view.
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
    """Batches of utterances of similar length.

    An item of this dataset is a whole batch: a dict of padded tensors. `hdmole.training.loop.fit`
    sets `epoch` during training.

    Args:
        rows: the utterances.
        fetch: gives the arrays (time, features) of a row by name. They are padded with zeros, and a
            mask (rows, time) is added that is true where there is no padding.
        lengths: length of each row's array, in frames.
        max_frames: largest number of frames in a batch, padding included.
        extra: gives further tensors for the rows of a batch, such as labels or posteriors.
        seed: random seed of the order of utterances that are nearly equally long.
        max_rows: largest number of utterances in a batch.
        multiple: lengths are padded to multiples of this number, so that batches have few shapes.
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
        return self.of(self.batches[number])

    def of(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch of these utterances."""
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


class Parts(Dataset[dict[str, torch.Tensor]]):
    """Batches in parts, which several processes share or whose gradients are accumulated.

    Item `parts * n + k` is part k of batch n. It holds its `share` of the batch's tokens: the
    losses of the parts, weighted so, sum to the loss of the batch. A part for which no utterance is
    left has the batch's first one, with share 0, as every process computes a gradient in each step.
    """

    def __init__(self, batches: Batches, parts: int) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.batches) * self.parts

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        rows = self.batches.batches[number // self.parts]
        part = rows[number % self.parts :: self.parts]
        of, all_ = (int((self.batches.extra(some)["labels"] >= 0).sum()) if some else 0 for some in (part, rows))
        return {**self.batches.of(part or rows[:1]), "share": torch.tensor(of / all_)}


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def spec_augment(features: np.ndarray, rng: np.random.Generator, times: int, width: float) -> np.ndarray:
    """SpecAugment (Park et al. 2019): set random frequency bands and stretches of time to zero.

    Args:
        features: mel features (T, n_mels).
        rng: draws two bands of up to 15 mels, of fewer where there are fewer, and the stretches of
            time.
        times: number of stretches of time.
        width: greatest length of a stretch, as a share of T.

    Returns:
        A masked copy (T, n_mels) in float32.
    """
    features = np.array(features, np.float32)
    for _ in range(2):
        size = int(rng.integers(0, min(16, features.shape[1])))
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
    """Batches of mel features, as in `Batches`.

    If `masks` is above 0, `spec_augment` masks the features with `masks` stretches of time of up to
    the share `width`. Every epoch gets new masks. They depend only on seed, epoch and utterance, so
    that a resumed training gets the same.
    """

    def fetch(i: int) -> dict[str, np.ndarray]:
        features = corpus.features(i)
        rng = np.random.default_rng((seed, batches.epoch, i))
        return {"input_features": spec_augment(features, rng, masks, width) if masks else features}

    # On a GPU, the first convolution of every new shape is slow, so that few shapes are better.
    multiple = 32 if torch.cuda.is_available() else 1
    batches = Batches(rows, fetch, corpus.index.frames.to_numpy(), max_frames, extra, seed=seed, multiple=multiple)
    return batches
