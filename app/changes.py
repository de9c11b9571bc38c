"""The changes of routing on the page Thresholds: undone, taken back at once, and pinned to compare.

A change is kept as the page's address says it: name -> text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app import links, texts
from app.session import session
from app.texts import Text, t

if TYPE_CHECKING:
    from hdmole.speech.transcript import Transcript

CHOICES = {"dynamic": Text("Thresholds"), "top_k": "Top-k", "top_p": "Top-p", "dense": Text("All")}
_MOST_PINS = 4


@dataclass(frozen=True)
class Pin:
    """A trial that the visitor keeps: what was changed, what was heard, and how likely the words
    were.
    """

    change: dict[str, str]
    transcript: Transcript
    times: float  # how many times as likely the words as trained became, per word


def apply(address: Mapping[str, str]) -> None:
    """Show the change of this address of the page, as if the visitor had opened it."""
    session().thresholds.clear()
    links.reset(**address)


def remember(address: dict[str, str], of: tuple[str, str]) -> None:
    """Add the page's address to those of the utterance and the adapter, `of`, to which one can go
    back.
    """
    kept = session()
    if kept.changes_in != of:
        kept.changes, kept.pins, kept.changes_in = [], [], of
    if not kept.changes or kept.changes[-1] != address:
        kept.changes.append(address)


def undo() -> None:
    """Go back to the change before the present one."""
    kept = session()
    del kept.changes[-1:]
    if kept.changes:
        apply(kept.changes[-1])


def pin(kept: Pin) -> None:
    """Keep a trial beside the others. The oldest one goes if there are too many."""
    pins = session().pins
    if all(other.change != kept.change for other in pins):
        pins.append(kept)
        del pins[:-_MOST_PINS]


def described(change: Mapping[str, str]) -> str:
    """A change in a few words, such as "global threshold 0.3, without Indian"."""
    parts = []
    for name, value in change.items():
        names = links.names_in(value)
        if name == "choose":
            parts.append(t(CHOICES[value]))
        elif name in _SAID:
            parts.append(t(_SAID[name], value=value))
        elif name in _LISTED:
            parts.append(t(_LISTED[name], names=_joined(texts.layer(n) if name == "layers" else texts.accent(n) for n in names)))
    return t(", ").join(parts)


_SAID = {
    "tau_global": Text("global threshold {value}"),
    "tau_local": Text("local threshold {value}"),
    "k": Text("{value} experts"),
    "p": Text("weight {value}"),
}
_LISTED = {
    "accent": Text("as if {names}"),
    "mask": Text("without {names}"),
    "force": Text("only {names}"),
    "layers": Text("at {names}"),
}


def _joined(names: Iterable[str]) -> str:
    return t(", ").join(names)
