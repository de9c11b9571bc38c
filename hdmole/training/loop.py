"""The training loop, which can be interrupted and resumed, and the objectives that it minimises."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hdmole.files import disk_space
from hdmole.training.data import Batches, Parts

Batch = dict[str, Tensor]
Objective = Callable[[Any, Batch], Tensor]  # (model, batch) -> scalar loss
# The attention of an LLM in training. On a CPU, "eager" is faster for short sequences.
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"
# Whether models are trained and speech is encoded in bf16. A CPU without instructions for bf16
# emulates them, and a training step then takes about twenty times as long as in float32. On a GPU,
# matrices of these sizes are multiplied as fast in TF32, without a kernel for each cast.
BF16 = not torch.cuda.is_available() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _PartByPart(Sampler[int]):
    """The parts of each batch one after the other, and batches in the order of a single process."""

    def __init__(self, dataset: Parts, seed: int) -> None:
        self.parts, self.sampler = dataset.parts, SeedableRandomSampler(dataset.batches, data_seed=seed)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.parts * len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        for number in self.sampler:
            yield from range(self.parts * number, self.parts * (number + 1))


class _Batch(Trainer):
    """A Trainer whose dataset has whole batches and whose loss is `objective(model, batch)`."""

    objective: Objective

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        # Accelerate by itself uses autocast only inside the model's `forward`.
        with self.accelerator.autocast():
            loss = self.objective(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


class _Part(_Batch):
    """A `_Batch` whose dataset is `Parts`."""

    loss_is_scaled_for_ga = True
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> _PartByPart:
        return _PartByPart(self.train_dataset, self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        share = inputs.pop("share") * self.args.world_size  # as DDP averages gradients that are to be summed
        return share * super().compute_loss(model, inputs)


class _Report(TrainerCallback):
    """Reports the loss, and sets the epoch of the batches."""

    def __init__(self, report: Callable[[str], None], name: str, batches: Batches | Sequence[Batch]) -> None:
        self.report, self.name, self.batches = report, name, batches

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if isinstance(self.batches, Batches):
            self.batches.epoch = state.global_step // len(self.batches)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.report(f"{self.name}: step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}")


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model trains faster on a CPU under autocast.

    Depthwise convolutions compute in float32, and attention by plain matrix products.
    """
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
            del module.forward


@contextmanager
def tf32() -> Iterator[None]:
    """Inside the block, a GPU multiplies float32 matrices in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for linear layers in the model's blocks, AdamW for all else.

    Of an adapter, Muon takes the factors of LoRA or of the experts; those of all experts are one
    matrix.

    Both take the same learning rate, because Muon's steps are scaled to the size of AdamW's
    (Liu et al. 2025). Muon uses three Newton-Schulz iterations in place of the usual five. This is
    nearly as good and cheaper on a CPU (docs/experiments/muon.md).
    """

    def __init__(self, model: nn.Module, rate: float, groups: Sequence[dict[str, Any]] | None = None) -> None:
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        hidden = [
            p for name, p in model.named_parameters()
            if p.requires_grad and ".layers." in name and (id(p) in linear or re.search(r"hdmole_(shared_)?[AB]\.", name))
        ]  # fmt: skip
        taken = set(map(id, hidden))
        groups = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        rest = [group for group in rest if group["params"]]
        super().__init__([*hidden, *(p for group in rest for p in group["params"])], {})
        self.parts = (
            torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=3),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        )
        self._share()

    def _share(self) -> None:
        # A learning-rate schedule changes these groups, which are those of the two optimisers.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def cosine(step: int, steps: int, warmup: float = 0.05, last: float = 0.01) -> float:
    """The learning rate at a step, as a share of its peak.

    It rises linearly during the warm-up and then falls along half a cosine (Loshchilov and
    Hutter 2017).

    Args:
        step: number of steps done, from 0.
        steps: number of steps of the whole training.
        warmup: share of the steps for the warm-up, which takes at least one step.
        last: after the warm-up, the learning rate does not fall below this share of the peak.
    """
    first = max(1, round(warmup * steps))
    if step < first:
        return step / first
    return max(last, 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first))))


def fit(
    model: nn.Module,
    batches: Batches | Sequence[Batch],
    objective: Objective,
    folder: Path,
    *,
    epochs: float,
    rate: float,
    report: Callable[[str], None],
    groups: Sequence[dict[str, Any]] | None = None,
    muon: bool = False,
    seed: int = 0,
    warmup: float = 0.05,
    last: float = 0.01,
    callbacks: Sequence[TrainerCallback] = (),
    accumulation: int = 1,
) -> None:
    """Train `model` in place, with a `cosine` schedule.

    Where transformers' Trainer finds several processes, they share every batch (DDP). The steps are
    those of a single process, but for rounding.

    In bf16 autocast where the processor computes bf16 itself (`BF16`), in TF32 on a GPU, otherwise
    in float32.

    An interrupted training goes on from the last checkpoint in `folder`.

    Args:
        model: the model. Its parameters that require a gradient are trained.
        batches: batches by number; each is a dict of tensors.
        objective: the loss to minimise, called as `objective(model, batch)`.
        folder: where checkpoints are written.
        epochs: passes over the data; may be a fraction.
        rate: peak learning rate.
        report: called with each line about the loss.
        groups: AdamW parameter groups. If not given, every trainable parameter has the rate `rate`.
        muon: whether to train with `MuonAdamW` in place of AdamW.
        seed: random seed of the order of the batches.
        warmup: share of the steps for the warm-up.
        last: lowest learning rate after the warm-up, as a share of the peak.
        callbacks: callbacks of transformers' Trainer.
        accumulation: number of parts of a batch, or of a process's share of it, whose gradients are
            computed one after the other and added, so that they need less memory. `Batches` can be
            divided, other batches cannot.

    Raises:
        OutputError: the disk is full. The last checkpoint is whole.
    """
    steps = max(1, math.ceil(epochs * len(batches)))
    optimizer: torch.optim.Optimizer
    if muon:
        optimizer = MuonAdamW(model, rate, groups)
    else:
        trained = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
        optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine, steps=steps, warmup=warmup, last=last))
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        bf16=BF16,
        use_cpu=not gpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_steps=max(20, min(300, steps // 6)),
        save_total_limit=1,
        logging_steps=max(1, min(50, steps // 10)),
        max_grad_norm=1.0,
        logging_nan_inf_filter=False,  # it would wait for the GPU after every step
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        gradient_accumulation_steps=accumulation,
    )
    dataset: Any = batches
    if (parts := arguments.world_size * accumulation) > 1:
        assert isinstance(batches, Batches)
        dataset = Parts(batches, parts)
    trainer = (_Part if parts > 1 else _Batch)(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda items: items[0],
        optimizers=(optimizer, schedule),
        callbacks=[_Report(report, folder.name, batches), *callbacks],
    )
    trainer.objective = objective
    with PartialState().main_process_first():
        checkpoint = last_checkpoint(folder)
    with disk_space(folder), tf32() if gpu else fast_on_cpu(model):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()


def last_checkpoint(folder: Path) -> str | None:
    """The path of the last checkpoint that was written whole; None if there is none.

    Later ones, which an interruption left unfinished, are removed. A checkpoint's state is what
    transformers' Trainer writes last.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def ctc_objective(model: nn.Module, batch: Batch) -> Tensor:
    """CTC loss per token of a transformers CTC model. The blank is the padding token."""
    encoder = model.encoder(input_features=batch["input_features"], attention_mask=batch["attention_mask"])  # type: ignore[operator]
    log_probs = model.ctc_head(encoder.last_hidden_state).float().log_softmax(-1).transpose(0, 1)  # type: ignore[operator]
    labels = batch["labels"]
    lengths = (labels >= 0).sum(1)
    loss = functional.ctc_loss(
        log_probs, labels.clamp_min(0), encoder.attention_mask.sum(1), lengths, blank=0, reduction="none", zero_infinity=True
    )
    return (loss / lengths.clamp_min(1)).mean()


def language_objective(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token."""
    loss: Tensor = model(**batch).loss
    return loss


def smoothed_objective(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the transcript's tokens with label smoothing 0.05."""
    labels = batch["labels"]
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.05)


def embedding_objective(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error between the projector's output and token embeddings of the LLM.

    The target of a frame is the mean of all token embeddings, weighted by the CTC head's posterior.
    The error is divided by the variance of the targets, so that a projector that always outputs
    their mean has a loss of about 1. The LLM gets no gradient.
    """
    states, mask = batch["encoder_states"], batch["encoder_mask"]
    with torch.no_grad():
        target = model.ctc_log_probs(states).exp() @ model.get_input_embeddings().weight  # type: ignore[operator]
        target = target[mask].float()
    said = model.multi_modal_projector(states, mask)[mask].float()  # type: ignore[operator]
    error: Tensor = functional.mse_loss(said, target) / target.var(0).mean()
    return error
