"""The method: how much of each LoRA expert a frame gets.

    y      = W0 x + b + (alpha / r) * B ( repeat(G, r) * (A x) )
    act(q, tau)_i = relu(q_i - tau) / sum_j relu(q_j - tau)        (0 for all i where none survives)
    g      = act(pi_1..N / m, tau_g)                               global, one per utterance
    l      = act(p, tau_l)                                         local, one per frame
    G      = m * ( g + l )                                         'sum'; or 'convex': m * (lambda * g + (1 - lambda) * l),
                                                                   or 'product': m * g * l / sum_j g_j l_j

pi is the accent recogniser's posterior (class 0 is "general"), m = 1 - pi_0 the accent mass, p = softmax(W_r x) the
local router. Source: arXiv 2409.19878 fixes LoRA experts, hierarchical routing and dynamic thresholds; these formulas
are this project's reading of it (docs/method.md says which part is whose).

* pure functions of tensors: nothing here knows of models, audio or files
* every shape ends in N, the number of experts; leading shapes broadcast: (U, 1, N) against (U, T, N)
* a gate of exactly 0 is an expert that is off
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLDS = ("dynamic", "top_k", "top_p", "dense")
ROUTINGS = ("hierarchical", "global", "local")
COMBINATIONS = ("sum", "convex", "product")


def act(q: Tensor, tau: Tensor | float) -> Tensor:
    """Weights (..., N) of the experts whose `q` (..., N) exceeds `tau` (...) or (); all zero where none does."""
    excess = torch.relu(q - (tau[..., None] if isinstance(tau, Tensor) else tau))
    return _normalise(excess)


def _normalise(weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0)


def top_k(q: Tensor, k: int) -> Tensor:
    """The k largest of `q` (..., N), renormalised: the static choice that dynamic thresholds replace."""
    kept = torch.zeros_like(q).scatter(-1, q.topk(min(k, q.shape[-1]), -1).indices, 1)
    return _normalise(q * kept)


def top_p(q: Tensor, p: float) -> Tensor:
    """The fewest largest of `q` (..., N) that together reach `p`, renormalised."""
    ordered, order = q.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the larger ones
    kept = torch.zeros_like(q).scatter(-1, order, (before < p).to(q.dtype))
    return _normalise(q * kept)


def select(q: Tensor, tau: Tensor | float, thresholds: str = "dynamic", k: int = 2, p: float = 0.9) -> Tensor:
    """`q` (..., N), a distribution over experts, cut by one of `THRESHOLDS`."""
    if thresholds == "dynamic":
        return act(q, tau)
    if thresholds == "top_k":
        return top_k(q, k)
    if thresholds == "top_p":
        return top_p(q, p)
    return q  # dense


@dataclass(frozen=True)
class Gates:
    """What a layer decided for each frame.

    `gate` G, `global_gate` g, `local_gate` l and `probabilities` p are (..., N); `tau_global`, `tau_local`, `mass` m and
    `mixing` lambda are (...) or (). `global_gate` and `posterior` have a frame axis of length 1.
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
    posterior : (..., N + 1), pi of the utterance each frame belongs to
    logits : (..., N), the local router's logits of each frame
    tau_global, tau_local : () or (...), thresholds
    mixing : (), lambda of the convex combination
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
