"""Where the sound of a file stands in time.

Part of the process that decodes (`hdmole/speech/_decode.py`). FFmpeg gives every packet a time.
That of some containers is a count of the packets that were found, which is wrong behind damage.
Here the time comes from the file.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

LATE, EARLY = 0.015, 0.02  # seconds by which a frame may miss its time before silence is put in or an overlap cut out
LIVE = 60.0  # seconds; a file that begins later than this is a piece of a longer stream, whose clock began before it
BIT_RATES = {  # kbit/s of MPEG layer 3, by the number in the header
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
}
RATES = (44_100, 48_000, 32_000)  # Hz of MPEG 1; MPEG 2 has half, MPEG 2.5 a quarter
DELAY = 1105  # samples that nearly every MP3 begins with: LAME's delay of 576, and the decoder's
AAC_DELAY = 1024  # samples that AAC begins with: the first frame only leads in
LONGEST_DELAY = 3000  # samples; FFmpeg writes more where it knows none
BEGINNING, WINDOW = 24, 2**20  # bytes of a packet that are looked for, and where
MOST_TAGS = 10  # before an MP3's sound
FIRST = 10  # packets whose mean size says how many are missing before them


class Source(Protocol):
    """The bytes of a recording."""

    def read(self, size: int) -> bytes: ...

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int: ...


class Page(NamedTuple):
    """A page of an Ogg file."""

    at: int  # first byte
    begins: bool  # whether a stream begins with it
    last: bool  # whether a stream ends with it
    granule: int | None  # the time at which the last packet that ends on it ends; None if none does
    missing: bool  # whether pages before it are missing
    whole: bool  # whether its last packet ends on it


def pages(source: Source, size: int) -> Iterator[Page]:
    """The pages of an Ogg file of `size` bytes. There are none in any other file."""
    at, following = 0, dict[int, int]()
    while at + 27 <= size:
        source.seek(at)
        head = source.read(282)
        if head[:4] != b"OggS" or len(head) < 27 + head[26]:
            if at == 0:
                break
            at += 1  # damaged: on to the next page
            source.seek(at)
            step = source.read(65536).find(b"OggS")
            at += step if step >= 0 else 65533
            continue
        flags, granule, serial, number = struct.unpack_from("<BqII", head, 5)
        lacing = head[27 : 27 + head[26]]
        missing = following.get(serial, number) != number
        following[serial] = number + 1
        yield Page(at, bool(flags & 2), bool(flags & 4), None if granule == -1 else granule, missing, lacing[-1:] < b"\xff")
        at += 27 + len(lacing) + sum(lacing)


def links(source: Source, size: int) -> list[tuple[int, int]]:
    """Beginning and end of the recordings that follow each other in an Ogg file.

    Any other file is one recording of all its bytes.
    """
    found, headers = [], False
    for page in pages(source, size):
        if page.begins and not headers:
            found.append(page.at)
        headers = page.begins
    found = [0, *(start for start in found if start)]
    return list(zip(found, [*found[1:], size], strict=True))


class Plain:
    """FFmpeg's own times."""

    def take(self, packet: Any, frames: list[Any]) -> list[Any]:
        """Take a packet and its frames. Returns the frames, or earlier ones, with their times."""
        return frames

    def rest(self) -> list[Any]:
        """The frames that are not yet returned."""
        return []


class Bytes(Plain):
    """The time that damaged bytes stood for, in files without a clock (MP3, ADTS).

    FFmpeg counts the packets that it finds. Where bytes were passed over, as many packets are
    missing as have that size on average.
    """

    def __init__(self, container: Any, source: Source) -> None:
        self._mp3, self._counted = container.format.name == "mp3", container.format.name in ("mp3", "aac")
        self._end, self._readable, self._delay = mp3_start(source) if self._mp3 else (0, True, None)
        self._source = source if container.format.name == "aac" else None
        self._begin = (container.start_time or 0) / 1e6  # seconds, FFmpeg's
        self._sizes: deque[int] = deque(maxlen=50)
        self._first: list[tuple[Any, list[Any]]] = []  # packets before any is placed
        self._next = self._shift = 0

    def take(self, packet: Any, frames: list[Any]) -> list[Any]:
        if not frames or packet.pos is None or frames[0].pts is None or not packet.duration:
            return frames
        if self._sizes:
            lost = self._position(packet) - self._end
            missing = round(lost / float(np.mean(self._sizes)))
            if lost > 0:
                self._shift += max(0, missing * packet.duration - (packet.pts - self._next))
            return self._placed(packet, frames)
        self._first.append((packet, frames))
        return self.rest() if len(self._first) == FIRST else []

    def rest(self) -> list[Any]:
        first, self._first = self._first, []
        if not first:
            return []
        size, (packet, frames) = float(np.mean([packet.size for packet, _ in first])), first[0]
        # the last part of a packet that was cut through does not count
        missing = int((self._position(packet) - self._end) / size + 0.1)
        if self._counted and missing * packet.duration > packet.pts:
            if not self._readable:  # the frame that tells of the file is damaged; it is a packet too
                missing -= 1
            self._shift = missing * packet.duration - packet.pts
            if self._delay is not None:  # FFmpeg's beginning is wrong where the first packets do not decode
                self._shift += round((self._begin - self._delay / frames[0].sample_rate) / packet.time_base)
        placed = self._placed(packet, frames)
        for packet, frames in first[1:]:
            placed += self.take(packet, frames)
        return placed

    def _position(self, packet: Any) -> int:
        """The first byte of a packet. FFmpeg's places in ADTS leave out what it passed over."""
        if self._source is None:
            return int(packet.pos)
        beginning = bytes(packet)[:BEGINNING]
        self._source.seek(self._end)
        if self._source.read(len(beginning)) == beginning:
            return self._end
        self._source.seek(self._end)
        return self._end + max(0, self._source.read(WINDOW).find(beginning))

    def _placed(self, packet: Any, frames: list[Any]) -> list[Any]:
        for frame in frames:
            frame.pts += self._shift
        self._end, self._next = self._position(packet) + packet.size, packet.pts + packet.duration
        self._sizes.append(packet.size)
        return frames


def mp3_start(source: Source) -> tuple[int, bool, int | None]:
    """Where the sound of an MP3 begins, whether that can be read, and the delay it tells of.

    The sound begins behind the tags and behind a first frame without sound, which tells of the file
    (Xing's and LAME's). The delay is in samples: the usual one where the beginning cannot be read,
    and None where the file tells none.
    """
    at = 0
    for _ in range(MOST_TAGS):
        source.seek(at)
        head = source.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        at += 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    source.seek(at)
    head = source.read(400)
    if len(head) < 200 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return at, False, DELAY
    first, version, channels = head[1] & 0x18 == 0x18, head[1] >> 3 & 3, 1 if head[3] >> 6 == 3 else 2
    rate, kind = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kind == 3 or not 0 < rate < 15:
        return at, False, DELAY
    hertz = RATES[kind] // {3: 1, 2: 2, 0: 4}[version]
    told = 4 + ((17 if channels == 1 else 32) if first else (9 if channels == 1 else 17))
    if head[told : told + 4] not in (b"Xing", b"Info"):
        return at, True, None
    flags = head[told + 7]
    lame = told + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    delay = int.from_bytes(head[lame + 21 : lame + 24], "big") >> 12
    size = (144 if first else 72) * BIT_RATES[first][rate] * 1000 // hertz + (head[2] >> 1 & 1)
    return at + size, True, None if delay == 0 else delay + 529 if delay < LONGEST_DELAY else DELAY


class Pages(Plain):
    """Times of the packets of an Ogg file, by its pages.

    A page tells when its last packet ends. Packets that cannot be decoded take what the others
    leave. Where time is left over although all decode, packets are missing: before the page where
    pages are missing too, else before its last packet, because FFmpeg ends a page that has become
    too long.
    """

    def __init__(self, stream: Any, found: Iterator[Page]) -> None:
        self._pages = {page.at: page for page in found}
        head = stream.codec_context.extradata or b""
        self._skip = struct.unpack_from("<H", head, 10)[0] if head[:8] == b"OpusHead" and len(head) >= 12 else 0
        self._vorbis = stream.codec_context.name == "vorbis"
        self._waiting: list[tuple[Any, list[Any]]] = []  # packets of one page
        self._end: int | None = None  # of the packets of earlier pages

    def take(self, packet: Any, frames: list[Any]) -> list[Any]:
        ready = []
        if self._waiting and self._waiting[0][0].pos != packet.pos:
            ready = self.rest()
        self._waiting.append((packet, frames))
        return ready

    def rest(self) -> list[Any]:
        waiting, self._waiting = self._waiting, []
        page = self._pages.get(waiting[0][0].pos) if waiting else None
        if page is not None and all(packet.pts is not None and packet.duration for packet, frames in waiting if frames):
            self._place(page, waiting)
        return [frame for _, frames in waiting for frame in frames]

    def _place(self, page: Page, waiting: list[tuple[Any, list[Any]]]) -> None:
        lengths = [packet.duration if frames else 0 for packet, frames in waiting]
        silent = [k for k, (_, frames) in enumerate(waiting) if not frames]
        known, end = sum(lengths), None if page.granule is None else page.granule - self._skip
        if end is not None and not page.whole:
            end += lengths[-1]  # it ends on the next page
        start = self._end
        if start is None and self._vorbis:  # whose first packet has no sound; FFmpeg knows the first page
            self._end = end
            return
        if start is None:
            # what is cut off its end shortens a last page
            start = -self._skip if end is None or page.last else max(end - known, -self._skip)
        gap, before = 0 if end is None else max(0, end - start - known), 0
        if silent:
            lengths = [gap // len(silent) if k in silent else length for k, length in enumerate(lengths)]
            gap = 0
        elif not page.missing:
            before = len(waiting) - 1
        for number, ((packet, frames), length) in enumerate(zip(waiting, lengths, strict=True)):
            start += gap if number == before else 0
            for frame in frames:
                frame.pts += start - packet.pts
            start += length
        self._end = start if end is None else end


def clock(container: Any, stream: Any, source: Source, size: int) -> Plain:
    """What gives the packets of a track their times."""
    name, codec = container.format.name, stream.codec_context.name
    if name == "ogg" and codec in ("opus", "vorbis", "flac"):
        return Pages(stream, pages(source, size))
    if name in ("mp3", "aac") or (codec.startswith("mp3") and name in ("wav", "w64", "aiff", "caf")):
        return Bytes(container, source)
    return Plain()


def placed(found: Iterator[Any], begin: float, longest: float) -> Iterator[tuple[float, float, Any]]:
    """Frames with the silence before each and what is to be cut off its beginning, both in seconds.

    A frame stands at its own time. Where frames are missing there is silence. A jump forward counts
    only where the next frame confirms it, and where it stays within `longest` seconds. A jump far
    back, which the next frame confirms, is a clock that began anew.

    Args:
        found: decoded frames.
        begin: time of the file's beginning in seconds.
        longest: where the recording ends at the latest, in seconds.
    """
    clock, shift = begin, 0.0  # the end of what is placed; what is added to the times of frames

    def late(frame: Any) -> float:
        if frame.pts is None or not frame.time_base:
            return 0.0
        return float(frame.pts * frame.time_base) + shift - clock

    def follows(frame: Any, other: Any, most: float) -> bool:
        if other is None or other.pts is None:
            return True
        gap = (other.pts * other.time_base - frame.pts * frame.time_base) - frame.samples / frame.sample_rate
        return bool(-EARLY < gap < most)

    usable = (frame for frame in found if frame.samples and frame.sample_rate)
    frame = next(usable, None)
    if frame is not None and begin < 0:  # a time that a damaged packet gave, where nothing before 0 decodes
        clock = begin = max(begin, min(0.0, begin + late(frame)))
    while frame is not None:
        coming = next(usable, None)
        lateness, silence, overlap = late(frame), 0.0, 0.0
        if lateness > LATE:
            if clock + lateness - begin > longest:
                shift -= lateness  # no such time: the clock is wrong or began anew
            elif follows(frame, coming, longest):
                silence = lateness
        elif lateness < -0.5:
            if follows(frame, coming, 0.5):
                shift -= lateness
        elif lateness < -EARLY:
            overlap = min(-lateness, frame.samples / frame.sample_rate)
        clock += silence - overlap + frame.samples / frame.sample_rate
        yield silence, overlap, frame
        frame = coming
