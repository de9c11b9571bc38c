"""GLM-ASR (zai-org): a Whisper-like encoder with rotary positions; four frames make one audio
token.

The shortest example of a family whose LLM reads audio tokens in a prompt; see
`hdmole.models.audio_llm`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GlmAsrForConditionalGeneration

from hdmole.models.audio_llm import AudioLLM

MERGED = 4  # encoder frames in one audio token


class GlmAsr(AudioLLM, GlmAsrForConditionalGeneration):  # type: ignore[misc]
    """`GlmAsrForConditionalGeneration`, and what `hdmole.models.family.Family` asks of it."""

    seconds_per_state = 0.08
    places = {  # noqa: RUF012
        "projector": r"model\.multi_modal_projector\.linear_[12]",
        "encoder": r"model\.audio_tower\.layers\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
        "llm": r"model\.language_model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    seconds_per_frame = {"multi_modal_projector": 0.08, "audio_tower": 0.02}  # noqa: RUF012

    @classmethod
    def prompt_ids(cls, processor: Any, sound: np.ndarray, config: Any) -> list[int]:
        """The request for a transcription that the class's processor writes."""
        if processor.chat_template is None:
            return cls.plain_ids(processor, config)
        return [int(token) for token in processor.apply_transcription_request(sound)["input_ids"][0]]

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, 4 d), four frames each, and their mask (B, T) bool."""
        mask = attention_mask.bool()
        frames = self.model.audio_tower(self.padded(input_features, mask, self.mel_frames)).last_hidden_state
        frames = frames[:, : frames.shape[1] // MERGED * MERGED]
        states = frames.reshape(len(frames), -1, self.config.audio_config.intermediate_size)
        lengths = ((mask.sum(1) - 1) // 2 + 1 - MERGED) // MERGED + 1
        longest = int(lengths.max())
        return states[:, :longest], torch.arange(longest, device=mask.device)[None] < lengths[:, None]
