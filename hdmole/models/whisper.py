"""Whisper (Radford et al. 2022) as a model that this library transcribes with and adapts.

* The input is as long as the clip and `SILENCE` seconds, not 30 s as in transformers' own forward.
  Encoder positions beyond it are not used. This is about 8 times faster on short clips.
* Batches are padded and masked, so that a clip gives the same alone and in any batch.
* Decoding is greedy. Tokens are limited by the clip's duration, and a text that begins to repeat
  itself ends there. Where the model hears no speech, the text is empty.
* Words get their times from the cross-attention, by dynamic time warping as in Whisper's own
  `timing.py`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

from hdmole.models.family import Heard
from hdmole.models.training import text_loss

SILENCE = 1.0  # seconds of silence after a clip; with less, Whisper tends to say things twice
STEP = 0.02  # seconds between two frames of the encoder
LONGEST = 28.0  # seconds that are heard at once; Whisper has positions for 30 s
MARGIN = 1.0  # seconds by which a sound and its silence are shorter than what there are positions for
TOKENS, TOKENS_PER_SECOND = 6, 5  # a clip of s seconds has at most 6 + 5 s tokens
NEAR_END = 0.5  # seconds before the end of a clip in which its last sentence ends
NO_SPEECH, UNSURE = 0.6, -1.0  # no text if P(no speech) is above the first and mean log P below the second
ENGLISH_ONLY = 51_864  # tokens in the vocabulary of the models that write English only


class ClipExtractor(WhisperFeatureExtractor):
    """Mel features of a clip and `SILENCE` seconds of silence, time first."""

    def __call__(self, sound: np.ndarray, sampling_rate: int = 16_000, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Features (1, T, n_mels) and their mask (1, T) of samples (S,); at most 30 s."""
        padded = np.pad(sound, (0, int(SILENCE * sampling_rate)))[: int((LONGEST + SILENCE) * sampling_rate)]
        found = super().__call__(padded, sampling_rate=sampling_rate, padding=False, return_tensors="pt")  # type: ignore[arg-type]
        features = found["input_features"].transpose(1, 2)
        return {"input_features": features, "attention_mask": torch.ones(features.shape[:2], dtype=torch.bool)}


class Tokens(NamedTuple):
    """Ids of Whisper's special tokens.

    Args:
        prompt: what a text begins with, `<|startoftranscript|><|en|><|transcribe|><|notimestamps|>`
            without those that the model does not have or was not trained with.
        english: the token of English, or None for a model that writes English only.
        languages: tokens of all languages.
        no_speech: the token that says that nobody speaks; None if there is none.
        no_text: tokens that are no text.
        stops: the full stop, the question mark and the exclamation mark.
    """

    prompt: list[int]
    english: int | None
    languages: list[int]
    no_speech: int | None
    no_text: list[int]
    stops: list[int]

    @classmethod
    def of(cls, tokenizer: Any, config: Any, settings: Any) -> Tokens:
        """Those of a tokenizer, for a model with this configuration and generation configuration."""
        vocabulary = {str(token): int(i) for token, i in tokenizer.get_vocab().items() if i < config.vocab_size}
        start, end = int(config.decoder_start_token_id), int(config.eos_token_id)
        multilingual = getattr(settings, "is_multilingual", None)
        if multilingual is None:
            multilingual = config.vocab_size != ENGLISH_ONLY
        english = vocabulary.get("<|en|>") if multilingual else None
        asked = ["<|transcribe|>"] if english is not None else []
        known = [english, *(vocabulary.get(token) for token in (*asked, "<|notimestamps|>"))]
        added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids, start}
        return cls(
            prompt=[start, *(i for i in known if i is not None)],
            english=english,
            languages=list(range(start + 1, vocabulary.get("<|translate|>", start + 1))) if english is not None else [],
            no_speech=next((vocabulary[token] for token in ("<|nospeech|>", "<|nocaptions|>") if token in vocabulary), None),
            no_text=sorted({*added, *range(len(tokenizer), config.vocab_size)} - {end}),
            stops=[vocabulary[mark] for mark in ".?!" if mark in vocabulary],
        )


class Whisper(WhisperForConditionalGeneration):
    """A Whisper, multilingual or of English only, that transcribes English.

    Shapes: `input_features` (B, T_mel, n_mels), zero on padding, and `attention_mask` (B, T_mel) as
    `ClipExtractor` gives them; encoder states (B, T, d) with a boolean mask (B, T); `labels` (B, L)
    token ids ending in `<|endoftext|>`, padded with -100.
    """

    whole_recordings = True  # it was trained on 30 s of whatever is said
    silent_frames = round(SILENCE / STEP)
    blank = None  # it has no CTC head
    projector = None
    seconds_per_state = STEP
    places = {  # noqa: RUF012
        "encoder": r"model\.encoder\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        "llm": r"model\.decoder\.layers\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    }
    tokens: Tokens
    seconds_per_frame = {"model.encoder": STEP, "model.decoder": float("nan")}  # noqa: RUF012

    def __init__(self, config: WhisperConfig) -> None:
        # attention weights are needed for the times of words
        config._attn_implementation = "eager"
        super().__init__(config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, trust_remote_code: bool = False, use_safetensors: bool = True, **kwargs: Any
    ) -> Any:
        """Load the weights, and the special tokens from the folder's tokenizer.

        No code of the folder is run and no pickle is opened, whatever is asked for.
        """
        loaded: Any = super().from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model.tokens = Tokens.of(tokenizer, model.config, model.generation_config)
        return loaded

    @property
    def longest_segment(self) -> float:
        """Seconds of the longest sound that is heard as a whole."""
        return max(0.5, min(LONGEST, STEP * self.config.max_source_positions - SILENCE - MARGIN))

    longest_utterance = longest_segment

    @staticmethod
    def extractor(folder: Path) -> Any:
        """The feature extractor in a model's folder."""
        return ClipExtractor.from_pretrained(folder, trust_remote_code=False)

    @property
    def speech_encoder(self) -> nn.Module:
        """The part that reads mel features."""
        encoder: nn.Module = self.model.encoder
        return encoder

    # -- encoder -----------------------------------------------------------------------------------

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d) and their mask (B, T) bool."""
        layers, mask = self.encode_layers(input_features, attention_mask)
        return layers[-1], mask

    def encode_layers(self, input_features: Tensor, attention_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """What goes into the first layer and comes out of each, (B, T, d), and the mask (B, T).

        The last one has gone through the final layer norm.
        """
        encoder, mask = self.model.encoder, attention_mask.bool()
        x = functional.gelu(encoder.conv1(input_features.transpose(1, 2))) * mask[:, None]
        x = functional.gelu(encoder.conv2(x)).transpose(1, 2)
        valid = mask[:, ::2]
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        bias, layers = _bias(valid, x.dtype), [x]
        for layer in encoder.layers:
            x = layer(x, bias)
            layers.append(x)
        return [*layers[:-1], encoder.layer_norm(x)], valid

    def encoder_layers(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode_layers` gives, one after the other (B, T, (layers + 1) * d), and the mask."""
        layers, mask = self.encode_layers(input_features, attention_mask)
        return torch.cat(layers, -1), mask

    # -- decoder -----------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """Id of `<|endoftext|>`."""
        end: Any = self.config.eos_token_id
        return int(end)

    @property
    def prompt(self) -> list[int]:
        """What a text begins with, as token ids."""
        return self.tokens.prompt

    def _decoder(
        self, ids: Tensor, states: Tensor, bias: Tensor | None, cache: EncoderDecoderCache | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (B, L, d) of the tokens `ids` (B, L), and each layer's cross-attention.

        transformers' own forward lets no mask of the encoder states through.
        """
        decoder, length = self.model.decoder, ids.shape[1]
        start = cache.get_seq_length() if cache is not None else 0
        x = decoder.embed_tokens(ids) + decoder.embed_positions.weight[start : start + length]
        lowest = torch.finfo(x.dtype).min
        causal = torch.full((length, start + length), lowest, dtype=x.dtype, device=x.device).triu(start + 1)
        weights = []
        for layer in decoder.layers:
            y, _ = layer.self_attn(layer.self_attn_layer_norm(x), past_key_values=cache, attention_mask=causal)
            x = x + y
            y, cross = layer.encoder_attn(
                layer.encoder_attn_layer_norm(x), key_value_states=states, attention_mask=bias, past_key_values=cache
            )
            x = x + y
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
            weights.append(cross)
        return decoder.layer_norm(x), weights

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, L + 1, vocabulary): those before each label, and those after the last.

        Takes the features of the audio with their mask, or its encoder states with theirs. The loss
        is the mean cross-entropy of the labels. Raises ValueError for no audio or no labels.
        """
        if encoder_states is None or encoder_mask is None:
            if input_features is None or attention_mask is None:
                raise ValueError("Give either input_features with attention_mask or encoder_states with encoder_mask.")
            encoder_states, encoder_mask = self.encode(input_features, attention_mask)
        if labels is None:
            raise ValueError("Give labels; to transcribe, call encode and decode.")
        prompt = labels.new_tensor(self.prompt).expand(len(labels), -1)
        ids = torch.cat([prompt, labels.masked_fill(labels < 0, self.end)], 1)
        hidden, _ = self._decoder(ids, encoder_states, _bias(encoder_mask, encoder_states.dtype))
        logits = self.proj_out(hidden[:, prompt.shape[1] - 1 :])
        return Seq2SeqLMOutput(loss=text_loss(logits[:, :-1], labels, num_items_in_batch), logits=logits)

    @torch.no_grad()
    def decode(self, states: Tensor, mask: Tensor) -> list[Heard]:
        """Write what is heard in encoder states (B, T, d) with their mask (B, T).

        `english` of each clip is the probability that English is spoken, among all languages; 1 for
        a model that writes English only.
        """
        seconds = (STEP * mask.sum(1) - SILENCE).tolist()
        limits = [int(TOKENS + TOKENS_PER_SECOND * max(0.0, s)) for s in seconds]
        most = self.config.max_target_positions - len(self.prompt)
        bias, cache = _bias(mask, states.dtype), EncoderDecoderCache(DynamicCache(), DynamicCache())
        end, (never, begins) = self.end, self._suppressed(states.device)
        step = torch.tensor([self.prompt] * len(states), device=states.device)
        written: list[list[int]] = [[] for _ in seconds]
        scores: list[list[float]] = [[] for _ in seconds]
        attention: list[Tensor] = []  # of each step, (B, heads, T)
        starts: list[list[int]] = [[0] for _ in seconds]  # of sentences, as numbers of tokens
        over = [False] * len(seconds)  # whether the last sentence ends where the speech does
        open_ = [True] * len(seconds)
        for turn in range(min(most, max(limits))):
            hidden, cross = self._decoder(step, states, bias, cache)
            attention.append(torch.stack([cross[layer][:, head, -1] for layer, head in self._alignment_heads], 1))
            logits = self.proj_out(hidden[:, [0, -1]] if turn == 0 else hidden[:, -1:]).float()
            if turn == 0:
                silent, english = self._silent_and_english(logits[:, 0])
            logits = logits[:, -1]
            logits[:, never if turn else begins] = -torch.inf
            best = logits.log_softmax(-1).max(-1)
            step = best.indices[:, None]
            for i, (token, score) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
                if open_[i]:
                    written[i].append(token)
                    scores[i].append(score)
                    again = repeated(written[i]) or (over[i] and said_before(written[i], starts[i]))
                    if again:
                        del written[i][-again:], scores[i][-again:]
                    open_[i] = token != end and not again and turn + 1 < limits[i]
                    if token in self.tokens.stops:
                        starts[i].append(len(written[i]))
                        heard = attention[-1][i].mean(0)[: int(mask[i].sum())].argmax()
                        over[i] = int(heard) * STEP > seconds[i] - NEAR_END
            if not any(open_):
                break
        weights = torch.stack(attention, 2).float()  # (B, heads, steps, T)
        found: list[Heard] = []
        for i, (ids, values) in enumerate(zip(written, scores, strict=True)):
            if silent[i] > NO_SPEECH and np.mean(values) < UNSURE:
                found.append(Heard([end], [float(np.log(silent[i]))], [], english[i]))
                continue
            text = len(ids) - (ids[-1:] == [end])
            frames = max(1, min(int(mask[i].sum()), round(seconds[i] / STEP)))
            found.append(Heard(ids, values, token_times(weights[i, :, : len(ids), :frames], text), english[i]))
        return found

    def _silent_and_english(self, logits: Tensor) -> tuple[list[float], list[float]]:
        """Probability that nobody speaks, and that English is spoken, of each clip.

        Args:
            logits: (B, vocabulary), those after the first token of the prompt.
        """
        silent, english = logits.new_zeros(len(logits)), logits.new_ones(len(logits))
        if self.tokens.no_speech is not None:
            silent = logits.softmax(-1)[:, self.tokens.no_speech]
        if self.tokens.english is not None:
            languages = self.tokens.languages
            english = logits[:, languages].softmax(-1)[:, languages.index(self.tokens.english)]
        return silent.tolist(), english.tolist()

    @property
    def _alignment_heads(self) -> list[tuple[int, int]]:
        """Layer and number of the heads whose cross-attention follows the speech.

        Where they are not known these are all heads of the upper half of the layers.
        """
        known = getattr(self.generation_config, "alignment_heads", None)
        layers = range(self.config.decoder_layers // 2, self.config.decoder_layers)
        return known or [(layer, head) for layer in layers for head in range(self.config.decoder_attention_heads)]

    def _suppressed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids (S,) of tokens that are never text, and these with those that begin no text.

        A configuration that names none has those of OpenAI's models, which a smaller vocabulary
        lacks.
        """
        settings = self.generation_config
        never = {*(getattr(settings, "suppress_tokens", None) or []), *self.tokens.no_text}
        begins = never | set(getattr(settings, "begin_suppress_tokens", None) or [])
        of_both = ([i for i in sorted(ids) if i < self.config.vocab_size] for ids in (never, begins))
        first, second = (torch.tensor(ids, dtype=torch.long, device=device) for ids in of_both)
        return first, second


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention scores (B, 1, 1, T) where `mask` (B, T) is false; None if nowhere."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def repeated(ids: list[int]) -> int:
    """How many tokens at the end say again what was just said; 0 if they do not.

    Six tokens or more that stand twice in a row are a repetition, and so are fewer tokens that
    stand five times or more in a row and are at least 12 in all. Digits that a speaker repeats are
    shorter than that.
    """
    for size in range(1, len(ids) // 2 + 1):
        last = ids[-size:]
        times = 1
        while ids[-size * (times + 1) : len(ids) - size * times] == last:
            times += 1
        if (size >= 6 and times >= 2) or (times >= 5 and size * times >= 12):
            return size * (times - 1)
    return 0


def said_before(ids: list[int], starts: list[int]) -> int:
    """Number of tokens of the last sentence if it begins, with three tokens, as an earlier one;
    else 0.

    `starts` are the numbers of the first token of each sentence.
    """
    *earlier, last = starts
    begun = ids[last:]
    return len(begun) if len(begun) == 3 and any(ids[k : k + 3] == begun for k in earlier) else 0


def token_times(weights: Tensor, count: int) -> list[tuple[float, float]]:
    """Start and end in seconds of the first `count` tokens.

    The path through the attention is found by dynamic time warping, as in Whisper's `timing.py`.

    Args:
        weights: (heads, tokens, T) attention to the T frames of the clip while each token was
            predicted. The end token may be the last.
        count: number of tokens that are text.
    """
    frames = weights.shape[-1]
    if not count:
        return []
    spread, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    smooth = _median_filter(((weights - mean) / spread.clamp_min(1e-6))[None], 7)[0]
    text, time = _dynamic_time_warping(-smooth.mean(0).double().cpu().numpy())
    first = time[np.flatnonzero(np.diff(text, prepend=-1))]  # frame at which each token begins
    edges = [*(STEP * first).tolist(), STEP * frames][: count + 1]
    return [(float(a), float(b)) for a, b in pairwise(edges)]


def layer_statistics(layers: list[Tensor], mask: Tensor) -> Tensor:
    """Mean and deviation over time of each layer's states: (B, layers, 2 d).

    Args:
        layers: (B, T, d) each, as `Whisper.encode_layers` gives them.
        mask: (B, T), true on valid frames.
    """
    x, valid = torch.stack(layers, 1), mask[:, None, :, None].to(layers[0].dtype)
    count = valid.sum(2)
    mean = (x * valid).sum(2) / count
    deviation = (((x - mean[:, :, None]) * valid) ** 2).sum(2).div(count).add(1e-6).sqrt()
    return torch.cat([mean, deviation], -1)
