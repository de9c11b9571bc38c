"""Mel features, the input of the models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdmole.speech.audio import SAMPLE_RATE


def mel_features(extractor: Any, sound: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mel features of one sound, as a batch of one.

    Args:
        extractor: the model's feature extractor, such as `ParakeetFeatureExtractor`.
        sound: (S,) samples at 16 kHz.

    Returns:
        Features (1, T, n_mels), with 0 in place of NaN, and their mask (1, T), which is 0 for
        frames of padding.
    """
    batch = extractor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    return torch.nan_to_num(batch["input_features"]), batch["attention_mask"]


def stored_mel_features(extractor: Any, sound: np.ndarray) -> np.ndarray:
    """Mel features (T, n_mels) of one sound in float16, without padding, for a training corpus."""
    features, mask = mel_features(extractor, sound)
    return features[mask.bool()].numpy().astype(np.float16)
