"""A tiny random Whisper, written as CTranslate2 writes it and converted by the library's own converter."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from hdmole.demo.real import PLACES
from hdmole.method.recogniser import LayerRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models.pretrained import convert, digest
from hdmole.models.whisper import Whisper

END = 256  # <|endoftext|>; the 256 ids before it are bytes
SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in [*LANGUAGES][:99]), "<|translate|>", "<|transcribe|>",
    "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{k / 50:.2f}|>" for k in range(1501)),
]  # fmt: skip
VOCABULARY = END + len(SPECIAL)
WIDTH, LAYERS, HEADS = 16, 2, 2
ACCENTS = ["indian", "german"]


def tensors(seed: int = 0, dtype: type = np.float16) -> dict[str, np.ndarray]:
    """The tensors of a CTranslate2 Whisper by name, with random values."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, size: int) -> None:
        found[f"{name}/weight"] = rng.normal(0, 0.3, (out, size)).astype(dtype)
        found[f"{name}/bias"] = rng.normal(0, 0.1, out).astype(dtype)

    def norm(name: str) -> None:
        found[f"{name}/gamma"] = rng.uniform(0.8, 1.2, WIDTH).astype(dtype)
        found[f"{name}/beta"] = rng.normal(0, 0.1, WIDTH).astype(dtype)

    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(HEADS, np.int16)
        found[f"{side}/position_encodings/encodings"] = rng.normal(0, 0.3, (1500 if side == "encoder" else 448, WIDTH)).astype(
            dtype
        )
        norm(f"{side}/layer_norm")
        for i in range(LAYERS):
            at = f"{side}/layer_{i}"
            norm(f"{at}/self_attention/layer_norm")
            linear(f"{at}/self_attention/linear_0", 3 * WIDTH, WIDTH)
            found[f"{at}/self_attention/linear_0/bias"][WIDTH : 2 * WIDTH] = 0  # Whisper's keys have no bias
            linear(f"{at}/self_attention/linear_1", WIDTH, WIDTH)
            if side == "decoder":
                norm(f"{at}/attention/layer_norm")
                linear(f"{at}/attention/linear_0", WIDTH, WIDTH)
                linear(f"{at}/attention/linear_1", 2 * WIDTH, WIDTH)
                found[f"{at}/attention/linear_1/bias"][:WIDTH] = 0
                linear(f"{at}/attention/linear_2", WIDTH, WIDTH)
            norm(f"{at}/ffn/layer_norm")
            linear(f"{at}/ffn/linear_0", 2 * WIDTH, WIDTH)
            linear(f"{at}/ffn/linear_1", WIDTH, 2 * WIDTH)
    for name, size in (("conv1", 80), ("conv2", WIDTH)):
        found[f"encoder/{name}/weight"] = rng.normal(0, 0.1, (WIDTH, size, 3)).astype(dtype)
        found[f"encoder/{name}/bias"] = rng.normal(0, 0.1, WIDTH).astype(dtype)
    found["decoder/embeddings/weight"] = rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(dtype)
    return found


def ct2_bytes(arrays: dict[str, np.ndarray], kind: str = "WhisperSpec", version: int = 6) -> bytes:
    """A CTranslate2 file, with the output layer as an alias of the embeddings."""
    numbers = {np.dtype(np.float32): 0, np.dtype(np.int16): 2, np.dtype(np.float16): 4}

    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), word(kind), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        parts += [word(name), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", numbers[array.dtype], array.nbytes), array.tobytes()]
    return b"".join([*parts, struct.pack("<I", 1), word("decoder/projection/weight"), word("decoder/embeddings/weight")])


def ct2_folder(folder: Path, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """Write a CTranslate2 folder as the wheels hold it."""
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(ct2_bytes(tensors() if arrays is None else arrays))
    settings = {"alignment_heads": [[1, 0], [1, 1]], "suppress_ids": [7], "suppress_ids_begin": [END]}
    (folder / "config.json").write_text(json.dumps(settings))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_whisper(folder: Path) -> Path:
    """A folder of transformers with a tiny random Whisper."""
    convert(ct2_folder(folder / "ct2"), folder / "whisper")
    return folder / "whisper"


def few_tokens(folder: Path, english_only: bool, positions: int = 400) -> Path:
    """A folder of transformers' own class: a vocabulary without most languages and without times, and
    an encoder that hears for `positions` / 50 seconds.
    """
    languages = [] if english_only else ["<|de|>", "<|en|>"]
    asked = [] if english_only else ["<|translate|>", "<|transcribe|>"]
    special = [*SPECIAL[:2], *languages, *asked, "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    tokenizer.add_tokens(special, special_tokens=True)
    config = WhisperConfig(
        vocab_size=len(tokenizer) + 3, num_mel_bins=12, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=positions, max_target_positions=60,
        pad_token_id=END, bos_token_id=END, eos_token_id=END, decoder_start_token_id=END + 1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if english_only:
        model.generation_config.is_multilingual = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=12, chunk_length=positions // 50).save_pretrained(folder)
    return folder


def tiny_adapters(base: Path, folder: Path) -> Path:
    """A model's folder with every kind of adapter and an accent recogniser, without the `base`."""
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=2, target_modules=PLACES["encoder"]),
        "hdmole": HDMoLEConfig.extended(ACCENTS, target_modules=PLACES["encoder"]),
    }
    for name, config in configs.items():
        model: Any = get_peft_model(Whisper.from_pretrained(base, dtype=torch.float32), config)  # type: ignore[arg-type]
        for key, parameter in model.named_parameters():
            if "_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(folder / "adapters" / name))
    (folder / "adapters" / "full").mkdir()
    changed = {"model.encoder.layers.1.fc1.weight": torch.randn(2 * WIDTH, WIDTH)}
    save_file(changed, folder / "adapters" / "full" / "model.safetensors")
    recogniser = LayerRecogniser(["general", *ACCENTS], LAYERS + 1, 2 * WIDTH, hidden=8)
    torch.nn.init.normal_(recogniser.output.weight)
    recogniser.save(folder / "accents")
    about = {"model_type": "whisper", "pretrained": "whisper-base", "pretrained_sha256": digest(base)}
    (folder / "config.json").write_text(json.dumps(about))
    return folder
