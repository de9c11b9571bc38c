"""Details of the training loop that a training from end to end does not show."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hdmole.training.data import Batches
from hdmole.training.loop import MuonAdamW, _Batch, _Report, ctc_objective, embedding_objective, fit, smoothed_objective


class Layers(nn.Module):
    """One hidden layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
        self.head = nn.Linear(2, 1)


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
    assert [stop.seen[name] for name in told] == [True, True, False, False]
    assert (stop.seen["group"]["betas"], stop.seen["group"]["weight_decay"]) == ((0.9, 0.98), 0.01)


def test_a_cpu_trains_the_fast_way(tmp_path: Path) -> None:
    fast: list[bool] = []

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        fast.append(not torch.backends.cuda.flash_sdp_enabled())
        return model(batch["x"]).float().mean()

    fit(nn.Linear(2, 1), [{"x": torch.ones(1, 2)}], objective, tmp_path / "fit", epochs=1, rate=0.1, report=print)
    assert fast == [not torch.cuda.is_available()]


def test_muon_and_adamw_have_the_published_settings() -> None:
    hidden, rest = MuonAdamW(Layers(), 0.1).param_groups
    assert (hidden["weight_decay"], hidden["ns_steps"], hidden["adjust_lr_fn"]) == (0.05, 3, "match_rms_adamw")
    assert (rest["betas"], rest["weight_decay"]) == ((0.9, 0.98), 0.01)


def test_a_state_without_its_second_part_is_refused() -> None:
    optimizer = MuonAdamW(Layers(), 0.1)
    with pytest.raises(ValueError, match="shorter"):
        optimizer.load_state_dict({"parts": optimizer.state_dict()["parts"][:1]})


def test_a_resumed_epoch_is_the_whole_number_of_passes() -> None:
    batches = Batches(range(3), lambda i: {"x": np.ones((1, 2), np.float32)}, [1, 1, 1], 1, lambda rows: {})
    _Report(print, "fit", batches).on_epoch_begin(None, SimpleNamespace(global_step=5), None)
    assert type(batches.epoch) is int and batches.epoch == 1


def test_the_loss_comes_with_its_outputs_where_they_are_wanted() -> None:
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=nullcontext), objective=lambda model, batch: model + batch
    )
    assert _Batch.compute_loss(trainer, 1, 2) == 3  # type: ignore[arg-type]
    assert _Batch.compute_loss(trainer, 1, 2, return_outputs=True) == (3, {"loss": 3})  # type: ignore[arg-type]


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


def test_the_smoothed_loss_reads_the_last_positions_and_leaves_padding_out() -> None:
    """Three frames of speech before two tokens of which one is padding: the third frame's logits predict the first token."""
    logits = torch.tensor([[[9.0, -9.0], [8.0, -8.0], [0.0, 1.0], [5.0, 7.0], [-4.0, 4.0]]])
    one, zero = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    model: Any = lambda labels: SimpleNamespace(logits=logits)  # noqa: E731
    found = smoothed_objective(model, {"labels": torch.tensor([[1, -100]])})
    assert float(found) == pytest.approx(0.95 * one + 0.05 * (one + zero) / 2, rel=1e-6)


def test_the_embedding_loss_of_a_projector_that_repeats_its_input() -> None:
    """Certain of tokens 0 and 1, embedded as (0, 2) and (4, 0), the projector says (1, 2) and (4, 0): error 1 in 4 numbers.

    The variances of the targets over frames are 8 and 2, on average 5.
    """
    embeddings = nn.Embedding(2, 2)
    embeddings.weight = nn.Parameter(torch.tensor([[0.0, 2.0], [4.0, 0.0]]))
    heard = torch.tensor([[[0.0, -99.0], [-99.0, 0.0]]])

    def projector(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert bool(mask.all())
        return torch.where(states == heard, torch.tensor([[[1.0, 2.0], [4.0, 0.0]]]), 0)

    model: Any = SimpleNamespace(
        ctc_log_probs=lambda states: states, get_input_embeddings=lambda: embeddings, multi_modal_projector=projector
    )
    found = embedding_objective(model, {"encoder_states": heard, "encoder_mask": torch.ones(1, 2, dtype=torch.bool)})
    assert float(found) == pytest.approx(1 / 4 / 5, rel=1e-5)
