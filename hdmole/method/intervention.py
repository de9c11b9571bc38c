"""Interventions: change the routing for the calls inside a `with` block.

The model itself is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hdmole.method.gate import LEARNED, THRESHOLDS, Gates
from hdmole.method.routing import adapter_of, current, layers_of, use
from hdmole.names import GENERAL, SHARED


@dataclass(frozen=True)
class Intervention:
    """What is changed at which layers. The fields are the checked parameters of `intervene`."""

    adapter: str
    layers: dict[int, tuple[str, int]]
    posterior: Tensor | None
    force: tuple[int, ...]
    mask: tuple[int, ...]
    tau_global: float | None
    tau_local: float | None
    scale: float
    gate: Tensor | None
    switches: dict[str, Any]
    shared: bool  # whether the shared expert works

    def change_thresholds(self, tau_global: Tensor, tau_local: Tensor) -> tuple[Tensor, Tensor]:
        """The changed thresholds: the given ones, or the layer's own, times the scale."""
        if self.tau_global is not None:
            tau_global = torch.full_like(tau_global, self.tau_global)
        if self.tau_local is not None:
            tau_local = torch.full_like(tau_local, self.tau_local)
        return tau_global * self.scale, tau_local * self.scale

    def change_gate(self, gates: Gates, most: Tensor) -> Gates:
        """The gates with the changed gate G.

        `most` (...) is the sum of G when every branch has experts on. Forced experts share it.
        """
        gate = gates.gate
        if self.gate is not None:
            gate = self.gate.to(gate).expand_as(gate)
        if self.force:
            gate = torch.zeros_like(gate)
            gate[..., list(self.force)] = (most / len(self.force))[..., None]
        if self.mask:
            gate = gate.clone()
            gate[..., list(self.mask)] = 0
        return gates._replace(gate=gate)


@contextmanager
def intervene(
    model: nn.Module,
    layers: str | list[str] | None = None,
    *,
    accent: str | Sequence[float] | Tensor | None = None,
    force: Sequence[int | str] = (),
    mask: Sequence[int | str] = (),
    tau_global: float | None = None,
    tau_local: float | None = None,
    scale_thresholds: float = 1.0,
    thresholds: str | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    gate: Sequence[float] | Tensor | None = None,
) -> Iterator[None]:
    """Run the calls in the block with changed routing.

    If blocks are nested, the innermost block that includes a layer applies to it.

    Parameters
    ----------
    model : a model with an active HDMoLE adapter
    layers : a regular expression searched in the names of layers, a list of names, None for all
    accent : name of an accent (or "general"), or a posterior (N + 1,), in place of the
        accent recogniser's
    force : experts (numbers from 0, or names of accents) that share the whole gate equally; all
        others are off. "shared" is the shared expert, if the adapter has one.
    mask : experts that are switched off, named as in `force`; the others keep their weight
    tau_global, tau_local : thresholds, 0 to 1. In the paper's gate a threshold is also the sum of
        its branch's weights, so that both change.
    scale_thresholds : factor on both thresholds
    thresholds, top_k, top_p : another way of choosing experts, one of
        `hdmole.method.gate.THRESHOLDS`. The weights of a branch keep the sum that the adapter was
        trained with.
    gate : the gate itself (N,)

    Raises
    ------
    ValueError : an unknown expert, accent, layer or switch; a threshold outside 0 to 1; a gate or
        posterior with the wrong shape or impossible numbers; a number that the chosen way of
        choosing experts does not use
    """
    adapter, config = adapter_of(model)
    experts: list[str] = config.accents
    classes = [GENERAL, *experts]
    named = [*experts, SHARED] if config.shared_expert_rank else experts  # the shared one has no number

    def number(expert: int | str) -> int:
        if isinstance(expert, str) and expert in experts:
            return experts.index(expert)
        if isinstance(expert, int) and 0 <= expert < len(experts):
            return expert
        raise ValueError(f"There is no expert {expert!r}; the experts are {', '.join(named)} (0 to {len(experts) - 1}).")

    posterior = None
    if isinstance(accent, str):
        if accent not in classes:
            raise ValueError(f"There is no accent {accent!r}; the accents are {', '.join(classes)}.")
        posterior = torch.eye(len(classes))[classes.index(accent)]
    elif accent is not None:
        posterior = torch.as_tensor(accent, dtype=torch.float32)
        if posterior.shape != (len(classes),):
            raise ValueError(f"An accent posterior has {len(classes)} numbers, the general domain first.")
        if not (posterior >= 0).all() or abs(float(posterior.sum()) - 1) > 1e-2:
            raise ValueError("An accent posterior is probabilities that sum to 1.")
    if thresholds is not None and thresholds not in THRESHOLDS:
        raise ValueError(f"thresholds is one of {', '.join(THRESHOLDS)}; not {thresholds!r}.")
    if thresholds == "sparsegen" != config.thresholds:
        raise ValueError("thresholds='sparsegen' needs an adapter that was trained with it.")
    if any(t is not None and not 0 <= t <= 1 for t in (tau_global, tau_local)) or not 0 <= scale_thresholds < math.inf:
        raise ValueError("Thresholds lie between 0 and 1, and their scale is not negative.")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("top_k is at least 1, and top_p above 0 and at most 1.")
    choice = thresholds or config.thresholds
    for names, given, needed in (
        ("top_k", top_k is not None, ("top_k",)),
        ("top_p", top_p is not None, ("top_p",)),
        ("tau_global, tau_local and scale_thresholds", (tau_global, tau_local, scale_thresholds) != (None, None, 1.0), LEARNED),
    ):
        if given and choice not in needed:
            raise ValueError(f"{names} change nothing with thresholds={choice!r}; add thresholds={needed[0]!r}.")
    fixed = None if gate is None else torch.as_tensor(gate, dtype=torch.float32)
    if fixed is not None and fixed.shape != (len(experts),):
        raise ValueError(f"A gate has {len(experts)} numbers, one for each expert.")
    if fixed is not None and not ((fixed >= 0) & fixed.isfinite()).all():
        raise ValueError("The numbers of a gate are finite and not negative.")
    switches = {k: v for k, v in (("thresholds", thresholds), ("k", top_k), ("p", top_p)) if v is not None}
    forced, masked = (
        [number(expert) for expert in given if expert != SHARED or not config.shared_expert_rank] for given in (force, mask)
    )
    if force and not forced:  # the shared expert alone
        masked = list(range(len(experts)))
    shared = SHARED not in mask and (not force or SHARED in force)
    change = Intervention(
        adapter, layers_of(model, layers), posterior, tuple(dict.fromkeys(forced)), tuple(masked), tau_global, tau_local,
        scale_thresholds, fixed, switches, shared,
    )  # fmt: skip
    context = current()
    with use(replace(context, interventions=(*context.interventions, change))):
        yield
