"""The data of training: SpecAugment, batches and their masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_corpus

from hdmole.training.data import Batches, Parts, frames_written, mel_batches, spec_augment


def test_spec_augment_zeroes_two_bands_and_some_stretches() -> None:
    """The bands and stretches that the generator draws, in its order, and nothing else."""
    features = np.ones((100, 80), np.float16)
    for seed in range(20):
        rng, expected = np.random.default_rng(seed), np.ones((100, 80), np.float32)
        for _ in range(2):
            size = int(rng.integers(0, 16))
            start = int(rng.integers(0, 80 - size))
            expected[:, start : start + size] = 0
        for _ in range(3):
            size = int(rng.integers(0, 11))  # up to a tenth of 100 frames
            start = int(rng.integers(0, 100 - size))
            expected[start : start + size] = 0
        np.testing.assert_array_equal(spec_augment(features, np.random.default_rng(seed), 3, 0.1), expected)
    assert (features == 1).all()  # the features themselves are not written to
    few = [spec_augment(np.ones((40, 8)), np.random.default_rng(seed), 1, 0.1) for seed in range(20)]
    assert all(masked.any() for masked in few) and not all(masked.all() for masked in few)  # 8 mels, fewer than a band may have


def test_batches_of_masked_features_are_another_view_each_epoch(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path, [("train", "accent", "german")] * 2)
    plain = mel_batches(corpus, [0, 1], 1000, lambda rows: {"rows": torch.tensor(rows)})[0]
    assert all((view == i + 1).all() for i, view in zip(plain["rows"].tolist(), plain["input_features"], strict=True))
    batches = mel_batches(corpus, [0, 1], 1000, lambda rows: {"rows": torch.tensor(rows)}, seed=3, masks=2)
    views = []
    for epoch in (0, 1, 0):
        batches.epoch = epoch
        batch = batches[0]
        views.append(batch["input_features"])
        for i, view in zip(batch["rows"].tolist(), batch["input_features"], strict=True):
            expected = spec_augment(corpus.features(i), np.random.default_rng((3, epoch, i)), 2, 0.08)
            np.testing.assert_array_equal(view.numpy(), expected)
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])


def test_batches_hold_so_many_frames_and_rows_padding_included() -> None:
    """Lengths 5, 30 and 40 with at most 120 frames a batch: 3 x 40 fit, and of multiples of 32 only 2 x 32 and 1 x 64."""
    lengths = [40, 5, 30]
    for settings, rows in (({}, [[1, 2, 0]]), ({"multiple": 32}, [[1, 2], [0]]), ({"max_rows": 2}, [[1, 2], [0]])):
        batches = Batches(range(3), lambda i: {"x": np.ones((lengths[i], 2))}, lengths, 120, lambda rows: {}, **settings)
        assert batches.batches == rows and len(batches) == len(rows)
        for number, of in enumerate(rows):
            longest = max(lengths[i] for i in of)
            padded = -(-longest // 32) * 32 if "multiple" in settings else longest
            expected = torch.arange(padded)[None] < torch.tensor([lengths[i] for i in of])[:, None]
            assert torch.equal(batches[number]["attention_mask"], expected)
            assert torch.equal(batches[number]["x"], expected[..., None].expand(-1, -1, 2).float())


def test_frames_are_appended_to_the_bytes_of_one_array(tmp_path: Path) -> None:
    parts = [np.full((2, 3), 1, np.float16), np.zeros((0, 3), np.float16), np.full((4, 3), 2, np.float16)]
    with frames_written(tmp_path / "frames.npy") as append:
        assert [append(part) for part in parts] == [0, 2, 2]
        assert not (tmp_path / "frames.npy").exists()
    np.save(tmp_path / "whole.npy", np.concatenate(parts))
    assert (tmp_path / "frames.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_parts_of_a_batch_hold_their_share_of_its_tokens() -> None:
    """Utterances 0, 1 and 2 have 1, 2 and 3 tokens; a fourth part gets none, and no share."""
    lengths = np.array([5, 6, 7])

    def extra(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([[k if k <= row else -100 for k in range(3)] for row in rows])}

    batches = Batches([0, 1, 2], lambda i: {"encoder_states": np.full((lengths[i], 1), i)}, lengths, 100, extra)
    order, parts = batches.batches[0], Parts(batches, 4)
    found = [parts[k] for k in range(len(parts))]
    assert [part["share"].item() for part in found] == pytest.approx([*((row + 1) / 6 for row in order), 0])
    assert [part["encoder_states"][:, 0, 0].tolist() for part in found] == [[row] for row in [*order, order[0]]]
