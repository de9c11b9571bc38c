"""The adapted layer, by numbers computed by hand.

A layer of two inputs and two outputs with two experts of rank 2. Its matrices are such that what the adapter adds to the
base layer's output for the frame x = (1, 2) is 1.5 times the gate: expert i adds scale * gate_i * (x_1 + x_2) to output i,
and scale is 0.5.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hdmole import HDMoLEConfig, intervene, route, trace
from hdmole.method.routing import RoutingError
from hdmole.method.tuner.layer import HDMoLELinear

X = torch.tensor([[[1.0, 2.0]]])  # one utterance of one frame
POSTERIOR = torch.tensor([[0.2, 0.6, 0.2]])  # m = 0.8, the accents among themselves 0.75, 0.25
# The thresholds are 0.15 and 0.05 and the local router says 0.75, 0.25, so
G = (6 / 7, 1 / 7)  # 0.6 and 0.1 above 0.15
L = (7 / 9, 2 / 9)  # 0.7 and 0.2 above 0.05


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def model_of(**switches: Any) -> Any:
    config = HDMoLEConfig.extended(**{"accents": ["a", "b"], "r": 2, "alpha": 1.0, "target_modules": ["0"], **switches})
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config).eval()
    layer = model.base_model.model[0]
    narrow = config.router_input == "x"
    values = {
        "hdmole_A": [[1.0, 0.0], [0.0, 1.0]] * 2,
        "hdmole_B": [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]],
        "hdmole_router": [[0.0, math.log(3) / 2], [0.0, 0.0]] if narrow else [[math.log(3), 0.0, 0.0, 0.0], [0.0] * 4],
        "hdmole_threshold": [logit(0.15), logit(0.05)],
        "hdmole_lambda": [math.log(3)],
        "hdmole_shared_A": [[1.0, 1.0]],
        "hdmole_shared_B": [[1.0], [2.0]],
    }
    for name, value in values.items():
        for parameter in getattr(layer, name).values():
            parameter.data = torch.tensor(value)
    return model


def added(model: Any, x: Tensor = X, posterior: Tensor = POSTERIOR) -> Tensor:
    """What the adapter adds, in units of the gate."""
    with torch.no_grad():
        return (model(x, accent_posterior=posterior) - model.base_model.model[0].base_layer(x)) / 1.5


def close(got: Tensor, *expected: Any) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)


BOTH = [0.8 * (g + x) for g, x in zip(G, L, strict=True)]
SHARED = [0.8, 1.6]  # the shared expert: 0.5 * m * 3 times 1 and 2, over 1.5


@pytest.mark.parametrize(
    ("switches", "gate"),
    [
        ({}, BOTH),
        ({"router_input": "x"}, BOTH),
        ({"routing": "global"}, [0.8 * 6 / 7, 0.8 / 7]),
        ({"routing": "local"}, [0.8 * 7 / 9, 0.8 * 2 / 9]),
        ({"combination": "convex"}, [0.8 * (0.75 * g + 0.25 * x) for g, x in zip(G, L, strict=True)]),
        ({"combination": "product"}, [0.8 * 42 / 44, 0.8 * 2 / 44]),
        ({"general_class": False}, [b / 0.8 for b in BOTH]),
        ({"thresholds": "dense"}, [1.2, 0.4]),
        ({"thresholds": "top_k", "top_k": 1}, [1.6, 0.0]),
        ({"thresholds": "top_p", "top_p": 0.7}, [1.6, 0.0]),
        ({"thresholds": "top_p", "top_p": 0.8}, [1.2, 0.4]),
        ({"shared_expert_rank": 1}, [BOTH[0] + SHARED[0], BOTH[1] + SHARED[1]]),
    ],
)  # fmt: skip
def test_each_switch_by_hand(switches: dict[str, Any], gate: list[float]) -> None:
    close(added(model_of(**switches)), [gate])


@pytest.mark.parametrize("shared", [0, 1])
def test_a_trace_says_what_each_expert_carries_of_the_change(shared: int) -> None:
    """In units of 1.5, expert i adds (B0, 0) or (0, B1), and the shared one (0.8, 1.6); D is their sum."""
    model = model_of(shared_expert_rank=shared)
    with torch.no_grad(), trace(model) as t:
        model(X, accent_posterior=POSTERIOR)
    seen, (b0, b1), (s0, s1) = t.arrays("0"), BOTH, [shared * s for s in SHARED]
    d0, d1 = b0 + s0, b1 + s1
    whole = d0**2 + d1**2
    close(torch.tensor(seen["share"]), [b0 * d0 / whole, b1 * d1 / whole])
    close(torch.tensor(seen["shared_share"]), (s0 * d0 + s1 * d1) / whole)
    close(torch.tensor(seen["change"]), 1.5 * whole**0.5)
    with torch.no_grad(), trace(model) as t, intervene(model, mask=["a", *(["shared"] if shared else [])]):
        model(X, accent_posterior=POSTERIOR)
    close(torch.tensor(t.arrays("0")["share"]), [0.0, 1.0])  # who is left carries all
    with torch.no_grad(), trace(model) as t, intervene(model, mask=["a", "b", *(["shared"] if shared else [])]):
        model(X, accent_posterior=POSTERIOR)
    assert not t.arrays("0")["share"].any() and not t.arrays("0")["change"].any()  # nobody, of nothing


def test_the_threshold_is_its_largest_value_times_a_sigmoid() -> None:
    model = model_of(threshold_max=1.0)  # at most 1 / 2
    model.base_model.model[0].hdmole_threshold["default"].data = torch.tensor([logit(0.3), logit(0.1)])
    close(added(model), [BOTH])


@pytest.mark.parametrize("router_input", ["ax", "x"])
def test_thresholds_that_depend_on_the_frame(router_input: str) -> None:
    model = model_of(threshold_parametrisation="input", router_input=router_input)
    layer, rest = model.base_model.model[0], [0.0, 0.0] if router_input == "ax" else []
    layer.hdmole_threshold["default"].data = torch.tensor([1.0, 2.0])
    weight = [[logit(0.15) - 1, 0.0, *rest], [0.0, (logit(0.05) - 2) / 2, *rest]]  # times x_1 = 1 and x_2 = 2
    layer.hdmole_threshold_weight["default"].data = torch.tensor(weight)
    close(added(model), [BOTH])
    tau_global, tau_local = layer.thresholds(
        "default", torch.tensor([[1.0, 2.0, 1.0, 2.0][: layer.hdmole_router["default"].shape[1]]])
    )
    close(tau_global.detach(), 0.15)
    close(tau_local.detach(), 0.05)


def test_thresholds_that_nothing_learned_are_those_of_the_configuration() -> None:
    model = model_of(thresholds="top_k", threshold_init=0.3)
    tau_global, tau_local = model.base_model.model[0].thresholds("default", X)
    assert (float(tau_global), float(tau_local)) == (pytest.approx(0.15), pytest.approx(0.15))
    assert tau_global.dtype == torch.float32
    with intervene(model, thresholds="relu"):  # 0.6 and 0.1; 0.6 and 0.1
        close(added(model), [[0.8 * 12 / 7, 0.8 * 2 / 7]])


def test_a_router_that_sees_the_accent() -> None:
    model = model_of(router_accent=0.5)
    layer = model.base_model.model[0]
    close(layer.hdmole_accent["default"].data, 0.5)
    layer.hdmole_accent["default"].data = torch.tensor([2.0])
    layer.hdmole_router["default"].data.zero_()
    # p is in proportion to 0.6 ** 2 and 0.2 ** 2: 0.9, 0.1, which are 0.85 and 0.05 above 0.05
    close(added(model), [[0.8 * (6 / 7 + 17 / 18), 0.8 * (1 / 7 + 1 / 18)]])
    layer.hdmole_accent["default"].data = torch.tensor([0.25])
    layer.hdmole_threshold["default"].data[1] = logit(0.01)
    # An accent of no probability counts as one of 1e-6, whose fourth root is 0.0316: p = 0.96935, 0.03065.
    close(added(model, posterior=torch.tensor([[0.0, 1.0, 0.0]])), [[1 + 0.95935 / 0.98, 0.02065 / 0.98]])


def test_without_gradients_the_next_token_follows_a_changed_threshold_weight_and_batch() -> None:
    model = model_of()
    layer = model.base_model.model[0]

    def gate(x: Tensor = X) -> Tensor:
        return (layer(x) - layer.base_layer(x)) / 1.5

    with torch.no_grad(), route(POSTERIOR):
        for _ in range(2):
            close(gate(), [BOTH])
        close(gate(X.expand(2, 1, 2)), [BOTH], [BOTH])
        close(gate(X[0]), BOTH)
        layer.hdmole_threshold["default"].copy_(torch.tensor([logit(0.25)] * 2))  # only the first expert is left
        close(gate(), [[1.6, 0.0]])
        layer.hdmole_B["default"].mul_(2)
        close(gate(), [[3.2, 0.0]])
        with route(torch.tensor([[0.2, 0.2, 0.6]])):
            close(gate(), [[1.6, 1.6]])
        with torch.enable_grad():  # what was kept has no gradient
            gate().sum().backward()
    assert layer.hdmole_threshold["default"].grad.abs().min() == 0  # one expert alone has all of it at any threshold
    layer.hdmole_threshold["default"].data = torch.tensor([logit(0.15), logit(0.05)])
    with route(POSTERIOR):
        with torch.no_grad():
            gate()
        gate()[..., 0].sum().backward()
    assert layer.hdmole_threshold["default"].grad.all()


@pytest.mark.parametrize(
    "switches",
    [
        {}, {"router_input": "x", "thresholds": "dynamic", "threshold_parametrisation": "scalar", "general_class": False},
        {"threshold_parametrisation": "input", "combination": "convex", "shared_expert_rank": 1}, {"routing": "global"},
        {"thresholds": "top_k", "top_k": 1, "router_accent": 1.0},
        {"thresholds": "sparsegen", "threshold_parametrisation": "scalar", "routing": "local"},
    ],
)  # fmt: skip
def test_a_compiled_model_is_one_graph_with_the_same_output_for_every_routing(switches: dict[str, Any]) -> None:
    """No graph break, and the routing is an argument of the graph and not a constant in it."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = model_of(**switches)
    layer = model.base_model.model[0]
    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    x, rows = torch.randn(3, 4, 2), torch.tensor([2, 0, 0, 1])
    posterior = torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    for pi in (posterior, posterior.flip(0)):
        with route(pi):
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    with route(posterior, rows):  # packed frames
        torch.testing.assert_close(compiled(x[0]), layer(x[0]))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, accent_posterior=posterior), model(x, accent_posterior=posterior))


def test_every_frame_is_gated_by_itself_and_every_utterance_by_its_posterior() -> None:
    model = model_of()
    x = torch.tensor([[[1.0, 2.0], [0.0, 3.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 3.0], [1.0, 2.0]]])
    even = [0.8 * (G[0] + 0.5), 0.8 * (G[1] + 0.5)]  # the router is undecided where x_1 is 0
    none = torch.tensor([[0.2, 0.6, 0.2], [1.0, 0.0, 0.0]])
    close(added(model, x, none), [BOTH, even, BOTH], [[0.0, 0.0]] * 3)
    close(added(model, x[:, :1].unflatten(1, (1, 1)), none), [[BOTH]], [[[0.0, 0.0]]])  # (U, 1, 1, d)
    layer = model.base_model.model[0]
    with torch.no_grad(), route(none, torch.tensor([1, 0])):
        packed = layer(X[0].expand(2, -1)) - layer.base_layer(X[0])
    close(packed / 1.5, [0.0, 0.0], BOTH)


def test_it_starts_as_no_change_at_the_published_values() -> None:
    torch.manual_seed(0)
    config = HDMoLEConfig.extended(["a", "b"], r=25, router_accent=0.7, shared_expert_rank=40, combination="convex",
                          threshold_parametrisation="input", threshold_init=0.5, threshold_max=2.0)  # fmt: skip
    base = nn.Linear(100, 30)
    layer = HDMoLELinear(base, "default", config, "place")
    x = torch.randn(2, 3, 100)
    with route(POSTERIOR):
        assert torch.equal(layer(x), base(x))
    values = {name: getattr(layer, name)["default"].detach() for name in layer.adapter_layer_names}
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "hdmole_A": (50, 100), "hdmole_B": (30, 50), "hdmole_router": (2, 50), "hdmole_threshold": (2,),
        "hdmole_threshold_weight": (2, 50), "hdmole_lambda": (1,), "hdmole_accent": (1,), "hdmole_shared_A": (40, 100),
        "hdmole_shared_B": (30, 40),
    }  # fmt: skip
    for name in ("hdmole_A", "hdmole_shared_A"):  # uniform within 1 / sqrt(100), as PEFT's LoRA
        assert values[name].abs().max() == pytest.approx(0.1, rel=0.01)
        assert values[name].std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    for name in ("hdmole_B", "hdmole_shared_B", "hdmole_threshold_weight", "hdmole_lambda"):
        assert not values[name].any()
    close(values["hdmole_threshold"], *[math.log(1 / 3)] * 2)  # 0.5 is a quarter of 2
    close(values["hdmole_accent"], 0.7)
    assert (layer.layer_name, layer.in_features, layer.out_features) == ("place", 100, 30)
    assert layer.configs == {"default": config} and layer.merged_adapters == [] and layer.active_adapters == ["default"]


@pytest.mark.parametrize(("router_input", "width"), [("ax", 400), ("x", 900)])
def test_the_router_starts_small(router_input: str, width: int) -> None:
    torch.manual_seed(0)
    config = HDMoLEConfig.extended(
        [str(k) for k in range(100)], r=4, router_input=router_input, threshold_parametrisation="input"
    )
    layer = HDMoLELinear(nn.Linear(900, 1), "default", config, "layer")
    assert layer.hdmole_router["default"].shape == (100, width) and layer.hdmole_threshold_weight["default"].shape == (2, width)
    assert float(layer.hdmole_router["default"].detach().std()) == pytest.approx(0.1 / math.sqrt(width), rel=0.03)


def test_what_no_switch_needs_is_not_made() -> None:
    layer = model_of(routing="global", router_accent=1.0, combination="convex", thresholds="dense").base_model.model[0]
    assert [name for name in layer.adapter_layer_names if len(getattr(layer, name))] == ["hdmole_A", "hdmole_B"]


@pytest.mark.parametrize(("own", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_thresholds_have_the_dtype_of_the_gates(own: torch.dtype, wide: torch.dtype) -> None:
    for switches in ({"thresholds": "dense"}, {}, {"threshold_parametrisation": "input"}):
        layer = model_of(router_input="x", **switches).base_model.model[0].to(own)
        assert {tau.dtype for tau in layer.thresholds("default", X.to(own))} == {wide}, switches


def test_a_second_adapter_waits_until_it_is_chosen() -> None:
    layer = HDMoLELinear(nn.Linear(2, 2).bfloat16(), "default", HDMoLEConfig.extended(["a", "b"]), "layer")
    layer.update_layer("other", HDMoLEConfig.extended(["z"], combination="convex", routing="local", r=3))
    assert {p.requires_grad for n, p in layer.named_parameters() if n.endswith("default")} == {True}
    assert {p.requires_grad for n, p in layer.named_parameters() if n.endswith("other")} == {False}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}  # that of the base layer
    assert layer.hdmole_A["other"].shape == (3, 2) and "other" not in layer.hdmole_lambda
    layer.set_adapter(["other"])
    nn.init.ones_(layer.hdmole_B["other"])
    x = X.bfloat16()
    with route(torch.tensor([[0.5, 0.5]])):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and not torch.equal(y, layer.base_layer(x))
        assert layer.thresholds("other", x)[0].dtype == torch.float32
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_two_adapters_add_up() -> None:
    model = model_of()
    layer = model.base_model.model[0]
    layer.update_layer("again", layer.configs["default"])
    for name in ("hdmole_A", "hdmole_B", "hdmole_router", "hdmole_threshold"):
        getattr(layer, name)["again"].data = getattr(layer, name)["default"].data.clone()
    layer.set_adapter(["default", "elsewhere", "again"])  # an adapter may have no part in a layer
    close(added(model), [[2 * gate for gate in BOTH]])
    layer.hdmole_threshold["again"].data = torch.tensor([logit(0.25), logit(0.25)])  # only the first expert is left
    close(added(model), [[BOTH[0] + 1.6, BOTH[1]]])


def test_a_change_holds_for_its_adapter_its_layers_and_the_innermost_block() -> None:
    model = model_of()
    with intervene(model, gate=[0.25, 4.0]):
        close(added(model), [[0.25, 4.0]])
        with intervene(model, force=["b"]):
            close(added(model), [[0.0, 2.0]])
    with intervene(model, accent=[0.0, 0.25, 0.75]):  # g = 0.1 and 0.6 above 0.15
        close(added(model), [[1 / 7 + 7 / 9, 6 / 7 + 2 / 9]])
    with intervene(model, tau_global=0.25, tau_local=0.5):
        close(added(model), [[1.6, 0.0]])
    with intervene(model, thresholds="top_k", top_k=1):
        close(added(model), [[1.6, 0.0]])
    with intervene(model, force=["a"]):
        layer = model.base_model.model[0]
        layer.update_layer("again", layer.configs["default"])
        layer.set_adapter(["again"])
        for name in ("hdmole_A", "hdmole_B", "hdmole_router", "hdmole_threshold"):
            getattr(layer, name)["again"].data = getattr(layer, name)["default"].data.clone()
        close(added(model), [BOTH])  # the change was made for the other adapter
    other = model_of()
    with intervene(other, force=["a"]):
        close(added(model), [BOTH])  # and for another layer


@pytest.mark.parametrize(
    ("switches", "most"), [({}, 2.0), ({"combination": "convex"}, 1.0), ({"combination": "product"}, 1.0), ({"routing": "local"}, 1.0)]
)  # fmt: skip
def test_forced_experts_share_what_a_full_gate_has(switches: dict[str, Any], most: float) -> None:
    model = model_of(**switches)
    with intervene(model, force=["a", "b"]):
        close(added(model), [[most / 2, most / 2]])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mask": ["shared"]}, BOTH),
        ({"mask": ["b", "shared"]}, [BOTH[0], 0.0]),
        ({"mask": ["a", "b"]}, SHARED),
        ({"mask": ["a", "b", "shared"]}, [0.0, 0.0]),
        ({"force": ["a"]}, [2.0, 0.0]),  # which switches off the shared one as well
        ({"force": ["a", "shared"]}, [2.0 + SHARED[0], SHARED[1]]),
        ({"force": ["shared"]}, SHARED),
        ({"accent": "general"}, [0.0, 0.0]),
    ],
)
def test_the_shared_expert_is_switched_off_like_any_other(change: dict[str, Any], expected: list[float]) -> None:
    model = model_of(shared_expert_rank=1)
    with intervene(model, **change):
        close(added(model), [expected])
    with intervene(model, mask=["a", "b", "shared"]):
        assert torch.equal(model(X, accent_posterior=POSTERIOR), model.base_model.model[0].base_layer(X))  # to the bit
    nobody = pytest.raises(ValueError, match=r"There is no expert 'shared'; the experts are a, b \(0 to 1\)")
    with nobody, intervene(model_of(), mask=["shared"]):
        pass


def test_a_trace_has_what_the_layer_computed() -> None:
    model = model_of()
    with trace(model) as seen, trace(model_of()) as blind:
        added(model)
    arrays = seen.arrays("0")
    for name, value in (("gate", [BOTH]), ("global_gate", [G]), ("local_gate", [L]), ("posterior", [[0.6, 0.2]])):
        assert arrays[name].tolist() == [pytest.approx(row, rel=1e-4) for row in value], name
    for name, number in (("mass", 0.8), ("tau_global", 0.15), ("tau_local", 0.05)):
        assert arrays[name].tolist() == [pytest.approx(number, rel=1e-4)], name
    assert blind.to_frame().empty


def test_an_unmixed_gate_has_a_mixing_of_one_half() -> None:
    model = model_of()
    model.base_model.model[0].configs["default"].combination = "convex"  # its lambda was never made
    close(added(model), [[gate / 2 for gate in BOTH]])


def refused(sentence: str) -> Any:
    return pytest.raises((RoutingError, ValueError), match=f"^{re.escape(sentence)}$")


def test_what_it_cannot_do_it_says() -> None:
    model = model_of()
    with refused(
        "This HDMoLE layer does not know the accent: give accent_posterior to the model's forward, wrap the call in "
        "hdmole.route(posterior), or use an adapter that carries an accent recogniser, in PEFT's PeftModel, and a model fed input_features. "
        "transformers' Trainer hands accent_posterior on only with remove_unused_columns=False."
    ):
        model(X)
    with refused(
        "The accent posterior has 4 classes; adapter 'default' has 2 experts and needs 3, the general domain first."
    ), route(torch.ones(1, 4) / 4):  # fmt: skip
        model.base_model.model[0](X)
    with pytest.raises(RoutingError, match="Layer '0' got an input"), route(torch.ones(2, 3) / 3):
        model.base_model.model[0](X)  # two posteriors for one row: the error names the layer
    with refused(
        "An HDMoLE adapter cannot be merged: its weights depend on the utterance and the frame. For global routing only, "
        "export_lora gives one accent as a plain LoRA adapter, and that can be merged."
    ):
        model.base_model.model[0].merge()
    with refused("An HDMoLE adapter is never merged, so there is nothing to unmerge."):
        model.base_model.model[0].unmerge()


def test_no_gradient_flows_into_a_half_precision_input_by_another_dtype() -> None:
    model = model_of().bfloat16()
    layer = model.base_model.model[0]
    for name in layer.adapter_layer_names:
        for parameter in getattr(layer, name).values():
            parameter.data = parameter.data.float()
    y = model(X.bfloat16(), accent_posterior=POSTERIOR)
    assert y.dtype == torch.bfloat16
    change = (y - layer.base_layer(X.bfloat16())).float() / 1.5
    torch.testing.assert_close(change, torch.tensor([[BOTH]]), rtol=0.05, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X, accent_posterior=POSTERIOR)
    assert torch.isfinite(y).all()
