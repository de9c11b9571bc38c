"""`HDMoLEModel`: the PEFT tuner that puts HDMoLE layers into a model and routes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file
from torch import Tensor, nn

from hdmole.recogniser import AccentRecogniser
from hdmole.routing import Routing, RoutingError, current, use
from hdmole.tuner.config import HDMoLEConfig
from hdmole.tuner.layer import HDMoLELinear

_ROUTING_ARGUMENTS = ("accent_posterior", "utterance_rows")
_MASKS = ("attention_mask", "input_features_mask", "feature_attention_mask")


def _strip(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: the routing arguments are for the adapter, the model itself never sees them."""
    return args, {k: v for k, v in kwargs.items() if k not in _ROUTING_ARGUMENTS}


class HDMoLEModel(BaseTuner):
    """The tuner behind `get_peft_model(model, HDMoLEConfig(...))`.

    A call is routed by the first of these there is: `accent_posterior` (U, N + 1), with `utterance_rows` where rows are
    not utterances, given to `forward`; a `hdmole.route(...)` block around it; the adapter's own accent recogniser, which
    reads `input_features` once per call of `forward` or `generate`.
    """

    prefix = "hdmole_"
    tuner_layer_cls = HDMoLELinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _pre_injection_hook(self, model: nn.Module, config: HDMoLEConfig, adapter_name: str) -> None:  # type: ignore[override]
        if "hdmole_recogniser" not in self._modules:
            self.hdmole_recogniser = nn.ModuleDict()
            model.register_forward_pre_hook(_strip, with_kwargs=True)
        if config.recogniser is not None and adapter_name not in self.hdmole_recogniser:
            recogniser = AccentRecogniser(**config.recogniser)
            if len(recogniser.labels) != config.experts + 1:
                raise ValueError(
                    f"The accent recogniser knows {len(recogniser.labels)} classes; {config.experts} experts need "
                    f"{config.experts + 1}, the general domain first."
                )
            self.hdmole_recogniser[adapter_name] = recogniser.requires_grad_(False).eval()

    def _create_and_replace(  # type: ignore[override]
        self, config: HDMoLEConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, HDMoLELinear):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"HDMoLE adapts nn.Linear modules; {current_key!r} is a {type(target).__name__}. Change target_modules."
            )
        layer = HDMoLELinear(target, adapter_name, config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        self.hdmole_recogniser.requires_grad_(False)

    def train(self, mode: bool = True) -> HDMoLEModel:
        super().train(mode)
        self.hdmole_recogniser.eval()  # frozen: never dropout, in training neither
        return self

    def set_recogniser(self, recogniser: AccentRecogniser, adapter_name: str = "default") -> None:
        """Copy a trained recogniser's weights into the adapter.

        Raises ValueError where the adapter has no recogniser (HDMoLEConfig.recogniser).
        """
        if adapter_name not in self.hdmole_recogniser:
            raise ValueError(
                f"Adapter {adapter_name!r} has no accent recogniser; give HDMoLEConfig(recogniser=recogniser.arguments)."
            )
        self.hdmole_recogniser[adapter_name].load_state_dict(recogniser.state_dict())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every `forward` and `generate` of the PEFT model: find out the accent, once."""
        beams = max(int(kwargs.get("num_beams") or 1), 1)
        context = current()
        posterior = kwargs.get("accent_posterior")
        if posterior is not None:
            routing = Routing(posterior.detach(), kwargs.get("utterance_rows"), beams)
        elif context.routing is not None:
            routing = replace(context.routing, beams=beams) if beams > 1 else context.routing
        else:
            found = self.recognise(args, kwargs)
            if found is None:
                yield  # a layer that runs will say what is missing
                return
            routing = Routing(found, kwargs.get("utterance_rows"), beams)
        with use(replace(context, routing=routing)):
            yield

    def recognise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The active adapter's accent posterior (U, N + 1) from `input_features`; None without recogniser or features."""
        name = self.active_adapters[0] if self.active_adapters else ""
        features = kwargs.get("input_features")
        if features is None and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            features = args[0]
        if name not in self.hdmole_recogniser or features is None:
            return None
        recogniser: Any = self.hdmole_recogniser[name]
        time = 1 if recogniser.arguments["feature_layout"] == "time_first" else 2
        candidates = [kwargs.get(m) for m in _MASKS] + [a for a in args[1:] if isinstance(a, Tensor)]
        mask = next((m for m in candidates if m is not None and m.shape == (features.shape[0], features.shape[time])), None)
        return recogniser.posterior(features, mask)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        self.merge_adapter()
        return self

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        next(m for m in self.model.modules() if isinstance(m, HDMoLELinear)).merge()


def export_lora(model: PeftModel, posterior: Tensor, folder: str | Path, adapter_name: str = "default") -> None:
    """Write the mixture under a fixed posterior (N + 1,) as one plain PEFT LoRA adapter of rank N * r.

    Only for routing="global" without a shared expert, where the gate is one for the whole utterance; any engine that
    serves LoRA can serve the result. Raises ValueError otherwise.
    """
    config: Any = model.peft_config[adapter_name]
    if config.routing != "global" or config.threshold_parametrisation != "layer" or config.shared_expert_rank:
        raise ValueError(
            "Only an adapter with routing='global', thresholds per layer and no shared expert is one LoRA; this one's gate "
            "changes from frame to frame."
        )
    from hdmole import gate as method

    state = {}
    for layer in model.modules():
        if isinstance(layer, HDMoLELinear):
            tau_global, tau_local = layer.thresholds(adapter_name, None)
            fixed = method.gates(
                posterior.float(), torch.zeros(config.experts), tau_global, tau_local, torch.tensor(0.5),
                thresholds=config.thresholds, k=config.top_k, p=config.top_p, routing="global", general_class=config.general_class,
            ).gate  # fmt: skip
            name = f"base_model.model.{layer.layer_name}"
            b = layer.hdmole_B[adapter_name] * (config.scale * fixed.repeat_interleave(config.r)).to(layer.hdmole_B[adapter_name])
            state[f"{name}.lora_A.weight"] = layer.hdmole_A[adapter_name].detach().contiguous()
            state[f"{name}.lora_B.weight"] = b.detach().contiguous()
    rank = config.experts * config.r
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    targets = sorted(layer.layer_name for layer in model.modules() if isinstance(layer, HDMoLELinear))
    LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, inference_mode=True).save_pretrained(str(folder))


__all__ = ["HDMoLEModel", "RoutingError", "export_lora"]
