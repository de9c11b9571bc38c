"""A tiny random Whisper, written as CTranslate2 writes it and converted by the library's own converter."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hdmole.models.pretrained import convert

END = 256  # <|endoftext|>; the 256 ids before it are bytes
SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|language {k}|>" for k in range(99)), "<|translate|>", "<|transcribe|>",
    "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{k / 50:.2f}|>" for k in range(1501)),
]  # fmt: skip
VOCABULARY = END + len(SPECIAL)
WIDTH, LAYERS, HEADS = 16, 2, 2


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
