"""Jobs of the app: they stop when they are cancelled, and what is done is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from driver import cards, said, session, settle, wait_until, wav
from streamlit.testing.v1 import AppTest

from app import jobs
from app.cards import so_far_html
from app.jobs import Job, Utterance
from app.turns import Turns
from hdmole.speech.asr import ASR
from hdmole.speech.audio import Audio


class SlowASR:
    """Stands for a model whose every method takes a while, and one of which fails."""

    methods, routed = ("base", "lora", "full", "hdmole"), ["hdmole"]

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def segments(self, audio: object, between: Callable[[], None]) -> list[object]:
        return []

    def transcribe(self, audio: object, method: str, **options: object) -> SimpleNamespace:
        time.sleep(0.2)
        if method == self.fails:
            raise RuntimeError("out of memory")
        return SimpleNamespace(text=method, trace=None, encoded=[])


def test_a_cancelled_job_stops_and_keeps_what_is_done() -> None:
    job = Job(SlowASR(), Utterance("a.wav", wav()))
    wait_until(lambda: job.transcripts)
    job.cancel()
    job.wait(5)
    assert not job.running and 1 <= len(job.transcripts) < 4
    further = job.again()
    further.wait(20)
    assert len(further.transcripts) == 4 and all(further.transcripts[m] is done for m, done in job.transcripts.items())


def test_who_came_first_is_done_first_and_a_long_clip_lets_a_short_one_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three visitors, one turn: the first two give clips of two seconds, the third came before them with one of twenty."""
    ended: list[str] = []

    class Counting(SlowASR):
        def transcribe(self, audio: Audio, method: str, **options: object) -> SimpleNamespace:
            time.sleep(0.05)
            if method == "hdmole":
                ended.append(audio.source)
            return SimpleNamespace(text=method, trace=None, encoded=[])

    monkeypatch.setattr(jobs, "TURNS", Turns(1))
    monkeypatch.setattr(jobs, "session_id", lambda: f"visitor {len(tasks)}")
    monkeypatch.setattr(jobs, "session_open", lambda name: True)
    tasks: list[Job] = []
    for name, seconds in (("long", 20.0), ("first", 2.0), ("second", 2.0)):
        tasks.append(Job(Counting(), Utterance(name, wav(seconds))))
        wait_until(lambda: tasks[-1].audio is not None)
    for task in tasks:
        task.wait(60)
    assert ended == ["first", "second", "long"]


def test_cancelling_on_the_page_says_so_and_can_be_taken_back(
    open_app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = open_app()
    go, real = threading.Event(), ASR.transcribe
    monkeypatch.setattr(
        ASR, "transcribe", lambda *args, **options: (options["method"] == "base" or go.wait(60)) and real(*args, **options)
    )
    at.selectbox(key="sample_choice").set_value("scottish_1").run()
    job = session(at).jobs[session(at).utterance.key]
    wait_until(lambda: job.transcripts)
    at.button(key="cancel").click().run()
    go.set()
    settle(at)
    assert any("Cancelled" in info.value for info in at.info)
    assert "not transcribed" in cards(at)
    settle(at.button(key="again").click().run())
    assert "not transcribed" not in cards(at) and not at.info


def test_a_long_recording_can_be_cancelled_inside_a_method() -> None:
    class Long(SlowASR):
        def transcribe(
            self,
            audio: object,
            method: str,
            *,
            progress: Callable[[float], None],
            heard: Callable[[list[object]], None],
            **options: object,
        ) -> SimpleNamespace:
            for k in range(1000):
                time.sleep(0.01)
                heard(said(*["<one>"] * (k + 1)))
                progress(k / 1000)
            return SimpleNamespace(text=method, trace=None, encoded=[])

    job = Job(Long(), Utterance("a.wav", wav()))
    wait_until(lambda: job.progress >= 0.21)
    assert job.listening == "base" and len(job.heard) > 40
    shown = so_far_html(job.heard)  # the last words, as text
    assert shown.startswith("… &lt;one&gt; ") and shown.count("one") == 40 and so_far_html([]) == ""
    job.cancel()
    job.wait(2)
    assert not job.running and not job.transcripts and not job.error


def test_a_failing_method_loses_nothing_that_was_done_before() -> None:
    job = Job(SlowASR(fails="full"), Utterance("a.wav", wav()))
    job.wait(20)
    assert list(job.transcripts) == ["base", "lora"]
    assert "a.wav" in job.error and "out of memory" in job.error


def test_stretches_meet_where_the_recording_was_cut() -> None:
    heard = [(-0.08, 6.16), (5.92, 4.16), (12.0, 2.0)]  # cut in speech at 6.0 s; sound to 10.0 s, and from 12.08 s on
    job = Job(SlowASR(), Utterance("a.wav", wav(14.0)))
    job.wait(20)
    job.encoded = [SimpleNamespace(offset=offset, seconds=seconds) for offset, seconds in heard]
    assert np.allclose(job.segments, [(0.0, 6.0), (6.0, 11.04), (11.04, 14.0)])
