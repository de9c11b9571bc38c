"""The method, against a plain per-expert loop written from the equations, and the adapter's
promises.
"""

from __future__ import annotations

import copy
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from two_layers import ACCENTS, Two, adapted, posteriors

from hdmole import AccentRecogniser, HDMoLEConfig, export_lora, intervene, route, trace, warm_start
from hdmole.method.gate import relu
from hdmole.method.routing import RoutingError, checkpoint_contexts
from hdmole.method.tuner import HDMoLELinear
from hdmole.method.tuner.config import HDMoLEConfig as Config


def by_the_equations(layer: HDMoLELinear, x: Tensor, pi: Tensor, config: Config) -> tuple[Tensor, float]:
    """One frame `x` (d_in,), one posterior (N + 1,), in float64; a loop over experts, nothing
    stacked.

    Also how far the frame is from a jump or pole of the gate: near one, float32 may rightly decide
    otherwise.
    """
    n, r = config.experts, config.r
    a, b = layer.hdmole_A["default"], layer.hdmole_B["default"]
    read = a @ x if config.router_input == "ax" else x
    logits, tau, clear = torch.zeros(n), torch.zeros(2), 1.0
    if config.routing != "global":
        logits = layer.hdmole_router["default"] @ read
        if config.router_accent is not None:
            logits = logits + layer.hdmole_accent["default"] * torch.log(pi[1:].clamp_min(1e-6))
    if config.thresholds == "relu":
        tau = layer.hdmole_threshold["default"]
        if config.threshold_parametrisation == "input":
            tau = tau + layer.hdmole_threshold_weight["default"] @ read
    tau = config.threshold_max / n / (1 + torch.exp(-tau))
    m = float(1 - pi[0])
    p = [math.exp(float(v)) for v in logits]
    p = [v / sum(p) for v in p]

    def cut(q: list[float], threshold: float) -> list[float]:
        nonlocal clear
        if config.thresholds == "dense":
            return q
        ordered = sorted(q, reverse=True)
        if config.thresholds == "top_k":
            kept = sorted(range(n), key=lambda i: -q[i])[: config.top_k]
            weight = [q[i] if i in kept else 0.0 for i in range(n)]
            if config.top_k < n:
                clear = min(clear, ordered[config.top_k - 1] - ordered[config.top_k])
        elif config.thresholds == "top_p":
            weight, mass = [0.0] * n, 0.0
            for i in sorted(range(n), key=lambda i: -q[i]):
                clear = min(clear, abs(mass - config.top_p))
                if mass < config.top_p:
                    weight[i] = q[i]
                mass += q[i]
            clear = min([clear, *(u - v for u, v in pairwise(ordered))])
        else:
            weight = [max(0.0, v - threshold) for v in q]
            clear = min(clear, abs(ordered[0] - threshold))
        total = sum(weight)
        return [v / total if total > 0 else 0.0 for v in weight]

    g = cut([float(v) / max(m, 1e-9) for v in pi[1:]], float(tau[0]))
    l = cut(p, float(tau[1]))  # noqa: E741
    if config.routing == "global":
        gate = g
    elif config.routing == "local":
        gate = l
    elif config.combination == "sum":
        gate = [u + v for u, v in zip(g, l, strict=True)]
    elif config.combination == "convex":
        mixing = 1 / (1 + math.exp(-float(layer.hdmole_lambda["default"])))
        gate = [mixing * u + (1 - mixing) * v for u, v in zip(g, l, strict=True)]
    else:
        total = sum(u * v for u, v in zip(g, l, strict=True))
        clear = min(clear, total) if total > 0 else clear
        gate = [u * v / total if total > 0 else 0.0 for u, v in zip(g, l, strict=True)]
    mass = m if config.general_class else 1.0
    y = layer.base_layer(x)
    for i in range(n):
        expert = b[:, i * r : (i + 1) * r] @ (a[i * r : (i + 1) * r] @ x)
        y = y + config.scale * mass * gate[i] * expert
    if config.shared_expert_rank:
        y = y + config.scale * mass * layer.hdmole_shared_B["default"] @ (layer.hdmole_shared_A["default"] @ x)
    return y, clear


@settings(max_examples=150, deadline=None)
@given(
    experts=st.integers(1, 6), rank=st.integers(1, 3), size=st.integers(2, 9), rows=st.integers(1, 3), frames=st.integers(1, 4),
    seed=st.integers(0, 10_000), thresholds=st.sampled_from(["relu", "top_k", "top_p", "dense"]),
    routing=st.sampled_from(["hierarchical", "global", "local"]), combination=st.sampled_from(["sum", "convex", "product"]),
    parametrisation=st.sampled_from(["sigmoid", "input"]), router_input=st.sampled_from(["ax", "x"]), general=st.booleans(),
    shared=st.integers(0, 2), accent=st.sampled_from([None, 0.7]), maximum=st.sampled_from([1.0, 2.0]),
    thresholds_up=st.sampled_from([0.0, 0.0, 4.0]), layout=st.sampled_from(["batch", "packed", "index", "padded"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_layer_equals_the_loop(
    experts: int, rank: int, size: int, rows: int, frames: int, seed: int, thresholds: str, routing: str, combination: str,
    parametrisation: str, router_input: str, general: bool, shared: int, accent: float | None, maximum: float,
    thresholds_up: float, layout: str, dtype: torch.dtype,
) -> None:  # fmt: skip
    config = HDMoLEConfig.extended(
        accents=[f"e{i}" for i in range(experts)], r=rank, thresholds=thresholds, routing=routing, combination=combination,
        threshold_parametrisation=parametrisation, router_input=router_input, general_class=general, shared_expert_rank=shared,
        router_accent=accent, threshold_max=maximum, top_k=2, top_p=0.6,
    )  # fmt: skip
    torch.manual_seed(seed)
    layer = HDMoLELinear(nn.Linear(size, size + 2), "default", config, "layer")
    for name, parameter in layer.named_parameters():
        if "hdmole" in name:
            nn.init.normal_(parameter, std=0.6)
    for threshold in layer.hdmole_threshold.values():
        threshold.data += thresholds_up  # high ones leave gates empty
    layer = layer.to(dtype)
    pi = (2 * torch.randn(rows, experts + 1, dtype=torch.float64)).softmax(1)
    x = torch.randn(rows, frames, size).to(dtype)
    index = torch.arange(rows)[:, None].expand(rows, frames)
    if layout == "index":  # every frame an utterance of its own choice
        index = torch.randint(rows, (rows, frames))
    valid = torch.arange(frames) < torch.randint(1, frames + 1, (rows, 1)) if layout == "padded" else index >= 0
    x[~valid] = 1e3  # whatever stands in the padding
    with torch.no_grad():
        reference = copy.deepcopy(layer).double()
        loop = [by_the_equations(reference, f, pi[u], config) for f, u in zip(x[valid].double(), index[valid], strict=True)]
        expected, clear = torch.stack([y for y, _ in loop]), min(c for _, c in loop)
        near = {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 0.1)
        assume(clear > near)
        if layout == "packed":
            with route(pi, index.flatten()):
                got = layer(x.flatten(0, 1)).unflatten(0, (rows, frames))
        else:
            with route(pi, index if layout == "index" else None):
                got = layer(x)
    exact = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2}.get(dtype, 0.15)
    assert got.dtype == dtype
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(got[valid].double() / scale, expected / scale, rtol=0, atol=exact)


def test_identity_at_the_start_and_wherever_all_gates_are_zero() -> None:
    base = Two().eval()
    x = torch.randn(2, 3, 6)
    expected = base(x)
    model = get_peft_model(copy.deepcopy(base), HDMoLEConfig.extended(accents=ACCENTS, target_modules=["first", "second"]))
    assert torch.equal(model(x, accent_posterior=posteriors(2)), expected)
    model = adapted(copy.deepcopy(base))
    assert not torch.equal(model(x, accent_posterior=posteriors(2)), expected)
    assert torch.equal(model(x, accent_posterior=torch.eye(4)[[0, 0]]), expected)  # certainly general: m = 0
    with intervene(model, mask=ACCENTS):
        assert torch.equal(model(x, accent_posterior=posteriors(2)), expected)
    with intervene(model, tau_global=1.0, tau_local=1.0):
        assert torch.equal(model(x, accent_posterior=posteriors(2)), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("combination", ["sum", "convex", "product"])
@pytest.mark.parametrize("parametrisation", ["sigmoid", "input"])
def test_gradients_equal_finite_differences_and_reach_nothing_else(combination: str, parametrisation: str) -> None:
    model = adapted(
        seed=3, combination=combination, threshold_parametrisation=parametrisation, shared_expert_rank=1, router_accent=0.4, r=1
    ).double()  # fmt: skip
    x, pi = torch.randn(2, 3, 6, dtype=torch.float64), posteriors(2).double()

    def loss() -> Tensor:
        return (model(x, accent_posterior=pi) ** 2).sum()

    loss().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert reached == trainable and all("hdmole_" in n for n in reached)
    kinds = {"hdmole_A", "hdmole_B", "hdmole_router", "hdmole_threshold", "hdmole_shared_A", "hdmole_shared_B", "hdmole_accent"}
    kinds |= {"hdmole_lambda"} if combination == "convex" else set()
    kinds |= {"hdmole_threshold_weight"} if parametrisation == "input" else set()
    assert {part for n in reached for part in n.split(".") if part.startswith("hdmole_")} == kinds
    for kind in kinds:
        parameter = next(p for n, p in model.named_parameters() if f".{kind}." in n)
        direction = torch.randn_like(parameter)
        analytic = float((parameter.grad * direction).sum())
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = float(loss())
            parameter -= 2 * step * direction
            below = float(loss())
            parameter += step * direction
        numeric = (above - below) / (2 * step)
        assert abs(analytic) > 1e-6 and numeric == pytest.approx(analytic, rel=1e-5, abs=1e-6), kind


def test_an_utterance_gets_the_same_alone_and_in_any_batch() -> None:
    model, pi = adapted(), posteriors(4)
    x = torch.randn(4, 5, 6)
    together = model(x, accent_posterior=pi)
    for u in range(4):
        torch.testing.assert_close(model(x[u : u + 1], accent_posterior=pi[u : u + 1])[0], together[u], rtol=1e-5, atol=1e-6)
    rows = torch.tensor([2, 0, 0, 3, 1, 2])
    packed = model(x[rows, 0], accent_posterior=pi, utterance_rows=rows)
    torch.testing.assert_close(packed, together[rows, 0], rtol=1e-5, atol=1e-6)


def test_an_expert_under_its_threshold_contributes_exactly_nothing() -> None:
    model = adapted(routing="global")
    pi = torch.tensor([[0.1, 0.8, 0.05, 0.05]])
    x = torch.randn(1, 3, 6)
    before = model(x, accent_posterior=pi)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, HDMoLELinear):
                layer.hdmole_B["default"][:, 2:] = 1e6  # experts b and c
    assert torch.equal(model(x, accent_posterior=pi), before)


def test_routing_is_never_guessed() -> None:
    model, x = adapted(), torch.randn(3, 4, 6)
    with pytest.raises(RoutingError, match="does not know the accent"):
        model(x)
    with pytest.raises(RoutingError, match="nothing says which row"):
        model(x, accent_posterior=posteriors(2))
    with pytest.raises(RoutingError, match="nothing says which row"):
        model(x.flatten(0, 1), accent_posterior=posteriors(3))  # packed, without an index
    with pytest.raises(RoutingError, match="does not fit layer"):
        model(x, accent_posterior=posteriors(2), utterance_rows=torch.zeros(5, dtype=torch.long))
    for wrong in (torch.tensor([0, 1, 7]), torch.tensor([0, 1, -1]), torch.tensor([0.0, 1.0, 1.0])):
        with pytest.raises(RoutingError, match="whole numbers"):
            model(x, accent_posterior=posteriors(2), utterance_rows=wrong)
    with pytest.raises(RoutingError, match="sum to 1"):
        model(x, accent_posterior=torch.randn(3, 4))
    with pytest.raises(RoutingError, match="needs 4"):
        model(x, accent_posterior=torch.ones(3, 3) / 3)
    with pytest.raises(RoutingError, match="must be"), route(torch.ones(3)):
        pass


def test_peft_saves_loads_switches_and_copies(tmp_path: Path) -> None:
    base, x, pi = Two().eval(), torch.randn(2, 3, 6), posteriors(2)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=6, channels=8)
    model = adapted(copy.deepcopy(base), recogniser=recogniser.arguments)
    expected = model(x, accent_posterior=pi)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(x, accent_posterior=pi), expected)
    for a, b in zip(
        model.base_model.hdmole_recogniser.state_dict().values(),
        loaded.base_model.hdmole_recogniser.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    model.train()
    assert not any(p.requires_grad for p in model.base_model.hdmole_recogniser.parameters())
    assert not any(m.training for m in model.base_model.hdmole_recogniser.modules())
    assert torch.equal(copy.deepcopy(model).eval()(x, accent_posterior=pi), expected)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize("low_memory", [False, True])
def test_several_adapters_on_one_model(tmp_path: Path, low_memory: bool) -> None:
    base, x, pi, pi_other = Two().eval(), torch.randn(2, 20, 6), posteriors(2), posteriors(2, 1)
    known = AccentRecogniser(["general", *ACCENTS], n_mels=6, channels=8)
    model = adapted(copy.deepcopy(base), recogniser=known.arguments)
    expected = model(x, accent_posterior=pi)
    other = AccentRecogniser(["general", "z"], n_mels=6, channels=4)
    nn.init.constant_(other.norms[0].running_mean, 0.5)
    config = HDMoLEConfig.extended(accents=["z"], target_modules=["second"], r=1, recogniser=other.arguments)
    model.add_adapter("other", config)
    model.base_model.set_recogniser(other, "other")
    assert torch.equal(model(x, accent_posterior=pi), expected)
    model.set_adapter("other")
    assert torch.equal(model(x, accent_posterior=pi_other), base(x))  # new: B is zero
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".second." in n and n.endswith("other") for n in trained)
    nn.init.normal_(model.base_model.model.second.hdmole_B["other"])
    changed = model(x)  # its own recogniser routes
    torch.testing.assert_close(changed, model(x, accent_posterior=other.eval().posterior(x)))
    with trace(model) as t, intervene(model, force=["z"]):
        model(x, accent_posterior=pi_other)
    assert t.experts == ["z"] and (t.arrays("second")["gate"] == 2).all()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory).eval()
    loaded.load_adapter(str(tmp_path / "other"), "other", low_cpu_mem_usage=low_memory)
    assert torch.equal(loaded(x, accent_posterior=pi), expected)
    loaded.set_adapter("other")
    assert torch.equal(loaded(x), changed)
    old = {  # files of old named the adapter in the recogniser's keys
        key.replace("hdmole_recogniser.", "hdmole_recogniser.other."): value
        for key, value in load_file(tmp_path / "other" / "adapter_model.safetensors").items()
    }
    shutil.copytree(tmp_path / "other", tmp_path / "old")
    save_file(old, tmp_path / "old" / "adapter_model.safetensors")
    for folder in ("other", "old"):
        for name in ("default", "renamed"):
            renamed = PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path / folder, adapter_name=name, low_cpu_mem_usage=low_memory
            ).eval()
            assert torch.equal(renamed(x), changed), (folder, name)
    with pytest.raises(ValueError, match="labels"):
        model.base_model.set_recogniser(AccentRecogniser(["z", "general"], n_mels=6, channels=4), "other")
    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.base_model.hdmole_recogniser) == ["default"]
    assert torch.equal(model(x, accent_posterior=pi), expected)
    both = adapted(copy.deepcopy(base))
    both.add_adapter("again", HDMoLEConfig.extended(accents=ACCENTS, target_modules=["first"]))
    both.base_model.set_adapter(["default", "again"])
    with trace(both) as t:
        both(x, accent_posterior=pi)
    assert len(t.records) == 2  # the first active adapter's layers
    nn.init.normal_(both.base_model.model.first.hdmole_B["again"])
    with intervene(both, mask=ACCENTS):  # and nothing of the second's is changed
        left = both(x, accent_posterior=pi)
    both.base_model.set_adapter(["again"])
    assert torch.equal(left, both(x, accent_posterior=pi)) and not torch.equal(left, base(x))


def test_what_a_switch_leaves_unused_is_no_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    def kinds(**switches: Any) -> set[str]:
        model = adapted(**switches)
        return {n.split("hdmole_")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}

    assert kinds() == {"A", "B", "router", "threshold"}
    assert kinds(routing="global", router_accent=1.0, combination="convex") == {"A", "B", "threshold"}
    assert kinds(thresholds="top_k", threshold_parametrisation="input") == {"A", "B", "router"}
    assert kinds(combination="convex", shared_expert_rank=1, router_accent=0.0, threshold_parametrisation="input") == {
        "A", "B", "router", "threshold", "threshold_weight", "lambda", "accent", "shared_A", "shared_B"
    }  # fmt: skip
    model = adapted(r=1, recogniser=AccentRecogniser(["general", *ACCENTS], n_mels=6, channels=8).arguments)
    model.print_trainable_parameters()
    count = sum(3 * (i + o) + 3 * 3 + 2 for i, o in ((6, 7), (7, 4)))  # A, B; router; thresholds
    assert f"trainable params: {count} ||" in capsys.readouterr().out


def test_a_half_precision_base_gets_its_adapter(tmp_path: Path) -> None:
    base, x = Two().bfloat16().eval(), torch.randn(2, 3, 6).bfloat16()
    model = adapted(base)
    y = model(x, accent_posterior=posteriors(2))
    assert y.dtype == torch.bfloat16 and {p.dtype for n, p in model.named_parameters() if "hdmole" in n} == {torch.float32}
    config = HDMoLEConfig.extended(accents=ACCENTS, target_modules=["first"], routing="global")
    half = get_peft_model(Two().bfloat16(), config, autocast_adapter_dtype=False).eval()
    with trace(half) as t:
        half(x, accent_posterior=posteriors(2))
    pi = posteriors(2)[0, 1:]
    tau = 2 / 3 * torch.sigmoid(half.base_model.model.first.hdmole_threshold["default"].float()[0])
    torch.testing.assert_close(
        torch.tensor(t.arrays("first")["gate"][0]), pi.sum() * relu(pi / pi.sum(), tau)
    )  # gates in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = adapted(Two())(x.float(), accent_posterior=posteriors(2))
    assert torch.isfinite(again).all()


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"accents": []}, "needs accents"), ({"accents": ["a", "a"]}, "each accent once"), ({"accents": ["general"]}, "each accent once"),
        ({"thresholds": "magic"}, "is one of"), ({"r": 0}, "r >= 1"), ({"top_p": 0.0}, "top_p"), ({"threshold_init": 3.0}, "threshold_init"),
        ({"recogniser": {"labels": ["general", "b", "a", "c"]}}, "in this order"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(switches: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        HDMoLEConfig.extended(**{"accents": ACCENTS, **switches})


def test_warm_start_makes_each_expert_the_lora_of_its_accent(tmp_path: Path) -> None:
    base, x = Two().eval(), torch.randn(2, 3, 6)
    loras = {}
    for seed, accent in enumerate(ACCENTS[:2]):
        torch.manual_seed(seed)
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"]))
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.5)
        lora.save_pretrained(str(tmp_path / accent))
        loras[accent] = lora.eval()
    model = get_peft_model(
        copy.deepcopy(base), HDMoLEConfig.extended(accents=ACCENTS, target_modules=["first", "second"], r=2)
    ).eval()
    warm_start(model, {accent: tmp_path / accent for accent in loras})
    for i, lora in enumerate(loras.values()):
        with intervene(model, gate=torch.eye(3)[i]):
            torch.testing.assert_close(model(x, accent_posterior=posteriors(2)), lora(x), rtol=1e-5, atol=1e-5)
    with intervene(model, force=["c"]):
        assert torch.equal(model(x, accent_posterior=posteriors(2)), base(x))  # had no LoRA: still new
    with pytest.raises(ValueError, match="no expert for accent"):
        warm_start(model, {"z": tmp_path / "a"})
    with pytest.raises(ValueError, match="of rank 1"):
        warm_start(adapted(r=1), {"a": tmp_path / "a"})
    fewer = get_peft_model(copy.deepcopy(base), HDMoLEConfig.extended(accents=ACCENTS, target_modules=["first"]))
    with pytest.raises(ValueError, match="same modules"):
        warm_start(fewer, {"a": tmp_path / "a"})


def test_the_recogniser_routes_by_itself_and_padding_does_not_matter() -> None:
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=6, channels=8).eval()
    x = torch.randn(2, 20, 6)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 11:] = False
    x = x * mask[..., None]
    pi = recogniser.posterior(x, mask)
    torch.testing.assert_close(recogniser.posterior(x[1:, :11], mask[1:, :11])[0], pi[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pi.sum(1), torch.ones(2))

    class Named(Two):
        def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(input_features)

    model = adapted(Named(), recogniser=recogniser.arguments)
    model.base_model.set_recogniser(recogniser)
    routed = model(input_features=x, attention_mask=mask)
    given = model(input_features=x, attention_mask=mask, accent_posterior=pi)
    torch.testing.assert_close(routed, given, rtol=1e-4, atol=1e-4)  # convolutions differ by where in memory they run
    assert not torch.allclose(routed, model(input_features=x, accent_posterior=pi.flip(0)), atol=1e-2)


def test_trainer_resumes_to_the_same_weights(tmp_path: Path) -> None:
    data = [
        {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(i)), "labels": torch.zeros(3, 4), "accent_posterior": posteriors(1, seed=i)[0]}
        for i in range(8)
    ]  # fmt: skip

    def run(folder: Path, steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = adapted(seed=5, recogniser=AccentRecogniser(["general", *ACCENTS], n_mels=6, channels=8).arguments).train()
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
            use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", label_names=["labels"],
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)  # type: ignore[arg-type]
        return {n: v.clone() for n, v in model.state_dict().items()}

    straight = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed = run(tmp_path / "b", 4, resume=True)
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_sees_the_routing() -> None:
    model, x = adapted().train(), torch.randn(2, 3, 6, requires_grad=True)
    layer = model.base_model.model.first
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        with route(posteriors(2)):
            y = checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts) if recompute else layer(x)
        y.square().sum().backward()
        grads.append(layer.hdmole_A["default"].grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("thresholds", ["relu", "top_k", "top_p", "dense"])
def test_a_global_mixture_is_one_lora(tmp_path: Path, thresholds: str) -> None:
    base, x = Two().eval(), torch.randn(2, 3, 6)
    model = adapted(copy.deepcopy(base), routing="global", thresholds=thresholds)
    pi = torch.tensor([0.2, 0.1, 0.5, 0.2])
    export_lora(model, pi, tmp_path)
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 3 * 2
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(plain(x), model(x, accent_posterior=pi[None].expand(2, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="changes from frame to frame"):
        export_lora(adapted(), pi, tmp_path)
    for wrong in (pi[:2], pi * 2):
        with pytest.raises(ValueError, match="4 probabilities that sum to 1"):
            export_lora(model, wrong, tmp_path)
    saved = get_peft_model(
        copy.deepcopy(base), HDMoLEConfig(accents=ACCENTS, routing="global", target_modules=["first"], modules_to_save=["second"])
    )
    with pytest.raises(ValueError, match="also trained second in full"):
        export_lora(saved, pi, tmp_path)


def test_a_gate_for_each_layer_and_the_shared_expert_are_one_lora(tmp_path: Path) -> None:
    """Equal to the adapter with these gates; the shared expert's weight is 0.8 then, as P(general) is 0.2."""
    base, x = Two().eval(), torch.randn(2, 3, 6)
    model = adapted(copy.deepcopy(base), shared_expert_rank=2, general_class=True)
    pi, held = torch.tensor([0.2, 0.1, 0.5, 0.2]), {"first": [0.5, 0.0, 0.2], "second": [0.0, 1.0, 0.3]}
    export_lora(model, pi, tmp_path, gates={layer: torch.tensor(gate) for layer, gate in held.items()})
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 3 * 2 + 2
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    of = {layer: intervene(model, layer, gate=gate) for layer, gate in held.items()}
    with torch.no_grad(), route(pi[None].expand(2, -1)), of["first"], of["second"]:
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
        with intervene(model, mask=["shared"]):
            assert not torch.allclose(plain(x), model(x), atol=1e-2)
    with pytest.raises(ValueError, match="no gate for the layer second"):
        export_lora(model, pi, tmp_path, gates={"first": torch.ones(3)})


def test_interventions_do_what_they_say_and_leave_no_mark() -> None:
    model, x, pi = adapted(), torch.randn(1, 4, 6), posteriors(1)

    def seen(**change: Any) -> dict[str, Any]:
        with intervene(model, **change), trace(model) as t:
            model(x, accent_posterior=pi)
        return t.arrays("first")

    untouched = model(x, accent_posterior=pi)
    assert (seen(force=["b"])["gate"] == [[0, 2, 0]] * 4).all()
    assert (seen(force=["b", 1])["gate"] == [[0, 2, 0]] * 4).all()
    assert (seen(mask=[0])["gate"][:, 0] == 0).all()
    assert (seen(accent="c")["posterior"] == [[0, 0, 1]] * 4).all()
    assert (seen(gate=[0.1, 0.0, 0.5])["gate"][0] == torch.tensor([0.1, 0, 0.5]).numpy()).all()
    assert (seen(thresholds="top_k", top_k=1)["n_active_local"] == 1).all()
    assert (seen(thresholds="dense")["n_active"] == 3).all()
    assert (seen(thresholds="top_p", top_p=0.01)["n_active_global"] == 1).all()
    assert seen(tau_local=0.25)["tau_local"][0] == pytest.approx(0.25)
    assert seen(scale_thresholds=0.0)["tau_global"][0] == 0
    with intervene(model, mask=[0, 1, 2]), intervene(model, layers="second", force=["a"]), trace(model) as t:
        model(x, accent_posterior=pi)
    assert (t.arrays("first")["gate"] == 0).all() and (t.arrays("second")["gate"][:, 0] == 2).all()
    assert torch.equal(model(x, accent_posterior=pi), untouched)
    for wrong, sentence in (({"force": ["z"]}, "no expert 'z'"), ({"accent": "z"}, "no accent 'z'"), ({"tau_local": 3}, "between 0 and 1"),
                            ({"thresholds": "magic"}, "is one of"), ({"layers": "zzz"}, "No HDMoLE layer"), ({"top_k": 0}, "at least 1"),
                            ({"gate": [1.0]}, "has 3 numbers"), ({"accent": [0.5, 0.5]}, "has 4 numbers"),
                            ({"top_k": 1}, "add thresholds='top_k'"), ({"thresholds": "dense", "tau_local": 0.1}, "change nothing"),
                            ({"gate": [1, math.nan, 0]}, "finite"), ({"accent": [0.5, 0.5, 0.5, -0.5]}, "sum to 1"),
                            ({"scale_thresholds": math.nan}, "not negative")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence), intervene(model, **wrong):
            pass


def test_threads_get_what_they_would_get_alone() -> None:
    model = adapted()
    jobs = [(torch.randn(2, 30, 6), posteriors(2, seed=i), {"mask": [i % 3]} if i % 2 else {}) for i in range(24)]

    def run(job: tuple[Tensor, Tensor, dict[str, Any]]) -> tuple[Tensor, int]:
        x, pi, change = job
        with trace(model) as t, intervene(model, **change):
            y = model(x, accent_posterior=pi)
        return y, len(t.records)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for (a, count), (b, expected) in zip(pool.map(run, jobs, timeout=60), alone, strict=True):
            assert torch.equal(a, b) and count == expected == 2


def test_the_documentation_names_every_switch_and_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    inherited = {f.name for f in fields(PeftConfig)}
    for field in fields(HDMoLEConfig):
        if field.name not in inherited:
            made = field.default_factory() if callable(field.default_factory) else field.default
            default = "required" if field.name == "accents" else f"`{made!r}`"
            assert f"| `{field.name}` | {default} |" in text, field.name
