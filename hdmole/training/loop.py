"""The training loop: transformers' Trainer over ready-made batches, resumable at any point; and its objectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hdmole.training.data import Batches

# of an LLM in training: the latter is faster on a CPU and short sequences
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


class _Batch(Trainer):
    """A Trainer whose dataset items are whole batches and whose loss is `objective(model, batch)`."""

    objective: Any = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        with self.accelerator.autocast():  # accelerate casts in the model's own forward alone
            loss = self.objective(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


class _Report(TrainerCallback):
    def __init__(self, report: Any, name: str, batches: Any) -> None:
        self.report, self.name, self.batches = report, name, batches

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if isinstance(self.batches, Batches):
            self.batches.epoch = state.global_step // len(self.batches)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            self.report(f"{self.name}: step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}")


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """What trains faster on a CPU under autocast: depthwise convolutions in float32, attention by plain matrix products."""
    found = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d) and 1 < m.groups == m.in_channels]

    def in_float32(forward: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    for module in found:
        module.forward = partial(in_float32, module.forward)  # type: ignore[method-assign]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in found:
            del module.forward  # type: ignore[method-assign]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the weights of linear layers in the model's blocks, AdamW for everything else.

    Both take the same learning rate: Muon's steps are scaled to the size of AdamW's (Liu et al. 2025). Three Newton-Schulz
    iterations in place of five: nearly as good and cheaper on a CPU (docs/experiments.md).
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        hidden = [
            m.weight for n, m in model.named_modules() if ".layers." in n and isinstance(m, nn.Linear) and m.weight.requires_grad
        ]
        taken = set(map(id, hidden))
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        super().__init__([*hidden, *rest], {})
        self.parts = (
            torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=3),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        )
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # a schedule sets their rates

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def fit(
    model: nn.Module,
    batches: Any,
    objective: Any,
    folder: Path,
    *,
    epochs: float,
    rate: float,
    report: Any,
    groups: Iterable[dict[str, Any]] | None = None,
    muon: bool = False,
    seed: int = 0,
    warmup: float = 0.05,
    last: float = 0.01,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train `model` in place with AdamW (or `MuonAdamW`), bf16 autocast and a cosine schedule; resumes from the last checkpoint.

    Parameters
    ----------
    batches : dataset whose items are batches (dicts of tensors)
    objective : (model, batch) -> scalar loss
    folder : where checkpoints go
    epochs, rate, warmup : passes over the data, peak learning rate, share of the steps for the warm-up
    last : least learning rate at the end, as a share of the peak
    groups : AdamW parameter groups; every trainable parameter at `rate` where none are given
    muon : take `MuonAdamW`, without groups
    callbacks : transformers' callbacks, to look on
    """
    steps = max(1, math.ceil(epochs * len(batches)))  # type: ignore[arg-type]
    parameters = list(groups or [{"params": [p for p in model.parameters() if p.requires_grad]}])
    optimizer: torch.optim.Optimizer = (
        MuonAdamW(model, rate)
        if muon
        else torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    )
    first = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: s / first if s < first else max(last, 0.5 * (1 + math.cos(math.pi * (s - first) / max(1, steps - first)))),
    )
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        bf16=True,
        use_cpu=not gpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_steps=max(20, min(300, steps // 6)),
        save_total_limit=1,
        logging_steps=max(1, min(50, steps // 10)),
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    trainer = _Batch(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: items[0],
        optimizers=(optimizer, schedule),
        callbacks=[_Report(report, folder.name, batches), *callbacks],
    )
    trainer.objective = objective
    with nullcontext() if gpu else fast_on_cpu(model):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    model.eval()


def ctc_objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """CTC loss per token of a transformers CTC model; the blank is the padding token."""
    encoder = model.encoder(input_features=batch["input_features"], attention_mask=batch["attention_mask"])  # type: ignore[operator]
    log_probs = model.ctc_head(encoder.last_hidden_state).float().log_softmax(-1).transpose(0, 1)  # type: ignore[operator]
    labels = batch["labels"]
    lengths = (labels >= 0).sum(1)
    loss = functional.ctc_loss(
        log_probs, labels.clamp_min(0), encoder.attention_mask.sum(1), lengths, blank=0, reduction="none", zero_infinity=True
    )
    return (loss / lengths.clamp_min(1)).mean()


def language_objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token."""
    return model(**batch).loss


def smoothed_objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the transcript's tokens with label smoothing 0.05."""
    labels = batch["labels"]
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.05)


def embedding_objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared distance of the projector's output from the LLM embeddings of what the CTC head hears, 1 for their mean.

    The target of a frame is the mean of the token embeddings under the CTC head's posterior; the LLM gets no gradient.
    """
    states, mask = batch["encoder_states"], batch["encoder_mask"]
    with torch.no_grad():
        target = model.ctc_log_probs(states).exp() @ model.get_input_embeddings().weight  # type: ignore[operator]
        target = target[mask].float()
    said = model.multi_modal_projector(states, mask)[mask].float()  # type: ignore[operator]
    return functional.mse_loss(said, target) / target.var(0).mean()
