"""The queue for the model: who comes next, the place that is told, work that ends with its tab."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from driver import wait_until
from tiny import speech_like

from app import jobs
from app.turns import HEAD_START, Ticket, Turns
from hdmole.speech.asr import ASR
from hdmole.speech.audio import Audio
from hdmole.speech.decoding import Encoded


def served(turns: Turns, held: list[Ticket], *waiting: Ticket) -> list[Ticket]:
    """The order in which waiting tickets get the one turn that `held` gives back."""
    order: list[Ticket] = []

    def work(ticket: Ticket) -> None:
        assert turns.take(ticket, lambda: False, lambda place, seconds: None)
        order.append(ticket)
        turns.give(ticket, 0.0)

    threads = [threading.Thread(target=work, args=(ticket,)) for ticket in waiting]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(turns._waiting) == len(waiting))
    for ticket in held:
        turns.give(ticket, 0.0)
    for thread in threads:
        thread.join(10)
    return order


def taken(turns: Turns, *tickets: Ticket) -> list[Ticket]:
    for ticket in tickets:
        assert turns.take(ticket, lambda: False, lambda place, seconds: None)
    return list(tickets)


def test_first_come_first_served_also_against_work_that_asks_again() -> None:
    """What works takes a new ticket after every segment, and stands behind those who came before it did."""
    turns, now = Turns(1), time.monotonic()
    first, second, again = Ticket("a", False, now - 2), Ticket("b", False, now - 1), Ticket("c", False, now)
    assert served(turns, taken(turns, Ticket("c", False, now - 9)), again, second, first) == [first, second, again]


def test_short_work_goes_first_but_not_for_ever() -> None:
    turns, now = Turns(1), time.monotonic()
    long, short = Ticket("a", True, now - HEAD_START + 1), Ticket("b", False, now)
    assert served(turns, taken(turns, Ticket("x", False)), long, short) == [short, long]
    older = Ticket("a", True, now - HEAD_START - 1)
    assert served(turns, taken(turns, Ticket("x", False)), short, older) == [older, short]


def test_a_visitor_with_a_turn_comes_after_those_without() -> None:
    turns, now = Turns(2), time.monotonic()
    one, other = taken(turns, Ticket("a", False), Ticket("b", False))
    more, new = Ticket("a", False, now - 9), Ticket("c", False, now)
    assert served(turns, [other], more, new) == [new, more]
    turns.give(one, 0.0)


def test_the_place_and_the_time_are_told_and_stopping_ends_the_wait() -> None:
    turns, said = Turns(1), list[tuple[int, float]]()
    (held,) = taken(turns, Ticket("a", False))
    turns.give(held, 6.0)  # a turn lasted 1 s by default, now 1 + 0.2 (6 - 1) = 2 s
    taken(turns, held)
    before = threading.Thread(
        target=turns.take, args=(Ticket("b", False, 0.0), lambda: len(said) > 1, lambda place, seconds: None)
    )
    before.start()
    wait_until(lambda: turns.wanted)
    assert not turns.take(Ticket("c", False), lambda: len(said) > 0, lambda place, seconds: said.append((place, seconds)))
    assert said == [(2, 4.0)]
    said.append((0, 0.0))
    before.join(10)
    assert not turns.wanted and not before.is_alive()


def slow(asr: ASR, audio: object, between: Callable[[], None]) -> Iterator[Encoded]:
    """`ASR.segments` that looks for speech for a hundred seconds."""
    for _ in range(1000):
        time.sleep(0.1)
        between()
    yield from ()


def test_the_work_of_a_closed_tab_ends(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "session_id", lambda: "one")
    monkeypatch.setattr(jobs, "session_open", lambda name: False)
    monkeypatch.setattr(jobs.Job, "patience", 0.2)
    long = Audio(np.zeros(120 * 16_000, np.float32), 120.0, "a.wav", "wav", "pcm_s16le", 16_000, 1, 0.0)
    monkeypatch.setattr(jobs, "decode", lambda data, name, max_seconds: long)
    monkeypatch.setattr(ASR, "segments", slow)
    task = jobs.Job(ASR.load(tiny_model), jobs.Utterance("a.wav", b"1"))
    task.wait(60)
    assert not task.running and task.cancelled and not task.error and not task.transcripts
    assert not jobs.TURNS.wanted and jobs.TURNS._free == jobs.TURNS.count


def test_cancelling_and_closing_a_tab_end_the_work_inside_a_segment(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer takes 0.2 s, so that a method needs many seconds for the only segment."""
    sound = Audio(speech_like(3.0), 3.0, "a.wav", "wav", "pcm_s16le", 16_000, 1, 0.0)
    monkeypatch.setattr(jobs, "decode", lambda data, name, max_seconds: sound)
    monkeypatch.setattr(jobs, "session_id", lambda: "one")
    open_tabs = {"one"}
    monkeypatch.setattr(jobs, "session_open", open_tabs.__contains__)
    asr, began = ASR.load(tiny_model), threading.Event()
    real = asr.models["base"].language_model.model.layers[0].forward

    def slow_layer(*given: object, **options: object) -> object:
        began.set()
        time.sleep(0.2)
        return real(*given, **options)

    monkeypatch.setattr(asr.models["base"].language_model.model.layers[0], "forward", slow_layer)
    for end, seconds in ((lambda task: task.cancel(), 2), (lambda task: open_tabs.clear(), jobs.Job.patience + 2)):
        began.clear()
        task = jobs.Job(asr, jobs.Utterance("a.wav", b"1"))
        assert began.wait(60)
        ended = time.monotonic()
        end(task)
        task.wait(60)
        assert time.monotonic() - ended < seconds
        assert not task.running and task.cancelled and not task.error and not task.transcripts
    assert jobs.TURNS._free == jobs.TURNS.count
