"""`HDMoLEModel`: the PEFT tuner that puts HDMoLE layers into a model and routes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hdmole.method.prompts import owners, pooled
from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.routing import Context, Routing, RoutingError, checkpoint_contexts, current, set_current, use
from hdmole.method.tuner.config import HDMoLEConfig
from hdmole.method.tuner.cuts import watch
from hdmole.method.tuner.layer import HDMoLELinear

_ROUTING_ARGUMENTS = ("accent_posterior", "utterance_rows")
_RECOGNISER = "base_model.hdmole_recogniser."
_KEEP_ROUTING = {"use_reentrant": False, "context_fn": checkpoint_contexts}
_MASKS = ("input_features_mask", "feature_attention_mask", "attention_mask")


def _features(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The features of a call: `input_features`, or the first argument unless it is token ids."""
    features: Tensor | None = kwargs.get("input_features")
    return args[0] if features is None and args and isinstance(args[0], Tensor) and args[0].is_floating_point() else features


def _begin(tuner: Any, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook that removes the routing arguments, which the model does not know.

    A model without PEFT's wrapper around it (`inject_adapter_in_model`) is routed by them here.
    """
    context = current()
    if not context.within:
        set_current(replace(tuner.routed(args, kwargs, wrapped=False), outer=context, entered=tuner))
    return args, {k: v for k, v in kwargs.items() if k not in _ROUTING_ARGUMENTS}


def _end(tuner: Any, _module: nn.Module, _args: Any, _output: Any) -> None:
    """A forward hook that ends what `_begin` began."""
    context = current()
    if context.entered is tuner and context.outer is not None:
        set_current(context.outer)


def generate(model: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `generate`, without the routing arguments.

    The layers are told how many beams an utterance has.
    """
    context = current()
    if not context.within:
        context = tuner.routed(args, kwargs, wrapped=False)
    kwargs = {k: v for k, v in kwargs.items() if k not in _ROUTING_ARGUMENTS}
    asked = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    beams = max(int(kwargs.get(k) or getattr(asked, k, None) or 1) for k in ("num_beams", "num_return_sequences"))
    if context.routing is not None and beams > 1:
        context = replace(context, routing=replace(context.routing, beams=beams))
    with use(context):
        return type(model).generate(model, *args, **kwargs)


def _each_alone(model: Any, _tuner: Any, **kwargs: Any) -> Any:
    """Whisper's step over one window of each sound of a batch, one sound after the other.

    The batch holds the sounds that go on, and then those of them that are decoded again at a higher
    temperature. Only Whisper's own code knows which they are.
    """
    context, sounds, conditions = current(), kwargs["batch_idx_map"], kwargs["do_condition_on_prev_tokens"]
    if context.routing is None:
        return type(model).generate_with_fallback(model, **kwargs)
    found, copies = [], len(kwargs["seek"]) // len(context.routing.posterior)
    for i, sound in enumerate(sounds):
        for recorder in context.recorders:
            recorder.begin({"encoder": int(kwargs["seek"][sound]) // 2})  # two mel frames make one
        one = {k: _only(kwargs[k], i, len(sounds)) for k in ("segment_input", "decoder_input_ids")}
        own = {k: _only(v, i, len(sounds)) for k, v in kwargs["kwargs"].items()}
        changed = {"cur_bsz": 1, "batch_size": 1, "batch_idx_map": [sound], "do_condition_on_prev_tokens": [conditions[i]]}
        routing = replace(context.routing, rows=torch.tensor([sound // copies]))
        with use(replace(context, routing=routing)):
            found.append(type(model).generate_with_fallback(model, **{**kwargs, **one, **changed, "kwargs": own}))
        conditions[i] = found[-1][3][0]
    sequences, outputs, skipped = ([step[k][0] for step in found] for k in range(3))
    return sequences, outputs, skipped, conditions, found[0][4]


def _only(value: Any, i: int, count: int) -> Any:
    """Row `i` of a tensor or list with `count` rows; anything else as it is."""
    return value[i : i + 1] if isinstance(value, Tensor | list) and len(value) == count else value


def _checkpoint(model: Any, _tuner: Any, how: Any = None, *args: Any, **kwargs: Any) -> None:
    """The model's own checkpointing; the recomputation sees the routing of the forward pass."""
    type(model)._activation_checkpointing_enable(model, {**(how or {}), **_KEEP_ROUTING}, *args, **kwargs)


# methods of transformers' models that have to know of the routing
_METHODS: dict[str, Callable[..., Any]] = {
    "generate": generate, "generate_with_fallback": _each_alone, "_activation_checkpointing_enable": _checkpoint,
}  # fmt: skip


class HDMoLEModel(BaseTuner):
    """The tuner behind `get_peft_model(model, HDMoLEConfig(...))`.

    A call is routed by the first of these that is there:

    1. `accent_posterior` (U, N + 1), given to `forward` or `generate`, with `utterance_rows` where
       rows are not utterances;
    2. a `hdmole.route(...)` block around the call;
    3. the adapter's own accent recogniser, which reads `input_features` once for each call.

    `set_adapter` and `disable_adapter` are PEFT's own and change the model for every thread. For
    one thread alone, `hdmole.intervene(model, accent="general")` gives the frozen base, if
    `general_class` is on and `modules_to_save` empty.
    """

    prefix = "hdmole_"
    tuner_layer_cls = HDMoLELinear
    # where target_modules is None
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _pre_injection_hook(self, model: nn.Module, config: HDMoLEConfig, adapter_name: str) -> None:  # type: ignore[override]
        self.hdmole_recogniser = nn.ModuleDict()
        self._handles = [
            model.register_forward_pre_hook(partial(_begin, self), with_kwargs=True),
            model.register_forward_hook(partial(_end, self), always_call=True),
        ]
        self._watched: list[Any] = []
        for module in model.modules():
            for name, own in _METHODS.items():
                if hasattr(type(module), name) and (module is model or name.startswith("_")):
                    setattr(module, name, partial(own, module, self))
        # it was switched on before the adapter was added
        if getattr(model, "is_activation_checkpointing", False):
            model.activation_checkpointing_enable()  # type: ignore[operator]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the adapter's recogniser, then its layers.

        PEFT calls this for the first adapter and for every further one.
        """
        config: Any = self.peft_config[adapter_name]
        if config.recogniser is not None and adapter_name not in self.hdmole_recogniser:
            recogniser = AccentRecogniser(**config.recogniser).requires_grad_(False).eval()
            # under low_cpu_mem_usage the weights are empty
            device, empty = next(model.parameters()).device, recogniser.output.weight.is_meta
            self.hdmole_recogniser[adapter_name] = recogniser if empty else recogniser.to(device)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for handle in self._watched:
            handle.remove()
        self._watched = list(watch(model, [m.layer_name for m in model.modules() if isinstance(m, HDMoLELinear)]))

    def unload(self) -> nn.Module:
        """The model without adapters, and without what this tuner has put into it."""
        model = super().unload()
        for handle in (*self._handles, *self._watched):
            handle.remove()
        for module in model.modules():
            for name in _METHODS:
                module.__dict__.pop(name, None)
        return model

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None:
        """Move the recogniser to the device of the model.

        Under `low_cpu_mem_usage` PEFT leaves its weights on the device that they were read to.
        """
        if adapter_name in self.hdmole_recogniser:
            self.hdmole_recogniser[adapter_name].to(next(self.model.parameters()).device)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Also take the adapter's name out of the recogniser's keys.

        These keys hold it in the middle, where PEFT does not look for it.
        """
        return super()._remove_adapter_name_from_key(key.replace(f"{_RECOGNISER}{adapter_name}.", _RECOGNISER, 1), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Read older files too, with scalars, and the adapter's name in the recogniser's keys."""
        scalars = ("hdmole_accent", "hdmole_lambda")
        state_dict = {key: value.reshape(1) if key.endswith(scalars) else value for key, value in state_dict.items()}
        if config.recogniser is not None:
            own = AccentRecogniser(**config.recogniser).state_dict()
            state_dict = {
                _RECOGNISER + rest.partition(".")[2] if key.startswith(_RECOGNISER) and (rest := key.removeprefix(_RECOGNISER)) not in own
                else key: value
                for key, value in state_dict.items()
            }  # fmt: skip
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _create_and_replace(  # type: ignore[override]
        self, config: HDMoLEConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        ranks, alphas = config.rank_pattern, config.alpha_pattern
        if ranks or alphas:
            rank = ranks.get(get_pattern_key(list(ranks), current_key), config.r)
            config = replace(config, r=rank, alpha=alphas.get(get_pattern_key(list(alphas), current_key), config.alpha))
        if isinstance(target, HDMoLELinear):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
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
        """Switch the model to training mode or out of it. The recogniser is never in it."""
        super().train(mode)
        self.hdmole_recogniser.eval()  # it is frozen, so it has no dropout in training
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its recogniser."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.hdmole_recogniser:
            del self.hdmole_recogniser[adapter_name]

    def set_recogniser(self, recogniser: AccentRecogniser, adapter_name: str = "default") -> None:
        """Copy a trained recogniser's weights into the adapter.

        Raises ValueError if the adapter has no recogniser (HDMoLEConfig.recogniser), or one of
        other labels or features.
        """
        if adapter_name not in self.hdmole_recogniser:
            raise ValueError(
                f"Adapter {adapter_name!r} has no accent recogniser; give HDMoLEConfig(recogniser=recogniser.arguments)."
            )
        mine: Any = self.hdmole_recogniser[adapter_name]
        for what in ("labels", "n_mels", "channels", "feature_layout", "layers"):
            own, given = mine.arguments.get(what), recogniser.arguments.get(what)
            if own != given:
                raise ValueError(
                    f"The adapter's recogniser has {what} {own}, the given one {given}; "
                    "give HDMoLEConfig(recogniser=recogniser.arguments)."
                )
        mine.load_state_dict(recogniser.state_dict())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Recognise the accent once. PEFT opens this block around a `forward` or `generate`."""
        with use(self.routed(args, kwargs)):
            yield

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any], wrapped: bool = True) -> Context:
        """The context of a call of the model with these arguments.

        `wrapped` says whether PEFT's model is around this one. Without it nobody has loaded the
        recogniser, so it is not asked. Without routing, the first layer that runs says what is
        missing. Raises ValueError for arguments by which PEFT would choose adapters by row.
        """
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"HDMoLE does not take {name}: one adapter serves all rows. Call set_adapter and run each adapter's rows apart."
                )
        context = replace(current(), within=True)
        cache = kwargs.get("past_key_values")
        if cache is None or (hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0):
            for recorder in context.recorders:
                recorder.begin()
        posterior, unmasked = kwargs.get("accent_posterior"), False
        if posterior is None and context.routing is None and wrapped:
            posterior, unmasked = self.recognise(args, kwargs), self._mask(args, kwargs) is None
        if posterior is not None:
            context = replace(context, routing=Routing(posterior.detach(), kwargs.get("utterance_rows"), unmasked=unmasked))
        if context.routing is not None and context.routing.rows is None and len(context.routing.posterior) > 1:
            rows = self._rows_of_windows(args, kwargs)
            context = replace(context, routing=replace(context.routing, rows=rows)) if rows else context
        return context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward.

        PEFT's models for a task do not pass `attention_mask` to the block above. If it arrives
        here, the accent is recognised again with it.
        """
        context = current()
        if context.routing is not None and context.routing.unmasked and self._mask(args, kwargs) is not None:
            posterior = self.recognise(args, kwargs)
            assert posterior is not None
            with use(replace(context, routing=replace(context.routing, posterior=posterior.detach(), unmasked=False))):
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def recognise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Accent posterior (U, N + 1) from `input_features`, by the active adapter's recogniser.

        None if either is missing. A recogniser that reads encoder layers gets them from the model's
        `encoder_layers(input_features, attention_mask)`, without any adapter.

        Raises ValueError if the model has no such method but the recogniser needs it.
        """
        recogniser, features, mask = self._recogniser, _features(args, kwargs), self._mask(args, kwargs)
        if recogniser is None or features is None:
            return None
        other = kwargs.get("input_features_mask")
        if mask is None and other is not None and len(features) > 1:
            raise RoutingError(
                f"The mask of the features counts {other.shape[-1]} audio tokens and not their frames, so the accent recogniser would "
                "hear padding; give one utterance at a time, or accent_posterior."
            )
        if recogniser.layers:
            if not hasattr(self.model, "encoder_layers"):
                raise ValueError(
                    "The adapter's accent recogniser reads encoder layers, but this model has no method encoder_layers to give them."
                )
            mask = features.new_ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
            with torch.no_grad(), use(replace(current(), frozen=True)):
                features, mask = self.model.encoder_layers(features, mask)
        posterior: Tensor = recogniser.posterior(features, mask)
        owner = self._owners(features, kwargs)
        if owner is None:
            return posterior
        frames = features.new_ones(len(features)) if mask is None else mask.sum(1)
        return pooled(posterior, owner, frames, len(kwargs["input_ids"]))

    def _owners(self, features: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The prompt (W,) of each window of `features` (W, ...); None for a model without audio
        tokens.

        Raises RoutingError where the prompts' audio tokens do not tell it.
        """
        ids, audio = kwargs.get("input_ids"), getattr(getattr(self.model, "config", None), "audio_token_id", None)
        if ids is None or audio is None or not len(features) or torch.compiler.is_compiling():
            return None
        tokens = (ids == audio).sum(1)
        if not int(tokens.sum()):
            return None
        masks = (kwargs.get(name) for name in _MASKS[:2])
        lengths = next((m.sum(1) for m in masks if m is not None and len(m) == len(features)), None)
        found = owners(tokens, len(features), lengths)
        if found is None:
            raise RoutingError(
                f"{len(features)} windows of audio belong to {len(ids)} prompts, and their audio tokens do not tell which to which; "
                "give accent_posterior, one row a prompt, and utterance_rows for the layers that see windows."
            )
        return found

    def _rows_of_windows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """`utterance_rows` for the parts that see windows of audio; empty where each prompt has one
        window.
        """
        features, core = _features(args, kwargs), getattr(self.model, "model", self.model)
        parts = [
            name
            for name, _ in core.named_children()
            if name not in ("language_model", "lm_head", "layers", "embed_tokens", "norm")
        ]
        layers = [m.layer_name for m in self.model.modules() if isinstance(m, HDMoLELinear)]
        if features is None or not any(part in layer for part in parts for layer in layers):
            return {}
        owner = self._owners(features, kwargs)
        if owner is None or torch.equal(owner, torch.arange(len(kwargs["input_ids"]), device=owner.device)):
            return {}
        return dict.fromkeys(parts, owner)

    @property
    def _recogniser(self) -> Any:
        """The active adapter's accent recogniser; None if it has none."""
        name = self.active_adapters[0] if self.active_adapters else ""
        return dict(self.hdmole_recogniser.items()).get(name)

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The mask (U, T) of the given features, false on padding; None if there is none."""
        recogniser, features = self._recogniser, _features(args, kwargs)
        if recogniser is None or features is None:
            return None
        time = 1 if recogniser.arguments["feature_layout"] == "time_first" else 2
        # the mask of the text may have the same length by chance
        masks = _MASKS if kwargs.get("input_ids") is None else _MASKS[:2]
        candidates = [kwargs.get(m) for m in masks] + [a for a in args[1:] if isinstance(a, Tensor)]
        return next((m for m in candidates if m is not None and m.shape == (features.shape[0], features.shape[time])), None)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Always raises ValueError; see `HDMoLELinear.merge`."""
        self.merge_adapter()
        return self

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ValueError; see `HDMoLELinear.merge`."""
        next(m for m in self.model.modules() if isinstance(m, HDMoLELinear)).merge()
