"""The method: how much of each LoRA expert a frame gets.

The paper (arXiv 2409.19878), with its equation numbers; `HDMoLEConfig()` is exactly this:

    P_g   = pi_1..N / sum_j pi_j                                                       (4)
    P_l   = softmax(W_l x)                                                             (5)
    P_ga  = tau_g * 1[P_g >= tau_g] P_g / sum_i 1[P_g >= tau_g] P_g                    (6)
    P_la  = tau_l * 1[P_l >= tau_l] P_l / sum_i 1[P_l >= tau_l] P_l                    (7)
    G     = P_ga + P_la                                                                (8)
    y     = W0 x + b + (alpha / r) * sum_i G_i B_i A_i x                               (9)

The global router P_g is the accent posterior of the utterance, the local router P_l is one linear
layer. The selection is hard and has no gradient. A threshold learns as the scale of its branch,
whose weights sum to it. Where no expert reaches the threshold, the branch is zero; the paper leaves
0 / 0 open.

Our variant (`HDMoLEConfig.extended()`) selects softly, and the accent mass m = 1 - pi_0 scales the
whole gate. pi_0 is the posterior of the general domain.

    relu(q, tau)_i = max(q_i - tau, 0) / sum_j max(q_j - tau, 0)
    G              = m * (relu(P_g, tau_g) + relu(P_l, tau_l))

docs/method.md lists every switch, whose choice it is and why.

* All functions here are pure functions of tensors. They do not depend on models, audio or files.
* Every shape ends in N, the number of experts. Leading dimensions broadcast:
  (U, 1, N) against (U, T, N).
* An expert whose gate is exactly 0 is off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = ("dynamic", "relu", "sparsegen", "top_k", "top_p", "dense")
LEARNED = ("dynamic", "relu", "sparsegen")  # those that read tau
ROUTINGS = ("hierarchical", "global", "local")
COMBINATIONS = ("sum", "convex", "product")


def dynamic(q: Tensor, tau: Tensor | float) -> Tensor:
    """A branch of the paper's gate, (6) and (7), of `q` (..., N) and a threshold (...) or ().

    The weights (..., N) of the experts that reach the threshold sum to it; the others are 0.
    """
    return _wide(tau) * hard(q, tau)


def hard(q: Tensor, tau: Tensor | float) -> Tensor:
    """`q` (..., N) of the experts that reach `tau`, of shape (...) or (), divided by their sum."""
    return _normalise(q * (q >= _wide(tau)))


def relu(q: Tensor, tau: Tensor | float) -> Tensor:
    """Weights (..., N) in proportion to how far `q` (..., N) exceeds `tau`, of shape (...) or ().

    They sum to 1. All of them are 0 if no `q` exceeds the threshold. This is our selection, and
    with thresholds of the input that of AdaMoLE (arXiv 2405.00361).
    """
    return _normalise(torch.relu(q - _wide(tau)))


def sparsegen(logits: Tensor, sparsity: Tensor) -> Tensor:
    """Sparsegen (Laha et al. 2018), by which LD-MoLE (arXiv 2509.25684) routes.

    The distribution p (..., N) over experts with the least |p - logits|^2 - sparsity * |p|^2.
    `sparsity` (...) is below 1; the larger it is, the fewer experts are on. One is always on.
    """
    z = logits / (1 - sparsity)[..., None]
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device)
    excess = ordered.cumsum(-1) - 1
    support = (count * ordered > excess).sum(-1, keepdim=True)  # how many experts are on
    return torch.relu(z - excess.gather(-1, support - 1) / support)


def top_k(q: Tensor, k: int) -> Tensor:
    """The `k` largest of `q` (..., N), divided by their sum; the others are 0.

    This is the usual choice in mixtures of experts. Dynamic thresholds replace it.
    """
    kept = torch.zeros_like(q).scatter(-1, q.topk(min(k, q.shape[-1]), -1).indices, 1)
    return _normalise(q * kept)


def top_p(q: Tensor, p: float) -> Tensor:
    """The fewest of `q` (..., N) that together reach `p`, divided by their sum; others are 0."""
    ordered, order = q.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the larger ones
    kept = torch.zeros_like(q).scatter(-1, order, (before < p).to(q.dtype))
    return _normalise(q * kept)


def _wide(tau: Tensor | float) -> Tensor | float:
    """A threshold (...) as (..., 1); one number stays as it is."""
    return tau[..., None] if isinstance(tau, Tensor) and tau.dim() else tau


def _normalise(weight: Tensor) -> Tensor:
    """`weight` (..., N), nowhere negative, divided by its sum. Where all is 0, it stays 0."""
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)


def select(
    q: Tensor, tau: Tensor | float, thresholds: str = "dynamic", k: int = 2, p: float = 0.9, logits: Tensor | None = None
) -> Tensor:
    """One branch of the gate (..., N) of a distribution `q` (..., N) over experts.

    `thresholds`, one of `THRESHOLDS`, says how experts are chosen: "dynamic" and "relu" by the
    threshold `tau`, "sparsegen" by `logits` (..., N) and `tau` as its sparsity, "top_k" the `k`
    largest, "top_p" the fewest that together reach `p`, and "dense" all.
    """
    if thresholds == "dynamic":
        return dynamic(q, tau)
    if thresholds == "relu":
        return relu(q, tau)
    if thresholds == "sparsegen":
        assert logits is not None and isinstance(tau, Tensor)
        return sparsegen(logits.to(q.dtype), tau)
    if thresholds == "top_k":
        return top_k(q, k)
    if thresholds == "top_p":
        return top_p(q, p)
    return q  # dense


def entropy(q: Tensor) -> Tensor:
    """Entropy (...) of distributions `q` (..., N), divided by log N.

    It is 1 for the uniform distribution, and 0 for N = 1.
    """
    return -torch.xlogy(q, q).sum(-1) / math.log(max(2, q.shape[-1]))


def effective(weights: Tensor) -> Tensor:
    """Effective number of experts (...) of `weights` (..., N): exp of the entropy of their shares.

    It is k where k experts have even weights, nearly 1 where one has nearly all, and 0 where no
    expert is on. Shares are those of the absolute weights, because a free threshold, and with it
    the weights of a branch, may be negative.
    """
    sizes = weights.abs()
    total = sizes.sum(-1)
    shares = sizes / total.clamp_min(1e-30)[..., None]
    return torch.where(total > 0, (-torch.xlogy(shares, shares).sum(-1)).exp(), 0.0)


def among_accents(posterior: Tensor) -> Tensor:
    """P_g (..., N) of a `posterior` (..., N + 1); zero where the general domain is certain."""
    experts = posterior[..., 1:]
    return experts / experts.sum(-1, keepdim=True).clamp_min(1e-9)


class Gates(NamedTuple):
    """What a layer decided for each frame, in the symbols of the equations.

    | field | shape | symbol |
    |---|---|---|
    | `gate`, `local_gate`, `probabilities` | (..., N) | G, P_la, P_l |
    | `global_gate` | (..., N), one for all frames of an utterance | P_ga |
    | `posterior` | (..., N + 1), likewise | pi |
    | `tau_global`, `tau_local` | () or (...) | tau_g, tau_l |
    | `mass` | (...), likewise | m; 1 where `general_class` is off |
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

    @property
    def accents(self) -> Tensor:
        """P_g (..., N), one for all frames of an utterance."""
        return among_accents(self.posterior)


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
    general_class: bool = False,
    scaled: bool | None = None,
    known: Gates | None = None,
) -> Gates:
    """The gate G of every frame.

    Parameters
    ----------
    posterior : (..., N + 1), pi of the utterance that each frame belongs to; gates get its dtype
    logits : (..., N), the local router's logits of each frame
    tau_global, tau_local : () or (...), thresholds; read where `thresholds` is one of `LEARNED`
    mixing : (), lambda of the convex combination
    thresholds, k, p : how experts are chosen, as in `select`
    routing : one of `ROUTINGS`: both routers, or one of them alone
    combination : how two branches become one gate, one of `COMBINATIONS`
    general_class : whether the accent mass scales the gate; where it does not, m is 1
    scaled : whether the weights of a branch sum to its threshold, and not to 1. By default this is
        so for "dynamic" alone. An intervention that chooses experts in another way keeps the sum
        that the adapter was trained with.
    known : gates of other frames under the same posterior, thresholds and switches. What is one for
        all frames of an utterance, P_ga and m, is then taken from them.
    """
    scaled = thresholds == "dynamic" if scaled is None else scaled

    def branch(q: Tensor, tau: Tensor, logits: Tensor) -> Tensor:
        weights = hard(q, tau) if thresholds == "dynamic" else select(q, tau, thresholds, k, p, logits)
        return _wide(tau) * weights if scaled else weights

    if known is not None:
        g, mass = known.global_gate, known.mass
    else:
        accents = among_accents(posterior)
        g = branch(accents, tau_global, accents)  # sparsegen routes locally
        mass = posterior[..., 1:].sum(-1) if general_class else posterior.new_ones(())  # m = 1 - pi_0
    probabilities = logits.softmax(-1, dtype=posterior.dtype)
    l = branch(probabilities, tau_local, logits)  # noqa: E741
    if routing == "global":
        gate = g.expand_as(l)
    elif routing == "local":
        gate = l
    elif combination == "sum":
        gate = g + l
    elif combination == "convex":
        gate = mixing * g + (1 - mixing) * l
    else:
        gate = _normalise(torch.relu(g * l))  # thresholds, and so weights, of two signs choose nothing in common
    gate = mass[..., None] * gate if general_class else gate
    return Gates(gate, g, l, probabilities, posterior, tau_global, tau_local, mass, mixing)


def auxiliary_loss(gates: Gates, kind: str, delta: float = 0.5) -> Tensor:
    """A loss () on the local router, of the probabilities of all frames of a call.

    "balance" is LoRAMoE's localised balancing constraint (arXiv 2312.09979): the variance over the
    mean of the probabilities, each weighted by 1 + `delta` where the expert is the accent's and by
    1 - `delta` where it is not. The accent posterior stands for the accent. "accent" is the routing
    loss of MoA (arXiv 2403.03432): the cross-entropy of the router with the accent. Frames of
    padding count as well, because a layer does not know them.
    """
    p, accents = gates.probabilities, gates.accents.expand_as(gates.probabilities)
    if kind == "accent":
        return -(accents * p.clamp_min(1e-9).log()).sum(-1).mean()
    importance = p * (1 + delta * (2 * accents - 1))
    return importance.var(unbiased=False) / importance.mean()
