"""The training loop: schedule, optimisers, checkpoints, objectives."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from hdmole.method.tuner import HDMoLEConfig
from hdmole.training import loop
from hdmole.training.adapt import Adaptation, parameter_groups
from hdmole.training.data import Batches
from hdmole.training.loop import (
    MuonAdamW,
    _Batch,
    _Report,
    cosine,
    ctc_objective,
    embedding_objective,
    fast_on_cpu,
    fit,
    language_objective,
    smoothed_objective,
)


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


class Stop(TrainerCallback):
    """Keeps what the training was told and ends it before its first step."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.seen = vars(args) | {"group": optimizer.param_groups[0]}
        raise InterruptedError


@pytest.mark.parametrize(("steps", "save", "log"), [(333, 55, 33), (4000, 300, 50), (9, 20, 1)])
def test_what_the_trainer_and_the_optimiser_are_told(tmp_path: Path, steps: int, save: int, log: int) -> None:
    stop, batches = Stop(), [{"x": torch.ones(1, 2)}]
    with pytest.raises(InterruptedError):
        fit(
            nn.Linear(2, 1), batches, lambda model, batch: model(batch["x"]).mean(), tmp_path / "fit", epochs=steps, rate=0.1,
            report=print, callbacks=[stop],
        )  # fmt: skip
    told = (
        "max_steps",
        "save_steps",
        "logging_steps",
        "save_total_limit",
        "seed",
        "max_grad_norm",
        "per_device_train_batch_size",
    )
    assert [stop.seen[name] for name in told] == [steps, save, log, 1, 0, 1.0, 1]
    told = ("bf16", "disable_tqdm", "dataloader_pin_memory", "remove_unused_columns")
    assert [stop.seen[name] for name in told] == [loop.BF16, True, False, False]
    assert (stop.seen["group"]["betas"], stop.seen["group"]["weight_decay"]) == ((0.9, 0.98), 0.01)


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
        rate=0.2, report=print, groups=groups, callbacks=[rates],
    )  # fmt: skip
    assert rates.found == [[0.0, 0.0], [0.2, 2.0]]
    assert all(torch.equal(head[k], v) for k, v in model.head.state_dict().items()) and not model.training
    assert torch.equal(untouched, model.body["layers"][0].bias)  # type: ignore[index]


@pytest.mark.parametrize(("muon", "bf16"), [(False, True), (True, True), (False, False)])
def test_a_training_that_was_cut_off_ends_as_one_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: bool, bf16: bool
) -> None:
    monkeypatch.setattr(loop, "BF16", bf16)
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
        fit(model, batches, objective, folder, epochs=6, rate=0.01, report=print, muon=muon, seed=seed, callbacks=callbacks)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", Cut())
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["checkpoint-40"]  # one, of step 20 no longer
    rest = Count()
    resumed = train(tmp_path / "cut", rest)
    assert rest.steps == 20
    assert types == {torch.bfloat16 if bf16 else torch.float32} and not torch.equal(whole["head.weight"], start["head.weight"])
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
        report=print,
    )  # fmt: skip
    assert seen == [0, 0, 0, 1, 1, 1]


def test_a_resumed_epoch_is_the_whole_number_of_passes() -> None:
    batches = Batches(range(3), lambda i: {"x": np.ones((1, 2), np.float32)}, [1, 1, 1], 1, lambda rows: {})
    _Report(print, "fit", batches).on_epoch_begin(None, SimpleNamespace(global_step=5), None)
    assert type(batches.epoch) is int and batches.epoch == 1


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
            norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))

    fit(
        _Blocks(), [{"x": torch.ones(1, 6)}], lambda model, batch: 1000 * model(batch["x"]).float().square().mean(), tmp_path / "fit",
        epochs=1, rate=0.1, report=print, callbacks=[Watch()],
    )  # fmt: skip
    assert norms == [pytest.approx(1.0, abs=1e-3)]


def test_the_loss_comes_with_its_outputs_where_they_are_wanted() -> None:
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=nullcontext), objective=lambda model, batch: model + batch
    )
    assert _Batch.compute_loss(trainer, 1, 2) == 3  # type: ignore[arg-type]
    assert _Batch.compute_loss(trainer, 1, 2, return_outputs=True) == (3, {"loss": 3})  # type: ignore[arg-type]


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


def test_a_cpu_trains_the_fast_way(tmp_path: Path) -> None:
    fast: list[bool] = []

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        fast.append(not torch.backends.cuda.flash_sdp_enabled())
        return model(batch["x"]).float().mean()

    fit(nn.Linear(2, 1), [{"x": torch.ones(1, 2)}], objective, tmp_path / "fit", epochs=1, rate=0.1, report=print)
    assert fast == [not torch.cuda.is_available()]


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


def test_muon_in_a_training_takes_its_weights_out_of_the_groups(tmp_path: Path) -> None:
    """Muon takes both layers' weights, at the rate of the training. The second group had nothing else, and goes."""
    model, rates = _Blocks(), _Rates()
    first, second = model.body["layers"]  # type: ignore[misc]
    groups: list[dict[str, Any]] = [
        {"params": [first.weight, first.bias]},
        {"params": [second.weight], "lr": 3.0},
        {"params": [model.head.bias], "lr": 2.0, "weight_decay": 0.5},
    ]
    muon, *rest = MuonAdamW(model, 0.2, groups).param_groups
    assert [id(p) for p in muon["params"]] == [id(first.weight), id(second.weight)] and muon["lr"] == 0.2
    found = [([id(p) for p in group["params"]], group["lr"], group["weight_decay"]) for group in rest]
    assert found == [([id(first.bias)], 0.2, 0.01), ([id(model.head.bias)], 2.0, 0.5)]
    before = copy.deepcopy(model.state_dict())
    fit(
        model, [{"x": torch.ones(1, 6)}] * 2, lambda model, batch: (model(batch["x"]).float() - 1).square().mean(), tmp_path / "fit",
        epochs=1, rate=0.2, report=print, groups=groups, muon=True, callbacks=[rates],
    )  # fmt: skip
    assert rates.found == [[0.0, 0.0, 0.0], [0.2, 0.2, 2.0]]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"body.layers.0.weight", "body.layers.1.weight", "head.bias"} <= changed
    assert not {"body.layers.1.bias", "head.weight"} & changed  # they are in no group


def test_muon_and_adamw_have_the_published_settings() -> None:
    hidden, rest = MuonAdamW(_Blocks(), 0.1).param_groups
    assert (hidden["weight_decay"], hidden["ns_steps"], hidden["adjust_lr_fn"]) == (0.05, 3, "match_rms_adamw")
    assert (rest["betas"], rest["weight_decay"]) == ((0.9, 0.98), 0.01)


def test_muon_takes_experts_and_leaves_thresholds_and_routers_at_their_own_rates() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    holder = nn.ModuleDict({"body": model})
    config = HDMoLEConfig(accents=["a", "b"], r=2, shared_expert_rank=1, target_modules=["0"])
    adapted: Any = get_peft_model(holder, config)  # type: ignore[arg-type]
    named = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
    groups = parameter_groups(named, 0.1, Adaptation("a", "hdmole", threshold_rate=2, router_rate=3))
    optimizer = MuonAdamW(adapted, 0.1, groups)
    kind = {id(p): n.split(".")[-2] for n, p in named}
    found = [({kind[id(p)] for p in group["params"]}, round(group["lr"], 6)) for group in optimizer.param_groups]
    assert found == [
        ({"hdmole_A", "hdmole_B", "hdmole_shared_A", "hdmole_shared_B"}, 0.1), ({"hdmole_threshold"}, 0.2), ({"hdmole_router"}, 0.3),
    ]  # fmt: skip


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


def test_a_state_without_its_second_part_is_refused() -> None:
    optimizer = MuonAdamW(_Blocks(), 0.1)
    with pytest.raises(ValueError, match="shorter"):
        optimizer.load_state_dict({"parts": optimizer.state_dict()["parts"][:1]})


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


def test_the_ctc_loss_sums_the_paths_with_blanks() -> None:
    """One token in two frames: it lasts both (0.3 x 0.7), or a blank comes before (0.5 x 0.7) or after (0.3 x 0.2)."""
    frames = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]]]).log()
    model: Any = SimpleNamespace(
        encoder=lambda input_features, attention_mask: SimpleNamespace(
            last_hidden_state=input_features, attention_mask=attention_mask
        ),
        ctc_head=lambda states: states,
    )
    batch = {"input_features": frames, "attention_mask": torch.ones(1, 2, dtype=torch.long), "labels": torch.tensor([[1]])}
    assert float(ctc_objective(model, batch)) == pytest.approx(-math.log(0.21 + 0.35 + 0.06), rel=1e-5)


def test_the_language_loss_is_the_models_own() -> None:
    found = language_objective(
        lambda x, labels: SimpleNamespace(loss=x + labels), {"x": torch.tensor(2), "labels": torch.tensor(3)}
    )  # type: ignore[arg-type]
    assert found == 5


def test_the_smoothed_loss_by_hand() -> None:
    """Two tokens after three frames: each is predicted by the logits before it; those of the last predict nothing.

    Padding (-100) is left out. Of classes (0, 1) with logits (0, 1) and the target 1: 0.95 * -log p(1) + 0.05 * mean of
    -log p over both classes.
    """
    logits = torch.tensor([[[9.0, -9.0], [8.0, -8.0], [0.0, 1.0], [5.0, 7.0], [-4.0, 4.0]]])
    batch = {"labels": torch.tensor([[1, -100]])}
    one, zero = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    found = smoothed_objective(lambda labels: SimpleNamespace(logits=logits), batch)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(0.95 * one + 0.05 * (one + zero) / 2, rel=1e-6)
    batch = {"labels": torch.tensor([[1, 0]])}
    one2, zero2 = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    second = 0.95 * zero2 + 0.05 * (one2 + zero2) / 2
    found = smoothed_objective(lambda labels: SimpleNamespace(logits=logits), batch)  # type: ignore[arg-type]
    assert float(found) == pytest.approx((0.95 * one + 0.05 * (one + zero) / 2 + second) / 2, rel=1e-6)


def test_the_embedding_loss_is_the_squared_error_over_the_variance_of_the_targets() -> None:
    """Three frames, of which the mask leaves two; certain of tokens 0 and 1, whose embeddings are (0, 2) and (4, 4)."""
    embeddings = nn.Embedding(2, 2)
    embeddings.weight = nn.Parameter(torch.tensor([[0.0, 2.0], [4.0, 4.0]]))
    states = torch.tensor([[[0.0, -99.0], [-99.0, 0.0], [0.0, -99.0]]])
    mask = torch.tensor([[True, True, False]])

    def loss_of(said: torch.Tensor) -> torch.Tensor:
        def projected(heard: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
            assert heard is states and frames is mask
            return said

        model: Any = SimpleNamespace(
            ctc_log_probs=lambda states: states, get_input_embeddings=lambda: embeddings, multi_modal_projector=projected
        )
        return embedding_objective(model, {"encoder_states": states, "encoder_mask": mask})

    # variances over two frames (n - 1): 8 and 2, mean 5; squared errors of saying the mean: 4, 1, 4, 1, mean 2.5
    mean = torch.tensor([[[2.0, 3.0], [2.0, 3.0], [50.0, 50.0]]], requires_grad=True)
    loss = loss_of(mean)
    assert float(loss.detach()) == pytest.approx(0.5)
    loss.backward()
    assert embeddings.weight.grad is None and mean.grad is not None and mean.grad[0, 2].tolist() == [0, 0]
    assert float(loss_of(torch.tensor([[[0.0, 2.0], [4.0, 4.0], [7.0, 7.0]]]))) == 0
    assert float(loss_of(torch.tensor([[[1.0, 2.0], [4.0, 4.0], [7.0, 7.0]]]))) == pytest.approx(0.25 / 5)
