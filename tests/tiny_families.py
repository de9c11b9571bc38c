"""Folders of tiny random models of transformers' own classes, with the classes' own processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

WORDS = [*"abcdefghijklmnopqrstuvwxyz' .:<|>_/", *(f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", "[TRANSCRIBE]", "<|im_start|>", "<|im_end|>"]
AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ENCODER = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_mel_bins=16)
TOWER = dict(num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16)
SECONDS = 4  # that an encoder has positions for


def tokenizer(audio: str = "<|AUDIO|>") -> PreTrainedTokenizerFast:
    """Letters, each alone or at the beginning of a word; the audio token is the 24th, as Voxtral has it."""
    special = [*SPECIAL, *AUDIO, "<asr_text>", *(f"<unused{k}>" for k in range(10)), audio if audio not in AUDIO else "<more>"]
    vocabulary = {token: k for k, token in enumerate([*special, *WORDS])}
    bpe = Tokenizer(models.BPE(vocabulary, [("▁", letter) for letter in ""], unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=dict(zip(("audio_token", "audio_bos_token", "audio_eos_token"), [audio, *AUDIO[1:]], strict=True)),
    )  # fmt: skip
    found.add_tokens(special[4:], special_tokens=True)
    return found


def whisper_features() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS, return_attention_mask=True)


TURNS = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_bos|>AUDIO<|audio_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>{% endif %}{% endfor %}"
)


def glmasr(words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    processor = transformers.GlmAsrProcessor(
        whisper_features(), words, chat_template=TURNS.replace("AUDIO", "<|AUDIO|>"), audio_token="<|AUDIO|>"
    )
    audio = {**ENCODER, "model_type": "glmasr_encoder"}
    return processor, dict(text_config={**TEXT, "model_type": "llama"}, audio_config=audio)


def qwen2_audio(words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    audio = {**TOWER, "model_type": "qwen2_audio_encoder", "max_source_positions": 50 * SECONDS}
    return transformers.Qwen2AudioProcessor(whisper_features(), words), dict(
        text_config={**TEXT, "model_type": "qwen2"}, audio_config=audio
    )


def qwen3_asr(words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    processor = transformers.Qwen3ASRProcessor(
        transformers.Qwen3ASRFeatureExtractor(feature_size=16, chunk_length=SECONDS), words,
        chat_template=TURNS.replace("AUDIO", "<|AUDIO|>"),
    )  # fmt: skip
    audio = {**TOWER, "n_window": 50, "n_window_infer": 100, "output_dim": 32, "downsample_hidden_size": 4}
    return processor, dict(text_config={**TEXT, "model_type": "qwen3"}, audio_config=audio)


def voxtral(words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    audio = {**ENCODER, "model_type": "voxtral_encoder", "max_source_positions": 50 * SECONDS}
    return transformers.VoxtralProcessor(whisper_features(), words), dict(
        text_config={**TEXT, "model_type": "llama"}, audio_config=audio
    )


def granite_speech(words: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    processor = transformers.GraniteSpeechProcessor(transformers.GraniteSpeechFeatureExtractor(), words)
    former = dict(
        model_type="blip_2_qformer", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        encoder_hidden_size=16, cross_attention_frequency=1,
    )  # fmt: skip
    encoder = dict(
        input_dim=160, num_layers=2, hidden_dim=16, num_heads=2, dim_head=8, output_dim=6, context_size=20, max_pos_emb=32,
        conv_kernel_size=3,
    )  # fmt: skip
    return processor, dict(
        text_config={**TEXT, "model_type": "granite"}, encoder_config=encoder, projector_config=former, has_lora_adapter=False
    )


FOLDERS: dict[str, Callable[[PreTrainedTokenizerFast], tuple[Any, Any]]] = {
    "glmasr": glmasr, "qwen2_audio": qwen2_audio, "qwen3_asr": qwen3_asr, "voxtral": voxtral, "granite_speech": granite_speech,
}  # fmt: skip


def save(kind: str, folder: Path, **more: Any) -> Any:
    """Write the folder of a model of the class `kind`, and return the model."""
    audio = {"granite_speech": "<|audio|>", "voxtral": "[AUDIO]"}.get(kind, AUDIO[0])
    words = tokenizer(audio)
    processor, config = FOLDERS[kind](words)
    config = {"audio_token_id": words.convert_tokens_to_ids(audio), **config}
    config["text_config"]["vocab_size"] = len(words)
    if kind == "qwen2_audio":
        config["audio_token_index"] = config.pop("audio_token_id")
    if kind == "granite_speech":
        config["audio_token_index"] = config.pop("audio_token_id")
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **config, **more))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
        elif not (name.endswith("weight") and "norm" in name):
            nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
