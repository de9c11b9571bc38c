"""The work of one session that must not run in Streamlit's script thread.

* a `Job` transcribes an utterance by every method, a `Trial` does it once more by HDMoLE with changed routing, a `Worth`
  measures what each expert was worth; `app.corpus` judges methods on many recordings
* each has a thread of its own, which a page polls
* what is finished stays: after an error or a cancel the results so far can still be read
* the thread never calls Streamlit: what it says is a `Text`, which a page translates
* the model is shared by all sessions; `TURNS` lets no more work run at once than half of the machine's cores
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from app.texts import Text
from hdmole.errors import UserError
from hdmole.names import METHOD_NAMES
from hdmole.speech.audio import Audio, decode

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR, Transcript
    from hdmole.speech.decoding import Encoded

LONGEST = 1800.0  # seconds of audio the app takes
TURNS = threading.BoundedSemaphore(max(1, (os.cpu_count() or 2) // 2))


@dataclass(frozen=True)
class Utterance:
    """What the user chose to have transcribed: the file's content as it came, and what is known about it."""

    name: str
    data: bytes
    reference: str = ""
    accent: str = ""
    sample: str = ""  # the sample's name where it is one of the model's samples

    @property
    def stem(self) -> str:
        """The file's name without its extension, for naming what is saved."""
        return Path(self.name).stem

    @cached_property
    def key(self) -> str:
        """Names this content, for storing its results."""
        return sha256(self.data).hexdigest()[:16]


class Stopped(Exception):
    """The user cancelled."""


class Task:
    """What all work shares: the thread, its turn on the model, cancelling, and errors as plain sentences.

    Attributes:
        name: of what is worked on, for the sentence of an error.
        error: what went wrong, in a sentence; empty where nothing did.
        step: what is being done.
    """

    def __init__(self, asr: ASR, name: str) -> None:
        self.name = name
        self.error: str = ""
        self.step: str = Text("Waiting for a free turn on the model")
        self._asr, self._stop = asr, threading.Event()
        self._share = 0.0  # of the running step
        self._turn = False  # whether it holds one of TURNS
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
        """Stop before the next step or segment; what is done stays."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Return when the work has ended, or after so many seconds."""
        self._thread.join(seconds)

    def _advance(self, share: float) -> None:
        self._share = share
        if self.cancelled and share < 1:  # what is just done is kept
            raise Stopped
        self._let_others()

    def _let_others(self) -> None:
        """Between two stretches or recordings others take their turn."""
        self._end_turn()
        time.sleep(0.05)
        self._take_turn()

    def _take_turn(self) -> None:
        """Wait for a turn on the model; cancelled work goes on without one to its next step, where it ends."""
        while not self._turn and not self.cancelled:
            self._turn = TURNS.acquire(timeout=0.2)

    def _end_turn(self) -> None:
        if self._turn:
            self._turn = False
            TURNS.release()

    def _run(self) -> None:
        self._take_turn()
        try:
            if not self.cancelled:
                self._work()
        except Stopped:
            pass
        except UserError as error:
            self.error = Text(error.sentence, **error.values)
        except Exception as error:  # the page lives on, whatever happens in here
            reason = str(error) or type(error).__name__
            self.error = Text("The transcription of {name} failed: {reason}", name=self.name, reason=reason)
        finally:
            self._end_turn()

    def _work(self) -> None:
        raise NotImplementedError


class Job(Task):
    """Transcribes `utterance` by every method of `asr`, starting at once; goes on where the job `stopped` ended."""

    def __init__(self, asr: ASR, utterance: Utterance, stopped: Job | None = None) -> None:
        self.methods = list(asr.methods)
        self.audio: Audio | None = stopped.audio if stopped else None
        self.encoded: list[Encoded] | None = stopped.encoded if stopped else None
        self.transcripts: dict[str, Transcript] = dict(stopped.transcripts) if stopped else {}  # by method
        self._tables: dict[int, pd.DataFrame] = {}
        self.utterance = utterance
        super().__init__(asr, utterance.name)

    def again(self) -> Job:
        """A job that goes on where this one ended."""
        return Job(self._asr, self.utterance, self)

    @property
    def progress(self) -> float:
        return ((self.audio is not None) + len(self.transcripts) + self._share) / (1 + len(self.methods))

    @property
    def segments(self) -> list[tuple[float, float]]:
        """Start and end in seconds of the stretches that long audio was cut into; of short audio all of it."""
        if self.audio is None or not self.encoded:
            return []
        starts = [0.0, *(s.offset for s in self.encoded[1:])]
        return list(zip(starts, [*starts[1:], self.audio.seconds], strict=True))

    @property
    def dynamic(self) -> bool:
        """Whether HDMoLE's experts are chosen by thresholds, as it was trained; else a layer has none to show."""
        return bool(self._asr.models["hdmole"].peft_config["default"].learned)

    def routing(self, segment: int = 0) -> pd.DataFrame | None:
        """Tidy trace of HDMoLE in one stretch of the audio; None where the model has no such adapter or is not done."""
        trace = self.transcripts["hdmole"].trace if "hdmole" in self.transcripts else None
        if trace is not None and segment not in self._tables:
            self._tables = {segment: trace.of_segment(segment).to_frame()}  # a long one's whole table is too large
        return self._tables.get(segment)

    def _work(self) -> None:
        self.step = Text("Reading the audio")
        self.audio = audio = self.audio or decode(self.utterance.data, self.utterance.name, max_seconds=LONGEST)
        for method in (m for m in self.methods if m not in self.transcripts):
            self._advance(0.0)
            self.step = Text("{method} is listening", method=Text(METHOD_NAMES.get(method, method)))
            self.encoded = self._asr.segment(audio) if self.encoded is None else self.encoded
            transcript = self._asr.transcribe(
                audio, method=method, want_trace=method == "hdmole", encoded=self.encoded, progress=self._advance
            )
            self._share, self.encoded = 0.0, transcript.encoded  # with what the base hears: the next method need not ask it
            self.transcripts[method] = transcript
        self.step = Text("Done")


class Trial(Task):
    """Transcribes a finished job's utterance once more by HDMoLE, with `change`: keywords of `hdmole.intervene`."""

    def __init__(self, asr: ASR, job: Job, change: dict[str, Any]) -> None:
        self.transcript: Transcript | None = None
        self._job, self._change, self.utterance = job, change, job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        assert self._job.audio is not None
        self.step = Text("HDMoLE is listening again")
        self._advance(0.0)
        self.transcript = self._asr.transcribe(
            self._job.audio, method="hdmole", intervention=self._change, encoded=self._job.encoded, progress=self._advance
        )


class Worth(Task):
    """What each expert was worth to each word of one stretch of a finished job's utterance."""

    def __init__(self, asr: ASR, job: Job, segment: int) -> None:
        assert job.encoded is not None
        self.words: list[dict[str, Any]] | None = None
        self._encoded, self.utterance = job.encoded[segment], job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        self.step = Text("Leaving out one expert after the other")
        self.words = self._asr.attribution(self._encoded)
