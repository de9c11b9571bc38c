"""Layers that see other rows than utterances: shared experts, Q-Former queries, padding; Whisper's long sounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_prompts import TEXT, TOWER
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GraniteSpeechForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    WhisperForConditionalGeneration,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

from hdmole import HDMoLEConfig, route, trace
from hdmole.method.routing import RoutingError

ACCENTS = ["a", "b", "c"]
AUDIO = 39
POSTERIOR = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05], [0.3, 0.1, 0.1, 0.5]])


def adapted(base: Any, target: str) -> Any:
    """The model with an adapter, both random."""
    for name, parameter in base.named_parameters():
        nn.init.normal_(
            parameter, mean=float("norm" in name and name.endswith("weight")), std=0.25 if parameter.dim() > 1 else 0.1
        )
    model: Any = get_peft_model(base, HDMoLEConfig(accents=ACCENTS, r=2, target_modules=target))
    for name, parameter in model.named_parameters():
        if "hdmole_" in name and "threshold" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(tokens: list[int]) -> dict[str, Tensor]:
    """Prompts padded on the left, with so many audio tokens each."""
    width = max(tokens) + 4
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    for u, count in enumerate(tokens):
        ids[u, width - count - 3 :] = torch.tensor([1, *[AUDIO] * count, 5 + u, 6])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("beams", [1, 2])
def test_shared_experts_of_a_mixture_are_routed_by_utterance(beams: int) -> None:
    torch.manual_seed(0)
    moe = dict(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, decoder_sparse_step=1,
        mlp_only_layers=[],
    )  # fmt: skip
    config = AutoConfig.for_model(
        "qwen2_audio", text_config={**TEXT, **moe, "model_type": "qwen2_moe"}, audio_config=TOWER, audio_token_index=AUDIO
    )
    model = adapted(Qwen2AudioForConditionalGeneration(config), r".*shared_expert\.up_proj")
    frames = torch.tensor([64, 40, 52])
    mask = (torch.arange(64) < frames[:, None]).long()
    batch = {**prompts([16, 10, 13]), "input_features": torch.randn(3, 8, 64), "feature_attention_mask": mask}
    how: dict[str, Any] = dict(max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None)
    with trace(model) as together:
        written = model.generate(**batch, accent_posterior=POSTERIOR, **how)
    for u in range(3):
        one = {name: value[u : u + 1] for name, value in batch.items()}
        with trace(model) as alone:
            assert torch.equal(model.generate(**one, accent_posterior=POSTERIOR[u : u + 1], **how)[0], written[u])
        theirs, ours = (t.arrays(t.layer_names[0], at) for t, at in ((together, u), (alone, 0)))
        np.testing.assert_allclose(theirs["gate"], ours["gate"], atol=1e-4)
        assert theirs["frame"].tolist() == ours["frame"].tolist() and len(np.unique(theirs["row"])) == beams
    with torch.no_grad():
        right, other = (model(**batch, accent_posterior=pi).logits for pi in (POSTERIOR, POSTERIOR.roll(1, 0)))
    assert not torch.allclose(right, other, atol=1e-3)


def test_the_queries_of_granites_q_former_have_the_accent_of_the_utterance() -> None:
    torch.manual_seed(0)
    former = dict(
        model_type="blip_2_qformer", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        encoder_hidden_size=16, cross_attention_frequency=1,
    )  # fmt: skip
    encoder = dict(
        input_dim=8, num_layers=1, hidden_dim=16, num_heads=2, output_dim=6, context_size=20, max_pos_emb=32, conv_kernel_size=3
    )
    text = {**TEXT, "model_type": "granite"}
    config = AutoConfig.for_model(
        "granite_speech", text_config=text, encoder_config=encoder, projector_config=former, audio_token_index=AUDIO,
        has_lora_adapter=False,
    )  # fmt: skip
    base = GraniteSpeechForConditionalGeneration(config)
    layers = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".projector." in n]
    model = adapted(base, r".*\.projector\.(linear|qformer\..*\.(query|key|value|dense))")
    batch = {**prompts([9, 9, 9]), "input_features": torch.randn(3, 45, 8)}  # three blocks of 15 frames, three tokens each
    with torch.no_grad(), trace(model) as together:
        logits = model(**batch, accent_posterior=POSTERIOR).logits
        other = model(**batch, accent_posterior=POSTERIOR.roll(1, 0)).logits
    assert set(together.layer_names) == set(layers) and not torch.allclose(logits, other, atol=1e-3)
    for u in range(3):
        one = {name: value[u : u + 1] for name, value in batch.items()}
        with torch.no_grad():
            alone = model(**one, accent_posterior=POSTERIOR[u : u + 1]).logits[0]
        torch.testing.assert_close(alone, logits[u], rtol=1e-4, atol=1e-4)
        for name in layers:
            assert np.allclose(together.arrays(name, u)["posterior"][0], POSTERIOR[u, 1:])


def test_padding_that_all_utterances_share_is_given_to_each() -> None:
    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            of = AutoConfig.for_model("gemma3n")
            of.audio_config.hidden_size, of.audio_config.vocab_size, of.audio_config.vocab_offset = 8, 4, 20
            of.text_config.hidden_size = 6
            self.embed_audio = Gemma3nMultimodalEmbedder(of.audio_config, of.text_config)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.embed_audio(input_ids=ids)
            return found

    torch.manual_seed(0)
    model = adapted(Audio(), r".*embedding_projection")
    padding = torch.tensor([[23]])
    with torch.no_grad(), route(POSTERIOR):
        together = model(padding)
    assert together.shape == (3, 1, 6)
    for u in range(3):
        with torch.no_grad(), route(POSTERIOR[u : u + 1]):
            torch.testing.assert_close(model(padding)[0], together[u])


def test_some_tokens_of_an_expert_are_refused() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, hidden_states: Tensor) -> Tensor:
            found: Tensor = self.experts[0](hidden_states.flatten(0, 1).flip(0))
            return found

    model = adapted(nn.Sequential(Mixture()), r".*experts\.0")
    with pytest.raises(RoutingError, match="nothing says which row"), route(POSTERIOR):
        model(torch.randn(3, 5, 4))


@pytest.mark.parametrize("beams", [1, 2])
def test_long_sounds_of_whisper_that_end_one_after_the_other(beams: int) -> None:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "whisper", vocab_size=48, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=32, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    model = adapted(WhisperForConditionalGeneration(config), r".*encoder\.layers.*q_proj")
    settings = model.get_base_model().generation_config
    settings.no_timestamps_token_id, settings.is_multilingual, settings.suppress_tokens = 30, False, []
    settings.max_initial_timestamp_index = 5
    features, mask = torch.randn(3, 8, 192), torch.ones(3, 192, dtype=torch.long)
    mask[0, 100:], mask[2, 130:] = 0, 0  # windows have 64 frames
    how: dict[str, Any] = dict(return_timestamps=True, max_new_tokens=6, num_beams=beams, condition_on_prev_tokens=False)
    with trace(model, seconds_per_frame=0.02) as t:
        written = model.generate(input_features=features, attention_mask=mask, accent_posterior=POSTERIOR, **how)
    name = t.layer_names[0]
    for u in range(3):
        length = int(mask[u].sum())  # alone, Whisper hears everything, whatever the mask says
        one = dict(input_features=features[u : u + 1, :, :length], accent_posterior=POSTERIOR[u : u + 1])
        alone = model.generate(**one, **how)[0]
        assert written[u, : len(alone)].tolist() == alone.tolist()
        arrays = t.arrays(name, u)
        assert np.allclose(arrays["posterior"], POSTERIOR[u, 1:])
        assert arrays["time"].max() < length * 0.01 + 0.64  # the last window begins within the sound
