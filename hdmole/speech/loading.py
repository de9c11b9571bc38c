"""Model folders: finding them, checking what they hold, and loading the models of all methods."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file

import hdmole.method.tuner  # noqa: F401  (makes PEFT know HDMoLE)
from hdmole.errors import UserError
from hdmole.models import pretrained
from hdmole.models.speech_llm import SpeechLLM
from hdmole.models.whisper import Whisper

# in a model's folder: weights changed by full fine-tuning
FULL = Path("adapters", "full", "model.safetensors")
ACCENTS = "accents"  # in a model's folder: the accent recogniser that reads the layers of the encoder
FAMILIES: dict[str, Any] = {"speech_llm": SpeechLLM, "whisper": Whisper}  # by `model_type`


class ModelError(UserError):
    """A model that cannot be used, or lacks a method or accent. The codes begin with `model.`."""


def find_model(model: str | Path) -> Path:
    """The folder of a model: "demo", "real", a path, or the name of a repository on the Hugging Face hub.

    Raises ModelError if there is none.
    """
    if str(model) == "real":
        folder = Path(__file__).resolve().parents[2] / "assets" / "real"
        if not (folder / "config.json").is_file():
            sentence = "The model for real speakers is not here; run 'hdmole demo build --real', or give --model a folder."
            raise ModelError("model.no_real", sentence)
        return folder
    if str(model) == "demo":
        folder = Path(__file__).resolve().parents[2] / "assets" / "demo"
        if not (folder / "config.json").is_file():
            sentence = "The demo model is not here; run 'hdmole demo build', or give --model a folder or hub name."
            raise ModelError("model.no_demo", sentence)
        return folder
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            sentence = "The folder {folder} holds no config.json, so it is not a model; give the folder of a SpeechLLM."
            raise ModelError("model.no_config", sentence, folder=folder)
        return folder
    try:
        return Path(snapshot_download(str(model)))
    except Exception as error:  # offline, not found, no access: the hub has an error class for each
        raise ModelError(
            "model.not_found",
            "There is no folder {model}, and it could not be had from the Hugging Face hub ({reason}); "
            "check the name and the connection.",
            model=repr(model),
            reason=type(error).__name__,
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model's folder. Raises ModelError if it is of a family that is not known."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        sentence = "{file} is not valid JSON, so the model cannot be loaded."
        raise ModelError("model.config_not_json", sentence, file=folder / "config.json") from None
    if config.get("model_type") not in FAMILIES:
        raise ModelError(
            "model.other_type",
            "{folder} holds a {type} model; this tool transcribes with 'speech_llm' models "
            "(hdmole.models.speech_llm.SpeechLLM) and 'whisper' models. Other models can be adapted in Python with get_peft_model.",
            folder=folder,
            type=repr(config.get("model_type")),
        )
    return dict(config)


def weights_folder(folder: Path) -> Path:
    """Where base, tokenizer and feature extractor lie: in the model's folder, or in that of its pretrained base.

    Raises ModelError if the pretrained base is not on this machine.
    """
    name = read_config(folder).get("pretrained")
    if name is None:
        return folder
    found = pretrained.find(name)
    if found is None:
        sentence = "The model in {folder} builds on {name}, which is not on this machine; run 'hdmole models get {name}'."
        raise ModelError("model.no_pretrained", sentence, folder=folder.name, name=name)
    return found


def fetch_base(model: str | Path, report: Callable[[str], None]) -> None:
    """Download the pretrained base that a model builds on, if it is not on this machine.

    Args:
        model: as in `find_model`.
        report: called with a sentence before each step that takes long.

    Raises:
        ModelError: there is no such model.
        PretrainedError: the base is nowhere to be had.
    """
    name = read_config(find_model(model)).get("pretrained")
    if name is not None:
        pretrained.get(name, report=report)


def load_models(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load the models of all methods in a folder, ready to decode on `device`, by method name.

    Each method has a copy of the parts that its adapter changes. It shares the rest with the base.
    Methods and threads therefore do not interfere.

    Raises:
        ModelError: the folder holds another kind of model, or one whose parts do not fit each
            other.
    """
    config, weights = read_config(folder), weights_folder(folder)
    sizes = [config.get(part, {}).get("vocab_size") for part in ("audio_config", "text_config")]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ModelError(
            "model.two_vocabularies",
            "The CTC head of {folder} writes {ctc} tokens and its LLM {llm}; both need one vocabulary, as the words' "
            "times and the in-domain score come from comparing the two. Train the CTC head on the LLM's tokens.",
            folder=folder,
            ctc=sizes[0],
            llm=sizes[1],
        )
    if config.get("pretrained_sha256") not in (None, pretrained.digest(weights)):
        warnings.warn(
            f"The adapters in {folder} were trained on other weights of {config['pretrained']} than those in {weights}.",
            stacklevel=2,
        )
    loaded: Any = FAMILIES[config["model_type"]].from_pretrained(weights, dtype=torch.float32, use_safetensors=True)
    base: Any = loaded.eval().requires_grad_(False).to(device)
    models: dict[str, Any] = {"base": base}
    if (folder / "adapters" / "lora").is_dir():
        models["lora"] = _adapted(base, folder / "adapters" / "lora")
    if (folder / FULL).is_file():
        changed = load_file(folder / FULL)
        full: Any = _with_own(base, changed)
        full.load_state_dict(changed, strict=False)
        models["full"] = full.float().eval()
    if (folder / "adapters" / "hdmole").is_dir():
        adapted = _adapted(base, folder / "adapters" / "hdmole")
        if not adapted.base_model.hdmole_recogniser and not (folder / ACCENTS).is_dir():
            raise ModelError(
                "model.no_recogniser",
                "The HDMoLE adapter in {folder} carries no accent recogniser, so nothing says how to route; train it with "
                "HDMoLEConfig(recogniser=recogniser.arguments) and set_recogniser.",
                folder=folder,
            )
        models["hdmole"] = adapted
    return models


def _with_own(base: Any, changed: Iterable[str]) -> Any:
    """A copy of the model with its own parts wherever a name in `changed` lies; it shares all others."""
    own = {name[:k] for name in changed for k in range(len(name) + 1) if name[k : k + 1] in (".", "")}
    shared = {id(module): module for name, module in base.named_modules() if name and name not in own}
    return copy.deepcopy(base, shared)


def _adapted(base: Any, folder: Path) -> Any:
    """The base with a PEFT adapter. What the adapter changes is copied, the rest is shared."""
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would open a pickle in its place
        sentence = "The adapter in {folder} has no adapter_model.safetensors; save it with safe_serialization=True."
        raise ModelError("model.adapter_not_safe", sentence, folder=folder)
    config = PeftConfig.from_pretrained(str(folder))
    names = [n for n, _ in base.named_modules() if n]
    saved = set(getattr(config, "modules_to_save", None) or ())
    changed = [n for n in names if check_target_module_exists(config, n) or saved & set(n.split("."))]
    return PeftModel.from_pretrained(_with_own(base, changed), folder).eval()
