"""Ending work inside a model: between its layers, and so between two tokens as well.

A segment of half a minute takes a large model many seconds. Whoever gave the work to a thread may
not want it any more, and then need not wait for the segment's end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_thread = threading.local()


class Cancelled(Exception):
    """The work is not wanted any more. What is done is kept."""


@contextmanager
def asking(wanted: Callable[[], None]) -> Iterator[None]:
    """In the block, `wanted` is called in this thread before each layer of the models of an `ASR`,
    and while a file is decoded.

    It raises an error, such as `Cancelled`, to end the work. Other threads that use the same models
    go on.
    """
    before = getattr(_thread, "wanted", None)
    _thread.wanted = wanted
    try:
        yield
    finally:
        _thread.wanted = before


def make_stoppable(models: Iterable[Any]) -> None:
    """Let the layers of these models, and what writes their tokens, ask whether to go on.

    Layers are what stands in a `nn.ModuleList`. What models share is prepared once.
    """
    from torch import nn  # reading a file does without it

    found: dict[int, nn.Module] = {}
    for model in models:
        layers = [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]
        # the decoder of Whisper calls the parts of its layers, and then this
        writes = model.get_output_embeddings()
        found |= {id(module): module for module in [*layers, *([] if writes is None else [writes])]}
    for module in found.values():
        module.register_forward_pre_hook(_ask)


def ask() -> None:
    """Raise what `wanted` of this thread's innermost block raises. Outside of one nothing happens."""
    wanted: Callable[[], None] | None = getattr(_thread, "wanted", None)
    if wanted is not None:
        wanted()


def _ask(module: nn.Module, inputs: Any) -> None:
    ask()
