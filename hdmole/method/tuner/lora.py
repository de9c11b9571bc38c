"""From plain LoRA to HDMoLE (`warm_start`), and from one fixed posterior to LoRA (`export_lora`)."""

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
from torch.nn import functional

from hdmole.method.gate import among_accents, entropy
from hdmole.method.gate import gates as gates_of
from hdmole.method.tuner.config import HDMoLEConfig
from hdmole.method.tuner.layer import HDMoLELinear


def _layers(model: PeftModel, adapter_name: str) -> list[HDMoLELinear]:
    return [m for m in model.modules() if isinstance(m, HDMoLELinear) and adapter_name in m.hdmole_A]


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
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("An adapter with rank_pattern or alpha_pattern cannot be started from LoRAs of one rank.")
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


def one_gate(config: HDMoLEConfig) -> bool:
    """Whether all frames of an utterance have one gate, so that the adapter is a LoRA there."""
    per_input = config.learned and config.threshold_parametrisation == "input"
    return config.routing == "global" and not per_input


@torch.no_grad()
def export_lora(
    model: PeftModel,
    posterior: Tensor,
    folder: str | Path,
    adapter_name: str = "default",
    gates: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the mixture under a fixed posterior as one plain PEFT LoRA adapter.

    Its rank is N * r, and that of the shared expert if there is one. It can be served as any LoRA.
    Where all frames of an utterance have one gate (`one_gate`), it is equal to the adapter. Where
    the gate changes from frame to frame, as in the paper's method, no LoRA is equal to the adapter.
    `gates` then says what gate each layer has instead. Layers of a lower rank than others are
    filled up with zeros, because many engines want one rank.

    Parameters
    ----------
    model : a PEFT model with an HDMoLE adapter
    posterior : (N + 1,), accent posterior, the general domain first
    folder : where the LoRA adapter is written
    adapter_name : name of the HDMoLE adapter
    gates : name of a layer -> the gate (N,) that all its frames get, such as the mean of its gate
        in a trace; without it the gate is that of the posterior

    Raises
    ------
    ValueError : an adapter whose gate changes from frame to frame, without `gates` for every layer;
        one that trained modules in full; a posterior that is none
    """
    config: Any = model.peft_config[adapter_name]
    layers = _layers(model, adapter_name)
    if gates is None and not one_gate(config):
        raise ValueError(
            "This adapter's gate changes from frame to frame, so no LoRA is equal to it. Only one with routing='global' and "
            "thresholds per layer is one LoRA; for an approximation give gates, one for each layer."
        )
    if gates is not None and (missing := [layer.layer_name for layer in layers if layer.layer_name not in gates]):
        raise ValueError(f"There is no gate for the layer {missing[0]}; give one for each layer.")
    if config.modules_to_save:
        raise ValueError(
            f"The adapter also trained {', '.join(config.modules_to_save)} in full; a LoRA adapter of experts would lose that."
        )
    if posterior.shape != (config.experts + 1,) or not (posterior >= 0).all() or abs(float(posterior.sum()) - 1) > 1e-2:
        raise ValueError(f"The accent posterior is {config.experts + 1} probabilities that sum to 1, the general domain first.")
    state = {}
    rank = max(layer.configs[adapter_name].r for layer in layers) * config.experts + config.shared_expert_rank
    for layer in layers:
        own, a, b = layer.configs[adapter_name], layer.hdmole_A[adapter_name], layer.hdmole_B[adapter_name]
        pi = posterior.to(a.device, torch.promote_types(a.dtype, torch.float32))
        if gates is None:
            found = gates_of(
                pi, torch.zeros_like(pi[1:]), *layer.thresholds(adapter_name, a), pi.new_tensor(0.5),
                thresholds=own.thresholds, k=own.top_k, p=own.top_p, routing="global", general_class=own.general_class,
            ).gate  # fmt: skip
        else:
            found = gates[layer.layer_name].to(pi)
        weights = found.repeat_interleave(own.r)
        if own.shared_expert_rank:
            mass = 1 - pi[0] if own.general_class else torch.ones_like(pi[0])
            weight = mass if own.shared_expert_weight == "mass" else entropy(among_accents(pi))
            weights = torch.cat([weights, weight.expand(own.shared_expert_rank)])
            a, b = torch.cat([a, layer.hdmole_shared_A[adapter_name]]), torch.cat([b, layer.hdmole_shared_B[adapter_name]], 1)
        b = b * (own.scale * weights).to(b)
        name, rest = f"base_model.model.{layer.layer_name}", rank - len(a)
        state[f"{name}.lora_A.weight"] = functional.pad(a, (0, 0, 0, rest)).cpu().contiguous()
        state[f"{name}.lora_B.weight"] = functional.pad(b, (0, rest)).cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layer.layer_name for layer in layers), inference_mode=True,
        task_type=config.task_type, base_model_name_or_path=config.base_model_name_or_path,
    ).save_pretrained(str(folder))  # fmt: skip
