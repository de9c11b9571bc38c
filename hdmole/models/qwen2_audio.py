"""Qwen2-Audio: a Whisper encoder whose frames are averaged in twos; one linear layer as projector."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from hdmole.models.audio_llm import AudioLLM


class Qwen2Audio(AudioLLM, Qwen2AudioForConditionalGeneration):  # type: ignore[misc]
    """`Qwen2AudioForConditionalGeneration`, and what `hdmole.models.family.Family` asks of it."""

    request = "Detect the language and recognize the speech:"  # that of the model's authors
    seconds_per_state = 0.04
    places = {  # noqa: RUF012
        "projector": r"model\.multi_modal_projector\.linear",
        "encoder": r"model\.audio_tower\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        "llm": r"model\.language_model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    seconds_per_frame = {"multi_modal_projector": 0.04, "audio_tower": 0.02}  # noqa: RUF012

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d) and their mask (B, T) bool."""
        mask, tower = attention_mask.bool(), self.model.audio_tower
        features = self.padded(input_features, mask, self.mel_frames)
        inside, lengths = tower._get_feat_extract_output_lengths(mask.sum(1))
        heard = torch.arange(features.shape[2] // 2, device=mask.device)[None] < inside[:, None]
        shape = features.new_zeros(*heard.shape, 1)
        bias = create_bidirectional_mask(config=tower.config, inputs_embeds=shape, attention_mask=heard.long())
        states = tower(features, attention_mask=bias).last_hidden_state
        longest = int(lengths.max())
        return states[:, :longest], torch.arange(longest, device=mask.device)[None] < lengths[:, None]
