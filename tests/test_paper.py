"""The paper's gate, equations (4) to (9), by loops and by hand; and the other routers against their own formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hdmole import HDMoLEConfig, auxiliary_losses, export_lora, intervene, route, trace
from hdmole.method.gate import auxiliary_loss, dynamic, entropy, gates, relu, sparsegen
from hdmole.method.tuner import HDMoLELinear

ROOT = Path(__file__).resolve().parent.parent
ACCENTS = ["a", "b", "c", "d"]


def layer_of(experts: int = 4, size: int = 5, seed: int = 0, **switches: Any) -> HDMoLELinear:
    """An adapted linear layer whose every factor is random; the thresholds are where they start."""
    torch.manual_seed(seed)
    config = HDMoLEConfig(accents=[f"e{i}" for i in range(experts)], **switches)
    layer = HDMoLELinear(nn.Linear(size, size + 1), "default", config, "layer").double()
    for name in ("hdmole_B", "hdmole_router", "hdmole_shared_B"):
        if "default" in getattr(layer, name):
            nn.init.normal_(getattr(layer, name)["default"])
    return layer


def by_the_paper(layer: HDMoLELinear, h: Tensor, p_g: Tensor, tau_g: float, tau_l: float) -> Tensor:
    """H_out of one frame `h` (d_in,), by loops over experts: (4) to (9) of the paper."""
    config = layer.configs["default"]
    n, r = config.experts, config.r
    a, b = layer.hdmole_A["default"], layer.hdmole_B["default"]
    logits = [float((w @ h).detach()) for w in layer.hdmole_router["default"]]
    p_l = [math.exp(v) / sum(math.exp(u) for u in logits) for v in logits]

    def branch(p: list[float], tau: float) -> list[float]:
        total = sum(v for v in p if v >= tau)
        return [tau * v / total if v >= tau else 0.0 for v in p]

    p_a = [u + v for u, v in zip(branch(p_g.tolist(), tau_g), branch(p_l, tau_l), strict=True)]
    out = layer.base_layer.weight @ h + layer.base_layer.bias
    for i in range(n):
        rows = slice(i * r, (i + 1) * r)
        out = out + (8 / r) * p_a[i] * (b[:, rows] @ (a[rows] @ h))
    return out


def test_without_switches_it_is_the_paper() -> None:
    config = HDMoLEConfig(accents=ACCENTS)
    assert (config.r, config.alpha, config.scale, config.thresholds, config.routing) == (8, 8.0, 1.0, "dynamic", "hierarchical")
    assert not config.general_class and not config.shared_expert_rank and config.router_input == "x"
    layer = layer_of()
    assert layer.hdmole_threshold["default"].tolist() == [0.25, 0.25]  # 1 / N, free
    assert {n for n in layer.adapter_layer_names if "default" in getattr(layer, n)} == {
        "hdmole_A", "hdmole_B", "hdmole_router", "hdmole_threshold",
    }  # fmt: skip
    assert layer.hdmole_router["default"].shape == (4, 5)  # on the layer's input
    torch.manual_seed(0)
    start = HDMoLELinear(nn.Linear(400, 3), "default", config, "layer").hdmole_A["default"]
    assert float(start.std()) == pytest.approx(1 / 8, rel=0.05)  # Gaussian


@settings(max_examples=100, deadline=None)
@given(
    experts=st.integers(1, 8), r=st.integers(1, 9), seed=st.integers(0, 10_000), tau_g=st.floats(0.01, 0.6), tau_l=st.floats(0.01, 0.6),
    with_general=st.booleans(),
)  # fmt: skip
def test_the_layer_is_the_papers(experts: int, r: int, seed: int, tau_g: float, tau_l: float, with_general: bool) -> None:
    layer = layer_of(experts, 5, seed, r=r)
    with torch.no_grad():
        layer.hdmole_threshold["default"].copy_(torch.tensor([tau_g, tau_l], dtype=torch.float64))
    h = torch.randn(2, 3, 5, dtype=torch.float64)
    p_g = torch.randn(2, experts, dtype=torch.float64).softmax(1)
    given_ = torch.cat([torch.full((2, 1), 0.5), 0.5 * p_g], 1) if with_general else p_g  # the general class is left out
    with route(given_), torch.no_grad():
        got = layer(h)
    for u in range(2):
        for t in range(3):
            expected = by_the_paper(layer, h[u, t], p_g[u], tau_g, tau_l)
            torch.testing.assert_close(got[u, t], expected, rtol=1e-9, atol=1e-9)


def values(tensor: Tensor) -> list[float]:
    return [round(v, 6) for v in tensor.tolist()]


def test_a_branch_by_hand() -> None:
    q = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert values(dynamic(q, torch.tensor(0.25))) == [0.166667, 0.083333, 0, 0]  # a tie at tau stays: 0.25 * (2/3, 1/3)
    assert values(dynamic(q, torch.tensor(0.3))) == [0.3, 0, 0, 0]  # one survivor gets all of tau
    assert values(dynamic(q, torch.tensor(0.6))) == [0, 0, 0, 0]  # none: the branch is zero
    assert values(dynamic(q, torch.tensor(0.125))) == [0.0625, 0.03125, 0.015625, 0.015625]  # everybody, ties among them
    assert values(relu(q, torch.tensor(0.25))) == [1, 0, 0, 0]  # ours: what does not exceed tau is off


def test_both_branches_by_hand() -> None:
    posterior = torch.tensor([0.2, 0.4, 0.2, 0.1, 0.1])  # general first: P_g = 0.5, 0.25, 0.125, 0.125
    found = gates(posterior, torch.tensor([0.0, 0.0, math.log(6), 0.0]), torch.tensor(0.3), torch.tensor(0.5), torch.tensor(0.5))
    assert values(found.probabilities) == [0.111111, 0.111111, 0.666667, 0.111111]
    assert values(found.gate) == [0.3, 0, 0.5, 0]  # P_ga + P_la, each renormalised by itself
    assert float(found.mass) == 1
    certain = gates(torch.tensor([1.0, 0, 0, 0, 0]), torch.zeros(4), torch.tensor(0.25), torch.tensor(0.25), torch.tensor(0.5))
    assert values(certain.global_gate) == [0, 0, 0, 0] and values(certain.gate) == [0.0625] * 4  # general: no accent to route by


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), experts=st.integers(1, 12), tau=st.floats(1e-3, 1.0))
def test_a_branch_sums_to_its_threshold_or_is_zero(seed: int, experts: int, tau: float) -> None:
    q = torch.randn(7, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)
    weights = dynamic(q, torch.tensor(tau, dtype=torch.float64))
    some = (q >= tau).any(1)
    torch.testing.assert_close(weights.sum(1), torch.where(some, tau, 0.0).double())
    assert torch.equal(weights > 0, q >= tau)


def test_a_threshold_has_the_gradient_of_the_scale_and_no_other() -> None:
    layer = layer_of(r=2)
    h, pi = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64).softmax(1)
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    with route(pi):
        (layer(h) * weight).sum().backward()
    tau = layer.hdmole_threshold["default"]

    def loss(scale_g: float, scale_l: float) -> float:
        """The output with both branches' scale changed and the selection as it was."""
        with torch.no_grad():
            logits = h @ layer.hdmole_router["default"].T
            found = gates(pi[:, None], logits, tau[0], tau[1], torch.tensor(0.5))
            gate = found.global_gate * scale_g / tau[0] + found.local_gate * scale_l / tau[1]
            ax = h @ layer.hdmole_A["default"].T * gate.repeat_interleave(2, -1)
            return float(((ax @ layer.hdmole_B["default"].T * 4) * weight).sum())

    start = tau.tolist()
    assert tau.grad is not None
    assert float(tau.grad[0]) == pytest.approx((loss(start[0] + 1, start[1]) - loss(*start)), rel=1e-9)  # linear in the scale
    assert float(tau.grad[1]) == pytest.approx((loss(start[0], start[1] + 1) - loss(*start)), rel=1e-9)


def adapted(**switches: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6)), HDMoLEConfig(accents=ACCENTS, target_modules=["0"], **switches))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "_B" in name or "router" in name:
            nn.init.normal_(parameter)
    return model.eval()


def test_trace_and_interventions_speak_of_the_papers_gate() -> None:
    model, x, pi = adapted(), torch.randn(1, 3, 5), torch.tensor([[0.2, 0.48, 0.16, 0.08, 0.08]])

    def seen(**change: Any) -> Any:
        with route(pi), trace(model) as t, intervene(model, **change):
            model(x)
        return t.arrays("0")

    plain = seen()
    torch.testing.assert_close(torch.tensor(plain["global_gate"].sum(1)), torch.full((3,), 0.25))
    assert plain["gate"].sum(1) == pytest.approx([0.5] * 3)  # 2 / N
    assert seen(force=["b"])["gate"].tolist() == [[0, 0.5, 0, 0]] * 3  # forced experts share what there is
    assert seen(force=["b", "d"], tau_global=0.3, tau_local=0.1)["gate"] == pytest.approx(
        torch.tensor([[0, 0.2, 0, 0.2]] * 3).numpy()
    )
    assert seen(scale_thresholds=2.0)["global_gate"].tolist() == [[0.5, 0, 0, 0]] * 3  # tau 0.5: one survivor, with all of it
    assert seen(tau_global=1.0)["global_gate"].tolist() == [[0, 0, 0, 0]] * 3
    certain = seen(accent="general")
    assert (certain["global_gate"] == 0).all() and certain["gate"].sum(1) == pytest.approx([0.25] * 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [0.25, 0, 0, 0]),  # P_g = 0.6, 0.2, 0.1, 0.1 at 0.25
        ({"tau_global": 0.2}, [0.15, 0.05, 0, 0]),  # a tie stays, and the sum is the new threshold
        ({"tau_global": 0.6}, [0.6, 0, 0, 0]),
        ({"tau_global": 0.0}, [0, 0, 0, 0]),  # all pass, with no weight
        ({"scale_thresholds": 0.4}, [0.06, 0.02, 0.01, 0.01]),  # 0.1
        # another choice of experts keeps the sum that the adapter was trained with
        ({"thresholds": "top_k", "top_k": 2}, [0.1875, 0.0625, 0, 0]),
        ({"thresholds": "top_p", "top_p": 0.5}, [0.25, 0, 0, 0]),
        ({"thresholds": "dense"}, [0.15, 0.05, 0.025, 0.025]),
        ({"thresholds": "relu", "tau_global": 0.15}, [0.135, 0.015, 0, 0]),  # excess 0.45 and 0.05
    ],
)
def test_an_intervention_changes_selection_and_scale_as_the_gate_says(change: dict[str, Any], expected: list[float]) -> None:
    x, pi = torch.randn(1, 3, 5), torch.tensor([[0.2, 0.48, 0.16, 0.08, 0.08]])
    model = adapted(routing="global")
    layer = model.base_model.model[0]
    with route(pi), trace(model) as t, intervene(model, **change), torch.no_grad():
        got = model(x)
    assert t.arrays("0")["gate"] == pytest.approx(torch.tensor([expected] * 3).numpy())
    a, b = layer.hdmole_A["default"], layer.hdmole_B["default"]
    by_hand = layer.base_layer(x) + ((x @ a.T) * torch.tensor(expected).repeat_interleave(8)) @ b.T  # alpha / r = 1
    torch.testing.assert_close(got, by_hand)


def test_a_hard_selection_of_ours_keeps_its_sum_of_one() -> None:
    torch.manual_seed(0)
    config = HDMoLEConfig.extended(ACCENTS, routing="global", target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(5, 6)), config).eval()  # type: ignore[arg-type]
    pi = torch.tensor([[0.2, 0.48, 0.16, 0.08, 0.08]])
    with route(pi), trace(model) as t, intervene(model, thresholds="dynamic", tau_global=0.2):
        model(torch.randn(1, 1, 5))
    assert t.arrays("0")["global_gate"] == pytest.approx(torch.tensor([[0.75, 0.25, 0, 0]]).numpy())
    assert t.arrays("0")["gate"].sum() == pytest.approx(0.8)  # the accent mass


def test_an_expert_of_negative_weight_is_at_work() -> None:
    model = adapted(routing="global")
    with torch.no_grad():
        model.base_model.model[0].hdmole_threshold["default"].fill_(-0.5)  # free numbers may become negative
    with route(torch.eye(5)[1:2]), trace(model) as t:
        model(torch.randn(1, 1, 5))
    seen = t.arrays("0")
    assert seen["gate"].tolist() == [[-0.5, 0, 0, 0]]  # P_g = 1, 0, 0, 0, which all reach it
    assert seen["active"].tolist() == [[1, 0, 0, 0]] and seen["n_active"] == seen["n_active_global"] == 1


def test_a_global_mixture_of_the_paper_is_one_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 6))
    model: Any = get_peft_model(base, HDMoLEConfig(accents=ACCENTS, target_modules=["0"], routing="global"))  # type: ignore[arg-type]
    nn.init.normal_(model.base_model.model[0].hdmole_B["default"])
    pi, x = torch.tensor([0.1, 0.5, 0.3, 0.05, 0.05]), torch.randn(2, 3, 5)
    with route(pi[None]):
        expected = model(x)
    export_lora(model, pi, tmp_path)
    lora = PeftModel.from_pretrained(nn.Sequential(model.base_model.model[0].base_layer), str(tmp_path))  # type: ignore[arg-type]
    torch.testing.assert_close(lora(x), expected)
    model.base_model.model[0].hdmole_threshold["default"].data.zero_()
    with route(pi[None]):
        torch.testing.assert_close(model(x), base[0].base_layer(x))  # a scale of zero


def test_the_extension_and_what_was_saved_before(tmp_path: Path) -> None:
    ours = HDMoLEConfig.extended(ACCENTS)
    assert (ours.r, ours.scale, ours.thresholds, ours.general_class, ours.router_input) == (2, 8.0, "relu", True, "ax")
    assert HDMoLEConfig.extended(ACCENTS, r=4, alpha=4.0, thresholds="top_k").scale == 1
    old = ROOT / "assets" / "demo" / "adapters" / "hdmole-extended"
    for reader in (PeftConfig, HDMoLEConfig):
        config: Any = reader.from_pretrained(str(old))
        assert (config.thresholds, config.threshold_parametrisation, config.r, config.scale) == ("relu", "sigmoid", 2, 8.0)
        assert config.general_class and config.router_input == "ax" and config.threshold_init == 0.5
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format"] == 2
    assert PeftConfig.from_pretrained(str(tmp_path)).thresholds == "relu"  # read once more: not translated again
    HDMoLEConfig(accents=ACCENTS).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).thresholds == "dynamic"
    told = json.loads((tmp_path / "adapter_config.json").read_text()) | {"format": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="later version"):
        PeftConfig.from_pretrained(str(tmp_path))


# -- the other routers of the paper's Table I and its successors ------------------------------------------------------------


def frame(layer: HDMoLELinear, weights: list[float], h: Tensor) -> Tensor:
    """The base and each expert times its weight."""
    r, a, b = layer.configs["default"].r, layer.hdmole_A["default"], layer.hdmole_B["default"]
    out = layer.base_layer(h)
    for i, w in enumerate(weights):
        rows = slice(i * r, (i + 1) * r)
        out = out + (8 / r) * w * (b[:, rows] @ (a[rows] @ h))
    return out


@pytest.mark.parametrize(
    "name", ["dense, as MoLE", "top-k, as MoRAL", "thresholds of the input, as AdaMoLE", "sparsegen, as LD-MoLE"]
)
@pytest.mark.parametrize("seed", range(4))
def test_routers_without_an_accent(name: str, seed: int) -> None:
    switches: dict[str, Any] = {
        "dense, as MoLE": dict(thresholds="dense"),
        "top-k, as MoRAL": dict(thresholds="top_k", top_k=2),
        "thresholds of the input, as AdaMoLE": dict(thresholds="relu", threshold_parametrisation="input", threshold_max=1.0, threshold_init=0.5),
        "sparsegen, as LD-MoLE": dict(thresholds="sparsegen", threshold_parametrisation="input"),
    }[name]  # fmt: skip
    layer = layer_of(r=2, routing="local", seed=seed, **switches)
    for weight in layer.hdmole_threshold_weight.values():
        nn.init.normal_(weight, std=0.3)
    h = torch.randn(5, dtype=torch.float64)
    u = (layer.hdmole_router["default"] @ h).detach()
    p = u.softmax(0).tolist()
    if name == "dense, as MoLE":
        weights = p
    elif name == "top-k, as MoRAL":
        kept = sorted(range(4), key=lambda i: -p[i])[:2]
        weights = [p[i] / sum(p[k] for k in kept) if i in kept else 0.0 for i in range(4)]
    else:
        s = layer.hdmole_threshold["default"][1] + layer.hdmole_threshold_weight["default"][1] @ h
        s = s.detach()
        if "AdaMoLE" in name:
            tau = 1 / 4 / (1 + math.exp(-float(s)))  # tau_max = 1 / N
            excess = [max(0.0, v - tau) for v in p]
            weights = [v / sum(excess) for v in excess]
        else:
            weights = nearest(u, 1 - math.exp(-float(s)))
    with route(torch.eye(5)[:1]):
        got = layer(h[None, None])[0, 0]
    torch.testing.assert_close(got, frame(layer, weights, h), rtol=1e-6, atol=1e-6)


def nearest(u: Tensor, strength: float) -> list[float]:
    """argmin over the simplex of |p - u|^2 - strength |p|^2 (Laha et al. 2018), by bisection of its Lagrange multiplier."""
    low, high = float(u.min()) - 10 - 10 * abs(1 - strength), float(u.max())
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max(0.0, (float(v) - middle) / (1 - strength)) for v in u)
        low, high = (middle, high) if total > 1 else (low, middle)
    return [max(0.0, (float(v) - low) / (1 - strength)) for v in u]


def test_sparsegen_by_hand() -> None:
    u = torch.tensor([1.0, 0.6, -1.0])
    assert values(sparsegen(u, torch.tensor(0.0))) == [0.7, 0.3, 0]  # the projection on the simplex: minus 0.3
    assert values(sparsegen(u, torch.tensor(0.6))) == [1, 0, 0]  # differences count 2.5 times
    assert values(sparsegen(u, torch.tensor(-3.0))) == [0.533333, 0.433333, 0.033333]  # and a quarter
    rows = sparsegen(torch.stack([u, torch.zeros(3)]), torch.tensor([0.0, 0.5]))
    assert [values(row) for row in rows] == [[0.7, 0.3, 0], [0.333333] * 3]  # each frame has its own experts


def test_a_shared_expert_by_the_entropy_of_the_accent() -> None:
    layer = layer_of(shared_expert_rank=3, shared_expert_weight="entropy")
    plain = layer_of()
    for name in ("hdmole_A", "hdmole_B", "hdmole_router"):
        getattr(plain, name)["default"] = getattr(layer, name)["default"]
    plain.base_layer = layer.base_layer
    h = torch.randn(1, 1, 5, dtype=torch.float64)
    shared = layer.hdmole_shared_B["default"] @ (layer.hdmole_shared_A["default"] @ h[0, 0])
    for posterior, weight in (
        ([0.0, 0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.5, 0.5, 0.0, 0.0, 0.0], 0.0),  # sure of the accent, whatever the general class
        ([0.0, 0.5, 0.5, 0.0, 0.0], 0.5),  # log 2 / log 4
    ):
        with route(torch.tensor([posterior], dtype=torch.float64)):
            torch.testing.assert_close(layer(h) - plain(h), (weight * shared)[None, None], rtol=1e-6, atol=1e-9)
    assert values(entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))) == [1, 0]


def test_auxiliary_losses_by_hand() -> None:
    pi = torch.tensor([[0.0, 1.0, 0.0]])  # certainly the first of two accents
    found = gates(pi[:, None], torch.tensor([[[math.log(3.0), 0.0]]]), torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.5))
    # p = (0.75, 0.25), weighted 1.5 and 0.5: (1.125, 0.125): mean 0.625, variance 0.25
    assert float(auxiliary_loss(found, "balance")) == pytest.approx(0.4)
    assert float(auxiliary_loss(found, "accent")) == pytest.approx(-math.log(0.75))
    unsure = torch.tensor([[[0.0, 0.75, 0.25]]])
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(3.0)]]])  # 0.75, 0.25 and the other way round
    found = gates(unsure, logits, torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.5))
    # weighted 1.25 and 0.75: 0.9375, 0.1875, 0.3125, 0.5625: mean 0.5, variance 0.08203125
    assert float(auxiliary_loss(found, "balance")) == pytest.approx(0.1640625)
    first, second = math.log(0.75), math.log(0.25)
    expected = -(0.75 * first + 0.25 * second + 0.75 * second + 0.25 * first) / 2  # the mean over frames
    assert float(auxiliary_loss(found, "accent")) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["balance", "accent"])
def test_auxiliary_losses_are_collected_and_train_the_router(kind: str) -> None:
    model, x, pi = adapted(auxiliary_loss=kind), torch.randn(2, 3, 5), torch.rand(2, 5).softmax(1)
    with route(pi):
        model(x)  # nobody asks: nothing is kept
    with route(pi), auxiliary_losses() as losses:
        model(x)
    assert len(losses) == 1
    losses[0].backward()
    reached = {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"hdmole_router"}
    with route(pi), auxiliary_losses() as none:
        adapted()(x)
    assert none == []


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"thresholds": "sparsegen"}, "routing='local'"),
        ({"auxiliary_loss": "accent", "routing": "global"}, "local router"),
        ({"auxiliary_loss": "magic"}, "is one of None, balance, accent"),
        ({"threshold_parametrisation": "layer"}, "is one of scalar, sigmoid, input"),
        ({"threshold_init": 0.0}, "above 0"),
        ({"init_weights": "zeros"}, "gaussian, kaiming"),
    ],
)
def test_switches_that_do_not_fit(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDMoLEConfig(accents=ACCENTS, **switches)
