"""The method: how much of each LoRA expert a frame gets.

    y      = W0 x + b + (alpha / r) * B ( repeat(G, r) * (A x) )
    act(q, tau)_i = relu(q_i - tau) / sum_j relu(q_j - tau)        (0 for all i where none survives)
    g      = act(pi_1..N / m, tau_g)                               global, one per utterance
    l      = act(p, tau_l)                                         local, one per frame
    G      = m * ( g + l )                                         combination 'sum'
             m * ( lambda * g + (1 - lambda) * l )                 'convex'
             m * ( g_i l_i / sum_j g_j l_j )                       'product'

pi is the posterior of the accent recogniser, whose class 0 is the general domain. m = 1 - pi_0 is
the accent mass, and p = softmax(W_r x) is the local router. tau_g and tau_l are the global and the
local threshold.

Source: arXiv 2409.19878 describes LoRA experts, hierarchical routing and dynamic thresholds in its
abstract. The formulas are this project's reading of it; docs/method.md says which part comes from
the paper.

* The functions here are pure functions of tensors. They know of no models, audio or files.
* Every shape ends in N, the number of experts. Leading dimensions broadcast:
  (U, 1, N) against (U, T, N).
* An expert whose gate is exactly 0 is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLDS = ("dynamic", "top_k", "top_p", "dense")
ROUTINGS = ("hierarchical", "global", "local")
COMBINATIONS = ("sum", "convex", "product")


def act(q: Tensor, tau: Tensor | float) -> Tensor:
    """Weights (..., N) in proportion to how far `q` (..., N) exceeds `tau`, of shape (...) or ().

    They sum to 1. All of them are 0 where no `q` exceeds the threshold.
    """
    excess = torch.relu(q - (tau[..., None] if isinstance(tau, Tensor) else tau))
    return _normalise(excess)


def _normalise(weight: Tensor) -> Tensor:
    """`weight` (..., N) divided by its sum; 0 where the sum is 0."""
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0)


def top_k(q: Tensor, k: int) -> Tensor:
    """The `k` largest of `q` (..., N), divided by their sum; the others 0.

    Dynamic thresholds take the place of this choice.
    """
    kept = torch.zeros_like(q).scatter(-1, q.topk(min(k, q.shape[-1]), -1).indices, 1)
    return _normalise(q * kept)


def top_p(q: Tensor, p: float) -> Tensor:
    """The fewest of `q` (..., N) that together reach `p`, divided by their sum; the others 0."""
    ordered, order = q.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the larger ones
    kept = torch.zeros_like(q).scatter(-1, order, (before < p).to(q.dtype))
    return _normalise(q * kept)


def select(q: Tensor, tau: Tensor | float, thresholds: str = "dynamic", k: int = 2, p: float = 0.9) -> Tensor:
    """Weights (..., N) of the experts that are kept of a distribution `q` (..., N).

    `thresholds`, one of `THRESHOLDS`, says which: "dynamic" keeps those above `tau`, "top_k" the
    `k` largest, "top_p" the fewest that together reach `p`, and "dense" all.
    """
    if thresholds == "dynamic":
        return act(q, tau)
    if thresholds == "top_k":
        return top_k(q, k)
    if thresholds == "top_p":
        return top_p(q, p)
    return q  # dense


@dataclass(frozen=True)
class Gates:
    """What a layer decided for each frame, in the symbols of the equations.

    | field | shape | symbol |
    |---|---|---|
    | `gate`, `local_gate`, `probabilities` | (..., N) | G, l, p |
    | `global_gate` | (..., N), one for all frames of an utterance | g |
    | `posterior` | (..., N + 1), likewise | pi |
    | `tau_global`, `tau_local` | () or (...) | tau_g, tau_l |
    | `mass` | (...) | m; 1 where `general_class` is off |
    | `mixing` | () | lambda |
    """

    gate: Tensor
    global_gate: Tensor
    local_gate: Tensor
    probabilities: Tensor
    posterior: Tensor
    tau_global: Tensor
    tau_local: Tensor
    mass: Tensor
    mixing: Tensor


def gates(
    posterior: Tensor,
    logits: Tensor,
    tau_global: Tensor,
    tau_local: Tensor,
    mixing: Tensor,
    *,
    thresholds: str = "dynamic",
    k: int = 2,
    p: float = 0.9,
    routing: str = "hierarchical",
    combination: str = "sum",
    general_class: bool = True,
) -> Gates:
    """The gate G of every frame.

    Parameters
    ----------
    posterior : (..., N + 1), pi of the utterance that each frame belongs to
    logits : (..., N), the local router's logits of each frame
    tau_global, tau_local : () or (...), thresholds; read where `thresholds` is "dynamic"
    mixing : (), lambda of the convex combination
    thresholds, k, p : how experts are chosen, as in `select`
    routing : one of `ROUTINGS`: both routers, or one of them alone
    combination : how two gates become one, one of `COMBINATIONS`
    general_class : whether the accent mass scales the gate; where it does not, m is 1
    """
    experts = posterior[..., 1:]
    mass = experts.sum(-1)  # m = 1 - pi_0
    among = experts / mass[..., None].clamp_min(1e-9)  # pi_1..N / m
    mass = mass if general_class else torch.ones_like(mass)
    probabilities = logits.softmax(-1)
    g = select(among, tau_global, thresholds, k, p)
    l = select(probabilities, tau_local, thresholds, k, p)  # noqa: E741  (the symbol of the equations)
    if routing == "global":
        gate = g.expand_as(l)
    elif routing == "local":
        gate = l
    elif combination == "sum":
        gate = g + l
    elif combination == "convex":
        gate = mixing * g + (1 - mixing) * l
    else:
        gate = _normalise(g * l)
    return Gates(mass[..., None] * gate, g, l, probabilities, posterior, tau_global, tau_local, mass, mixing)
