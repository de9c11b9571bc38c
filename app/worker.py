"""Work of one session that must not run in Streamlit's script thread.

* one `Job` transcribes one utterance by every method, one `Trial` does it once more by HDMoLE with changed routing, one
  `Evaluation` judges methods on a corpus; each in its own thread, which a page polls
* what is finished stays: after an error or a cancel the results so far can still be read
* the thread never calls Streamlit: what it says is a `Text`, which a page translates; and it never sees another session's utterance
* the model is shared by all sessions; `_TURNS` keeps the machine from running more jobs than it has cores for
"""

from __future__ import annotations

import atexit
import os
import shutil
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import pandas as pd

from app.texts import Text
from hdmole.errors import UserError
from hdmole.names import METHOD_NAMES
from hdmole.speech.audio import Audio, decode
from hdmole.speech.manifest import ManifestError
from hdmole.study.evaluate import Cancelled, evaluate

LONGEST = 1800.0  # seconds of audio the app takes
MOST_UNPACKED = 4e9  # bytes of a ZIP's content
_TURNS = threading.BoundedSemaphore(max(1, (os.cpu_count() or 2) // 2))


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


class _Stopped(Exception):
    """The user cancelled."""


class _Task:
    """What all work shares: the thread, its turn on the model, cancelling, and errors as plain sentences."""

    def __init__(self, asr: Any, name: str) -> None:
        self.name = name
        self.error = ""
        self.step: str = Text("Waiting for a free turn on the model")
        self._asr, self._stop = asr, threading.Event()
        self._share = 0.0  # of the running step
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
            raise _Stopped
        self._let_others()

    def _let_others(self) -> None:
        """Between two stretches or recordings others take their turn."""
        _TURNS.release()
        time.sleep(0.05)
        _TURNS.acquire()

    def _run(self) -> None:
        while not _TURNS.acquire(timeout=0.2):
            if self.cancelled:
                return
        try:
            self._work()
        except _Stopped:
            pass
        except UserError as error:
            self.error = Text(error.sentence, **{name: Text(str(value)) for name, value in error.values.items()})
        except Exception as error:  # the page lives on, whatever happens in here
            reason = str(error) or type(error).__name__
            self.error = Text("The transcription of {name} failed: {reason}", name=self.name, reason=reason)
        finally:
            _TURNS.release()

    def _work(self) -> None:
        raise NotImplementedError


class Job(_Task):
    """Transcribes `utterance` by every method of `asr` (an `hdmole.speech.asr.ASR`), starting at once; goes on where `stopped` was."""

    def __init__(self, asr: Any, utterance: Utterance, stopped: Job | None = None) -> None:
        self.methods = list(asr.methods)
        self.audio: Audio | None = stopped.audio if stopped else None
        self.encoded: Any = stopped.encoded if stopped else None  # list of hdmole.speech.asr.Encoded
        self.transcripts: dict[str, Any] = dict(stopped.transcripts) if stopped else {}  # method -> hdmole.speech.asr.Transcript
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
        return bool(self._asr.models["hdmole"].peft_config["default"].thresholds == "dynamic")

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
            self.encoded = self._asr.encode(audio) if self.encoded is None else self.encoded
            transcript = self._asr.transcribe(
                audio, method=method, want_trace=method == "hdmole", encoded=self.encoded, progress=self._advance
            )
            self._share = 0.0
            self.transcripts[method] = transcript
        self.step = Text("Done")


class Trial(_Task):
    """Transcribes a finished job's utterance once more by HDMoLE, with `change`: keywords of `hdmole.intervene`."""

    def __init__(self, asr: Any, job: Job, change: dict[str, Any]) -> None:
        self.transcript: Any = None
        self._job, self._change, self.utterance = job, change, job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        self.step = Text("HDMoLE is listening again")
        self._advance(0.0)
        self.transcript = self._asr.transcribe(
            self._job.audio, method="hdmole", intervention=self._change, encoded=self._job.encoded, progress=self._advance
        )


class Worth(_Task):
    """What each expert was worth to each word of one stretch of a finished job's utterance."""

    def __init__(self, asr: Any, job: Job, segment: int) -> None:
        self.words: list[dict[str, Any]] | None = None
        self._encoded, self.utterance = job.encoded[segment], job.utterance
        super().__init__(asr, job.utterance.name)

    def _work(self) -> None:
        self.step = Text("Leaving out one expert after the other")
        self.words = self._asr.attribution(self._encoded)


class Evaluation(_Task):
    """Judges `methods` on the recordings of a manifest, or of a ZIP, unpacked to `folder`/speech; the results folder is `out`."""

    def __init__(self, asr: Any, source: Path | IO[bytes], methods: list[str], folder: Path) -> None:
        self.source, self.methods, self.folder, self.out = source, methods, folder, folder / "results"
        self.summary: dict[str, Any] | None = None
        atexit.register(shutil.rmtree, folder / "speech", ignore_errors=True)
        super().__init__(asr, Path(str(getattr(source, "name", source))).name)

    def forget(self) -> None:
        """Remove the unpacked recordings; the results stay."""
        shutil.rmtree(self.folder / "speech", ignore_errors=True)

    def _progress(self, done: int, total: int) -> None:
        self.step = Text("{done} of {total} recordings heard", done=done, total=total)
        self._share = done / max(1, total)
        if self.cancelled and done < total:
            raise Cancelled
        self._let_others()

    def _work(self) -> None:
        if not isinstance(self.source, Path):
            self.step = Text("Unpacking")
            self.source = unpack(self.source, self.folder / "speech")
        try:
            self.summary, _ = evaluate(self._asr, self.source, self.methods, self.out, progress=self._progress)
        except Cancelled:
            raise _Stopped from None


def unpack(file: IO[bytes], folder: Path) -> Path:
    """Unpack an uploaded ZIP of recordings; returns the path of its manifest. Raises ManifestError in a plain sentence."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir() and "__MACOSX" not in e.filename]
            if sum(e.file_size for e in entries) > MOST_UNPACKED:
                raise ManifestError(
                    "manifest.zip_too_large",
                    "The ZIP unpacks to more than {size} GB; give the manifest's path instead.",
                    size=f"{MOST_UNPACKED / 1e9:g}",
                )
            manifests = [e for e in entries if e.filename.endswith(".jsonl")]
            if not manifests:
                raise ManifestError(
                    "manifest.not_in_zip",
                    "The ZIP has no manifest; put a .jsonl file with audio, text and accent on each line into it.",
                )
            paths = {entry.filename: Path(archive.extract(entry, folder)) for entry in entries}
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "password" in str(error):
            raise ManifestError("manifest.zip_locked", "The ZIP is locked with a password; make one without.") from None
        raise ManifestError("manifest.not_a_zip", "The file is not a ZIP that can be read; make it again.") from None
    except OSError as error:
        sentence = "The ZIP cannot be unpacked ({reason}); give its files plain names."
        raise ManifestError("manifest.zip_not_unpacked", sentence, reason=error.strerror or error) from None
    return paths[min(manifests, key=lambda e: (e.filename.count("/"), e.filename)).filename]
