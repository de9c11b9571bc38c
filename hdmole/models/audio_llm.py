"""What families have in common whose LLM reads audio tokens within a prompt.

GLM-ASR, Qwen2-Audio, Qwen3-ASR, Voxtral and Granite Speech are such families. A prompt is

    before, audio, after, text

`before` and `after` are what the class's own processor writes around the audio, in the words that
the class was trained with. The processor is asked once, for a second of silence; the number of
audio tokens follows from the length of the sound.

A family is a class of transformers with `AudioLLM` before it, and says four things:

* `encode`: from mel features to the input of the projector, with a mask.
* `project`: from there to audio tokens, with a mask.
* `places` and `projector`: the names of the layers that can be adapted.
* `seconds_per_frame`: how long a frame is.

The names of all parameters stay those of the class. Adapters that were trained on it fit, and those
that are trained here fit it. Both methods see utterances in rows, so a layer always knows which
utterance a frame belongs to; where the class packs or cuts them, `rows_are` says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from hdmole.models.training import keep_norms, text_loss

RATE = 16_000  # samples a second
HOP = 0.01  # seconds between two mel frames
MARGIN = 1.0  # seconds by which a sound is shorter than what the encoder has positions for
TOKENS, TOKENS_PER_SECOND = 8, 10  # a sound of s seconds has at most 8 + 10 s tokens


class Prompt(NamedTuple):
    """Token ids before and after the audio, and the ids that end a text."""

    before: list[int]
    after: list[int]
    ends: list[int]


class Features:
    """Mel features by the class's own extractor, time first, and without the padding that it adds."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, sound: np.ndarray, **_: Any) -> dict[str, Tensor]:
        """Features (1, T, n_mels) and their mask (1, T) of samples (S,) at 16 kHz."""
        found = self.extractor(sound, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
        frames = int(found["attention_mask"].sum())
        features = found["input_features"][:, :, :frames].transpose(1, 2)
        return {"input_features": features, "attention_mask": torch.ones(features.shape[:2], dtype=torch.bool)}


class AudioLLM:
    """The part of a family that is alike in all of them.

    Shapes: `input_features` (B, T_mel, n_mels) and `attention_mask` (B, T_mel) as `extractor` gives
    them; encoder states (B, T, d), the projector's input, with a boolean mask (B, T); `labels`
    (B, L) token ids ending in one of `prompt.ends`, padded with -100.
    """

    whole_recordings = True  # such models were trained on up to 30 s of whatever is said
    silent_frames = 0
    blank = None  # no CTC head writes the LLM's tokens
    projector: ClassVar[str] = "model.multi_modal_projector"
    places: ClassVar[dict[str, str]]  # part of the model -> regular expression of its linear layers
    seconds_per_frame: Any
    seconds_per_state: ClassVar[float]
    request: ClassVar[str] = "Transcribe the speech."
    config: Any
    prompt: Prompt
    mel_frames: int  # to which the class's extractor pads a sound

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        """Load the class's weights, from safetensors only, and the prompt from the folder's
        processor.
        """
        given = {name: value for name, value in kwargs.items() if name not in ("use_safetensors", "trust_remote_code")}
        loaded = super().from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **given)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.eos_token_id}
        ids = cls.prompt_ids(processor, np.zeros(RATE, np.float32), model.config)
        audio = [k for k, token in enumerate(ids) if token == model.config.audio_token_id]
        model.prompt = Prompt(ids[: audio[0]], ids[audio[-1] + 1 :], sorted(ends - {None}))
        model.mel_frames = int(getattr(cls.features_of(processor), "nb_max_frames", 0))
        return loaded

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the weights are those of transformers' own class, with the older names that it
        reads.
        """
        return False

    @staticmethod
    def features_of(processor: Any) -> Any:
        """The feature extractor of the class's processor."""
        return processor.feature_extractor

    @classmethod
    def prompt_ids(cls, processor: Any, sound: np.ndarray, config: Any) -> list[int]:
        """The class's prompt for a sound (S,), as token ids with audio tokens in it.

        A processor without a chat template gets the audio alone, before `request`.
        """
        if processor.chat_template is None:
            return cls.plain_ids(processor, config)
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": cls.request}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [int(token) for token in np.ravel(found["input_ids"])]

    @classmethod
    def plain_ids(cls, processor: Any, config: Any) -> list[int]:
        """The audio and `request` as token ids, for a folder whose processor has no chat template."""
        begin, end = (getattr(processor, name, None) for name in ("audio_bos_token_id", "audio_eos_token_id"))
        first = [processor.tokenizer.bos_token_id, begin, config.audio_token_id, end]
        request: list[int] = processor.tokenizer(cls.request, add_special_tokens=False)["input_ids"]
        return [*(token for token in first if token is not None), *request]

    @classmethod
    def extractor(cls, folder: Path) -> Features:
        """The feature extractor in a model's folder."""
        return Features(cls.features_of(AutoProcessor.from_pretrained(folder, trust_remote_code=False)))

    @property
    def speech_encoder(self) -> nn.Module:
        """The part that reads mel features."""
        encoder: nn.Module = self.model.audio_tower  # type: ignore[attr-defined]
        return encoder

    @property
    def longest_segment(self) -> float:
        """Seconds of the longest sound that is heard as a whole."""
        return max(1.0, HOP * self.mel_frames - MARGIN)

    longest_utterance = longest_segment

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or out of it. Frozen batch norms keep the statistics they have."""
        super().train(mode)  # type: ignore[misc]
        keep_norms(self.speech_encoder)
        return self

    # -- what each family says ---------------------------------------------------------------------

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d), the projector's input, and their mask (B, T) bool."""
        raise NotImplementedError

    def project(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Audio tokens (B, T, d_llm) and their mask (B, T) bool."""
        audio: Tensor = self.get_submodule(self.projector)(states)  # type: ignore[attr-defined]
        return audio, mask

    def encoder_layers(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d) for an accent recogniser, and their mask (B, T) bool."""
        return self.encode(input_features, attention_mask)

    # ----------------------------------------------------------------------------------------------

    def padded(self, features: Tensor, mask: Tensor, frames: int) -> Tensor:
        """Features (B, n_mels, frames), filled up with what the extractor makes of silence.

        Whisper's extractor cuts off what is 8 powers of ten below the loudest moment and divides by
        4, so silence is 2 below it; 10 powers of ten below 1 are its lowest value.
        """
        features = features.masked_fill(~mask[..., None], -torch.inf)
        silence = (features.amax((1, 2), keepdim=True) - 2).clamp_min(-1.5)
        features = nn.functional.pad(features, (0, 0, 0, frames - features.shape[1]), value=-torch.inf)
        return torch.where(features.isinf(), silence, features).transpose(1, 2)

    def embed_prompt(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt as embeddings (B, P, d_llm) and their mask (B, P), both padded on the left."""
        audio, valid = self.project(states, mask)
        table = self.get_input_embeddings()  # type: ignore[attr-defined]
        ids = (torch.tensor(part, dtype=torch.long, device=audio.device) for part in (self.prompt.before, self.prompt.after))
        before, after = (table(part).to(audio.dtype) for part in ids)
        rows = [torch.cat([before, heard[v], after]) for heard, v in zip(audio, valid, strict=True)]
        ones = [torch.ones(len(row), dtype=torch.bool, device=audio.device) for row in rows]
        return pad_sequence(rows, True, padding_side="left"), pad_sequence(ones, True, padding_side="left")

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, L + 1, vocabulary): those before each label, and those after the last.

        Takes the features of the audio with their mask, or its encoder states with theirs. The loss
        is the mean cross-entropy of the labels. With token ids (`input_ids`) or embeddings, this is
        the class's own forward.
        """
        if kwargs.get("input_ids") is not None or kwargs.get("inputs_embeds") is not None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            own = {"input_features": input_features, "attention_mask": attention_mask, "labels": labels}
            return super().forward(**own, **kwargs)  # type: ignore[misc]
        if encoder_states is None or encoder_mask is None:
            if input_features is None or attention_mask is None:
                raise ValueError("Give either input_features with attention_mask or encoder_states with encoder_mask.")
            encoder_states, encoder_mask = self.encode(input_features, attention_mask)
        if labels is None:
            raise ValueError("Give labels; to transcribe, call encode and decode.")
        embeds, mask = self.embed_prompt(encoder_states, encoder_mask)
        text = self.get_input_embeddings()(labels.clamp_min(0)).to(embeds.dtype)  # type: ignore[attr-defined]
        embeds, mask = torch.cat([embeds, text], 1), torch.cat([mask, labels >= 0], 1)
        hidden, _ = self._llm(embeds, mask)
        logits = self.lm_head(hidden[:, -labels.shape[1] - 1 :])  # type: ignore[attr-defined]
        return CausalLMOutputWithPast(loss=text_loss(logits[:, :-1], labels, num_items_in_batch), logits=logits)

    def _llm(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hidden states (B, L, d_llm) of embeddings (B, L, d_llm), and the cache with theirs.

        `mask` (B, L_all) is that of all tokens up to here.
        """
        position_ids = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        out = self.model(  # type: ignore[attr-defined]
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=position_ids, past_key_values=cache,
            use_cache=not torch.is_grad_enabled(),
        )  # fmt: skip
        return out.last_hidden_state, out.past_key_values

    @torch.no_grad()
    def decode(self, states: Tensor, mask: Tensor) -> list[tuple[list[int], list[float], None]]:
        """Write greedily what is heard in encoder states (B, T, d) with their mask (B, T).

        Returns:
            For each utterance the token ids with the end token, the log-probability (nats) of each,
            and None, as the LLM does not know when a token was said.
        """
        limits = [int(TOKENS + TOKENS_PER_SECOND * self.seconds_per_state * n) for n in mask.sum(1).tolist()]
        embeds, valid = self.embed_prompt(states, mask)
        written: list[list[int]] = [[] for _ in limits]
        scores: list[list[float]] = [[] for _ in limits]
        open_, cache = [True] * len(limits), None
        while any(open_):
            hidden, cache = self._llm(embeds, valid, cache)
            best = self.lm_head(hidden[:, -1]).float().log_softmax(-1).max(-1)  # type: ignore[attr-defined]
            for i, (token, score) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
                if open_[i]:
                    written[i].append(token)
                    scores[i].append(score)
                    open_[i] = token not in self.prompt.ends and len(written[i]) < limits[i]
            embeds = self.get_input_embeddings()(best.indices[:, None]).to(embeds.dtype)  # type: ignore[attr-defined]
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
        return [(ids, values, None) for ids, values in zip(written, scores, strict=True)]


def unpacked(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Frames (sum T, d) of utterances one after the other as (B, T, d), with their mask (B, T)."""
    states = pad_sequence(list(frames.split(lengths.tolist())), batch_first=True)
    return states, torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
