"""Model folders: finding them, checking what they hold, and loading the models of all methods."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file

import hdmole.method.tuner  # noqa: F401  (makes PEFT know HDMoLE)
from hdmole.errors import UserError
from hdmole.models.speech_llm import SpeechLLM

# in a model's folder: weights changed by full fine-tuning
FULL = Path("adapters", "full", "model.safetensors")


class ModelError(UserError):
    """A model that cannot be used, or lacks a method or accent. The codes begin with `model.`."""


def find_model(model: str | Path) -> Path:
    """The folder of a model: "demo", a path, or the name of a repository on the Hugging Face hub.

    Raises ModelError if there is none.
    """
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


def load_models(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load the models of all methods in a folder, ready to decode on `device`, by method name.

    Each method has a copy of the projector and of whatever else its adapter changes. It shares the
    rest with the base. Methods and threads therefore do not interfere.

    Raises:
        ModelError: the folder holds another kind of model, or one whose parts do not fit each
            other.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        sentence = "{file} is not valid JSON, so the model cannot be loaded."
        raise ModelError("model.config_not_json", sentence, file=folder / "config.json") from None
    if config.get("model_type") != "speech_llm":
        raise ModelError(
            "model.other_type",
            "{folder} holds a {type} model; this tool transcribes with 'speech_llm' models "
            "(hdmole.models.speech_llm.SpeechLLM). Other models can be adapted in Python with get_peft_model.",
            folder=folder,
            type=repr(config.get("model_type")),
        )
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
    loaded: Any = SpeechLLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    base: SpeechLLM = loaded.eval().requires_grad_(False).to(device)
    models: dict[str, Any] = {"base": base}
    if (folder / "adapters" / "lora").is_dir():
        models["lora"] = _adapted(base, folder / "adapters" / "lora")
    if (folder / FULL).is_file():
        weights = load_file(folder / FULL)
        full: Any = _with_own(base, weights)
        full.load_state_dict(weights, strict=False)
        models["full"] = full.float().eval()
    if (folder / "adapters" / "hdmole").is_dir():
        adapted = _adapted(base, folder / "adapters" / "hdmole")
        if not adapted.base_model.hdmole_recogniser:
            raise ModelError(
                "model.no_recogniser",
                "The HDMoLE adapter in {folder} carries no accent recogniser, so nothing says how to route; train it with "
                "HDMoLEConfig(recogniser=recogniser.arguments) and set_recogniser.",
                folder=folder,
            )
        models["hdmole"] = adapted
    return models


def _with_own(base: SpeechLLM, changed: Iterable[str]) -> SpeechLLM:
    """A copy of the model with its own projector and parts that hold a name in `changed`.

    It shares all other parts with the model.
    """
    parts = {"multi_modal_projector", *(name.split(".")[0] for name in changed)}
    model = copy.copy(base)
    model._modules = dict(base._modules)
    model._forward_pre_hooks = copy.copy(base._forward_pre_hooks)
    model._forward_pre_hooks_with_kwargs = copy.copy(base._forward_pre_hooks_with_kwargs)
    for part in parts & set(base._modules):
        model._modules[part] = copy.deepcopy(base._modules[part])
    return model


def _adapted(base: SpeechLLM, folder: Path) -> Any:
    """The base with a PEFT adapter. What the adapter changes is copied, the rest is shared."""
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would open a pickle in its place
        sentence = "The adapter in {folder} has no adapter_model.safetensors; save it with safe_serialization=True."
        raise ModelError("model.adapter_not_safe", sentence, folder=folder)
    config = PeftConfig.from_pretrained(str(folder))
    names = [n for n, _ in base.named_modules() if n]
    saved = set(getattr(config, "modules_to_save", None) or ())
    changed = [n for n in names if check_target_module_exists(config, n) or saved & set(n.split("."))]
    return PeftModel.from_pretrained(_with_own(base, changed), folder).eval()
