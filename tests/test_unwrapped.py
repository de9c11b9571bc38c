"""What the tuner puts into a model: without PEFT's wrapper, in a pickle, under checkpointing, and taken out again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from test_transformers_models import ACCENTS, build, inputs
from torch import nn

from hdmole import HDMoLEConfig, route, trace
from hdmole.method.routing import RoutingError
from hdmole.method.tuner import HDMoLELinear

PI = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05], [0.3, 0.1, 0.1, 0.5]])
HOW: dict[str, Any] = dict(max_new_tokens=4, num_beams=2, do_sample=False)


def test_a_model_with_an_injected_adapter_takes_the_posterior() -> None:
    wrapped, batch = build("glmasr"), inputs("glmasr")
    config: Any = wrapped.peft_config["default"]
    state = {name.removeprefix("base_model.model."): value for name, value in wrapped.state_dict().items()}
    expected = wrapped(**batch, accent_posterior=PI).logits, wrapped.generate(**batch, accent_posterior=PI, **HOW)
    bare: Any = build("glmasr").unload()  # type: ignore[operator]
    inject_adapter_in_model(config, bare)
    bare.load_state_dict({name: value for name, value in state.items() if "recogniser" not in name})
    assert torch.equal(bare(**batch, accent_posterior=PI).logits, expected[0])
    assert torch.equal(bare.generate(**batch, accent_posterior=PI, **HOW), expected[1])
    with route(PI):
        assert torch.equal(bare(**batch).logits, expected[0])
    for call in (bare, lambda **kwargs: bare.generate(**kwargs, **HOW)):
        with pytest.raises(RoutingError, match="carries an accent recogniser, in PEFT's PeftModel"):
            call(**batch)
    with pytest.raises(RoutingError, match="for 2 utterances"):  # a call that fails leaves no routing behind
        bare(**batch, accent_posterior=PI[:2])
    with pytest.raises(RoutingError, match="in PEFT's PeftModel"):
        bare(**batch)


def test_transformers_loads_an_adapter_with_a_recogniser(tmp_path: Path) -> None:
    wrapped, batch = build("glmasr"), inputs("glmasr")
    wrapped.save_pretrained(str(tmp_path))
    bare: Any = build("glmasr").unload()  # type: ignore[operator]
    bare.load_adapter(str(tmp_path))
    assert torch.equal(bare.eval()(**batch, accent_posterior=PI).logits, wrapped(**batch, accent_posterior=PI).logits)


def test_a_pickled_model_is_the_same() -> None:
    model, batch = build("glmasr"), inputs("glmasr")
    expected = model(**batch).logits, model.generate(**batch, accent_posterior=PI, **HOW)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    nn.init.zeros_(next(p for n, p in model.named_parameters() if "hdmole_B" in n))  # it stands on its own
    assert torch.equal(again(**batch).logits, expected[0])
    assert torch.equal(again.generate(**batch, accent_posterior=PI, **HOW), expected[1])


@pytest.mark.parametrize("part", ["", "model.language_model"])
def test_checkpointing_switched_on_at_the_base(part: str) -> None:
    gradients = []
    for on in (False, True):
        model, batch = build("glmasr").train(), inputs("glmasr")
        if on:
            base: Any = model.get_base_model()
            base.get_submodule(part).gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"], accent_posterior=PI).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, found in gradients[1].items():
        torch.testing.assert_close(found, gradients[0][name], rtol=1e-4, atol=1e-5)


def test_deleted_and_unloaded_nothing_is_left() -> None:
    def left(model: nn.Module) -> tuple[set[str], int]:
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        return {f"{n}.{k}" for n, m in model.named_modules() for k in vars(m) if "_active_adapter" not in k}, hooks

    plain: Any = build("glmasr").unload()  # type: ignore[operator]
    before = left(plain)
    targets = r".*language_model.*[qv]_proj"
    model: Any = get_peft_model(plain, HDMoLEConfig(accents=ACCENTS, target_modules=targets))
    model.add_adapter("second", HDMoLEConfig(accents=["x", "y"], r=1, target_modules=targets))
    assert left(plain) != before
    model.delete_adapter("second")
    layers = [m for m in model.modules() if isinstance(m, HDMoLELinear)]
    assert layers and all(set(layer.configs) == {"default"} for layer in layers) and set(model.peft_config) == {"default"}
    unloaded = model.unload()
    assert unloaded is plain and left(plain) == before
    assert isinstance(get_peft_model(plain, HDMoLEConfig(accents=ACCENTS, target_modules=targets)), PeftModel)


def test_a_trace_of_a_bare_model_counts_frames_from_0_in_each_call() -> None:
    bare: Any = build("glmasr").unload()  # type: ignore[operator]
    inject_adapter_in_model(HDMoLEConfig(accents=ACCENTS, target_modules=r".*language_model.*q_proj"), bare)
    batch = inputs("glmasr")
    with torch.no_grad(), trace(bare) as t:
        for _ in range(2):
            bare(**batch, accent_posterior=PI)
    frames = t.arrays(t.layer_names[0], 0)["frame"]
    assert frames.tolist() == [*range(batch["input_ids"].shape[1])] * 2
