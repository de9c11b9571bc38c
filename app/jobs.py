"""The work of one session that must not run in Streamlit's script thread.

* A `Job` transcribes an utterance by every method. A `Trial` does it once more by HDMoLE with
  changed routing. A `Worth` measures what each expert was worth. `app.corpus` judges methods on
  many recordings.
* Each task has its own thread, which a page polls.
* After an error or a cancel, the results so far can still be read.
* The thread never calls Streamlit. Its messages are `Text`, which a page translates.
* All sessions share the model. `TURNS` limits the tasks that run at once to half of the machine's
  cores, and lets them work in turn. The work of a tab that was closed ends.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from app.access import hide_folders, plain
from app.session import session_id, session_open
from app.texts import Text, without_folders
from app.turns import Ticket, Turns
from hdmole.errors import UserError
from hdmole.names import method_label
from hdmole.settings import settings
from hdmole.speech.audio import Audio, decode
from hdmole.speech.stopping import Cancelled, asking

if TYPE_CHECKING:
    from hdmole.method.tuner import HDMoLEConfig
    from hdmole.speech.asr import ASR
    from hdmole.speech.decoding import Encoded, Word
    from hdmole.speech.transcript import Transcript

LONGEST = settings().seconds  # of audio that the app accepts
LONG = 30.0  # seconds; longer audio is long work, which comes after short work
TURNS = Turns(settings().turns or max(1, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True)
class Utterance:
    """What the visitor chose to transcribe: the file's content, and what is known about it."""

    name: str
    data: bytes
    reference: str = ""
    accent: str = ""
    sample: str = ""  # name of the sample, if it is one of the model's
    clip: str = ""  # the key under which `app.clips` keeps it, if it is the visitor's

    @property
    def stem(self) -> str:
        """The file's name without its extension, for the names of downloads."""
        return Path(self.name).stem

    @cached_property
    def key(self) -> str:
        """A digest of the content, under which its results are stored."""
        return sha256(self.data).hexdigest()[:16]


class Task:
    """What all tasks share: the thread, its turn on the model, cancelling and errors.

    Attributes:
        name: name of what is worked on, for the sentence of an error.
        patience: seconds for which the work goes on after its tab was closed. A connection that
            was lost for a moment is back by then.
        error: what went wrong, in a sentence; empty if nothing did.
        step: what is being done.
    """

    patience = 3.0

    def __init__(self, asr: ASR, name: str) -> None:
        self.name = name
        self.error: str = ""
        self.step: str = Text("Waiting for a free turn on the model")
        self.long = False  # whether it is long work
        self._since = time.monotonic()  # by which short work has its place in the queue
        self._visitor, self._gone_since = session_id(), 0.0
        self._asr, self._stop = asr, threading.Event()
        self._share = 0.0  # share of the running step that is done
        self._ticket: Ticket | None = None  # while it holds a turn
        self._began = 0.0  # when the turn began
        self._thread = threading.Thread(target=self._run, name="transcribe", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1."""
        return self._share

    def cancel(self) -> None:
        """Stop before the next layer of the model. What is done stays."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Wait until the work has ended, for at most so many seconds."""
        self._thread.join(seconds)

    def _advance(self, share: float) -> None:
        self._share = share
        if share < 1:  # a step that has just ended is kept
            self._go_on()
        self._let_others()

    def _go_on(self) -> None:
        """Raise Cancelled if the work is not wanted any more: cancelled, or its tab was closed."""
        if self._closed():
            self.cancel()
        if self.cancelled:
            raise Cancelled

    def _let_others(self) -> None:
        """Give the turn to those who wait, between two segments or recordings."""
        if TURNS.wanted:
            step = self.step
            self._end_turn()
            self._take_turn()
            self.step = step

    def _take_turn(self) -> None:
        """Wait for a turn on the model, or until the task is cancelled."""
        ticket = Ticket(self._visitor, self.long, time.monotonic() if self.long else self._since)
        if TURNS.take(ticket, lambda: self.cancelled or self._closed(), self._told):
            self._ticket, self._began = ticket, time.monotonic()
        else:
            self.cancel()

    def _told(self, place: int, seconds: float) -> None:
        self.step = Text("Place {place} in the queue, about {seconds} s", place=place, seconds=max(1, round(seconds)))

    def _end_turn(self) -> None:
        if self._ticket is not None:
            TURNS.give(self._ticket, time.monotonic() - self._began)
            self._ticket = None

    def _closed(self) -> bool:
        """Whether the visitor's tab has been closed for longer than a page takes to load again."""
        return self._closed_for() > self.patience

    def _closed_for(self) -> float:
        """Seconds since it was first seen that the visitor's tab is closed; 0 if it is open."""
        if session_open(self._visitor):
            self._gone_since = 0.0
        elif not self._gone_since:
            self._gone_since = time.monotonic()
        return time.monotonic() - self._gone_since if self._gone_since else 0.0

    def _run(self) -> None:
        try:
            TURNS.admit(self._visitor)
            self._take_turn()
            with asking(self._go_on):
                self._go_on()
                self._work()
        except Cancelled:
            pass
        except UserError as error:
            self.error = Text(error.sentence, **without_folders(error))
        except Exception as error:  # no error in here may break the page
            reason = plain(hide_folders(str(error)) or type(error).__name__)
            self.error = Text("The transcription of {name} failed: {reason}", name=plain(self.name), reason=reason)
        finally:
            self._end_turn()

    def _work(self) -> None:
        raise NotImplementedError


class Job(Task):
    """Transcribes `utterance` by every method of `asr`. It starts at once.

    If a job `stopped` is given, it continues from there.
    """

    def __init__(self, asr: ASR, utterance: Utterance, stopped: Job | None = None) -> None:
        self.methods = list(asr.methods)
        self.audio: Audio | None = stopped.audio if stopped else None
        self.encoded: list[Encoded] | None = stopped.encoded if stopped else None
        # method -> transcript
        self.transcripts: dict[str, Transcript] = dict(stopped.transcripts) if stopped else {}
        # what the method that is listening has heard so far
        self.heard: list[Word] = []
        self._tables: dict[tuple[str, int], pd.DataFrame] = {}
        self.utterance = utterance
        super().__init__(asr, utterance.name)

    def again(self) -> Job:
        """A new job that continues from where this one ended."""
        return Job(self._asr, self.utterance, self)

    @property
    def progress(self) -> float:
        return ((self.audio is not None) + len(self.transcripts) + self._share) / (1 + len(self.methods))

    @property
    def segments(self) -> list[tuple[float, float]]:
        """Start and end in seconds of the stretches that the audio was cut into.

        Short audio is one stretch. Two stretches meet in the middle between the sound of the one
        and that of the other. The quiet around them may reach across, up to
        `hdmole.speech.segments.MARGIN` seconds.
        """
        if self.audio is None or not self.encoded:
            return []
        middles = [(one.offset + one.seconds + other.offset) / 2 for one, other in pairwise(self.encoded)]
        return list(pairwise([0.0, *middles, self.audio.seconds]))

    @property
    def judged(self) -> Transcript | None:
        """The transcript whose in-domain score counts: that of the default method, else the first."""
        return self.transcripts.get(self._asr.default) or next(iter(self.transcripts.values()), None)

    def gate(self, method: str) -> HDMoLEConfig | None:
        """The configuration of an HDMoLE adapter; None if the method is none."""
        return self._asr.gate(method) if method in self._asr.routed else None

    def routing(self, method: str, segment: int = 0) -> pd.DataFrame | None:
        """Tidy trace of an HDMoLE adapter in one stretch of the audio.

        None if the method is no HDMoLE adapter, or has not finished.
        """
        trace = self.transcripts[method].trace if method in self.transcripts else None
        if trace is not None and (method, segment) not in self._tables:
            # the table of a whole long recording is too large
            self._tables = {(method, segment): trace.of_segment(segment).to_frame()}
        return self._tables.get((method, segment))

    def _work(self) -> None:
        self.step = Text("Reading the audio")
        self.audio = audio = self.audio or decode(self.utterance.data, self.utterance.name, max_seconds=LONGEST)
        self.long = audio.seconds > LONG
        self._since += audio.seconds  # a shorter clip that came a little later goes first
        for method in (m for m in self.methods if m not in self.transcripts):
            self._advance(0.0)
            self.step = Text("{method} is listening", method=Text(plain(method_label(method))))
            self.heard = []
            transcript = self._asr.transcribe(
                audio,
                method=method,
                want_trace=method in self._asr.routed,
                encoded=self.encoded or self._asr.segments(audio, lambda: self._advance(self._share)),
                progress=self._advance,
                heard=self._hear,
            )
            # `encoded` also holds what the base heard, so that the next method need not decode it
            self._share, self.encoded = 0.0, transcript.encoded
            self.transcripts[method] = transcript
        self.step = Text("Done")

    def _hear(self, words: list[Word]) -> None:
        self.heard = words

    @property
    def listening(self) -> str:
        """The method that is at work; empty if none is."""
        left = [method for method in self.methods if method not in self.transcripts]
        return left[0] if left and self.running else ""


class Trial(Task):
    """Transcribes a finished job's utterance once more by an HDMoLE adapter with changed routing.

    `change` holds keywords of `hdmole.intervene`. `words` is how likely the words as trained are
    under the change (`ASR.likelihoods`), for audio of up to `LONG` seconds; None for longer audio.
    """

    def __init__(self, asr: ASR, job: Job, method: str, change: dict[str, Any]) -> None:
        self.transcript: Transcript | None = None
        self.words: list[dict[str, Any]] | None = None
        self._job, self._method, self._change, self.utterance = job, method, change, job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        assert self._job.audio is not None
        self.step = Text("{method} is listening again", method=Text(plain(method_label(self._method))))
        self._advance(0.0)
        transcript = self._asr.transcribe(
            self._job.audio, method=self._method, intervention=self._change, encoded=self._job.encoded, progress=self._advance
        )
        if self._job.audio.seconds <= LONG:
            self.words = [
                word
                for segment in self._job.encoded or []
                for word in self._asr.likelihoods(segment, [self._change], method=self._method)
            ]
        self.transcript = transcript


class Worth(Task):
    """Measures what each expert was worth to each word in one stretch of a finished job."""

    def __init__(self, asr: ASR, job: Job, method: str, segment: int) -> None:
        assert job.encoded is not None
        self.words: list[dict[str, Any]] | None = None
        self._encoded, self._method, self.utterance = job.encoded[segment], method, job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        self.step = Text("Leaving out one expert after the other")
        self.words = self._asr.attribution(self._encoded, method=self._method)
