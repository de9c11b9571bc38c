"""Training by small examples: schedule, optimisers, objectives, the choice of rows, SpecAugment, temperatures."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, TrainerCallback

from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tuner.layer import HDMoLELinear
from hdmole.training import adapt as adapting
from hdmole.training import preparation
from hdmole.training.adapt import Adaptation, Speech, parameter_groups, training_rows
from hdmole.training.data import Batches, Corpus, States, mel_batches, spec_augment, write_corpus
from hdmole.training.loop import (
    MuonAdamW,
    cosine,
    ctc_objective,
    embedding_objective,
    fast_on_cpu,
    fit,
    language_objective,
    smoothed_objective,
)
from hdmole.training.preparation import best_temperature, encode_corpus, softer_temperature, tempered, train_recogniser


def silent(line: str) -> None:
    """Takes a report and does nothing with it."""


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (5, 0.5), (9, 0.9), (10, 1.0), (40, 0.75), (55, 0.5), (70, 0.25), (100, 0.1), (99, 0.1)],
)
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(step: int, rate: float) -> None:
    """Of 100 steps, 10 warm up; a third of the other 90 on, the cosine of 60 degrees is 1/2, so the rate 3/4."""
    assert cosine(step, 100, warmup=0.1, last=0.1) == pytest.approx(rate)


def test_the_schedule_of_few_steps() -> None:
    assert cosine(0, 1) == 0 and cosine(1, 1) == 1  # at least one step of warm-up
    assert [cosine(s, 3, warmup=0, last=0) for s in range(4)] == pytest.approx([0, 1, 0.5, 0])
    assert cosine(100, 100) == 0.01 and cosine(5, 100) == 1 and cosine(4, 100) == pytest.approx(0.8)  # as `fit` has it


class _Blocks(nn.Module):
    """Two residual blocks in a list called `layers`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body["layers"]:  # type: ignore[union-attr]
            x = x + layer(x).relu()
        return self.head(x)


class _Rates(TrainerCallback):
    """Learning rates (one of each parameter group) before each step."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.found.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("muon", [False, True])
def test_every_step_takes_the_rate_of_the_schedule(tmp_path: Path, muon: bool) -> None:
    batches = [{"x": torch.ones(1, 6)}] * 4
    said: list[str] = []
    rates = _Rates()
    fit(
        _Blocks(), batches, lambda model, batch: model(batch["x"]).float().square().mean(), tmp_path / "fit", epochs=2.5, rate=0.5,
        report=said.append, muon=muon, warmup=0.2, last=0.3, callbacks=[rates],
    )  # fmt: skip
    expected = [0.0, 0.25, 0.5] + [0.5 * max(0.3, 0.5 * (1 + math.cos(math.pi * k / 8))) for k in range(1, 8)]
    groups = 2 if muon else 1
    assert len(rates.found) == 10  # two and a half passes over four batches
    assert [r for r in rates.found] == [pytest.approx([e] * groups) for e in expected]
    assert [line.split(",")[0] for line in said] == [f"fit: step {k} of 10" for k in range(1, 11)]
    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["checkpoint-10"]


def test_the_groups_of_an_optimiser_keep_their_own_rates(tmp_path: Path) -> None:
    model, rates = _Blocks(), _Rates()
    model.head.requires_grad_(False)
    head = copy.deepcopy(model.head.state_dict())
    groups = [{"params": [model.body["layers"][0].weight]}, {"params": [model.body["layers"][1].weight], "lr": 2.0}]  # type: ignore[index]
    untouched = model.body["layers"][0].bias.detach().clone()  # type: ignore[index]
    fit(
        model, [{"x": torch.ones(1, 6)}] * 2, lambda model, batch: model(batch["x"]).float().square().mean(), tmp_path / "fit", epochs=1,
        rate=0.2, report=silent, groups=groups, callbacks=[rates],
    )  # fmt: skip
    assert rates.found == [[0.0, 0.0], [0.2, 2.0]]
    assert all(torch.equal(head[k], v) for k, v in model.head.state_dict().items()) and not model.training
    assert torch.equal(untouched, model.body["layers"][0].bias)  # type: ignore[index]


@pytest.mark.parametrize("muon", [False, True])
def test_a_training_that_was_cut_off_ends_as_one_in_one_go(tmp_path: Path, muon: bool) -> None:
    torch.manual_seed(0)
    start = _Blocks().state_dict()
    batches = [{"x": torch.randn(8, 6), "labels": torch.randint(0, 3, (8,))} for _ in range(10)]
    types = set()

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.body["layers"][0](batch["x"])  # type: ignore[index]
        types.add(hidden.dtype)  # the autocast holds outside of the model's own forward, too
        return nn.functional.cross_entropy(model(batch["x"]).float() + 0 * hidden.sum(), batch["labels"])

    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            if state.global_step == 40:
                raise InterruptedError

    class Count(TrainerCallback):
        def __init__(self) -> None:
            self.steps = 0

        def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
            self.steps += 1

    def train(folder: Path, *callbacks: TrainerCallback, seed: int = 0) -> dict[str, torch.Tensor]:
        model = _Blocks()
        model.load_state_dict(start)
        fit(model, batches, objective, folder, epochs=6, rate=0.01, report=silent, muon=muon, seed=seed, callbacks=callbacks)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", Cut())
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["checkpoint-40"]  # one, of step 20 no longer
    rest = Count()
    resumed = train(tmp_path / "cut", rest)
    assert rest.steps == 20
    assert types == {torch.bfloat16} and not torch.equal(whole["head.weight"], start["head.weight"])
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    other = train(tmp_path / "other", seed=1)
    assert not torch.equal(whole["head.weight"], other["head.weight"])  # the seed decides on the order of the batches


def test_batches_are_told_their_epoch_also_after_a_resume(tmp_path: Path) -> None:
    seen: list[int] = []

    def fetch(i: int) -> dict[str, np.ndarray]:
        seen.append(batches.epoch)
        return {"x": np.ones((1, 6), np.float32)}

    batches = Batches(range(3), fetch, [1, 1, 1], 1, lambda rows: {})
    fit(
        _Blocks(), batches, lambda model, batch: model(batch["x"]).float().square().mean(), tmp_path / "fit", epochs=2, rate=0.1,
        report=silent,
    )  # fmt: skip
    assert seen == [0, 0, 0, 1, 1, 1]


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
            norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))

    fit(
        _Blocks(), [{"x": torch.ones(1, 6)}], lambda model, batch: 1000 * model(batch["x"]).float().square().mean(), tmp_path / "fit",
        epochs=1, rate=0.1, report=silent, callbacks=[Watch()],
    )  # fmt: skip
    assert norms == [pytest.approx(1.0, abs=1e-3)]


def test_depthwise_convolutions_train_in_float32_on_a_cpu() -> None:
    depthwise, dense, plane = nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    single, grouped = nn.Conv1d(1, 1, 3), nn.Conv1d(4, 4, 3, groups=2)  # neither is depthwise
    x, image = torch.randn(1, 4, 9), torch.randn(1, 4, 9, 9)
    model = nn.Sequential(depthwise, dense, plane, single, grouped)
    for around, of_depthwise in ((fast_on_cpu, torch.float32), (nullcontext, torch.bfloat16)):
        with around(model), torch.autocast("cpu", torch.bfloat16):
            assert (depthwise(x.bfloat16()).dtype, dense(x).dtype, plane(image.bfloat16()).dtype) == (
                of_depthwise, torch.bfloat16, of_depthwise,
            )  # fmt: skip
            assert single(x[:, :1]).dtype == grouped(x).dtype == torch.bfloat16
    with pytest.raises(KeyError), fast_on_cpu(model):
        assert "forward" in vars(depthwise) and "forward" not in vars(dense)
        assert torch.equal(depthwise(x), nn.functional.conv1d(x, depthwise.weight, depthwise.bias, groups=4))
        raise KeyError
    assert not any("forward" in vars(m) for m in model)  # the convolutions' own again, also after an error


def test_attention_is_by_matrix_products_inside_the_block_only() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with fast_on_cpu(nn.Linear(1, 1)):
        assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_muon_takes_the_weights_of_hidden_layers_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model = _Blocks()
    model.body["layers"][0].weight.requires_grad_(False)  # type: ignore[index]
    alone = copy.deepcopy(model)
    hidden = alone.body["layers"][1].weight  # type: ignore[index]
    rest = [p for p in alone.parameters() if p.requires_grad and p is not hidden]
    expected = (
        torch.optim.Muon([hidden], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=3),
        torch.optim.AdamW(rest, lr=0.1, betas=(0.9, 0.98), weight_decay=0.01),
    )
    optimizer = MuonAdamW(model, 0.1)
    taken = [group["params"] for group in optimizer.param_groups]
    assert [len(of) for of in taken] == [1, 4] and taken[0][0] is model.body["layers"][1].weight  # type: ignore[index]
    x = torch.randn(9, 6)
    for _ in range(3):
        for stepping, optimizers in ((model, (optimizer,)), (alone, expected)):
            stepping.zero_grad()
            stepping(x).pow(2).sum().backward()
            for each in optimizers:
                each.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name])


def test_the_state_of_muon_and_adamw_is_saved_and_loaded_and_follows_a_schedule() -> None:
    torch.manual_seed(0)
    model = _Blocks()
    optimizer = MuonAdamW(model, 0.1)
    x = torch.randn(9, 6)
    model(x).pow(2).sum().backward()
    optimizer.step()
    other = copy.deepcopy(model)
    loaded = MuonAdamW(other, 0.7)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.1]
    for which in (optimizer, loaded):
        for group in which.param_groups:
            group["lr"] = 0.05
    for stepping, each in ((model, optimizer), (other, loaded)):
        stepping.zero_grad()
        stepping(x).pow(2).sum().backward()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- objectives -------------------------------------------------------------------------------------------------------


def test_the_ctc_loss_of_one_frame_and_one_token_is_its_negative_log_probability() -> None:
    """One frame each; the second utterance has two tokens, for which one frame is too short: it counts zero."""
    logits = torch.tensor([[[0.0, 3.0, 1.0]], [[0.0, 0.0, 0.0]]])
    model = SimpleNamespace(
        encoder=lambda input_features, attention_mask: SimpleNamespace(
            last_hidden_state=input_features, attention_mask=attention_mask
        ),
        ctc_head=lambda states: states,
    )
    batch = {
        "input_features": logits,
        "attention_mask": torch.ones(2, 1, dtype=torch.long),
        "labels": torch.tensor([[1, -100], [1, 2]]),
    }
    first = math.log(1 + math.exp(3) + math.exp(1)) - 3
    assert float(ctc_objective(model, batch)) == pytest.approx(first / 2, rel=1e-5)  # type: ignore[arg-type]
    # two frames for the two tokens: one path, (1, 2), each with probability 1/3; the loss is per token
    batch = {
        "input_features": torch.zeros(1, 2, 3),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
        "labels": torch.tensor([[1, 2]]),
    }
    assert float(ctc_objective(model, batch)) == pytest.approx(2 * math.log(3) / 2, rel=1e-5)  # type: ignore[arg-type]
    # a frame that is masked is not read
    batch["attention_mask"], batch["labels"] = torch.tensor([[1, 0]]), torch.tensor([[2]])
    assert float(ctc_objective(model, batch)) == pytest.approx(math.log(3), rel=1e-5)  # type: ignore[arg-type]


def test_the_language_loss_is_the_models_own() -> None:
    found = language_objective(
        lambda x, labels: SimpleNamespace(loss=x + labels), {"x": torch.tensor(2), "labels": torch.tensor(3)}
    )  # type: ignore[arg-type]
    assert found == 5


def test_the_smoothed_loss_by_hand() -> None:
    """Two tokens after one frame of speech: logits of the frame before each predict it, those of the last predict nothing.

    Of classes (0, 1) with logits (0, 1) and the target 1: 0.95 * -log p(1) + 0.05 * mean of -log p over both classes.
    """
    logits = torch.tensor([[[9.0, -9.0], [0.0, 1.0], [5.0, 7.0], [-4.0, 4.0]]])
    batch = {"labels": torch.tensor([[1, -100]])}
    one, zero = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    found = smoothed_objective(lambda labels: SimpleNamespace(logits=logits), batch)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(0.95 * one + 0.05 * (one + zero) / 2, rel=1e-6)
    batch = {"labels": torch.tensor([[1, 0]])}
    one2, zero2 = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    second = 0.95 * zero2 + 0.05 * (one2 + zero2) / 2
    found = smoothed_objective(lambda labels: SimpleNamespace(logits=logits), batch)  # type: ignore[arg-type]
    assert float(found) == pytest.approx((0.95 * one + 0.05 * (one + zero) / 2 + second) / 2, rel=1e-6)


def test_the_embedding_loss_is_one_for_a_projector_that_says_the_mean() -> None:
    """Three frames, of which the mask leaves two; certain of tokens 0 and 1, whose embeddings are (0, 2) and (4, 0)."""
    embeddings = nn.Embedding(2, 2)
    embeddings.weight = nn.Parameter(torch.tensor([[0.0, 2.0], [4.0, 0.0]]))
    states = torch.tensor([[[0.0, -99.0], [-99.0, 0.0], [0.0, -99.0]]])
    mask = torch.tensor([[True, True, False]])

    def loss_of(said: torch.Tensor) -> torch.Tensor:
        model: Any = SimpleNamespace(
            ctc_log_probs=lambda states: states,
            get_input_embeddings=lambda: embeddings,
            multi_modal_projector=lambda states, mask: said,
        )
        return embedding_objective(model, {"encoder_states": states, "encoder_mask": mask})

    # variances over two frames (n - 1): 8 and 2, mean 5; squared errors of saying the mean: 4, 1, 4, 1, mean 2.5
    mean = torch.tensor([[[2.0, 1.0], [2.0, 1.0], [50.0, 50.0]]], requires_grad=True)
    loss = loss_of(mean)
    assert float(loss.detach()) == pytest.approx(0.5)
    loss.backward()
    assert embeddings.weight.grad is None and mean.grad is not None and mean.grad[0, 2].tolist() == [0, 0]
    assert float(loss_of(torch.tensor([[[0.0, 2.0], [4.0, 0.0], [7.0, 7.0]]]))) == 0
    assert float(loss_of(torch.tensor([[[1.0, 2.0], [4.0, 0.0], [7.0, 7.0]]]))) == pytest.approx(0.25 / 5)


# -- what is trained, and on what -------------------------------------------------------------------------------------


def test_thresholds_learn_at_ten_times_the_rate_and_without_weight_decay() -> None:
    names = ["layer.hdmole_A.default", "layer.hdmole_threshold_local.default", "layer.hdmole_B.default"]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in names]
    slow, fast = parameter_groups(named, 0.002)
    assert [id(p) for p in slow["params"]] == [id(named[0][1]), id(named[2][1])] and set(slow) == {"params"}
    assert [id(p) for p in fast["params"]] == [id(named[1][1])]
    assert fast["lr"] == pytest.approx(0.02) and fast["weight_decay"] == 0
    assert len(parameter_groups([named[0]], 0.002)) == 1


def corpus_of(folder: Path, rows: list[tuple[str, str, str]], frames: int = 40) -> Corpus:
    """A corpus of (split, domain, accent); every feature of utterance i is i + 1."""
    index = pd.DataFrame(rows, columns=["split", "domain", "accent"])
    index = index.assign(text="one two", speaker="s", utterance=[f"u{i}" for i in range(len(rows))], seconds=1.0)
    write_corpus(folder, index, [np.full((frames, 80), i + 1, np.float16) for i in range(len(rows))])
    return Corpus(folder)


def test_replay_exchanges_accented_for_general_speech_and_share_takes_some_of_it(tmp_path: Path) -> None:
    accented, general = list(range(20)), list(range(20, 30))
    rows = [("train", "accent", "german")] * 20 + [("train", "general", "general")] * 10
    corpus = corpus_of(tmp_path, [*rows, ("test", "accent", "german"), ("dev", "general", "general")], frames=1)
    assert training_rows(corpus, Adaptation("a", "full"), 0) == accented

    def counted(seed: int = 0, **changes: float) -> tuple[int, int]:
        found = training_rows(corpus, Adaptation("a", "full", **changes), seed)  # type: ignore[arg-type]
        assert len(set(found)) == len(found)
        return len(set(found) & set(accented)), len(set(found) & set(general))

    assert counted(replay=0.25) == (15, 5)  # as many as before, a quarter of them general
    assert counted(share=0.1) == (2, 0)
    assert counted(share=0.5, replay=0.2) == (8, 2)
    assert counted(replay=0.75) == (10, 10)  # no more than there is
    assert counted(share=0.001) == (1, 0)
    replayed = Adaptation("a", "full", replay=0.25)
    assert training_rows(corpus, replayed, 1) == training_rows(corpus, replayed, 1) != training_rows(corpus, replayed, 2)


# -- SpecAugment ------------------------------------------------------------------------------------------------------


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


def test_batches_of_masked_features_are_another_view_each_epoch(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [("train", "accent", "german")] * 2)
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
        assert 0 < (batch["input_features"] == 0).float().mean() < 0.8
    assert torch.equal(views[0], views[2]) and not torch.equal(views[0], views[1])


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
    corpus = corpus_of(tmp_path / "corpus", rows)
    states = encode_corpus(corpus, _Mirror(), tmp_path / "states", [0], 5, silent)
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
    corpus, masked = corpus_of(tmp_path / "corpus", rows), []

    def look(model: nn.Module, batches: Batches, objective: Any, folder: Path, **rest: Any) -> None:
        masked.append((folder.name, bool((batches[0]["input_features"] == 0).any()), rest["epochs"]))

    monkeypatch.setattr(preparation, "fit", look)
    stages = [("clear", [0, 1], False, 2.0), ("masked", [0, 1], True, 1.0)]
    train_recogniser(corpus, ["general", "german"], stages, tmp_path / "r", rate=1e-3, seed=0, report=silent)
    assert masked == [("r-clear-training", False, 2.0), ("r-masked-training", True, 1.0)]


# -- temperatures -----------------------------------------------------------------------------------------------------


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
    corpus = corpus_of(tmp_path / "corpus", [*rows, ("dev", "general", "general")])
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
    again, same = train_recogniser(corpus, ["general", "german"], [], tmp_path / "r", rate=0, seed=0, report=silent)
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


def test_batches_padded_to_multiples_come_in_few_shapes() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(40, 800, 400)
    shapes, masked = {}, {}
    for multiple in (1, 32):
        batches = Batches(
            range(400), lambda i: {"x": np.ones((lengths[i], 2))}, lengths, 4_000, lambda rows: {}, multiple=multiple
        )
        items = [batches[n] for n in range(len(batches))]
        shapes[multiple] = {tuple(item["x"].shape) for item in items}
        masked[multiple] = sum(int(item["attention_mask"].sum()) for item in items)
    assert len(shapes[32]) < len(shapes[1]) / 1.5 and all(t % 32 == 0 and b * t <= 4_000 for b, t, _ in shapes[32])
    assert masked[1] == masked[32] == lengths.sum()


# -- an adaptation as a whole -----------------------------------------------------------------------------------------


@pytest.fixture
def accented(tmp_path: Path, tiny_model: Path) -> Speech:
    """Speech for the tiny model: 8 accented and 4 general training utterances; view v of utterance i is 100 v + i throughout."""
    labels = ["general", "indian", "german", "scottish"]
    rows = [("train", "accent", labels[1 + i % 3]) for i in range(8)] + [("train", "general", "general")] * 4
    corpus = corpus_of(tmp_path / "corpus", rows, frames=4)
    states = np.concatenate([np.full((3, 32), 100 * view + i, np.float16) for view in (0, 1) for i in range(12)])
    spans = np.array([[[3 * (12 * view + i), 3] for i in range(12)] for view in (0, 1)])
    torch.manual_seed(0)
    recogniser, posteriors = AccentRecogniser(labels, channels=16), np.full((12, 4), 0.25, np.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return Speech(corpus, States(states, spans), tokenizer, tiny_model, recogniser, posteriors)


class _Fits:
    """Stands in for `fit`: keeps what it was called with, and what an HDMoLE layer's gate was then made of."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module, batches: Batches, objective: Any, folder: Path, **rest: Any) -> None:
        rows = [i for batch in batches.batches for i in batch]
        layer = next((m for m in model.modules() if isinstance(m, HDMoLELinear)), None)
        config = None if layer is None else layer.configs["default"]
        call = {"rows": rows, "batch": batches[0], "folder": folder.name, "config": config, "objective": objective, **rest}
        self.calls.append({**call, "names": {id(p): name for name, p in model.named_parameters()}})


def adapted(speech: Speech, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, **changes: Any) -> list[dict[str, Any]]:
    """The calls of `fit` when a method of a kind is trained for 2 epochs at a rate of 0.01."""
    fits, options = _Fits(), {"r": 1, "shared_expert_rank": 1} if kind == "hdmole" else {}
    monkeypatch.setattr(adapting, "fit", fits)
    adaptation = Adaptation("a", kind, options, **changes)
    adapting.adapt(speech, adaptation, folder / "adapter", epochs=2, rate=0.01, seed=0, report=silent)
    return fits.calls


def test_an_adaptation_trains_thresholds_faster_on_the_accents(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = adapted(accented, tmp_path, monkeypatch, "hdmole")
    slow, fast = call["groups"]
    assert fast["lr"] == pytest.approx(0.1) and call["rate"] == 0.01 and fast["weight_decay"] == 0
    assert slow["params"] and all("threshold" not in call["names"][id(p)] for p in slow["params"])
    assert fast["params"] and all("threshold" in call["names"][id(p)] for p in fast["params"])
    assert sorted(call["rows"]) == list(range(8)) and call["epochs"] == 2 and call["folder"] == "adapter-training"
    assert call["objective"] is smoothed_objective and call["batch"]["accent_posterior"].tolist()[0] == [0.25] * 4
    assert call["config"].routing == "hierarchical"


def test_replay_and_share_reach_the_training(accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = adapted(accented, tmp_path, monkeypatch, "full", replay=0.25, share=0.5)
    assert len(call["rows"]) == 4 and len([i for i in call["rows"] if i >= 8]) == 1
    assert call["epochs"] == 4 and "accent_posterior" not in call["batch"]  # as many steps as with all of the speech


def test_a_warm_start_trains_each_expert_on_its_own_accent_first(
    accented: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, rest = adapted(accented, tmp_path, monkeypatch, "hdmole", warm_share=0.25)
    assert (warm["folder"], warm["epochs"], rest["folder"], rest["epochs"]) == ("adapter-warming", 0.5, "adapter-training", 1.5)
    assert (warm["config"].routing, warm["config"].thresholds, warm["config"].shared_expert_rank) == ("global", "dense", 0)
    assert (rest["config"].routing, rest["config"].thresholds, rest["config"].shared_expert_rank) == (
        "hierarchical",
        "relu",
        1,
    )
    assert warm["batch"]["accent_posterior"].amax(1).tolist() == [1.0] * 8  # the accent that was spoken
    assert warm["batch"]["accent_posterior"].argmax(1).bincount().tolist() == [0, 3, 3, 2]
    assert rest["batch"]["accent_posterior"].tolist() == [[0.25] * 4] * 8


def test_training_hears_both_masked_views_of_an_utterance(accented: Speech) -> None:
    batches, views = accented.batches(list(range(8)), 0, lambda rows: {}), []
    for epoch in range(12):
        batches.epoch = epoch
        heard = batches[0]["encoder_states"][:, 0, 0] // 100
        assert heard.tolist() == (batches[0]["encoder_states"][:, 0, 0] // 100).tolist()  # the same within an epoch
        views.append(heard)
    share = torch.stack(views).mean(0)
    assert (share > 0).all() and (share < 1).all()  # of each utterance now one, now the other


def test_training_posteriors_come_from_masked_features(tmp_path: Path) -> None:
    class Zeros(nn.Module):
        """Logits: the share of features that are zero, and 0."""

        labels = ("general", "german")

        def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([(features == 0).float().mean((1, 2)), torch.zeros(len(features))], 1)

    corpus = corpus_of(tmp_path, [("train", "accent", "german"), ("dev", "accent", "german"), ("train", "general", "general")])
    logits = preparation._accent_logits(Zeros(), corpus, 0, "cpu")
    for i in (0, 2):
        expected = spec_augment(corpus.features(i), np.random.default_rng((0, 0, i)), 2, 0.08)
        assert logits[i, 0] == pytest.approx((expected == 0).mean()) and logits[i, 0] > 0
    assert logits[1].tolist() == [0, 0]
