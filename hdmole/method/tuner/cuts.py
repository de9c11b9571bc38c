"""Modules that change the first axis of what they get, before layers within them see it.

* A mixture-of-experts block flattens (B, T, d) to (B * T, d) for its shared expert, and the
  Q-Former of Granite Speech gets blocks of frames. A hook on the module notes it in the routing of
  the call.
* The queries of that Q-Former and the padding of Gemma 3n are one row for all utterances. A hook
  gives each utterance a copy, so that each can be routed by its own accent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from hdmole.method.routing import current

_COPIED = {"Blip2QFormerModel": "query_embeds", "Gemma3nMultimodalEmbedder": "input_ids"}


def _parts(module: nn.Module, frames: int) -> int | None:
    """Into how many rows a module cuts a row of so many frames; None for a module that cuts none."""
    if hasattr(module, "experts"):
        return frames
    if type(module).__name__ == "GraniteSpeechEncoderProjector":
        return -(-frames // int(module.window_size))  # type: ignore[arg-type]
    return None


def _tell(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook of the module `name`: its cut goes into the routing, one row to all."""
    routing, x = current().routing, args[0] if args else kwargs.get("hidden_states")
    if routing is None:
        return args, kwargs
    if isinstance(x, Tensor) and x.dim() > 2 and (parts := _parts(module, x.shape[1])) is not None:
        routing.cuts[name] = x.shape[0], parts
    copied = _COPIED.get(type(module).__name__, "")
    one, blocks = kwargs.get(copied), kwargs.get("encoder_hidden_states")
    if one is not None and len(one) == 1 and len(routing.posterior) > 1:
        rows = len(routing.posterior) * routing.beams if blocks is None else len(blocks)
        return args, {**kwargs, copied: one.expand(rows, *one.shape[1:])}
    return args, kwargs


def watch(model: nn.Module, layers: list[str]) -> Iterator[Any]:
    """Put the hook on every such module that has one of the `layers` within it.

    Gives the handles by which the hooks are removed.
    """
    for name, module in model.named_modules():
        known = type(module).__name__ in _COPIED or _parts(module, 1) is not None
        if known and any(layer.startswith(f"{name}.") for layer in layers):
            yield module.register_forward_pre_hook(partial(_tell, name), with_kwargs=True)
