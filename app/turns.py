"""Turns on the model, which all visitors share: who may work next, and where the others stand in
the queue.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hdmole.errors import UserError
from hdmole.settings import settings

HEAD_START = 5.0  # seconds by which short work goes before long work that has waited as long


class QueueError(UserError):
    """More work was asked for than is taken. The codes begin with `queue.`"""


@dataclass(eq=False)
class Ticket:
    """A wish for a turn, and what it is asked for: by whom, whether for long work, and since when."""

    visitor: str
    long: bool
    since: float = field(default_factory=time.monotonic)


class Turns:
    """A number of turns that are given out fairly.

    First come, first served. A visitor who holds a turn comes after those who hold none, and short
    work comes `HEAD_START` seconds before long work. Long work asks for a new turn after every
    segment, so that nobody waits for its end.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free, self._held = count, Counter[str]()
        self._waiting: list[Ticket] = []
        self._starts: dict[str, deque[float]] = {}  # visitor -> when tasks were started in the last minute
        self._changed = threading.Condition()
        self._seconds = 1.0  # that a turn lasted lately

    def admit(self, visitor: str) -> None:
        """Let a new task of a visitor in. Work that is no visitor's always comes in.

        Raises QueueError where more tasks wait, or were started by the visitor in the last minute,
        than the settings allow.
        """
        limits, now = settings(), time.monotonic()
        with self._changed:
            for name in [name for name, times in self._starts.items() if now - times[-1] > 60]:
                del self._starts[name]
            recent = deque(start for start in self._starts.get(visitor, ()) if now - start <= 60)
            if visitor and len(self._waiting) >= limits.waiting:
                raise QueueError("queue.full", "Too many people wait for the model; try again in a few minutes.")
            own = sum(ticket.visitor == visitor for ticket in self._waiting)
            if visitor and (own >= limits.waiting_of_one or len(recent) >= limits.starts_a_minute):
                raise QueueError("queue.too_many", "You have started too much at once; wait a minute and try again.")
            self._starts[visitor] = deque([*recent, now])

    def take(self, ticket: Ticket, stopped: Callable[[], bool], told: Callable[[int, float], None]) -> bool:
        """Wait for a turn. False if `stopped` became true before there was one.

        While it waits, `told` is called with the place in the queue, from 1, and with the seconds
        that this will last by what turns lasted lately.
        """
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not (self._free and self._order()[0] is ticket):
                    if stopped():
                        return False
                    place = self._order().index(ticket) + 1
                    told(place, place * self._seconds / self.count)
                    self._changed.wait(0.2)
                if stopped():
                    return False
                self._free -= 1
                self._held[ticket.visitor] += 1
                return True
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give(self, ticket: Ticket, seconds: float) -> None:
        """Give the turn of `ticket` back, which lasted so many seconds."""
        with self._changed:
            self._free += 1
            self._held[ticket.visitor] -= 1
            self._held += Counter()  # without those who hold none
            self._seconds += 0.2 * (seconds - self._seconds)
            self._changed.notify_all()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def _order(self) -> list[Ticket]:
        return sorted(self._waiting, key=lambda t: (self._held[t.visitor], t.since + HEAD_START * t.long))
