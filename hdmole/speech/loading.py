"""Model folders: finding them, checking what they hold, and loading the models of all methods."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from hdmole.errors import UserError
from hdmole.files import write_text
from hdmole.method.tuner import HDMoLEModel  # the import makes PEFT know HDMoLE
from hdmole.models import pretrained
from hdmole.models.family import FAMILIES, family
from hdmole.speech.domain import SCORE, DomainScorer

ASSETS = Path(__file__).resolve().parents[2] / "assets"  # of the repository
# in a model's folder: weights changed by full fine-tuning
FULL = Path("adapters", "full", "model.safetensors")
ACCENTS = "accents"  # in a model's folder: the accent recogniser that reads the layers of the encoder
PROJECTOR = "multi_modal_projector"
# folder of a method -> PEFT's name of the kind of adapter that it holds
KINDS = {"lora": "LORA", "hdmole": "HDMOLE", "hdmole-extended": "HDMOLE"}
SUMS = "SHA256SUMS"  # in a released folder: the SHA-256 sums of the files that are loaded, in the form of `sha256sum`
# what a folder with a base must hold: one file of each row
NEEDED = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"),
)
# what is downloaded of a repository on the hub: no pickles, no code, and no second copy of the
# weights
FROM_HUB = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors", "adapters/**/*.safetensors", "accents/*"]

_INCOMPLETE = "The model folder {folder} has no {files}; copy the whole folder."


class ModelError(UserError):
    """A model that cannot be used, or lacks a method or accent. The codes begin with `model.`."""


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: "demo", "real", a path, or the name of a repository on the Hugging
    Face hub.

    Of a repository, config.json is read first, and nothing else is downloaded if its family is not
    known. `revision` is a branch, tag or commit of the repository.

    Raises ModelError if there is no such model, or if its family is not known.
    """
    if str(model) == "real":
        folder = ASSETS / "real"
        if not (folder / "config.json").is_file():
            sentence = "The model for real speakers is not here; run 'hdmole demo build --real', or give --model a folder."
            raise ModelError("model.no_real", sentence)
        return folder
    if str(model) == "demo":
        folder = ASSETS / "demo"
        if not (folder / "config.json").is_file():
            sentence = "The demo model is not here; run 'hdmole demo build', or give --model a folder or hub name."
            raise ModelError("model.no_demo", sentence)
        return folder
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            sentence = "The folder {folder} holds no config.json, so it is not a model; give the folder of a model."
            raise ModelError("model.no_config", sentence, folder=folder)
        return folder
    try:
        read_config(Path(hf_hub_download(str(model), "config.json", revision=revision)).parent)
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=FROM_HUB))
    except ModelError:
        raise
    except Exception as error:  # offline, not found, no access: the hub has an error class for each
        raise ModelError(
            "model.not_found",
            "There is no folder {model}, and it could not be had from the Hugging Face hub ({reason}); "
            "check the name and the connection.",
            model=repr(model),
            reason=type(error).__name__,
        ) from None


def write_sums(folder: Path) -> Path:
    """Write the SHA-256 sums of all files of a model that are loaded, and return the file that
    holds them.
    """
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.suffix in (".json", ".safetensors")]
    kept = sorted(name.as_posix() for name in names if name.parts[0] not in ("results", "samples"))
    write_text(folder / SUMS, "".join(f"{_sum(folder / name)}  {name}\n" for name in kept))
    return folder / SUMS


def check_sums(folder: Path) -> None:
    """Raise ModelError if a file is not the one whose sum `write_sums` wrote.

    Folders without sums are not checked.
    """
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise ModelError("model.incomplete", _INCOMPLETE, folder=folder, files=name)
        if _sum(folder / name) != digest:
            raise ModelError(
                "model.other_sum",
                "{file} is not the file that was released, by its SHA-256 sum; copy the model's folder again. If you have changed it "
                "yourself, run 'hdmole demo sums --model {folder}'.",
                file=folder / name,
                folder=folder,
            )


def _sum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model's folder.

    Raises ModelError if it is of a family that is not known.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        sentence = "{file} is not valid JSON, so the model cannot be loaded."
        raise ModelError("model.config_not_json", sentence, file=folder / "config.json") from None
    if config.get("model_type") not in FAMILIES:
        raise ModelError(
            "model.other_type",
            "{folder} holds a {type} model; the families that are known are {families}. To add one, copy "
            "hdmole/models/glm_asr.py, change it, and name it in hdmole/models/family.py. In Python, get_peft_model adapts "
            "any model.",
            folder=folder,
            type=repr(config.get("model_type")),
            families=", ".join(FAMILIES),
        )
    return dict(config)


def weights_folder(folder: Path) -> Path:
    """Where base, tokenizer and feature extractor lie: in the model's folder, or in that of its
    pretrained base.

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


def fetch_base(model: str | Path, report: Callable[[str], None], revision: str | None = None) -> None:
    """Download the pretrained base that a model builds on, if it is not on this machine.

    Args:
        model, revision: as in `find_model`.
        report: called with a sentence before each step that takes long.

    Raises:
        ModelError: there is no such model.
        PretrainedError: the base is nowhere to be had.
    """
    name = read_config(find_model(model, revision)).get("pretrained")
    if name is not None:
        pretrained.get(name, report=report)


def load_models(folder: Path, device: torch.device, adapters: Sequence[Path] = ()) -> dict[str, Any]:
    """Load the models of all methods in a folder, ready to decode on `device`, by method name.

    The methods are the frozen base, full fine-tuning, and one for each PEFT adapter in the folder's
    `adapters` and in the list `adapters`, under the name of its folder. Each has a copy of the
    parts that it changes, and shares the rest. Methods and threads therefore do not interfere.

    Raises:
        ModelError: the folder holds another kind of model, or one whose parts do not fit each
            other.
    """
    config, weights = read_config(folder), weights_folder(folder)
    sizes = [config.get(part, {}).get("vocab_size") for part in ("audio_config", "text_config")]
    if config["model_type"] == "speech_llm" and None not in sizes and sizes[0] != sizes[1]:
        raise ModelError(
            "model.two_vocabularies",
            "The CTC head of {folder} writes {ctc} tokens and its LLM {llm}; both need one vocabulary, as the words' "
            "times and the in-domain score come from comparing the two. Train the CTC head on the LLM's tokens.",
            folder=folder,
            ctc=sizes[0],
            llm=sizes[1],
        )
    if missing := [names[0] for names in NEEDED if not any((weights / name).is_file() for name in names)]:
        raise ModelError("model.incomplete", _INCOMPLETE, folder=weights, files=", ".join(missing))
    if (weights / "adapter_config.json").is_file():  # transformers would put it into the base, from a pickle if need be
        raise ModelError(
            "model.adapter_in_base",
            "The model folder {folder} holds an adapter_config.json beside the base; put each adapter into a folder of its own in "
            "{folder}/adapters.",
            folder=weights,
        )
    known = config.get("pretrained_sha256")
    if known is not None and known != pretrained.digest(weights):
        warnings.warn(
            f"The adapters in {folder} were trained on other weights of {config['pretrained']} than those in {weights}.",
            stacklevel=2,
        )
    check_sums(folder)
    base = _base(weights, family(config["model_type"])).to(device)
    models: dict[str, Any] = {"base": base}
    if (folder / FULL).is_file():
        models["full"] = _changed(base, folder / FULL)
    experts: set[tuple[str, ...]] = set()
    inside = [adapter for adapter in sorted((folder / "adapters").glob("[!.]*/")) if adapter.name not in ("base", "full")]
    for adapter in [*inside, *(Path(adapter).resolve() for adapter in adapters)]:
        if adapter.name in models:
            sentence = "Two adapters have the name {name}; rename the folder {folder}, as the name is that of the method."
            raise ModelError("model.adapter_twice", sentence, name=repr(adapter.name), folder=adapter)
        models[adapter.name] = found = adapted(base, adapter, KINDS.get(adapter.name) if adapter in inside else None)
        if not isinstance(found.base_model, HDMoLEModel):
            continue
        if not found.base_model.hdmole_recogniser and not (folder / ACCENTS).is_dir():
            raise ModelError(
                "model.no_recogniser",
                "The HDMoLE adapter in {folder} carries no accent recogniser, so nothing says how to route; train it with "
                "HDMoLEConfig(recogniser=recogniser.arguments) and set_recogniser.",
                folder=adapter,
            )
        experts.add(tuple(found.peft_config["default"].accents))
    if len(experts) > 1:
        raise ModelError(
            "model.different_experts",
            "The HDMoLE adapters in {folder} have experts of different accents; train them with the same accents in the same "
            "order, or keep one of them.",
            folder=folder,
        )
    return models


def load_scores(folder: Path, adapters: Sequence[Path] = ()) -> dict[str, DomainScorer]:
    """The in-domain scores of a model, by method: that of the base lies in the model's folder, that
    of an adapter in the adapter's.
    """
    known = {"base": folder} | {at.name: at for at in [*(folder / "adapters").glob("[!.]*/"), *(a.resolve() for a in adapters)]}
    return {method: DomainScorer.load(at / SCORE) for method, at in known.items() if (at / SCORE).is_file()}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder of weights.

    It has an end token, if only the model's configuration names one.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        end = GenerationConfig.from_pretrained(folder).eos_token_id
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end[0] if isinstance(end, list) else end)
    return tokenizer


def _base(folder: Path, family: Any) -> Any:
    """The base in float32, without gradients.

    Raises ModelError if the weights do not fit the configuration.
    """
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # transformers would print a table of what does not fit
    try:
        loaded, found = family.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        transformers_logging.set_verbosity(shown)
    sizes = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in found["mismatched_keys"]}
    _fits(folder, set(found["missing_keys"]) - set(sizes), found["unexpected_keys"], sizes)
    base = loaded.eval().requires_grad_(False)
    _numbers(folder, base.state_dict())
    return base


def load_adapter(base: Any, folder: Path) -> Any:
    """The base, which is changed in place, with a PEFT adapter that this library has trained, ready
    for decoding.

    Raises ModelError if the folder has no weights in safetensors.
    """
    _safe(folder)
    return PeftModel.from_pretrained(base, folder).eval()


def _safe(folder: Path) -> None:
    """Raise ModelError if an adapter has no weights in safetensors.

    PEFT would open a pickle in their place.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        sentence = "The adapter in {folder} has no adapter_model.safetensors; save it with safe_serialization=True."
        raise ModelError("model.adapter_not_safe", sentence, folder=folder)


def _changed(base: Any, file: Path) -> Any:
    """The base with the weights that full fine-tuning changed.

    Raises ModelError if they do not fit the base, or if a layer lacks weights that others have.
    """
    weights, own = load_file(file), base.state_dict()
    sizes = {
        key: (tuple(w.shape), tuple(own[key].shape)) for key, w in weights.items() if key in own and w.shape != own[key].shape
    }
    layers, kinds = {_layer(key) for key in weights}, {_kind(key) for key in weights}
    wanted = {key for key in own if _layer(key) in layers and _kind(key) in kinds}
    _fits(file.parent, wanted - set(weights), set(weights) - set(own), sizes)
    if not weights:
        raise ModelError("model.no_weights", "{file} holds no weights; copy the whole model folder.", file=file)
    _numbers(file.parent, weights)
    model = _with_own(base, weights)
    model.load_state_dict(weights, strict=False)
    return model.float().eval()


def _layer(key: str) -> str:
    """The layer that a weight belongs to, such as `encoder.layers.3`; the projector counts as one."""
    return PROJECTOR if key.startswith(PROJECTOR) else re.split(r"(?<=\.\d)\.|(?<=\.\d\d)\.", key, maxsplit=1)[0]


def _kind(key: str) -> str:
    """The name of a weight within its layer; all those of the projector are of one kind."""
    return PROJECTOR if key.startswith(PROJECTOR) else key.removeprefix(_layer(key))


def _fits(folder: Path, missing: Collection[str], unknown: Collection[str], sizes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ModelError if weights in a folder are missing, unknown or of another size.

    It says how many, and names one.
    """
    if missing or unknown or sizes:
        name = min([*(missing or unknown), *sizes])
        raise ModelError(
            "model.other_weights",
            "The weights in {folder} are of another model: {missing} too few, {unknown} too many and {other} of another size, such as "
            "{name}; copy this model's folder again.",
            folder=folder, missing=len(missing), unknown=len(unknown), other=len(sizes),
            name=name if name not in sizes else f"{name}: {sizes[name][0]}, not {sizes[name][1]}",
        )  # fmt: skip


def _numbers(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            sentence = "The weights in {folder} are damaged: {name} holds values that are no numbers; copy the folder again."
            raise ModelError("model.not_numbers", sentence, folder=folder, name=key)


def _with_own(base: Any, changed: Iterable[str]) -> Any:
    """A copy of the model with its own parts wherever a name in `changed` lies; it shares all
    others.
    """
    own = {name[:k] for name in changed for k in range(len(name) + 1) if name[k : k + 1] in (".", "")}
    shared = {id(module): module for name, module in base.named_modules() if name and name not in own}
    return copy.deepcopy(base, shared)


def adapted(base: Any, folder: Path, kind: str | None = None) -> Any:
    """The base with a PEFT adapter. What the adapter changes is copied, the rest is shared.

    Raises ModelError if the adapter is not of the given kind, or if its weights do not fit the
    base.
    """
    _safe(folder)
    config: Any = PeftConfig.from_pretrained(str(folder))
    if kind is not None and config.peft_type != kind:
        sentence = "The adapter in {folder} is of the kind {found}, not {kind}; put each adapter into the folder of its method."
        found_kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelError("model.other_adapter", sentence, folder=folder, found=found_kind, kind=kind)
    names = [n for n, _ in base.named_modules() if n]
    saved = set(getattr(config, "modules_to_save", None) or ())
    changed = [n for n in names if check_target_module_exists(config, n) or saved & set(n.split("."))]
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT warns if the base lies in another folder than in training
    model: Any = get_peft_model(_with_own(base, changed), config)
    weights = load_file(folder / "adapter_model.safetensors")
    _numbers(folder, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of other sizes, which are refused below
        try:
            found = model.load_adapter(str(folder), "default", ignore_mismatched_sizes=True)
        except KeyError as error:  # PEFT's way to say that a module to save is not there
            missing, unknown = {str(error.args[0])}, set()
        else:
            missing, unknown = {key.replace(".default", "", 1) for key in found.missing_keys}, set(found.unexpected_keys)
    own = model.state_dict()
    sizes = {}
    for key in missing & set(weights):
        ours = next((value for name, value in own.items() if name.replace(".default", "", 1) == key), None)
        if ours is not None:
            sizes[key] = tuple(weights[key].shape), tuple(ours.shape)
    _fits(folder, missing - set(sizes), unknown, sizes)
    return model.eval()
