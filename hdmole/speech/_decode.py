"""The child process of `hdmole.speech.audio.decode`.

It reads audio on standard input and writes samples to standard output.

Files from unknown sources are decoded here. If a decoder hangs, crashes or takes too much memory,
only this process ends, and the one that serves all users goes on. It is run as a script, so that
neither torch nor the rest of hdmole is imported.

Arguments: longest audio in seconds, CPU time in seconds, memory in MB (beyond what the libraries
take), rate in Hz.
Output: one line of JSON (`error`, or `format`, `codec`, `rate`, `channels`, `clipped`), then
float32 mono samples at that rate, in the machine's byte order.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

CLIPPED = 0.999  # of full scale; a sample at or above it counts as clipped

# Only containers that hold one recording. Playlists (HLS, concat, DASH) are refused, because they
# open other files and addresses.
CONTAINERS = "wav,w64,flac,mp3,aac,ogg,mov,mp4,m4a,matroska,webm,amr,aiff,caf,au"
NAMES = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "webm"}


class Refused(Exception):
    """Raised with the reason of a refusal, a key of the sentences in `hdmole.speech.audio`."""


class Input:
    """Standard input without a file name, so that FFmpeg goes by the content alone."""

    name = ""

    def __init__(self) -> None:
        self._file = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115

    def read(self, size: int) -> bytes:
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def limit(cpu_seconds: int, memory_mb: int) -> None:
    """Set the limits of this process.

    Call it after the libraries are loaded, because `memory_mb` comes on top of the memory in use.
    """
    with open("/proc/self/statm") as statm:
        loaded = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, loaded + memory_mb * 2**20),
        (resource.RLIMIT_CPU, cpu_seconds),  # SIGXCPU; the parent's clock usually comes first
        (resource.RLIMIT_FSIZE, 0),  # it writes to a pipe, never to a file
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def channels_first(frame: Any) -> np.ndarray:
    """A decoded frame of any sample format as (channels, samples) float32 in [-1, 1].

    NaN becomes 0.
    """
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype.kind == "f":
        data = np.nan_to_num(data, nan=0.0, posinf=1.0, neginf=-1.0)
    elif data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128.0) / 128.0
    else:
        data = data / -float(np.iinfo(data.dtype).min)
    return np.asarray(np.clip(data, -1.0, 1.0), np.float32)


def frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames. Damaged packets are skipped; at a broken end the frames simply stop."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except (av.InvalidDataError, av.EOFError):
                continue
    except (av.InvalidDataError, av.EOFError):
        return


def declared_seconds(container: Any, stream: Any, size: int) -> float:
    """The length in seconds that the file declares; 0 if it declares none.

    For uncompressed audio it is at most what `size` bytes can hold.
    """
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    if stream.codec_context.name.startswith("pcm_") and stream.codec_context.bit_rate:
        # a WAV written to a pipe declares hours
        seconds = min(seconds, size * 8 / stream.codec_context.bit_rate)
    return seconds


class Resampler:
    """Resamples mono audio to `target` Hz. The rate of the input may change from frame to frame."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.parts: list[np.ndarray] = []
        self._rate = 0
        self._resampler: Any = None

    def add(self, mono: np.ndarray, rate: int) -> None:
        if rate != self._rate:
            self.finish()
            self._rate = rate
            self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=self._target)
        if rate == self._target:
            self.parts.append(mono)
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono[None]), format="fltp", layout="mono")
        frame.sample_rate = rate
        self._keep(frame)

    def finish(self) -> None:
        if self._resampler is not None and self._rate != self._target:
            self._keep(None)
        self._resampler = None

    def _keep(self, frame: Any) -> None:
        self.parts += [out.to_ndarray()[0] for out in self._resampler.resample(frame)]


def decode(max_seconds: float, target: int) -> tuple[dict[str, Any], np.ndarray]:
    source = Input()
    size = os.fstat(0).st_size
    try:
        container = av.open(source, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
    except av.FFmpegError as error:
        raise Refused("memory" if error.errno == errno.ENOMEM else "not_audio") from None
    streams = container.streams.audio
    if not streams:
        raise Refused("no_sound_track")
    stream = container.streams.best("audio") or streams[0]
    if stream.codec_context is None:
        raise Refused("unknown_codec")
    if declared_seconds(container, stream, size) > max_seconds + 0.5:
        raise Refused("too_long")
    seconds, clipped, total, rate, channels = 0.0, 0, 0, 0, 0
    resampler, first = Resampler(target), Resampler(target)
    for frame in frames(container, stream):
        if not frame.samples or not frame.sample_rate:
            continue
        data = channels_first(frame)
        rate, channels = rate or frame.sample_rate, channels or len(data)
        clipped += int(np.count_nonzero(np.abs(data) >= CLIPPED))
        total += data.size
        seconds += frame.samples / frame.sample_rate
        if seconds > max_seconds + 0.5:  # codecs round up to whole frames
            raise Refused("too_long")
        resampler.add(data.mean(axis=0), frame.sample_rate)
        if len(data) > 1:
            first.add(data[0], frame.sample_rate)
    for each in (resampler, first):
        each.finish()
    if not total:
        raise Refused("damaged")
    name = container.format.name
    about = {
        "format": NAMES.get(name, name),
        "codec": stream.codec_context.name,
        "rate": rate,
        "channels": channels,
        "clipped": clipped / total,
    }
    mono, left = (np.concatenate([*each.parts, np.zeros(0, np.float32)]) for each in (resampler, first))
    # channels in opposite phase cancel out
    if np.abs(left).max(initial=0.0) > 30 * np.abs(mono).max(initial=0.0):
        mono = left
    return about, np.clip(mono, -1.0, 1.0)


def main() -> None:
    max_seconds, cpu_seconds = float(sys.argv[1]), math.ceil(float(sys.argv[2]))
    memory_mb, target = int(sys.argv[3]), int(sys.argv[4])
    av.logging.set_level(av.logging.PANIC)
    limit(cpu_seconds, memory_mb)
    samples = np.zeros(0, np.float32)
    try:
        about, samples = decode(max_seconds, target)
    except Refused as reason:
        about = {"error": str(reason)}
    except MemoryError:
        about = {"error": "memory"}
    except av.FFmpegError as error:
        about = {"error": "memory" if error.errno == errno.ENOMEM else "damaged"}
    sys.stdout.buffer.write(json.dumps(about).encode() + b"\n" + samples.astype(np.float32).tobytes())


if __name__ == "__main__":
    main()
