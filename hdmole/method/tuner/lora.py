"""From plain LoRA to HDMoLE (`warm_start`), and from a fixed mixture to LoRA (`export_lora`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from hdmole.method.gate import gates
from hdmole.method.tuner.layer import HDMoLELinear


def _layers(model: PeftModel, adapter_name: str) -> list[HDMoLELinear]:
    return [m for m in model.modules() if isinstance(m, HDMoLELinear) and adapter_name in m.hdmole_A]


def _one_rank(config: Any) -> None:
    """Raise ValueError if layers have ranks or scales of their own."""
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("An adapter with rank_pattern or alpha_pattern cannot be copied from or to a LoRA of one rank.")


@torch.no_grad()
def warm_start(model: PeftModel, loras: Mapping[str, str | Path], adapter_name: str = "default") -> None:
    """Copy the LoRA adapter of each accent into the expert of that accent.

    At a gate of 1 the expert then adds what the LoRA adds.

    Parameters
    ----------
    model : a PEFT model with an HDMoLE adapter
    loras : accent -> folder (or Hub id) of a PEFT LoRA adapter of rank r; the expert of an accent
        left out stays as it is
    adapter_name : name of the HDMoLE adapter

    Raises
    ------
    ValueError : an accent without an expert, an adapter that is not plain LoRA of rank r on the
        same modules
    """
    config: Any = model.peft_config[adapter_name]
    _one_rank(config)
    layers = {f"base_model.model.{layer.layer_name}": layer for layer in _layers(model, adapter_name)}
    for accent, source in loras.items():
        if accent not in config.accents:
            raise ValueError(f"There is no expert for accent {accent!r}; the experts are {', '.join(config.accents)}.")
        lora: Any = LoraConfig.from_pretrained(str(source))
        if lora.r != config.r or lora.use_dora or lora.bias != "none" or lora.rank_pattern or lora.alpha_pattern:
            raise ValueError(f"{source} is not a plain LoRA adapter (no DoRA, bias or patterns) of rank {config.r}.")
        state = load_file(_weights(source))
        if set(state) != {f"{name}.lora_{factor}.weight" for name in layers for factor in "AB"}:
            raise ValueError(f"{source} does not adapt the same modules: {', '.join(x.layer_name for x in layers.values())}.")
        scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r) / config.scale
        i = config.accents.index(accent)
        rows = slice(i * config.r, (i + 1) * config.r)
        for name, layer in layers.items():
            layer.hdmole_A[adapter_name][rows] = state[f"{name}.lora_A.weight"].to(layer.hdmole_A[adapter_name])
            layer.hdmole_B[adapter_name][:, rows] = scale * state[f"{name}.lora_B.weight"].to(layer.hdmole_B[adapter_name])


def _weights(source: str | Path) -> Path:
    """The file with the weights of an adapter in a folder or on the hub; never a pickle, which may
    hold code.
    """
    if not Path(source).is_dir():
        return Path(hf_hub_download(str(source), SAFETENSORS_WEIGHTS_NAME))
    file = Path(source) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{source} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with safe_serialization=True.")
    return file


@torch.no_grad()
def export_lora(model: PeftModel, posterior: Tensor, folder: str | Path, adapter_name: str = "default") -> None:
    """Write the mixture under a fixed posterior as one plain PEFT LoRA adapter of rank N * r.

    It can be served as any LoRA. This is possible where the gate is the same for all frames of an
    utterance: with routing="global", thresholds per layer and no shared expert.

    Parameters
    ----------
    model : a PEFT model with an HDMoLE adapter
    posterior : (N + 1,), accent posterior, the general domain first
    folder : where the LoRA adapter is written
    adapter_name : name of the HDMoLE adapter

    Raises
    ------
    ValueError : an adapter whose gate changes from frame to frame, or that trained modules in full;
        a posterior that is none
    """
    config: Any = model.peft_config[adapter_name]
    _one_rank(config)
    per_input = config.learned and config.threshold_parametrisation == "input"
    if config.routing != "global" or per_input or config.shared_expert_rank:
        raise ValueError(
            "Only an adapter with routing='global', thresholds per layer and no shared expert is one LoRA; this one's gate "
            "changes from frame to frame."
        )
    if config.modules_to_save:
        raise ValueError(
            f"The adapter also trained {', '.join(config.modules_to_save)} in full; a LoRA adapter of experts would lose that."
        )
    if posterior.shape != (config.experts + 1,) or not (posterior >= 0).all() or abs(float(posterior.sum()) - 1) > 1e-2:
        raise ValueError(f"The accent posterior is {config.experts + 1} probabilities that sum to 1, the general domain first.")
    state, layers = {}, _layers(model, adapter_name)
    for layer in layers:
        a, b = layer.hdmole_A[adapter_name], layer.hdmole_B[adapter_name]
        pi = posterior.to(a.device, torch.promote_types(a.dtype, torch.float32))
        fixed = gates(
            pi, torch.zeros_like(pi[1:]), *layer.thresholds(adapter_name, a), pi.new_tensor(0.5),
            thresholds=config.thresholds, k=config.top_k, p=config.top_p, routing="global", general_class=config.general_class,
        ).gate  # fmt: skip
        name = f"base_model.model.{layer.layer_name}"
        state[f"{name}.lora_A.weight"] = a.cpu().contiguous()
        state[f"{name}.lora_B.weight"] = (b * (config.scale * fixed.repeat_interleave(config.r)).to(b)).cpu().contiguous()
    folder, rank = Path(folder), config.experts * config.r
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layer.layer_name for layer in layers), inference_mode=True,
        task_type=config.task_type, base_model_name_or_path=config.base_model_name_or_path,
    ).save_pretrained(str(folder))  # fmt: skip
