"""Reading audio. The command line, the app and the tests all use `decode`.

`decode` takes a file or its bytes (wav, flac, mp3, ogg/opus, m4a, mp4, webm; any rate, any number
of channels) and returns 16 kHz mono float32. The format is recognised by the content, not by the
extension. PyAV decodes in a child process with limits on time, memory and duration, because some
files make decoders hang or crash (a WAV of 157 bytes hangs libsndfile 1.2.2).
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import POLLIN, poll
from typing import IO

import numpy as np

from hdmole.errors import UserError
from hdmole.speech.stopping import ask

SAMPLE_RATE = 16_000  # Hz
SHORTEST = 0.1  # seconds
SILENCE = 10 ** (-60 / 20)  # peak amplitude, -60 dBFS
POLL = 0.2  # seconds until somebody who waits for a file is asked again whether it is wanted

# a request (longest audio in seconds, time in seconds, memory in MB, rate in Hz) and the end of an
# answer (exit code, whether it took too long), as in _decode.py
REQUEST, ENDED = struct.Struct("=4d"), struct.Struct("=i?")
# second half of the error code -> sentence; the child process gives the first five and "memory"
_SENTENCES = {
    "not_audio": "{name} is not audio that can be read; give a WAV, FLAC, MP3, Ogg, M4A, MP4 or WebM file.",
    "no_sound_track": "{name} has no sound track; give a file that holds speech.",
    "unknown_codec": (
        "The sound in {name} is in a coding that is not known here; convert it to WAV, FLAC, MP3, Ogg, M4A, MP4 or WebM."
    ),
    "damaged": "{name} is damaged or cut off and nothing in it can be decoded; export or record it again.",
    "too_long": "{name} is longer than the {seconds} seconds allowed; cut it into shorter pieces.",
    "memory": "{name} needs more than the {size} MB of memory allowed to decode; convert it to WAV or cut it.",
    "time": "{name} could not be decoded within {seconds} seconds; convert it to WAV or cut it into shorter pieces.",
}


class AudioError(UserError):
    """Audio that cannot be used. The codes begin with `audio.`."""


@dataclass(frozen=True)
class Audio:
    """Decoded audio, and what was found in the file."""

    samples: np.ndarray = field(repr=False)  # (seconds * 16000,) float32, mono, in [-1, 1]
    seconds: float
    source: str  # name of the file, or the name given to decode
    # container by content: wav, flac, mp3, ogg, mp4 (also m4a), webm (also matroska), ...
    format: str
    codec: str  # pcm_s16le, flac, mp3float, opus, vorbis, aac, ...
    original_rate: int  # Hz
    channels: int  # in the file, before they were averaged
    clipped: float  # share of the original samples at full scale, 0 to 1


class _Server:
    """The process that runs `_decode.py`.

    It is started for the first file, and again if it has ended.
    """

    def __init__(self, script: Path) -> None:
        self._script, self._lock = script, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def ask(self, file: IO[bytes], limits: tuple[float, float, int, int]) -> tuple[bytes, int, bool]:
        """What the process that decoded has written, its exit code, and whether it took too long."""
        for _ in range(2):  # the process may have ended
            with ExitStack() as stack:
                outputs, sent = zip(*(os.pipe() for _ in range(2)), strict=True)
                output, ended = (stack.enter_context(open(number, "rb")) for number in outputs)
                with self._lock:
                    connection = self._connection = self._connection or self._start()
                    with suppress(OSError):
                        socket.send_fds(connection, [REQUEST.pack(*limits)], [file.fileno(), *sent])
                for number in sent:
                    os.close(number)
                answer = poll()  # select() takes no number above 1,023
                answer.register(output, POLLIN)
                while not answer.poll(1000 * POLL):
                    ask()  # an error closes the pipes, which ends the process that decodes
                written = output.read()
                if end := ended.read():
                    code, late = ENDED.unpack(end)
                    return written, code, late
            with self._lock:
                if self._connection is connection:
                    self.close()
        return b"", 0, False

    def _start(self) -> socket.socket:
        """Start the process, and return its socket."""
        ours, theirs = socket.socketpair()
        # -P keeps the folder of the script out of the import path, so that no file in it hides a
        # module of Python.
        command = [sys.executable, "-P", str(self._script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        return ours

    def close(self) -> None:
        """End the process."""
        if self._connection is not None and self._process is not None:
            with suppress(OSError):  # it has ended before
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._connection = None
            self._process.wait()


_server = _Server(Path(__file__).with_name("_decode.py"))
atexit.register(_server.close)


def decode(
    source: str | os.PathLike[str] | bytes,
    name: str | None = None,
    *,
    max_seconds: float = 1800,
    timeout: float = 60,
    memory_mb: int = 2048,
) -> Audio:
    """Decode a file, or the bytes of one, to 16 kHz mono float32.

    Args:
        source: path of the file, or its content.
        name: what messages call it; by default the name of the file.
        max_seconds: longest audio accepted, in seconds.
        timeout: longest time the decoding may take, in seconds.
        memory_mb: most memory that the decoding may take, in MB.

    Returns:
        The audio; `samples` has shape (seconds * 16000,). Of a file that is cut off, what is there
        is decoded. NaN in floating-point audio becomes 0.

    Raises:
        AudioError: the file is missing, empty, not audio, broken, silent (peak below -60 dBFS),
            shorter than 0.1 s, too long, or takes too much time or memory.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = _printable(name or "The recording")
        if not len(source):
            raise _empty(name)
        with tempfile.TemporaryFile() as file:
            file.write(source)
            file.seek(0)
            return _decode(file, name, max_seconds, timeout, memory_mb)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"decode takes a path or bytes, not {type(source).__name__}")
    path = Path(source)
    name = _printable(name or path.name or str(source))
    with _open(path, name) as file:
        return _decode(file, name, max_seconds, timeout, memory_mb)


def samples_of(audio: Audio | np.ndarray) -> np.ndarray:
    """The samples (S,) float32, those of integers scaled to [-1, 1].

    Raises AudioError unless they are at least 0.1 s of one channel, and all of them numbers.
    """
    samples = np.asarray(audio.samples if isinstance(audio, Audio) else audio)
    if samples.ndim != 1 or samples.dtype.kind not in "fi":
        raise AudioError(
            "audio.not_mono",
            "The samples have the shape {shape} and the type {type}; give one channel, shape (samples,), of numbers from -1 to 1.",
            shape=samples.shape,
            type=samples.dtype,
        )
    if len(samples) < SHORTEST * SAMPLE_RATE:
        length = f"{len(samples) / SAMPLE_RATE:.2f}"
        sentence = "{name} is too short ({length} s); give at least {seconds} seconds of speech."
        raise AudioError("audio.too_short", sentence, name="The recording", length=length, seconds=f"{SHORTEST:g}")
    if not np.isfinite(samples).all():
        raise AudioError("audio.not_numbers", "Some samples are NaN or infinite; give numbers from -1 to 1.")
    if samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32, copy=False)


def _open(path: Path, name: str) -> IO[bytes]:
    try:
        if path.is_dir():
            raise AudioError("audio.folder", "{name} is a folder; give an audio file.", name=name)
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe would block, and a device never ends
            raise AudioError("audio.not_a_file", "{name} is not a regular file; give an audio file.", name=name)
        if size == 0:
            raise _empty(name)
        return path.open("rb")
    except AudioError:
        raise
    except PermissionError:
        raise AudioError("audio.forbidden", "{name} may not be read by this user; change its permissions.", name=name) from None
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError("audio.absent", "{name} does not exist; check the path.", name=name) from None
    # the name is too long or has a null byte, or the disk fails
    except (OSError, ValueError) as error:
        reason = _printable(str(error))
        sentence = "{name} cannot be opened ({reason}); check the path."
        raise AudioError("audio.not_opened", sentence, name=name, reason=reason) from None


def _empty(name: str) -> AudioError:
    return AudioError("audio.empty", "{name} is empty (0 bytes); record or export it again.", name=name)


def _decode(file: IO[bytes], name: str, max_seconds: float, timeout: float, memory_mb: int) -> Audio:
    def refuse(reason: str) -> AudioError:
        limit = max_seconds if reason == "too_long" else timeout
        return AudioError(f"audio.{reason}", _SENTENCES[reason], name=name, seconds=f"{limit:g}", size=memory_mb)

    output, code, late = _server.ask(file, (max_seconds, timeout, memory_mb, SAMPLE_RATE))
    if late or code == -signal.SIGXCPU:
        raise refuse("time")
    # it was killed by the CPU limit, or by the system because memory ran out
    if code == -signal.SIGKILL:
        raise refuse("memory")
    if code < 0:
        raise refuse("damaged")
    header, _, body = output.partition(b"\n")
    about = json.loads(header or '{"failed": "no message"}')
    if "failed" in about:
        sentence = "{name} could not be decoded ({reason}); convert it to WAV and try again."
        raise AudioError("audio.decoder_failed", sentence, name=name, reason=_printable(about["failed"]))
    if "error" in about:
        raise refuse(about["error"])
    samples = np.frombuffer(body, np.float32).copy()
    seconds = len(samples) / SAMPLE_RATE
    if seconds < SHORTEST:
        sentence = "{name} is too short ({length} s); give at least {seconds} seconds of speech."
        raise AudioError("audio.too_short", sentence, name=name, length=f"{seconds:.2f}", seconds=f"{SHORTEST:g}")
    if np.abs(samples).max() < SILENCE:
        sentence = "{name} is silent (nothing above -60 dBFS); check the microphone and record it again."
        raise AudioError("audio.silent", sentence, name=name)
    return Audio(
        samples=samples,
        seconds=seconds,
        source=name,
        format=about["format"],
        codec=about["codec"],
        original_rate=about["rate"],
        channels=about["channels"],
        clipped=about["clipped"],
    )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
