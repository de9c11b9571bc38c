"""Granite Speech (IBM): a Conformer, and a Q-Former that makes 3 audio tokens of 15 frames.

The class has no mask of padding, so each utterance is encoded alone. A clip then gives the same in
every batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, GraniteSpeechForConditionalGeneration

from hdmole.method.routing import rows_are
from hdmole.models.audio_llm import AudioLLM, Features, unpacked

LONGEST = 28.0  # seconds that are heard at once


class _Stacked(Features):
    """The class's extractor takes other arguments, and puts two mel frames into one, time first."""

    def __call__(self, sound: np.ndarray, **_: Any) -> dict[str, Tensor]:
        features = self.extractor(sound[None].astype(np.float32))["input_features"]
        return {"input_features": features, "attention_mask": torch.ones(features.shape[:2], dtype=torch.bool)}


class GraniteSpeech(AudioLLM, GraniteSpeechForConditionalGeneration):  # type: ignore[misc]
    """`GraniteSpeechForConditionalGeneration`, and what `hdmole.models.family.Family` asks of it."""

    projector = "model.projector"
    request = "can you transcribe the speech into a written format?"  # that of the model's authors
    longest_segment = longest_utterance = LONGEST
    seconds_per_state = 0.02
    places = {  # noqa: RUF012
        "projector": r"model\.projector\.(linear|qformer\..*\.(query|key|value|dense))",
        "encoder": r"model\.encoder\.layers\..*(to_q|to_kv|to_out|up_proj|down_proj)",
        "llm": r"model\.language_model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    seconds_per_frame = {  # noqa: RUF012  (of the first part that is in a layer's name)
        "crossattention.attention.key": 0.02, "crossattention.attention.value": 0.02, "model.projector": 0.1, "model.encoder": 0.02,
    }  # fmt: skip

    @staticmethod
    def features_of(processor: Any) -> Any:
        """The feature extractor of the class's processor."""
        return processor.audio_processor

    @classmethod
    def extractor(cls, folder: Path) -> Features:
        """The feature extractor in a model's folder."""
        return _Stacked(cls.features_of(AutoProcessor.from_pretrained(folder, trust_remote_code=False)))

    @classmethod
    def prompt_ids(cls, processor: Any, sound: np.ndarray, config: Any) -> list[int]:
        """A user's turn in the tokenizer's chat template, with the audio before the request."""
        text = f"{processor.audio_token}{cls.request}"
        if processor.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": text}]
            text = processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return [int(token) for token in processor.tokenizer(text)["input_ids"]]

    @property
    def speech_encoder(self) -> nn.Module:
        """The part that reads mel features."""
        encoder: nn.Module = self.model.encoder
        return encoder

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d) and their mask (B, T) bool."""
        mask, found = attention_mask.bool(), []
        for u, (features, valid) in enumerate(zip(input_features, mask, strict=True)):
            with rows_are(torch.tensor([u], device=mask.device)):
                found.append(self.model.encoder(features[valid][None]).last_hidden_state[0])
        states = pad_sequence(found, batch_first=True)
        lengths = torch.tensor([len(s) for s in found], device=mask.device)
        return states, torch.arange(states.shape[1], device=mask.device)[None] < lengths[:, None]

    def project(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Audio tokens (B, T', d_llm) and their mask (B, T') bool.

        Only blocks with frames of the sound go through the Q-Former, each with its own queries.
        """
        projector: Any = self.model.projector
        size, queries = projector.window_size, projector.num_queries
        count = -(-mask.sum(1) // size)  # blocks of each utterance
        states = nn.functional.pad(states * mask[..., None], (0, 0, 0, -states.shape[1] % size))
        blocks = torch.cat([s[: n * size].unflatten(0, (-1, size)) for s, n in zip(states, count.tolist(), strict=True)])
        with rows_are(torch.arange(len(mask), device=mask.device).repeat_interleave(count)):
            asked = projector.query.expand(len(blocks), -1, -1)
            heard = projector.qformer(query_embeds=asked, encoder_hidden_states=blocks, return_dict=True).last_hidden_state
            audio = projector.linear(heard)  # (blocks, queries, d_llm)
        return unpacked(audio.flatten(0, 1), count * queries)
