"""The process of `hdmole.speech.audio.decode` that decodes.

Files from unknown sources are decoded here. If a decoder hangs, crashes or takes too much memory,
only a child of this process ends, and the one that serves all users goes on. It is run as a script,
so that neither torch nor the rest of hdmole is imported.

    decode -> this process, with FFmpeg loaded -> one that waits -> one that decodes, with limits

Loading FFmpeg takes 0.2 s, a fork 2 ms. Each file gets a process of its own, which never saw
another.

Standard input is a Unix socket. A request is `REQUEST` (longest audio in seconds, time in seconds,
memory in MB beyond what the libraries take, rate in Hz) with three open files: the audio, and two
pipes for the answer. The first gets one line of JSON (`error`, `failed`, or `format`, `codec`,
`rate`, `channels`, `clipped`), then float32 mono samples at that rate, in the machine's byte order.
The second gets `ENDED`: how the process that decoded has ended, as `os.waitstatus_to_exitcode`
says, and whether it took too long.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np

# This file is run as a script. Its own package comes first while the rest of it is imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hdmole.speech._clock import AAC_DELAY, LIVE, Plain, clock, links, placed

del sys.path[0]

REQUEST = struct.Struct("=4d")  # longest audio, time, memory, rate
ENDED = struct.Struct("=i?")
CLIPPED = 0.999  # of full scale; what reaches it counts as clipped
SILENCE = 10 ** (-60 / 20)  # peak amplitude, -60 dBFS
MOST_CHUNKS = 1000  # of a WAV file that are looked at for the one that describes the samples
NOISE = (0x38, 0x40)  # codings in a WAV file, of NMS and G.721, that FFmpeg takes for others
MOST_FAILURES = 10_000  # reads of a packet in a row; then the rest of a file is given up
POLL = 0.5  # seconds until it is seen that nobody waits for a file any more
STRETCH = 0.1  # seconds in which it is decided whether channels are in opposite phase

# Only containers that hold one recording. Playlists (HLS, concat, DASH) stay out: they open other
# files and addresses.
CONTAINERS = "wav,w64,flac,mp3,aac,ogg,mov,mp4,m4a,matroska,webm,amr,aiff,caf,au,nistsphere"
STATED = "wav,w64,flac,mov,aiff,caf,au,nistsphere"  # those that state their length; of others FFmpeg may guess it
NAMES = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "webm"}


class Refused(Exception):
    """Raised with the reason of a refusal, a key of the sentences in `hdmole.speech.audio`."""


class Input:
    """Standard input from `start` to `end`.

    It has no file name, so that FFmpeg goes by the content alone.
    """

    name = ""

    def __init__(self, start: int, end: int) -> None:
        self._file = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
        self._start, self._end, self._at = start, end, 0
        self.astray = False  # whether a place beyond the end was asked for, where FFmpeg then finds the end of the file
        self._patch: tuple[int, bytes] = (0, b"")
        self._patch = whole_words(self)
        self._at = 0

    def read(self, size: int) -> bytes:
        left = self._end - self._start - self._at
        if left <= 0:  # a damaged file may ask for what no file can hold
            return b""
        self._file.seek(self._start + self._at)
        data = self._file.read(min(size, left)) or b""
        for k, byte in enumerate(self._patch[1], self._patch[0] - self._at):
            if 0 <= k < len(data):
                data = data[:k] + bytes([byte]) + data[k + 1 :]
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end - self._start}[whence]
        if at < 0:  # a damaged file may ask for it; FFmpeg takes it for an error and goes on
            return -1
        self.astray = self.astray or at > self._end - self._start
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def again(self) -> Input:
        """The same bytes, for another reader."""
        return Input(self._start, self._end)


def whole_words(source: Input) -> tuple[int, bytes]:
    """Which bytes of a WAV or Wave64 file to replace, and by what.

    A sample fills its container from the top, however many of its bits are valid. FFmpeg goes by
    the valid bits alone and takes 24 of 32 for another format. With these bytes it goes by the
    container.
    """
    head = source.read(40)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        at, chunk, whole, even = 12, struct.Struct("<4sI"), 8, 2
    elif head[:4] == b"riff" and head[24:28] == b"wave":
        at, chunk, whole, even = 40, struct.Struct("<4s12xQ"), 0, 8
    else:
        return 0, b""
    for _ in range(MOST_CHUNKS):
        source.seek(at)
        header = source.read(chunk.size)
        if len(header) < chunk.size:
            break
        name, size = chunk.unpack(header)
        if name == b"fmt ":
            layout = source.read(40)
            if len(layout) < 26:
                break
            code, channels, _, _, align, bits, extra, _, _, kind = struct.unpack_from("<HHIIHHHHIH", layout.ljust(40, b"\0"))
            extensible = code == 0xFFFE and size >= 40
            container, code = bits, kind if extensible else code
            if code in NOISE:
                raise Refused("unknown_codec")
            if code == 1 and channels and align % channels == 0 and bits <= align // channels * 8 <= 32:
                container = align // channels * 8
            if extensible:
                return at + chunk.size + 14, struct.pack("<HHH", container, max(extra, 22), container)
            return at + chunk.size + 14, struct.pack("<H", container)
        at += max(size + whole, chunk.size)
        at += -at % even
    return 0, b""


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
    if frame.format.name in ("s64", "s64p"):  # PyAV has no arrays of it
        frame = av.AudioResampler(format="dblp").resample(frame)[0]
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


def mixed(data: np.ndarray) -> np.ndarray:
    """The mean of the channels of a stretch (channels, samples).

    Channels in opposite phase are turned over first.

    Channels in opposite phase cancel each other. This is taken to happen where the mean has less
    than a quarter of the energy that the mean of unrelated channels would have.
    """
    mean = np.asarray(data.mean(axis=0))
    energies = np.square(data, dtype=np.float64).sum(axis=1)
    if len(data) < 2 or np.square(mean, dtype=np.float64).sum() >= 0.25 * energies.sum() / len(data) ** 2:
        return mean
    loudest = data[energies.argmax()]
    signs = np.where(data @ loudest < 0, -1.0, 1.0).astype(np.float32)
    return np.asarray((data * signs[:, None]).mean(axis=0))


def frames(container: Any, stream: Any, source: Input, times: Plain) -> Iterator[Any]:
    """Decoded frames.

    Packets that cannot be read or decoded are passed over, up to `MOST_FAILURES` in a row.
    """

    def decoded(packet: Any) -> list[Any]:
        try:
            return list(packet.decode() if packet is not None else stream.decode(None))
        except (av.FFmpegError, ValueError) as error:
            if getattr(error, "errno", 0) == errno.ENOMEM:
                raise
            return []

    failures = 0
    while failures < MOST_FAILURES:
        source.astray, ended = False, False
        try:
            for packet in container.demux(stream):
                if packet.size:  # PyAV ends with a packet of nothing
                    failures = 0
                    yield from times.take(packet, decoded(packet))
            ended = not source.astray
        except (av.FFmpegError, ValueError) as error:
            if getattr(error, "errno", 0) == errno.ENOMEM:
                raise
        if ended:
            break
        failures += 1  # and on to what lies behind the damage
    yield from [*times.rest(), *decoded(None)]  # also what the decoder still holds


def declared_seconds(container: Any, stream: Any, size: int) -> float:
    """The length in seconds that the file states, 0 where it states none.

    Audio of a constant bit rate cannot be longer than its bytes.
    """
    if container.format.name.split(",")[0] not in STATED.split(","):
        return 0.0
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / av.time_base
    if stream.codec_context.name.startswith(("pcm_", "adpcm_", "gsm", "g72")) and stream.codec_context.bit_rate:
        # a WAV written to a pipe declares hours, and Wave64 of libsndfile years
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


class Mixer:
    """Turns frames with any number of channels at any rate into mono at `target` Hz.

    It keeps what is found in them on the way.
    """

    def __init__(self, target: int) -> None:
        self._resampler, self._waiting, self._rate = Resampler(target), [np.zeros((1, 0), np.float32)], 0
        self.seconds, self.clipped, self.total, self.rate, self.channels = 0.0, 0, 0, 0, 0

    def add(self, data: np.ndarray, rate: int) -> None:
        """Take a frame (channels, samples)."""
        self.rate, self.channels = self.rate or rate, self.channels or len(data)
        self.clipped += int(np.count_nonzero(np.abs(data) >= CLIPPED))
        self.total += data.size
        self._put(data, rate)

    def silence(self, seconds: float, rate: int) -> None:
        """Take silence, in pieces of a second at most."""
        left = round(seconds * rate)
        while left > 0:
            self._put(np.zeros((1, min(left, rate)), np.float32), rate)
            left -= rate

    def finish(self) -> np.ndarray:
        """All of it: (samples,) float32."""
        self._mix()
        self._resampler.finish()
        return np.concatenate([*self._resampler.parts, np.zeros(0, np.float32)])

    def _put(self, data: np.ndarray, rate: int) -> None:
        if len(data) != len(self._waiting[0]) or rate != self._rate:
            self._mix()
            self._waiting, self._rate = [data[:, :0]], rate
        self.seconds += data.shape[1] / rate
        self._waiting.append(data)
        if len(data) == 1 or sum(part.shape[1] for part in self._waiting) >= STRETCH * rate:
            self._mix()

    def _mix(self) -> None:
        data = np.concatenate(self._waiting, axis=1)
        self._waiting = [data[:, :0]]
        if data.size:
            self._resampler.add(mixed(data), self._rate)


def opened(source: Input) -> Any:
    beginning = source.read(4)
    source.seek(0)
    if beginning == b"RIFX":  # FFmpeg reads its numbers in the wrong byte order
        raise Refused("unknown_codec")
    try:
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        return av.open(source, options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise Refused("memory" if getattr(error, "errno", 0) == errno.ENOMEM else "not_audio") from None


def decode(max_seconds: float, target: int) -> tuple[dict[str, Any], np.ndarray]:
    """What is known about a file, and its samples.

    The links of a chained Ogg file follow each other.
    """
    reason: Refused | None = None
    parts: list[tuple[dict[str, Any], np.ndarray]] = []
    left, size = max_seconds, os.fstat(0).st_size
    for start, end in links(Input(0, size), size):
        try:
            parts.append(decode_link(start, end, left, target))
        except Refused as refused:
            if str(refused) == "too_long":
                raise
            reason = reason or refused
        else:
            left -= len(parts[-1][1]) / target
    if not parts:
        raise reason or Refused("damaged")
    about = parts[0][0]
    lengths = [len(samples) for _, samples in parts]
    if len(parts) > 1 and sum(lengths) > 0:
        about["clipped"] = float(np.average([part["clipped"] for part, _ in parts], weights=lengths))
    return about, np.concatenate([samples for _, samples in parts])


def decode_link(start: int, end: int, max_seconds: float, target: int) -> tuple[dict[str, Any], np.ndarray]:
    """The first of the sound tracks that can be decoded and is not silent.

    FFmpeg's choice comes first.
    """
    with opened(Input(start, end)) as container:
        streams = container.streams.audio
        if not streams:
            raise Refused("no_sound_track")
        best = container.streams.best("audio") or streams[0]
        order = sorted(range(len(streams)), key=lambda k: streams[k].index != best.index)
    result: tuple[dict[str, Any], np.ndarray] | None = None
    reason: Refused | None = None
    for number in order:
        source = Input(start, end)
        with opened(source) as container:
            try:
                found = decode_track(container, container.streams.audio[number], source, end - start, max_seconds, target)
            except Refused as refused:
                reason = reason or refused
                continue
        if np.abs(found[1]).max(initial=0.0) >= SILENCE:
            return found
        result = result or found
    if result is None:
        raise reason or Refused("damaged")
    return result


def decode_track(
    container: Any, stream: Any, source: Input, size: int, max_seconds: float, target: int
) -> tuple[dict[str, Any], np.ndarray]:
    """What is known about one sound track, and its samples."""
    if stream.codec_context is None:
        raise Refused("unknown_codec")
    name = container.format.name
    stated = declared_seconds(container, stream, size)
    if stated > max_seconds + 0.5:
        raise Refused("too_long")
    begin = (container.start_time or 0) / av.time_base
    if name == "aac" and stream.codec_context.sample_rate:
        begin = AAC_DELAY / stream.codec_context.sample_rate
    elif 0 <= begin < LIVE and name != "mp3":  # which has no clock; FFmpeg's begins after the encoder's delay
        begin = 0.0
    if (name, stream.codec_context.name) == ("caf", "alac"):  # FFmpeg would cut off the end a second time
        stream.codec_context.options = {"flags2": "+skip_manual"}
    mixer, times = Mixer(target), clock(container, stream, source.again(), size)
    longest = stated + 0.5 if stated and name == "flac" else max_seconds
    for silence, overlap, frame in placed(frames(container, stream, source, times), begin, longest):
        rate = frame.sample_rate
        mixer.silence(silence, rate)
        mixer.add(channels_first(frame)[:, round(overlap * rate) :], rate)
        if mixer.seconds > max_seconds + 0.5:  # codecs round up to whole frames
            raise Refused("too_long")
    samples = mixer.finish()
    if not mixer.total:
        raise Refused("damaged")
    about = {
        "format": NAMES.get(name, name),
        "codec": stream.codec_context.name,
        "rate": mixer.rate,
        "channels": mixer.channels,
        "clipped": mixer.clipped / mixer.total,
    }
    return about, np.clip(samples, -1.0, 1.0)


def answer(max_seconds: float, cpu_seconds: float, memory_mb: int, target: int) -> None:
    """Decode standard input, with limits, and write the answer to standard output."""
    limit(math.ceil(cpu_seconds), memory_mb)
    about: dict[str, Any]
    samples = np.zeros(0, np.float32)
    try:
        about, samples = decode(max_seconds, target)
    except Refused as reason:
        about = {"error": str(reason)}
    except MemoryError:
        about = {"error": "memory"}
    except Exception as error:
        if getattr(error, "errno", 0) == errno.ENOMEM:
            about = {"error": "memory"}
        else:
            about = {"error": "damaged"} if isinstance(error, av.FFmpegError) else {"failed": str(error)}
    with open(1, "wb") as output:
        output.write(json.dumps(about).encode() + b"\n" + samples.astype(np.float32).tobytes())


def watch(request: bytes, audio: int, output: int, ended: int) -> None:
    """Have a process of its own answer a request, and say how it ended."""
    max_seconds, seconds, memory_mb, target = REQUEST.unpack(request)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        os.close(ended)
        os.dup2(audio, 0)
        os.dup2(output, 1)
        os.closerange(3, 64)
        answer(max_seconds, seconds, int(memory_mb), int(target))
        return
    os.close(output)
    late, end = False, time.monotonic() + seconds
    reader = select.poll()
    reader.register(ended, 0)  # it tells only that nobody reads what is written there

    def look(*_: object) -> None:
        nonlocal late
        late = time.monotonic() >= end
        if late or reader.poll(0):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, min(POLL, seconds), POLL)
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(ended, ENDED.pack(os.waitstatus_to_exitcode(status), late))


def serve() -> None:
    """Answer requests until the process that sends them closes its socket."""
    av.logging.set_level(av.logging.PANIC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; its end is seen at the socket
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    with socket.socket(fileno=0) as connection:
        while True:
            request, files, *_ = socket.recv_fds(connection, REQUEST.size, 3)
            if len(files) < 3:
                return
            if not os.fork():
                try:
                    watch(request, *files)
                finally:
                    os._exit(0)
            for file in files:
                os.close(file)


if __name__ == "__main__":
    serve()
