"""Mutated audio files: each must end in audio or in one plain sentence, and soon. `make fuzz` runs it.

Usage: python tests/fuzz.py COUNT [SEED]. Files of every container are made from a sample of the demo model and changed at
random. Files that end otherwise, or take longer than `SLOWEST` seconds, are kept in build/fuzz, and the exit status is then 1.
"""

from __future__ import annotations

import io
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import soundfile

from hdmole.speech.audio import AudioError, decode

ROOT = Path(__file__).resolve().parent.parent
SLOWEST = 5.0  # seconds
# container -> FFmpeg's name of its format, codec, rate
CONTAINERS = {
    "wav": ("wav", "pcm_s16le", 16_000), "flac": ("flac", "flac", 16_000), "mp3": ("mp3", "libmp3lame", 16_000),
    "opus": ("ogg", "libopus", 48_000), "m4a": ("mp4", "aac", 16_000), "webm": ("webm", "libopus", 48_000),
    "aac": ("adts", "aac", 16_000), "aiff": ("aiff", "pcm_s16be", 16_000), "caf": ("caf", "pcm_s16le", 16_000),
    "au": ("au", "pcm_s16be", 16_000), "w64": ("w64", "pcm_s16le", 16_000),
}  # fmt: skip


def whole(container: str) -> bytes:
    """A file of this container with a second and a half of speech."""
    form, codec, rate = CONTAINERS[container]
    samples = soundfile.read(ROOT / "assets" / "demo" / "samples" / "general_1.flac", dtype="int16")[0][:24_000]
    content = io.BytesIO()
    with av.open(content, "w", format=form) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="s16", layout="mono")
        frame.sample_rate = 16_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, stream.codec_context.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return content.getvalue()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to four random changes; most are near its beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(len(changed) * rng.random() ** int(rng.integers(1, 4)))
        length = int(rng.integers(1, 64))
        match int(rng.integers(0, 6)):
            case 0:
                changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = rng.bytes(length)
            case 3:
                del changed[max(at, 1) :]
            case 4:  # sizes and times that cannot be
                value = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
                changed[at : at + 4] = value.to_bytes(4, ["little", "big"][int(rng.integers(0, 2))])
            case _:
                other = int(rng.integers(0, len(changed)))
                changed[at:at] = changed[other : other + 16 * length]
    return bytes(changed)


def outcome(data: bytes) -> tuple[str, float]:
    """What decoding ends in, "audio" or the code of a refusal, and the seconds that it took. Any other error is raised."""
    started = time.monotonic()
    try:
        sound = decode(data, "fuzzed", timeout=30)
    except AudioError as error:
        assert "\n" not in str(error)
        return error.code, time.monotonic() - started
    assert np.isfinite(sound.samples).all() and np.abs(sound.samples).max() <= 1
    return "audio", time.monotonic() - started


def main(count: int, seed: int) -> int:
    originals, kept = {name: whole(name) for name in CONTAINERS}, ROOT / "build" / "fuzz"
    ends, bad = Counter[str](), 0
    for number in range(count):
        name = list(CONTAINERS)[number % len(CONTAINERS)]
        data = mutated(originals[name], np.random.default_rng([seed, number]))
        try:
            end, seconds = outcome(data)
            wrong = "slow" if seconds > SLOWEST else ""
        except Exception as error:
            end, wrong = "wrong", repr(error)
        ends[end] += 1
        if wrong:
            bad += 1
            kept.mkdir(parents=True, exist_ok=True)
            (kept / f"{seed}-{number}.{name}").write_bytes(data)
            print(f"build/fuzz/{seed}-{number}.{name}: {wrong}", flush=True)
    print(f"{count} files: " + ", ".join(f"{end} {times}" for end, times in ends.most_common()))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
