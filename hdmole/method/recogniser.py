"""The accent recogniser: a network that computes the accent posterior of an utterance.

The posterior routes the utterance. A recogniser is trained before the adapter, then frozen. There
are two kinds:

* `AccentRecogniser` reads frames: mel features, or a learned weighted sum of the frozen encoder's
  layers, as in EAR (arXiv 2606.10454). It is a small time-delay network of dilated convolutions
  (x-vectors, Snyder et al. 2018) with statistics pooling. Only valid frames are pooled, so padding
  does not change the result. It is saved with the adapter.
* `LayerRecogniser` reads means and deviations over time of the layers of a pretrained encoder. So
  much is learned there already that a small network is enough. It is saved with the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from hdmole.files import write_text, written


class _Recogniser(nn.Module):
    """What both recognisers share: saving, loading, labels and the posterior."""

    arguments: dict[str, Any]
    temperature: Tensor

    def save(self, folder: Path) -> None:
        """Write the weights and the arguments the network was made with into `folder`."""
        with written(folder / "model.safetensors") as part:
            save_file(self.state_dict(), part)
        write_text(folder / "config.json", json.dumps(self.arguments, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; the network is ready for use, without dropout."""
        model = cls(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    @property
    def labels(self) -> list[str]:
        """Names of the classes, the general domain first."""
        labels: list[str] = self.arguments["labels"]
        return labels

    @torch.no_grad()
    def posterior(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Posterior pi (B, N + 1): the softmax of the logits divided by the stored temperature.

        The temperature calibrates it (Guo et al. 2017). Takes what `forward` takes. Computed in
        float32, without gradient and without dropout.
        """
        training = self.training
        self.eval()
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self(features.float()) if mask is None else self(features.float(), mask)
        self.train(training)
        return (logits / self.temperature).softmax(1)


class AccentRecogniser(_Recogniser):
    """From the features of an utterance to a posterior over accents.

    Class 0 is the general domain. With `layers`, the features of a frame are the outputs of that
    many encoder layers, one after the other. Each is normalised, and their sum with learned softmax
    weights is what the network reads.

    Parameters
    ----------
    labels : names of the classes, the general domain first, then the accent of each expert
    n_mels : mel bins of the features; with `layers` the width of the encoder
    channels : width of the network
    feature_layout : "time_first" for features (B, T, n_mels), "mel_first" for (B, n_mels, T)
    dropout : dropout before the output layer, in training
    layers : encoder layers that are read; 0 reads mel features

    Raises
    ------
    ValueError : an unknown feature layout, or "mel_first" with `layers`
    """

    def __init__(
        self, labels: list[str], n_mels: int = 80, channels: int = 128, feature_layout: str = "time_first", dropout: float = 0.2,
        layers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if feature_layout not in ("time_first", "mel_first"):
            raise ValueError(f"feature_layout is 'time_first' or 'mel_first', not {feature_layout!r}.")
        if layers and feature_layout != "time_first":
            raise ValueError("Outputs of encoder layers have the layout 'time_first'.")
        self.arguments: dict[str, Any] = dict(
            labels=list(labels), n_mels=n_mels, channels=channels, feature_layout=feature_layout, dropout=dropout
        )
        if layers:
            self.arguments["layers"] = layers
            self.layer_weights = nn.Parameter(torch.zeros(layers))
        # Encoder frames are eight times as long as mel frames, so none is skipped there.
        stride = 1 if layers else 2
        shapes = [(n_mels, 5, 1, stride), (channels, 3, 1, 1), (channels, 3, 2, 1), (channels, 3, 3, 1), (channels, 3, 4, 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size, channels, kernel, stride=stride, dilation=dilation, padding=dilation * (kernel - 1) // 2)
            for size, kernel, dilation, stride in shapes
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in shapes)
        self.attention = nn.Linear(channels, 1)
        self.hidden = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(channels, len(labels))
        self.register_buffer("temperature", torch.ones(()))

    @property
    def layers(self) -> int:
        """The number of encoder layers that are read; 0 for mel features."""
        return int(self.arguments.get("layers", 0))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N + 1).

        Parameters
        ----------
        features : (B, T, n_mels), or (B, n_mels, T) where `feature_layout` is "mel_first"; with
            `layers` (B, T, layers * n_mels)
        mask : (B, T), true on valid frames; without it all frames are valid

        Raises
        ------
        ValueError : features of another width
        """
        width = self.arguments["n_mels"] * max(1, self.layers)
        if self.arguments["feature_layout"] == "mel_first":
            features = features.transpose(1, 2)
        if features.dim() != 3 or features.shape[2] != width:
            what = f"{self.layers} encoder layers, {width} numbers a frame" if self.layers else f"{width} mel bins"
            raise ValueError(f"The accent recogniser expects {what}; got features {tuple(features.shape)}.")
        features = features.to(self.output.weight.dtype)
        if self.layers:
            each = features.unflatten(2, (self.layers, -1))  # (B, T, layers, n_mels)
            each = functional.layer_norm(each, each.shape[-1:])
            features = (self.layer_weights.softmax(0)[:, None] * each).sum(2)
        mask = torch.ones(features.shape[:2], device=features.device) if mask is None else mask
        valid = mask.to(features.dtype)[..., None]  # (B, T, 1)
        x = (features - (features * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)) * valid
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(functional.relu(convolution(x.transpose(1, 2)))).transpose(1, 2)
            if y.shape[1] != valid.shape[1]:
                valid = valid[:, :: convolution.stride[0]][:, : y.shape[1]]  # type: ignore[index]
            x = (x + y if x.shape == y.shape else y) * valid
        frames = valid.sum(1).clamp_min(1)  # (B, 1)
        mean = x.sum(1) / frames
        deviation = (((x - mean[:, None]) * valid) ** 2).sum(1).div(frames).add(1e-5).sqrt()
        weight = self.attention(x).masked_fill(valid == 0, -1e4).softmax(1)  # (B, T, 1)
        attended = (weight * x).sum(1)
        peak = x.masked_fill(valid == 0, -1e4).amax(1)
        pooled = torch.cat([mean, deviation, attended, peak], 1)  # (B, 4 * channels)
        logits: Tensor = self.output(self.dropout(functional.relu(self.hidden(pooled))))
        return logits


class LayerRecogniser(_Recogniser):
    """From statistics of the layers of a frozen encoder to a posterior over accents.

    The layers are added with learned weights that sum to 1, as in SUPERB (Yang et al. 2021).

    Parameters
    ----------
    labels : names of the classes, the general domain first, then the accent of each expert
    layers : number of layers
    width : numbers that are given for each layer
    hidden : width of the network
    dropout : dropout before the output layer, in training
    """

    def __init__(self, labels: list[str], layers: int, width: int, hidden: int = 256, dropout: float = 0.3) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = dict(labels=list(labels), layers=layers, width=width, hidden=hidden, dropout=dropout)
        self.weights = nn.Parameter(torch.zeros(layers))
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, len(labels))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, statistics: Tensor) -> Tensor:
        """Logits (B, N + 1) from statistics (B, layers, width), such as means over time."""
        x = (statistics * self.weights.softmax(0)[:, None]).sum(1)
        logits: Tensor = self.output(self.dropout(functional.relu(self.hidden(self.norm(x)))))
        return logits
