"""An LLM-based speech recogniser built from transformers classes.

* Encoder, projector and LLM have the names that transformers uses: `audio_tower`,
  `multi_modal_projector`, `language_model`.
* `audio_tower` is a CTC model with Parakeet's interface. Its CTC head is kept: it gives the times
  of words, and a second, independent opinion on what was said.
* The projector consists of attention and feed-forward layers made of `nn.Linear`, so that every
  adapter can be put into it.
* The LLM reads `<bos> audio <sep> text <eos>`. Audio is padded on the left, so that the positions
  of the text are contiguous.
* Encoder states can be computed once (`encode`) and given to several adapted models
  (`encoder_states=`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForCTC,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hdmole.method.routing import route
from hdmole.models.training import keep_norms


class SpeechLLMConfig(PreTrainedConfig):
    """Configuration of `SpeechLLM`.

    Parameters
    ----------
    audio_config, text_config : dict or PreTrainedConfig
        Configurations of the CTC encoder and of the decoder-only LLM.
    projector_hidden_size, projector_layers, projector_heads, projector_intermediate_size : int
        Width, depth, attention heads and feed-forward width of the projector.
    projector_dropout : float
    sep_token_id : int
        The token between audio and text.
    seconds_per_frame : float
        Length in seconds of one encoder output frame.
    longest_segment, longest_utterance : float
        Seconds that are transcribed at once. Audio up to `longest_segment`, about the longest
        sentence of the training data, is not cut unless it has a long pause. With one, and up to
        `longest_utterance`, about the longest training utterance, audio is cut only where CTC head
        and LLM disagree on it. All other audio is cut at its pauses.
    """

    model_type = "speech_llm"
    sub_configs: ClassVar[dict[str, Any]] = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        audio_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        projector_hidden_size: int = 512,
        projector_layers: int = 2,
        projector_heads: int = 8,
        projector_intermediate_size: int = 1024,
        projector_dropout: float = 0.1,
        sep_token_id: int = 3,
        seconds_per_frame: float = 0.08,
        longest_segment: float = 8.0,
        longest_utterance: float = 14.0,
        **kwargs: Any,
    ) -> None:
        self.audio_config = _as_config(audio_config, "parakeet_ctc")
        self.text_config = _as_config(text_config, "llama")
        self.projector_hidden_size = projector_hidden_size
        self.projector_layers = projector_layers
        self.projector_heads = projector_heads
        self.projector_intermediate_size = projector_intermediate_size
        self.projector_dropout = projector_dropout
        self.sep_token_id = sep_token_id
        self.seconds_per_frame = seconds_per_frame
        self.longest_segment = longest_segment
        self.longest_utterance = longest_utterance
        super().__init__(**kwargs)


def _as_config(config: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default), **values)


class ProjectorLayer(nn.Module):
    """Pre-norm self-attention with rotary positions and a feed-forward block, all `nn.Linear`."""

    def __init__(self, hidden: int, heads: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.o_proj = nn.Linear(hidden, hidden)
        self.norm_feed_forward = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        y = self.norm_attention(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *positions)
        # y: (B, heads, T, hidden / heads)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.dropout(self.o_proj(y.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.fc2(functional.gelu(self.fc1(self.norm_feed_forward(x)))))
        return x


class Projector(nn.Module):
    """From encoder states (B, T, d_encoder) to embeddings of the LLM (B, T, d_llm)."""

    def __init__(self, config: SpeechLLMConfig) -> None:
        super().__init__()
        hidden = config.projector_hidden_size
        self.linear_1 = nn.Linear(config.audio_config.encoder_config.hidden_size, hidden)
        self.layers = nn.ModuleList(
            ProjectorLayer(hidden, config.projector_heads, config.projector_intermediate_size, config.projector_dropout)
            for _ in range(config.projector_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.linear_2 = nn.Linear(hidden, config.text_config.hidden_size)
        rotary: Any = AutoConfig.for_model("llama", hidden_size=hidden, num_attention_heads=config.projector_heads)
        self.rotary = LlamaRotaryEmbedding(rotary)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        x = self.linear_1(states)
        positions = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        # bias: (B, 1, 1, T)
        bias = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, positions, bias)
        embeds: Tensor = self.linear_2(self.norm(x))
        return embeds


class SpeechLLM(PreTrainedModel):
    """Speech encoder with CTC head, projector and decoder-only LLM.

    Shapes: `input_features` (B, T_mel, n_mels) and `attention_mask` (B, T_mel) as the feature
    extractor gives them; encoder states (B, T, d_encoder) with a boolean mask (B, T); `labels`
    (B, L) token ids ending in `<eos>`, padded with -100.
    """

    config_class = SpeechLLMConfig
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SpeechLLMConfig) -> None:
        super().__init__(config)
        self.audio_tower = AutoModelForCTC.from_config(config.audio_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()  # type: ignore[no-untyped-call]

    # -- what `hdmole.models.family.Family` asks of a model -------------------------------------------

    projector = "multi_modal_projector"
    places = {  # noqa: RUF012
        "projector": r"multi_modal_projector\..*(linear_1|linear_2|q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
        "encoder": r"audio_tower\.encoder\.layers\..*(linear1|linear2|q_proj|k_proj|v_proj|o_proj)",
        "llm": r"language_model\.model\.layers\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    }
    whole_recordings = False  # it was trained on single sentences
    silent_frames = 0  # encoder frames of silence that the extractor adds after a sound

    @staticmethod
    def extractor(folder: Path) -> Any:
        """The feature extractor in a model's folder."""
        return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)

    @property
    def speech_encoder(self) -> nn.Module:
        """The part that reads mel features."""
        encoder: nn.Module = self.audio_tower
        return encoder

    @property
    def seconds_per_frame(self) -> dict[str, float]:
        """Seconds between two frames that a layer sees, by the part of the model it lies in.

        The layers for relative positions see no frames of audio, so their value is NaN.
        """
        step = self.seconds_per_state
        return {"multi_modal_projector": step, "relative_k_proj": float("nan"), "audio_tower": step}

    @property
    def seconds_per_state(self) -> float:
        """Seconds between two encoder states."""
        return float(self.config.seconds_per_frame)

    @property
    def longest_segment(self) -> float:
        """Seconds of the longest sound that is heard as a whole in any case."""
        return float(self.config.longest_segment)

    @property
    def longest_utterance(self) -> float:
        """Seconds of the longest sound that is heard as a whole if CTC head and LLM agree on it."""
        return float(self.config.longest_utterance)

    @property
    def blank(self) -> int:
        """Id of the CTC head's blank."""
        return int(self.config.audio_config.pad_token_id)

    # ------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's table of token embeddings."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> SpeechLLM:
        """Switch to training, or out of it.

        Batch norms that are frozen keep the statistics they were trained with.
        """
        super().train(mode)
        keep_norms(self.audio_tower)
        return self

    def encode(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states (B, T, d_encoder) and their mask (B, T) bool.

        Gradients flow only where the encoder is trained.
        """
        trained = any(p.requires_grad for p in self.audio_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            out = self.audio_tower.encoder(input_features=input_features, attention_mask=attention_mask.bool())
        return out.last_hidden_state, out.attention_mask.bool()

    def encoder_layers(self, input_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the subsampling and of every encoder layer, and their mask (B, T) bool.

        The outputs (B, T, (layers + 1) * d_encoder) of a frame stand one after the other.
        """
        out = self.audio_tower.encoder(
            input_features=input_features, attention_mask=attention_mask.bool(), output_hidden_states=True
        )
        return torch.cat(out.hidden_states, -1), out.attention_mask.bool()

    def ctc_log_probs(self, encoder_states: Tensor) -> Tensor:
        """CTC log-probabilities (B, T, vocabulary); the blank is the tokenizer's padding token."""
        logits: Tensor = self.audio_tower.ctc_head(encoder_states)
        return logits.float().log_softmax(-1)

    def embed_prompt(self, encoder_states: Tensor, encoder_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`<bos> audio <sep>` as embeddings (B, T + 2, d_llm), and their mask (B, T + 2).

        Both are padded on the left.
        """
        audio = self.multi_modal_projector(encoder_states, encoder_mask)
        length = audio.shape[1]
        padding = length - encoder_mask.sum(1)  # (B,)
        source = (torch.arange(length, device=audio.device)[None] - padding[:, None]) % length
        audio = audio.gather(1, source[..., None].expand_as(audio))
        tokens = torch.tensor([self.config.text_config.bos_token_id, self.config.sep_token_id], device=audio.device)
        # ends: (B, 2, d_llm)
        ends = self.get_input_embeddings()(tokens).to(audio.dtype).expand(len(audio), -1, -1)
        embeds = torch.cat([ends[:, :1], audio, ends[:, 1:]], 1)
        # the padding stands first, then <bos>, then audio
        embeds = embeds.scatter(1, padding[:, None, None].expand(-1, 1, embeds.shape[2]), ends[:, :1])
        mask = torch.arange(length + 2, device=audio.device)[None] >= padding[:, None]
        return embeds, mask

    def _prompt(
        self, features: Tensor | None, mask: Tensor | None, states: Tensor | None, states_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if states is None or states_mask is None:
            if features is None or mask is None:
                raise ValueError("Give either input_features with attention_mask or encoder_states with encoder_mask.")
            states, states_mask = self.encode(features, mask)
        return self.embed_prompt(states, states_mask)

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T + 2 + L, vocabulary) and, with `labels`, the mean cross-entropy of the text.

        Takes the features of the audio with their mask, or its encoder states with theirs. Raises
        ValueError for neither.
        """
        embeds, mask = self._prompt(input_features, attention_mask, encoder_states, encoder_mask)
        targets = None
        if labels is not None:
            text = self.get_input_embeddings()(labels.clamp_min(0)).to(embeds.dtype)
            embeds = torch.cat([embeds, text], 1)
            targets = torch.cat([torch.full_like(mask, -100, dtype=torch.long), labels], 1)
            mask = torch.cat([mask, labels >= 0], 1)
        position_ids = (mask.long().cumsum(1) - 1).clamp_min(0)
        # of Trainer, so that steps that accumulate gradients have the loss of one large batch
        count = {name: kwargs[name] for name in ("num_items_in_batch",) if kwargs.get(name) is not None}
        out: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=position_ids, labels=targets, use_cache=False, **count
        )
        return out

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids of the transcript (B, L).

        Takes what `forward` takes; other keyword arguments go to the LLM's `generate`.
        """
        embeds, mask = self._prompt(input_features, attention_mask, encoder_states, encoder_mask)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask.long(), **kwargs)

    @torch.no_grad()
    def decode(self, encoder_states: Tensor, encoder_mask: Tensor) -> list[tuple[list[int], list[float], None]]:
        """Write greedily what is heard in encoder states (B, T, d_encoder) with their mask (B, T).

        Returns:
            For each utterance the token ids with the end token, the log-probability (nats) of each,
            and None, as the LLM does not know when a token was said.
        """
        text = self.config.text_config
        out = self.generate(
            encoder_states=encoder_states, encoder_mask=encoder_mask, max_new_tokens=int(8 + 1.5 * int(encoder_mask.sum(1).max())),
            do_sample=False, pad_token_id=text.pad_token_id, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        log_probs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(2, out.sequences[..., None])[..., 0]
        found = []
        for ids, scores in zip(out.sequences.tolist(), log_probs.tolist(), strict=True):
            length = next((i + 1 for i, t in enumerate(ids) if t == text.eos_token_id), len(ids))
            found.append((ids[:length], scores[:length], None))
        return found


@torch.no_grad()
def encode_all(model: Any, features: Sequence[Tensor], posterior: Tensor | None = None) -> list[Tensor]:
    """Encoder states (T, d_encoder) of each of U utterances, from their mel features (T_mel,
    n_mels).

    `posterior` (U, N + 1) routes the utterances where `model` has an HDMoLE adapter in its encoder.
    """
    mels = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([f.new_ones(len(f), dtype=torch.bool) for f in features], batch_first=True)
    with nullcontext() if posterior is None else route(posterior):
        states, valid = model.encode(mels, mask)
    return [s[v] for s, v in zip(states, valid, strict=True)]


AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig, exist_ok=True)
