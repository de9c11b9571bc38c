"""Qwen3-ASR: an encoder that reads a second at a time and packs all utterances into one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3ASRForConditionalGeneration

from hdmole.method.routing import rows_are
from hdmole.models.audio_llm import AudioLLM, unpacked

LANGUAGE = "en"  # that is asked for; the model then writes the text alone


class Qwen3ASR(AudioLLM, Qwen3ASRForConditionalGeneration):  # type: ignore[misc]
    """`Qwen3ASRForConditionalGeneration`, and what `hdmole.models.family.Family` asks of it."""

    seconds_per_state = 1 / 13
    places = {  # noqa: RUF012
        "projector": r"model\.multi_modal_projector\.linear_[12]",
        "encoder": r"model\.audio_tower\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        "llm": r"model\.language_model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    seconds_per_frame = {"multi_modal_projector": 1 / 13, "audio_tower": 1 / 13}  # noqa: RUF012  (13 frames a second)

    @classmethod
    def prompt_ids(cls, processor: Any, sound: np.ndarray, config: Any) -> list[int]:
        """The request for a transcription that the class's processor writes."""
        if processor.chat_template is None:
            return cls.plain_ids(processor, config)
        return [int(token) for token in processor.apply_transcription_request(sound, language=LANGUAGE)["input_ids"][0]]

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d) and their mask (B, T) bool."""
        tower: Any = self.model.audio_tower
        chunk = 2 * tower.n_window  # mel frames
        missing = -input_features.shape[1] % chunk
        mask = nn.functional.pad(attention_mask.bool(), (0, missing))
        features = nn.functional.pad(input_features, (0, 0, 0, missing)) * mask[..., None]
        lengths = tower._post_cnn_length(mask.view(len(mask), -1, chunk).sum(2)).sum(1)  # (B,)
        with rows_are(torch.arange(len(mask), device=mask.device).repeat_interleave(lengths)):
            frames = tower(features.transpose(1, 2), input_features_mask=mask.long()).last_hidden_state
        return unpacked(frames, lengths)
