"""The gate, by numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hdmole.method.gate import effective, gates, relu, select, top_k, top_p

Q = torch.tensor([[[0.5, 0.375, 0.125]], [[0.0, 0.25, 0.75]]])  # (2, 1, 3)


def close(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_what_exceeds_the_threshold_is_shared_out_in_proportion() -> None:
    close(relu(Q, 0.25), [[[2 / 3, 1 / 3, 0.0]], [[0.0, 0.0, 1.0]]])  # excess 0.25, 0.125, 0; and 0, 0, 0.5
    close(relu(Q, torch.tensor(0.25)), [[[2 / 3, 1 / 3, 0.0]], [[0.0, 0.0, 1.0]]])
    close(relu(Q, torch.tensor([[0.25], [0.0]])), [[[2 / 3, 1 / 3, 0.0]], [[0.0, 0.25, 0.75]]])  # a threshold a row


def test_the_effective_number_of_experts_weighs_them() -> None:
    close(
        effective(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [0.0, 0.3, 0.0, 0.0], [0.0] * 4])),
        [4.0, 2.0, 1.0, 0.0],
    )
    # shares 0.75 and 0.25: exp(0.75 ln(4 / 3) + 0.25 ln 4) = (4 / 3)^0.75 * 4^0.25 = 1.754765, whatever the sum and the signs
    close(effective(torch.tensor([[0.75, 0.25, 0.0], [0.03, -0.01, 0.0]])), [1.754765, 1.754765])
    assert effective(torch.tensor([0.93, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])) < 1.6  # all eight are above zero


def test_where_nothing_exceeds_the_threshold_all_is_zero_and_so_is_the_gradient() -> None:
    q, tau = Q.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    gate = relu(q, tau)
    close(gate.detach(), [[[0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])  # 0.5 does not exceed 0.5
    gate[0].sum().backward()
    assert q.grad is not None and tau.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q)) and tau.grad == 0


def test_a_higher_threshold_takes_from_the_weaker_expert() -> None:
    """d/dtau of (0.5 - tau) / (0.875 - 2 tau) is 0.125 / (0.875 - 2 tau)^2: 0.125 / 0.140625 at 0.25."""
    tau = torch.tensor(0.25, requires_grad=True)
    relu(Q, tau)[0, 0, 0].backward()
    assert tau.grad is not None
    close(tau.grad, 0.125 / 0.140625)


def test_the_largest_k() -> None:
    close(top_k(Q, 1), [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    close(top_k(Q, 2), [[[4 / 7, 3 / 7, 0.0]], [[0.0, 0.25, 0.75]]])
    close(top_k(Q, 9), Q.tolist())  # more than there are


def test_the_fewest_that_reach_p() -> None:
    close(top_p(Q, 0.5), [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])  # 0.5 reaches 0.5
    close(top_p(Q, 0.6), [[[4 / 7, 3 / 7, 0.0]], [[0.0, 0.0, 1.0]]])
    close(top_p(Q, 0.8), [[[4 / 7, 3 / 7, 0.0]], [[0.0, 0.25, 0.75]]])
    assert top_p(Q.double(), 0.5).dtype == torch.float64


def test_each_way_of_choosing_has_its_name_and_its_default() -> None:
    close(select(Q, 0.25), [[[1 / 7, 0.75 / 7, 0.0]], [[0.0, 0.0625, 0.1875]]])  # 0.25 in all, a tie among them
    close(select(Q, 0.25, "dynamic"), [[[1 / 7, 0.75 / 7, 0.0]], [[0.0, 0.0625, 0.1875]]])
    close(select(Q, 0.25, "relu"), [[[2 / 3, 1 / 3, 0.0]], [[0.0, 0.0, 1.0]]])
    close(select(Q, 0.25, "top_k"), [[[4 / 7, 3 / 7, 0.0]], [[0.0, 0.25, 0.75]]])  # two
    close(select(Q, 0.25, "top_k", k=1), [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    close(select(Q, 0.25, "top_p", p=0.5), [[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])
    close(select(torch.tensor([0.75, 0.2, 0.05]), 0.25, "top_p"), [0.75 / 0.95, 0.2 / 0.95, 0.0])  # 0.9
    close(select(Q, 0.25, "dense"), Q.tolist())


# One utterance of two frames. m = 0.8, the accents among themselves 0.5, 0.375, 0.125; above tau_g = 0.25: g = 2/3, 1/3, 0.
POSTERIOR = torch.tensor([[[0.2, 0.4, 0.3, 0.1]]])  # (1, 1, 4)
# p = 0.1, 0.6, 0.3 and 0.25, 0.25, 0.5; above tau_l = 0.2: l = 0, 0.8, 0.2 and 0.125, 0.125, 0.75.
LOGITS = torch.tensor([[[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]]).log()  # (1, 2, 3)
G, L = [2 / 3, 1 / 3, 0.0], [[0.0, 0.8, 0.2], [0.125, 0.125, 0.75]]


def gate_of(posterior: Tensor = POSTERIOR, **switches: Any) -> Any:
    ours = {"thresholds": "relu", "general_class": True, **switches}
    return gates(posterior, LOGITS, torch.tensor(0.25), torch.tensor(0.2), torch.tensor(0.25), **ours)


def test_a_gate_is_the_mass_times_global_and_local() -> None:
    found = gate_of()
    close(found.gate, [[[0.8 * (g + x) for g, x in zip(G, frame, strict=True)] for frame in L]])
    close(found.global_gate, [[G]])
    close(found.local_gate, [L])
    close(found.probabilities, [[[0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]])
    close(found.mass, [[0.8]])
    assert torch.equal(found.posterior, POSTERIOR)
    assert (found.tau_global, found.tau_local, found.mixing) == (0.25, torch.tensor(0.2), 0.25)
    assert torch.equal(gate_of(routing="hierarchical", combination="sum").gate, found.gate)
    # the paper's, without switches: P_g = 0.5, 0.375, 0.125 at 0.25, and p at 0.2, each with its threshold as sum
    paper = gates(POSTERIOR, LOGITS, torch.tensor(0.25), torch.tensor(0.2), torch.tensor(0.25))
    close(paper.mass, 1.0)
    close(paper.global_gate, [[[1 / 7, 0.75 / 7, 0.0]]])
    close(paper.local_gate, [[[0.0, 0.4 / 3, 0.2 / 3], [0.05, 0.05, 0.1]]])
    close(paper.gate, [[[1 / 7, 0.75 / 7 + 0.4 / 3, 0.2 / 3], [1 / 7 + 0.05, 0.75 / 7 + 0.05, 0.1]]])


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"routing": "global"}, [[0.8 * 2 / 3, 0.8 / 3, 0.0]] * 2),
        ({"routing": "local"}, [[0.0, 0.64, 0.16], [0.1, 0.1, 0.6]]),
        # 0.25 g + 0.75 l
        ({"combination": "convex"}, [[0.8 / 6, 0.8 * (1 / 12 + 0.6), 0.12], [0.8 * (1 / 6 + 0.09375), 0.8 * (1 / 12 + 0.09375), 0.45]]),
        # g l = 0, 0.8/3, 0 and 1/12, 1/24, 0, each divided by its sum
        ({"combination": "product"}, [[0.0, 0.8, 0.0], [1.6 / 3, 0.8 / 3, 0.0]]),
        ({"general_class": False}, [[2 / 3, 1 / 3 + 0.8, 0.2], [2 / 3 + 0.125, 1 / 3 + 0.125, 0.75]]),
        ({"thresholds": "top_k", "k": 1}, [[0.8, 0.8, 0.0], [0.8, 0.0, 0.8]]),
        ({"thresholds": "top_k", "routing": "global"}, [[0.8 * 4 / 7, 0.8 * 3 / 7, 0.0]] * 2),
        ({"thresholds": "top_p", "p": 0.4}, [[0.8, 0.8, 0.0], [0.8, 0.0, 0.8]]),
        ({"thresholds": "top_p", "routing": "local"}, [[0.0, 0.8 * 2 / 3, 0.8 / 3], [0.2, 0.2, 0.4]]),
        ({"thresholds": "dense"}, [[0.48, 0.78, 0.34], [0.6, 0.5, 0.5]]),
    ],
)  # fmt: skip
def test_each_switch_changes_the_gate_as_its_equation_says(switches: dict[str, Any], expected: list[list[float]]) -> None:
    close(gate_of(**switches).gate, [expected])


def test_no_accent_at_all_is_no_gate() -> None:
    found = gate_of(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    close(found.gate, [[[0.0] * 3] * 2])
    close(found.global_gate, [[[0.0] * 3]])


def test_little_accent_is_divided_by_its_own_mass() -> None:
    found = gate_of(torch.tensor([[[1 - 1e-5, 4e-6, 5e-6, 1e-6]]]))
    close(found.global_gate, [[[0.15 / 0.4, 0.25 / 0.4, 0.0]]])  # 0.4, 0.5, 0.1 above 0.25


def test_where_global_and_local_choose_different_experts_their_product_is_zero_and_has_no_gradient() -> None:
    posterior = torch.tensor([[[0.0, 1.0, 0.0]]])
    logits = torch.tensor([[[0.0, 9.0]]], requires_grad=True)
    tau = torch.tensor(0.5, requires_grad=True)
    gate = gates(posterior, logits, tau, tau, torch.tensor(0.5), combination="product", thresholds="relu").gate
    close(gate.detach(), [[[0.0, 0.0]]])
    gate.sum().backward()
    assert logits.grad is not None and tau.grad is not None
    close(logits.grad, [[[0.0, 0.0]]])
    close(tau.grad, 0.0)


def test_weights_of_two_signs_choose_nothing_in_common() -> None:
    """A threshold that was learned may be negative, and with it the weights of its branch."""
    for sign, expected in ((-1.0, [0.0, 0.0]), (1.0, [0.75, 0.25])):
        tau = torch.tensor(0.25)
        gate = gates(
            torch.tensor([0.0, 0.75, 0.25]), torch.tensor([0.0, 0.0]), tau, sign * tau, torch.tensor(0.5), combination="product"
        ).gate
        close(gate, expected)


def test_what_is_known_of_the_utterance_is_taken_from_gates_of_other_frames() -> None:
    switches: dict[str, Any] = {"thresholds": "relu", "general_class": True}
    tau, mixing = torch.tensor(0.2), torch.tensor(0.5)
    first = gates(POSTERIOR, LOGITS[:, :1], torch.tensor(0.25), tau, mixing, **switches)
    found = gates(POSTERIOR, LOGITS, torch.tensor(0.25), tau, mixing, known=first, **switches)
    assert torch.equal(found.gate, gate_of().gate) and found.global_gate is first.global_gate
