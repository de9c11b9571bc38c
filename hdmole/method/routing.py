"""Routing: the utterance that each row of a layer's input belongs to, and its accent posterior.

A layer needs both, but its input holds neither. They are kept in one variable of the thread,
together with the active interventions and traces. Threads that share a model therefore do not see
each other's routing, and the model holds no state of a call. It is a `threading.local` and not a
context variable, because `torch.compile` can read the former without a graph break.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


class RoutingError(ValueError):
    """A layer cannot tell which utterance its rows belong to, or has no accent posterior."""


@dataclass(frozen=True)
class Routing:
    """Accent posterior (U, N + 1) of the utterances, and the utterance of each input row."""

    posterior: Tensor
    rows: Tensor | Mapping[str, Tensor] | None = None
    beams: int = 1
    unmasked: bool = False  # the adapter's recogniser found the accent without a mask of padding
    # of layers that ran without gradients: what holds for the next tokens as well
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    # of modules that cut what they get: the length of its first axis, and the number of rows that
    # each row is cut into, by the module's name (`hdmole.method.tuner.cuts`)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.posterior.dim() != 2:
            raise RoutingError(
                f"The accent posterior has shape {tuple(self.posterior.shape)}; it must be (utterances, experts + 1)."
            )
        if torch.compiler.is_compiling():  # compiled code cannot look at numbers
            return
        # the first is false for NaN
        if not ((self.posterior.sum(1) - 1).abs() < 1e-2).all() or (self.posterior < 0).any():
            raise RoutingError("The accent posterior must be probabilities that sum to 1 over the classes, for every utterance.")
        utterances = len(self.posterior)
        for rows in self.rows.values() if isinstance(self.rows, Mapping) else (self.rows,):
            if rows is None:
                continue
            outside = rows[(rows < 0) | (rows >= utterances)]
            if rows.dtype != torch.long or outside.numel():
                raise RoutingError(
                    f"The row-to-utterance index holds whole numbers (torch.long) from 0 to {utterances - 1}, one for each "
                    f"utterance of the accent posterior; this one is {rows.dtype} with {outside.unique().tolist()} outside."
                )

    def of_frames(self, value: Tensor, x: Tensor, layer: str) -> Tensor:
        """`value` (U, K) of the utterances, so that it broadcasts against the frames of `x` (B,
        ..., d).

        Its shape is (K,) for a single utterance, (U, 1..., K) where the rows of `x` are the
        utterances, and otherwise (rows..., 1..., K). Raises RoutingError as `of_rows` does.
        """
        if self.rows is None and len(value) == 1:
            return value[0]
        if self.rows is not None or x.dim() < 3 or len(value) != x.shape[0]:
            value = value[self.of_rows(x, layer)]
        return value.reshape(*value.shape[:-1], *[1] * (x.dim() - value.dim()), value.shape[-1])

    def _given(self, layer: str) -> Tensor | None:
        """The index that was given for a layer; None if there is none."""
        if not isinstance(self.rows, Mapping):
            return self.rows
        fitting = [part for part in self.rows if part in layer]
        return self.rows[max(fitting, key=len)] if fitting else None

    def cut(self, x: Tensor, layer: str) -> tuple[int, int] | None:
        """How the first axis of a layer's input `x` (B, ..., d) is split into utterances, or their
        beams, and rows of each; None if a row is an utterance or nothing is known of it.
        """
        name = max((name for name in self.cuts if layer.startswith(f"{name}.")), key=len, default=None)
        # one of many experts gets some of the tokens, in any order
        if name is None or self._given(layer) is not None or ".experts." in layer:
            return None
        batch, parts = self.cuts[name]
        fits = batch in (len(self.posterior), len(self.posterior) * self.beams) and x.shape[0] == batch * parts
        return (batch, parts) if fits else None

    def copies(self, x: Tensor, layer: str) -> int:
        """How many beams of an utterance stand one after the other in `x` (B, ..., d); 1 without
        beams.
        """
        rows = self._given(layer)
        single = len(self.posterior) if rows is None else len(rows) if rows.dim() == 1 else x.shape[0]
        return self.beams if x.shape[0] == single * self.beams else 1

    def of_rows(self, x: Tensor, layer: str) -> Tensor:
        """Utterance of each row of `x` (B, ..., d), as a LongTensor.

        Its shape is the beginning of the shape of `x`. Raises RoutingError if the index does not
        fit the input; nothing is guessed.
        """
        utterances, batch = len(self.posterior), x.shape[0]
        rows = self._given(layer)
        if rows is not None:
            rows = rows.to(x.device).repeat_interleave(self.copies(x, layer), 0)
            if rows.shape != x.shape[: rows.dim()] or rows.dim() >= x.dim():
                raise RoutingError(
                    f"The row-to-utterance index of shape {tuple(rows.shape)} does not fit layer {layer!r}, whose input is "
                    f"{tuple(x.shape)}; give utterance_rows for this layer, one utterance number a row."
                )
            return rows
        if utterances == 1:
            return torch.zeros(batch, dtype=torch.long, device=x.device)
        if x.dim() >= 3 and batch == utterances:
            return torch.arange(batch, device=x.device)
        if x.dim() >= 3 and batch == utterances * self.beams:
            return torch.arange(utterances, device=x.device).repeat_interleave(self.beams)
        raise RoutingError(
            f"Layer {layer!r} got an input of shape {tuple(x.shape)} for {utterances} utterances, and nothing says which row "
            "belongs to which; give utterance_rows, a LongTensor with one utterance number a row."
        )


@dataclass(frozen=True)
class Context:
    """Routing, interventions and trace recorders in the current `with` blocks of this thread."""

    routing: Routing | None = None
    interventions: tuple[Any, ...] = ()
    recorders: tuple[Any, ...] = ()
    losses: list[Tensor] | None = None  # auxiliary losses of layers, if they are collected
    frozen: bool = False  # layers add nothing: the frozen model is asked
    within: bool = False  # a call of an adapted model is going on
    outer: Context | None = None  # what the model `entered` has to restore at the end of its call
    entered: Any = None


_EMPTY = Context()
_thread = threading.local()


def current() -> Context:
    """The context of this thread. It is empty outside of all blocks."""
    context: Context = getattr(_thread, "context", _EMPTY)
    return context


def set_current(context: Context) -> None:
    """Make `context` that of this thread. `use` does so for a block."""
    _thread.context = context


@contextmanager
def use(context: Context) -> Iterator[None]:
    """Run the block under `context`."""
    before = current()
    _thread.context = context
    try:
        yield
    finally:
        _thread.context = before


@contextmanager
def route(posterior: Tensor, rows: Tensor | Mapping[str, Tensor] | None = None, beams: int = 1) -> Iterator[None]:
    """Give every HDMoLE layer that runs in the block its accent posterior.

    Parameters
    ----------
    posterior : (U, N + 1), accent posterior of each utterance, class 0 general; rows sum to 1
    rows : row -> utterance index. A LongTensor whose shape is the beginning of the layers' input
        shape, or a mapping from a part of the layer name to such a tensor where layers see
        different batches (a packed projector, say). Not needed for one utterance, nor where a
        layer's input (B, T, d) has one row an utterance.
    beams : beams per utterance, where the batch axis is utterances times beams

    Raises
    ------
    RoutingError : the posterior is not (U, N + 1) or does not sum to 1; or, from a layer in the
        block, the index does not fit
    """
    with use(replace(current(), routing=Routing(posterior.detach(), rows, beams))):
        yield


@contextmanager
def rows_are(rows: Tensor) -> Iterator[None]:
    """In the block, row i of every layer's input belongs to utterance `rows[i]` (a LongTensor).

    For a model's own code, where it packs utterances or runs them one at a time. The accent
    posterior stays that of the block around; without any, nothing happens.
    """
    context = current()
    routing = context.routing
    with use(context if routing is None else replace(context, routing=replace(routing, rows=rows, beams=1))):
        yield


@contextmanager
def auxiliary_losses() -> Iterator[list[Tensor]]:
    """Collect the auxiliary loss () of every HDMoLE layer that runs in the block.

    Add their sum, times a weight, to the loss of a training step. The list is empty if no layer has
    such a loss (`HDMoLEConfig.auxiliary_loss`).
    """
    losses: list[Tensor] = []
    with use(replace(current(), losses=losses)):
        yield losses


def checkpoint_contexts() -> tuple[Any, Any]:
    """`context_fn` for torch.utils.checkpoint: recomputation sees the routing of the forward pass.

    The recomputation records no trace, because the trace would hold every frame twice. It needs
    `use_reentrant=False`. Give it to transformers as `gradient_checkpointing_kwargs`:
    `{"use_reentrant": False, "context_fn": checkpoint_contexts}`.
    """
    context = current()
    return use(context), use(replace(context, recorders=(), losses=None))


def adapter_of(model: nn.Module) -> tuple[str, Any]:
    """Name and configuration of the active HDMoLE adapter of `model`.

    Raises ValueError if there is none.
    """
    configs: Any = getattr(model, "peft_config", {})
    names: Any = getattr(model, "active_adapters", [])
    if callable(names):  # a model of transformers without PEFT's around it
        names = next((m.active_adapters for m in model.modules() if getattr(m, "is_hdmole_layer", False)), [])
    for name in names:
        if hasattr(configs.get(name), "accents"):
            return name, configs[name]
    raise ValueError("This model has no active HDMoLE adapter, so there is no routing to look at or to change.")


def layers_of(model: nn.Module, layers: str | list[str] | None = None) -> dict[int, tuple[str, int]]:
    """The HDMoLE layers of `model` whose name matches: id(layer) -> (name, place).

    The place is the number of the layer among all HDMoLE layers of the model, from 0. `layers` is
    None for all, a regular expression searched in the name, or a list of names. Raises ValueError
    if no layer matches.
    """
    found = {}
    named = [(name, module) for name, module in model.named_modules() if getattr(module, "is_hdmole_layer", False)]
    for order, (_, module) in enumerate(named):
        name = module.layer_name
        wanted = layers is None or (bool(re.search(layers, name)) if isinstance(layers, str) else name in layers)
        if wanted:
            found[id(module)] = (name, order)
    if not found:
        raise ValueError(
            f"No HDMoLE layer matches {layers!r}; the layers are {', '.join(m.layer_name for _, m in named) or 'none at all'}."
        )
    return found
