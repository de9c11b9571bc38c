"""What users of PEFT's LoRA expect: patterns, rank-stabilised scale, dropout, default modules, Conv1D; DoRA refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config
from two_layers import ACCENTS, Two, adapted, posteriors

from hdmole import HDMoLEConfig, export_lora, route, warm_start
from hdmole.method.tuner import HDMoLELinear


def layers(model: nn.Module) -> dict[str, HDMoLELinear]:
    return {m.layer_name: m for m in model.modules() if isinstance(m, HDMoLELinear)}


def test_patterns_give_layers_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    model = adapted(rank_pattern={"second": 5}, alpha_pattern={"^first$": 3.0}, alpha=8.0)
    found = layers(model)
    assert found["first"].hdmole_A["default"].shape == (3 * 2, 6) and found["second"].hdmole_A["default"].shape == (3 * 5, 7)
    assert [found[name].configs["default"].scale for name in ("first", "second")] == [3 / 2, 8 / 5]
    x = torch.randn(2, 4, 6)
    with torch.no_grad(), route(posteriors(2)):
        expected = model(x)
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Two(), tmp_path).eval()  # type: ignore[arg-type]
    with torch.no_grad(), route(posteriors(2)):
        assert torch.equal(again(x), expected)
    with pytest.raises(ValueError, match="LoRAs of one rank"):
        warm_start(model, {})


def test_layers_of_several_ranks_become_one_lora_of_the_highest(tmp_path: Path) -> None:
    base = Two().eval()
    model = adapted(copy.deepcopy(base), rank_pattern={"second": 5}, alpha_pattern={"^first$": 3.0}, routing="global")
    pi, x = posteriors(1), torch.randn(2, 4, 6)
    export_lora(model, pi[0], tmp_path)
    plain: Any = PeftModel.from_pretrained(base, tmp_path)
    assert plain.peft_config["default"].r == 3 * 5
    with torch.no_grad(), route(pi):
        torch.testing.assert_close(plain(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


def test_the_rank_stabilised_scale() -> None:
    assert HDMoLEConfig(accents=ACCENTS, r=4, alpha=8.0, use_rslora=True).scale == 4.0  # 8 / sqrt(4)
    assert HDMoLEConfig(accents=ACCENTS, r=4, alpha=8.0).scale == 2.0


def test_dropout_drops_what_experts_read_in_training_only() -> None:
    plain, dropping = adapted(), adapted(dropout=0.5)
    x = torch.randn(2, 4, 6)
    with torch.no_grad(), route(posteriors(2)):
        assert torch.equal(dropping(x), plain(x))
        torch.manual_seed(1)
        found = layers(dropping.train())["first"](x)
        torch.manual_seed(1)
        kept = nn.functional.dropout(x, 0.5)  # half is zero, the rest twice as large
        layer = layers(plain)["first"]
        expected = layer(kept) - layer.base_layer(kept) + layer.base_layer(x)  # the routers read A x, too
    torch.testing.assert_close(found, expected)


def test_gpt2_has_default_modules_that_are_conv1d(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()

    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    model: Any = get_peft_model(base(), HDMoLEConfig(accents=ACCENTS, r=2)).eval()
    (layer,) = layers(model).values()
    assert layer.layer_name == "transformer.h.0.attn.c_attn" and (layer.in_features, layer.out_features) == (8, 24)
    with torch.no_grad():
        assert torch.equal(model(ids, accent_posterior=posteriors(2)).logits, base()(ids).logits)
        nn.init.normal_(layer.hdmole_B["default"])
        logits = model(ids, accent_posterior=posteriors(2)).logits
        torch.testing.assert_close(model(ids[1:], accent_posterior=posteriors(2)[1:]).logits[0], logits[1])
        assert not torch.allclose(logits, base()(ids).logits, atol=1e-3)
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(base(), tmp_path).eval()
        assert torch.equal(again(ids, accent_posterior=posteriors(2)).logits, logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"use_dora": True}, "HDMoLE has no DoRA"),
        ({"rank_pattern": {"first": 0}}, "ranks of at least 1, in rank_pattern too"),
        ({"dropout": 1.0}, "a dropout from 0 to below 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HDMoLEConfig(accents=ACCENTS, **wrong)
