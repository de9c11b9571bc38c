"""Preparing speech for training: encoder outputs, the accent recogniser, temperatures of its posteriors."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import ACCENTS, TARGETS, tiny_corpus, tiny_speech_llm
from torch import nn
from transformers import TrainerControl, TrainerState

from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.training import preparation
from hdmole.training.data import Batches, spec_augment
from hdmole.training.preparation import (
    best_temperature,
    encode_corpus,
    encode_layers,
    softer_temperature,
    tempered,
    train_recogniser,
)


class _Mirror(nn.Module):
    """An encoder whose outputs are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=input_features, attention_mask=attention_mask)


def test_training_speech_is_encoded_in_two_masked_views_and_other_speech_as_it_is(tmp_path: Path) -> None:
    rows = [
        ("train", "accent", "german"),
        ("test", "accent", "german"),
        ("train", "accent", "german"),
        ("dev", "general", "general"),
    ]
    corpus = tiny_corpus(tmp_path / "corpus", rows)
    states = encode_corpus(corpus, _Mirror(), tmp_path / "states", [0], 5, print)
    for view in (0, 1):
        expected = spec_augment(corpus.features(0), np.random.default_rng((5, view, 0)), 1, 0.05)
        np.testing.assert_array_equal(states.get(0, view), expected)
        assert (states.get(0, view) == 0).any()
    assert not np.array_equal(states.get(0, 0), states.get(0, 1))
    for i in (1, 3):
        assert (states.get(i) == i + 1).all() and states.get(i).shape == (40, 80) and (states.get(i, 1) == i + 1).all()
    assert states.spans[:, 2].sum() == 0  # a training row that was not asked for


def test_the_stages_of_the_recogniser_mask_the_features_that_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("train", "accent", "german"),
        ("train", "general", "general"),
        ("dev", "accent", "german"),
        ("dev", "general", "general"),
    ]
    corpus, masked = tiny_corpus(tmp_path / "corpus", rows), []

    def look(model: nn.Module, batches: Batches, objective: Any, folder: Path, **rest: Any) -> None:
        masked.append((folder.name, bool((batches[0]["input_features"] == 0).any()), rest["epochs"]))

    monkeypatch.setattr(preparation, "fit", look)
    stages = [("clear", [0, 1], False, 2.0), ("masked", [0, 1], True, 1.0)]
    train_recogniser(corpus, ["general", "german"], stages, tmp_path / "r", rate=1e-3, seed=0, report=print)
    assert masked == [("r-clear-training", False, 2.0), ("r-masked-training", True, 1.0)]


def test_training_posteriors_come_from_masked_features(tmp_path: Path) -> None:
    class Zeros(nn.Module):
        """Logits: the share of features that are zero, and 0."""

        labels = ("general", "german")

        def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([(features == 0).float().mean((1, 2)), torch.zeros(len(features))], 1)

    corpus = tiny_corpus(tmp_path, [("train", "accent", "german"), ("dev", "accent", "german"), ("train", "general", "general")])
    logits = preparation._accent_logits(Zeros(), corpus, 0, "cpu")
    for i in (0, 2):
        expected = spec_augment(corpus.features(i), np.random.default_rng((0, 0, i)), 2, 0.08)
        assert logits[i, 0] == pytest.approx((expected == 0).mean()) and logits[i, 0] > 0
    assert logits[1].tolist() == [0, 0]


def test_the_temperature_is_the_one_with_the_least_cross_entropy() -> None:
    """Three of four right at a logit difference of 2: best is a probability of 3/4, so 2 / T = log 3 and T = 1.82."""
    logits = torch.tensor([[2.0, 0.0]] * 4)
    assert best_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(1.8)
    assert best_temperature(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(0.5)  # all right: as sure as may be
    assert best_temperature(logits, torch.tensor([0, 1, 1, 1])) == pytest.approx(5.0)  # mostly wrong: as unsure as may be


def test_training_posteriors_are_no_surer_than_those_of_dev_speech() -> None:
    dev, train = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    softer = softer_temperature(train, dev, 2.0)  # 3 / T may be at most 2 / 2: T = 3; 2 * 1.05**9 is the first above
    assert softer == pytest.approx(2 * 1.05**9)
    assert softer_temperature(dev, train, 2.0) == 2.0  # already less sure
    assert 10 <= softer_temperature(torch.tensor([[1e4, 0.0]]), dev, 2.0) < 10.5


def test_posteriors_are_the_softmax_of_logits_over_their_temperature() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    found = tempered(logits, np.array([True, False]), 2.0, 4.0)
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))])
    assert found[1].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])


def test_a_recogniser_is_trained_saved_and_loaded_with_its_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recogniser hears the known accent in each; on dev speech it is wrong once in four."""
    rows = [("train", "accent", "german"), ("train", "general", "general")] + [("dev", "accent", "german")] * 3
    corpus = tiny_corpus(tmp_path / "corpus", [*rows, ("dev", "general", "general")])
    logits = torch.tensor([[0.0, 4.0], [4.0, 0.0]] + [[0.0, 2.0]] * 4)
    monkeypatch.setattr(preparation, "fit", lambda *args, **rest: None)
    monkeypatch.setattr(preparation, "_accent_logits", lambda *args: logits)
    told: list[str] = []
    recogniser, posteriors = train_recogniser(
        corpus, ["general", "german"], [("clear", [0, 1], False, 1.0)], tmp_path / "r", rate=1e-3, seed=0, report=told.append
    )
    assert float(recogniser.temperature) == pytest.approx(1.8)
    assert posteriors[2].tolist() == pytest.approx([1 / (1 + math.exp(2 / 1.8)), 1 / (1 + math.exp(-2 / 1.8))], rel=1e-4)
    assert posteriors[0, 1] <= posteriors[2, 1] < posteriors[0, 1] + 0.02  # 4 / 1.8 softened until no surer
    assert told == ["recogniser: 75.0% on dev speakers, temperature 1.80, 3.74 for training posteriors"]
    again, same = train_recogniser(corpus, ["general", "german"], [], tmp_path / "r", rate=0, seed=0, report=print)
    assert float(again.temperature) == float(recogniser.temperature) and np.array_equal(same, posteriors)


def test_the_recogniser_divides_its_logits_by_the_temperature() -> None:
    torch.manual_seed(0)
    recogniser = AccentRecogniser(["general", "german"], channels=8).eval()
    features = torch.randn(1, 50, 80)
    recogniser.temperature.fill_(2.5)
    with torch.no_grad():
        logits = recogniser(features)
    torch.testing.assert_close(recogniser.posterior(features), (logits / 2.5).softmax(1))
    assert not torch.allclose(recogniser.posterior(features), logits.softmax(1), atol=1e-4)


def test_encoder_layers_stand_in_the_place_of_mel_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BF16", False)
    rows = [
        ("train", "accent", "german"),
        ("train", "general", "general"),
        ("dev", "accent", "german"),
        ("test", "accent", "german"),
    ]
    corpus, base = tiny_corpus(tmp_path / "corpus", rows), tiny_speech_llm()
    said: list[str] = []
    layers = encode_layers(corpus, base, tmp_path / "layers", [0, 2, 3], said.append)
    mels = torch.from_numpy(np.array(corpus.features(2), np.float32))[None]
    states, _ = base.encode(mels, torch.ones(1, 40, dtype=torch.bool))
    assert layers.features(2).shape == (states.shape[1], 3 * 32)  # the subsampling and two layers
    torch.testing.assert_close(torch.from_numpy(np.array(layers.features(2)[:, 64:])).float(), states[0], atol=2e-3, rtol=2e-3)
    assert layers.index.frames.tolist() == [states.shape[1], 0, states.shape[1], states.shape[1]]  # one was not asked for
    assert layers.index.accent.tolist() == corpus.index.accent.tolist()
    count = len(said)
    again = encode_layers(corpus, base, tmp_path / "layers", [0, 2, 3], said.append)
    assert len(said) == count and np.array_equal(again.features(3), layers.features(3))

    stages = [("clear", [0], False, 1.0)]
    options: dict[str, Any] = {"rate": 1e-3, "seed": 0, "report": print}
    recogniser, posteriors = train_recogniser(layers, ["general", "german"], stages, tmp_path / "better", layers=3, **options)
    assert recogniser.layers == 3 and AccentRecogniser.load(tmp_path / "better").arguments == recogniser.arguments
    assert np.isnan(posteriors[1]).all() and np.allclose(posteriors[[0, 2, 3]].sum(1), 1)


def test_layers_are_normalised_and_weighted() -> None:
    torch.manual_seed(0)
    one, three = (AccentRecogniser(["general", "a"], n_mels=4, channels=8, layers=layers).eval() for layers in (1, 3))
    three.load_state_dict({**one.state_dict(), "layer_weights": torch.tensor([0.3, -1.0, 2.0])})
    x = torch.randn(2, 5, 4)
    louder = torch.cat([x, 7 * x, 0.1 * x + 3], -1)  # the same three times, apart from scale and offset
    torch.testing.assert_close(three(louder), one(x), atol=1e-3, rtol=1e-3)
    others = torch.cat([torch.randn(2, 5, 4), x, torch.randn(2, 5, 4)], -1)
    assert (three(others) - one(x)).abs().max() > 1e-2
    with torch.no_grad():
        three.layer_weights.copy_(torch.tensor([0.0, 50.0, 0.0]))  # the second layer alone
    torch.testing.assert_close(three(others), one(x))
    with pytest.raises(ValueError, match="3 encoder layers, 12 numbers a frame; got features"):
        three(x)
    with pytest.raises(ValueError, match="time_first"):
        AccentRecogniser(["general", "a"], feature_layout="mel_first", layers=2)


def test_a_recogniser_of_layers_asks_the_frozen_encoder() -> None:
    base = tiny_speech_llm()
    frozen = copy.deepcopy(base)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=32, channels=8, layers=3).eval()
    config = HDMoLEConfig(
        accents=ACCENTS, r=1, target_modules=f"({TARGETS})|audio_tower.*linear1", recogniser=recogniser.arguments
    )
    model: Any = get_peft_model(base, config)
    model.base_model.set_recogniser(recogniser)
    for name, parameter in model.named_parameters():
        if "hdmole_B" in name:
            nn.init.normal_(parameter)
    mels, mask = torch.randn(2, 60, 80), torch.ones(2, 60, dtype=torch.bool)
    mask[1, 40:] = False
    expected = recogniser.posterior(*frozen.encoder_layers(mels, mask))
    got = model.base_model.recognise((), {"input_features": mels, "attention_mask": mask})
    torch.testing.assert_close(got, expected)
    labels = torch.tensor([[5, 2], [6, 2]])
    with torch.no_grad():
        by_itself = model(input_features=mels, attention_mask=mask, labels=labels).logits
        given = model(input_features=mels, attention_mask=mask, labels=labels, accent_posterior=expected).logits
    torch.testing.assert_close(by_itself, given)
    assert (by_itself - frozen(input_features=mels, attention_mask=mask, labels=labels).logits).abs().max() > 1e-3  # it adapts
    plain: Any = get_peft_model(
        nn.Sequential(nn.Linear(80, 3)), HDMoLEConfig(accents=ACCENTS, target_modules=["0"], recogniser=recogniser.arguments)
    )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no method encoder_layers"):
        plain(mels)


def test_an_early_recogniser_stops_at_its_accuracy() -> None:
    measured: list[int] = []
    state, control = TrainerState(), TrainerControl()

    def accuracy() -> float:
        measured.append(state.global_step)
        return state.global_step / 50

    stop = preparation._Until(accuracy, 0.6)
    for step in range(1, 41):
        state.global_step = step
        stop.on_step_end(None, state, control)  # type: ignore[arg-type]
        if control.should_training_stop:
            break
    assert measured == [10, 20, 30] and state.global_step == 30
