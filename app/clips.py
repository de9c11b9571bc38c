"""The visitors' own recordings, kept for a while so that the address of a page leads back to them.

They stay in memory. Only those who have the address can open one.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace

from app.jobs import Utterance
from hdmole.settings import settings

KEPT = 3600.0  # seconds after its last use for which a recording is kept
MOST_BYTES = settings().kept_mb * 1e6  # of all recordings; beyond it, the one that was used longest ago goes first

_clips: dict[str, tuple[Utterance, float]] = {}  # key -> recording and its last use; the last used comes last
_lock = threading.Lock()


def keep(chosen: Utterance) -> Utterance:
    """Keep a recording. Returns it with the key that opens it."""
    clip = replace(chosen, clip=secrets.token_urlsafe(12))
    with _lock:
        _clips[clip.clip] = clip, time.monotonic()
        _forget()
    return clip


def find(key: str) -> Utterance | None:
    """The recording of this key, which is then kept from now on.

    None if it is not, or no longer, kept.
    """
    with _lock:
        _forget()
        if key not in _clips:
            return None
        clip, _ = _clips.pop(key)
        _clips[key] = clip, time.monotonic()
        return clip


def forget_old() -> None:
    """Forget the recordings that were used long ago, also while nobody gives or asks for one."""
    with _lock:
        _forget()


def _forget() -> None:
    now = time.monotonic()
    for key in [key for key, (_, used) in _clips.items() if now - used > KEPT]:
        del _clips[key]
    while len(_clips) > 1 and sum(len(clip.data) for clip, _ in _clips.values()) > MOST_BYTES:
        del _clips[next(iter(_clips))]
