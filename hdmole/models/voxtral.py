"""Voxtral (Mistral): a Whisper encoder that always hears 30 s; four frames make one audio token.

Silence after a sound is heard, too, because the model was trained with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import VoxtralForConditionalGeneration

from hdmole.models.audio_llm import AudioLLM

LANGUAGE = "en"


class Voxtral(AudioLLM, VoxtralForConditionalGeneration):  # type: ignore[misc]
    """`VoxtralForConditionalGeneration`, and what `hdmole.models.family.Family` asks of it."""

    seconds_per_state = 0.08
    places = {  # noqa: RUF012
        "projector": r"model\.multi_modal_projector\.linear_[12]",
        "encoder": r"model\.audio_tower\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        "llm": r"model\.language_model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    seconds_per_frame = {"multi_modal_projector": 0.08, "audio_tower": 0.02}  # noqa: RUF012

    @classmethod
    def prompt_ids(cls, processor: Any, sound: np.ndarray, config: Any) -> list[int]:
        """Mistral's request for a transcription:

        `<s>[INST][BEGIN_AUDIO] audio [/INST]lang:en[TRANSCRIBE]`.

        Mistral's own package writes it, and reads the tokenizer of the hub's folders. A folder with
        a tokenizer of transformers needs no such package.
        """
        tokenizer = processor.tokenizer

        def named(*tokens: str) -> list[int]:
            ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
            return [i for i in ids if i is not None and i != tokenizer.unk_token_id]

        language = tokenizer(f"lang:{LANGUAGE}", add_special_tokens=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        audio = [*named("[INST]", "[BEGIN_AUDIO]"), config.audio_token_id, *named("[/INST]")]
        return [*begin, *audio, *language, *named("[TRANSCRIBE]")]

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, 4 d), four frames each, and their mask (B, T), which is all true."""
        features = self.padded(input_features, attention_mask.bool(), self.mel_frames)
        frames = self.model.audio_tower(features).last_hidden_state
        states = frames.reshape(len(frames), -1, self.config.audio_config.intermediate_size)
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
