"""Windows of audio belong to the prompts whose audio tokens they give, never to rows of the same number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

from hdmole import AccentRecogniser, HDMoLEConfig, trace
from hdmole.method.prompts import owners, pooled
from hdmole.method.routing import RoutingError

ACCENTS = ["a", "b", "c"]
AUDIO = 39
TEXT = dict(
    model_type="qwen2", vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TOWER = dict(
    model_type="qwen2_audio_encoder", num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16,
    max_source_positions=32,
)  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "windows", "lengths", "expected"),
    [
        ([8, 5, 6], 3, [64, 40, 52], [0, 1, 2]),  # one window each
        ([32, 0], 2, [64, 64], [0, 0]),  # as many windows as prompts, but all of the first
        ([13, 0], 2, [64, 40], [0, 0]),
        ([8, 16, 8], 4, None, [0, 1, 1, 2]),
        ([2, 1], 3, [9, 5, 7], [0, 0, 1]),  # one token for each window
        ([8, 13, 6], 4, [64, 64, 40, 52], None),
        ([8, 7, 0], 3, [64, 40, 20], None),
    ],
)
def test_owners(tokens: list[int], windows: int, lengths: list[int] | None, expected: list[int] | None) -> None:
    found = owners(torch.tensor(tokens), windows, None if lengths is None else torch.tensor(lengths))
    assert (found if found is None else found.tolist()) == expected


def test_a_prompts_posterior_is_the_mean_of_its_windows() -> None:
    windows = torch.tensor([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0]])
    found = pooled(windows, torch.tensor([0, 0, 2]), torch.tensor([30, 10, 5]), 3)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.7], [1.0, 0.0], [1.0, 0.0]]))


def build(target: str, recognises: bool = False) -> Any:
    torch.manual_seed(0)
    base = Qwen2AudioForConditionalGeneration(
        AutoConfig.for_model("qwen2_audio", text_config=TEXT, audio_config=TOWER, audio_token_index=AUDIO)
    )
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=8, channels=8, feature_layout="mel_first")
    own = {"recogniser": recogniser.arguments} if recognises else {}
    model: Any = get_peft_model(base, HDMoLEConfig(accents=ACCENTS, r=2, target_modules=target, **own))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "recogniser" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(*tokens: int) -> dict[str, Any]:
    """Prompts padded on the left, and two windows of 64 frames."""
    width = max(tokens) + 3
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    for u, count in enumerate(tokens):
        ids[u, width - count - 3 :] = torch.tensor([1, *[AUDIO] * count, 5 + u, 6])
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1))
    features[0] += 1
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "input_features": features,
            "feature_attention_mask": torch.ones(2, 64, dtype=torch.long)}  # fmt: skip


@pytest.mark.parametrize("part", ["audio_tower", "multi_modal_projector"])
def test_two_audios_in_one_prompt_and_none_in_the_other(part: str) -> None:
    model, batch = build(rf".*{part}.*(q_proj|linear)"), prompts(32, 0)
    pi = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]])
    with torch.no_grad(), trace(model) as t:
        found = model(**batch, accent_posterior=pi).logits[0]
        right = model(**batch, accent_posterior=pi, utterance_rows=torch.tensor([0, 0])).logits[0]
    assert torch.equal(found, right)
    frames = t.arrays(t.layer_names[0], 0)["frame"]  # of two windows in two calls; the second goes on where the first ends
    count = len(frames) // 2
    assert frames[:count].tolist() == list(range(count)) and count in (32, 64)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_an_utterance_of_two_windows_has_one_accent(beams: int) -> None:
    model, batch = build(r".*language_model.*q_proj", recognises=True), prompts(32)
    each = model.base_model._recogniser.posterior(batch["input_features"])
    torch.testing.assert_close(model.base_model.recognise((), batch), each.mean(0, keepdim=True))
    with trace(model) as t:
        model.generate(**batch, max_new_tokens=3, num_beams=beams, do_sample=False)
    table = t.to_frame()
    assert set(table.utterance) == {0} and table.groupby("accent").posterior.nunique().max() == 1 and table.row.nunique() == beams


def test_what_the_tokens_do_not_tell_is_refused() -> None:
    model, batch = build(r".*audio_tower.*q_proj"), prompts(16, 12, 0)
    batch["input_features"] = torch.randn(3, 8, 64)
    batch["feature_attention_mask"] = (torch.arange(64) < torch.tensor([[64], [30], [18]])).long()
    with pytest.raises(RoutingError, match="their audio tokens do not tell which"):
        model(**batch, accent_posterior=torch.eye(4)[1:])


def test_a_mask_of_tokens_is_none_of_frames() -> None:
    model, batch = build(r".*language_model.*q_proj", recognises=True), prompts(16, 16)
    del batch["feature_attention_mask"]
    with pytest.raises(RoutingError, match="counts 9 audio tokens and not their frames"):
        model.base_model.recognise((), {**batch, "input_features_mask": torch.ones(2, 9, dtype=torch.bool)})
