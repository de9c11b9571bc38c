"""Every container and codec, every kind of bad input, and a process that goes on afterwards."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from driver import wait_until
from tiny import speech_like

from hdmole.speech import audio
from hdmole.speech.audio import SAMPLE_RATE, Audio, AudioError, decode
from hdmole.speech.stopping import Cancelled, asking

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def tone(seconds: float, rate: int, channels: int = 1, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """(channels, seconds * rate) float32: the same sine in every channel."""
    wave = amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def encode(data: np.ndarray, rate: int, container: str, codec: str, video: bool = False, sound: bool = True) -> bytes:
    """The bytes of a file with `data` (channels, samples) in it, made by FFmpeg's own encoders."""
    buffer = io.BytesIO()
    layout = LAYOUTS[len(data)]
    with av.open(buffer, "w", format=container) as output:
        picture = output.add_stream("mpeg4", rate=10) if video else None
        options = {"strict": "-2"} if codec == "vorbis" else {}
        stream = output.add_stream(codec, rate=rate, layout=layout, options=options) if sound else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            for index in range(10):
                image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 25 * index, np.uint8), format="rgb24")
                image.pts, image.time_base = index, Fraction(1, 10)
                output.mux(picture.encode(image))
            output.mux(picture.encode(None))
        if stream is not None:
            resampler = av.AudioResampler(
                format=stream.codec_context.format or "s16", layout=layout, rate=rate,
                frame_size=stream.codec_context.frame_size or None,
            )  # fmt: skip
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(stream.encode(part))
            output.mux(stream.encode(None))
    return buffer.getvalue()


def wav(payload: bytes, rate: int = 16_000, channels: int = 1, code: int = 1, bits: int = 16, claim: int = -1) -> bytes:
    """A WAV file by hand: format `code` 1 is PCM, 3 float; `claim` is the size its header claims for the data."""
    step = channels * bits // 8
    body = struct.pack("<4sIHHIIHH", b"fmt ", 16, code, channels, rate, rate * step % 2**32, step % 2**16, bits)
    size = len(payload) if claim < 0 else claim
    body += struct.pack("<4sI", b"data", size) + payload
    return struct.pack("<4sI4s", b"RIFF", min(4 + len(body) if claim < 0 else claim, 2**32 - 1), b"WAVE") + body


def pitch(audio: Audio) -> float:
    """The strongest frequency in the middle of the audio, in Hz."""
    middle = audio.samples[len(audio.samples) // 4 : 3 * len(audio.samples) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), n=SAMPLE_RATE))
    return float(np.argmax(spectrum))


KINDS = [
    # container, codec, rates, channels, container and codec found
    ("wav", "pcm_s16le", (8000, 11025, 16000, 44100, 48000), (1, 2, 6), "wav", "pcm_s16le"),
    ("wav", "pcm_s24le", (44100,), (2,), "wav", "pcm_s24le"),
    ("wav", "pcm_f32le", (48000,), (1,), "wav", "pcm_f32le"),
    ("wav", "pcm_u8", (8000,), (1,), "wav", "pcm_u8"),
    ("wav", "pcm_mulaw", (8000,), (1,), "wav", "pcm_mulaw"),
    ("flac", "flac", (11025, 44100), (1, 6), "flac", "flac"),
    ("mp3", "libmp3lame", (8000, 16000, 44100), (1, 2), "mp3", "mp3float"),
    ("ogg", "libopus", (16000, 48000), (1, 2, 6), "ogg", "opus"),
    ("ogg", "vorbis", (44100,), (2,), "ogg", "vorbis"),
    ("ogg", "flac", (16000,), (1,), "ogg", "flac"),
    ("ipod", "aac", (11025, 44100), (1, 2), "mp4", "aac"),
    ("ipod", "alac", (44100,), (2,), "mp4", "alac"),
    ("mp4", "aac", (48000,), (1, 6), "mp4", "aac"),
    ("webm", "libopus", (48000,), (1, 2), "webm", "opus"),
    ("adts", "aac", (44100,), (1,), "aac", "aac"),
]


@pytest.mark.parametrize(
    ("container", "codec", "rate", "channels", "found_container", "found_codec"),
    [(kind[0], kind[1], rate, number, *kind[4:]) for kind in KINDS for rate in kind[2] for number in kind[3]],
)
def test_every_container_codec_rate_and_number_of_channels(
    container: str, codec: str, rate: int, channels: int, found_container: str, found_codec: str
) -> None:
    audio = decode(encode(tone(1.0, rate, channels), rate, container, codec), "clip.xyz")
    assert audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    assert audio.seconds == len(audio.samples) / SAMPLE_RATE
    assert audio.seconds == pytest.approx(1.0, abs=0.12)  # lossy codecs work in whole frames
    assert pitch(audio) == pytest.approx(440, abs=2)
    middle = audio.samples[4000:12000]
    kept = 5 / 6 if (codec, channels) == ("aac", 6) else 1  # AAC takes all but the bass out of the sixth channel
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2) * kept, rel=0.07)
    assert (audio.format, audio.codec) == (found_container, found_codec)
    assert (audio.channels, audio.source) == (channels, "clip.xyz")
    assert audio.clipped <= (0.002 if codec == "aac" else 0)  # the encoder overshoots where the tone sets in
    assert audio.original_rate == (48000 if codec == "libopus" else rate)


def test_samples_are_exact_at_16_khz_and_in_time_at_other_rates() -> None:
    exact = tone(0.5, 16_000)[0]
    audio = decode(wav((exact * 32767).astype("<i2").tobytes()))
    np.testing.assert_allclose(audio.samples, exact, atol=1e-4)
    for rate in (8000, 44_100, 48_000):
        audio = decode(wav((tone(0.5, rate)[0] * 32767).astype("<i2").tobytes(), rate))
        assert len(audio.samples) == pytest.approx(8000, abs=1)
        np.testing.assert_allclose(audio.samples[200:7800], exact[200:7800], atol=2e-3)


def test_channels_are_averaged() -> None:
    both = np.stack([tone(0.5, 16_000)[0], np.zeros(8000, np.float32)])
    audio = decode(encode(both, 16_000, "wav", "pcm_s16le"))
    np.testing.assert_allclose(audio.samples, both.mean(axis=0), atol=1e-4)
    opposite = decode(encode(np.stack([both[0], -both[0]]), 16_000, "wav", "pcm_s16le"))  # they would cancel each other
    np.testing.assert_allclose(opposite.samples, both[0], atol=1e-4)


def test_content_decides_and_never_the_extension(tmp_path: Path) -> None:
    liar = tmp_path / "speech.wav"
    liar.write_bytes(encode(tone(0.5, 44_100), 44_100, "mp3", "libmp3lame"))
    audio = decode(liar)
    assert (audio.format, audio.source) == ("mp3", "speech.wav")
    other = tmp_path / "song.mp3"
    other.write_bytes(encode(tone(0.5, 44_100), 44_100, "flac", "flac"))
    assert decode(str(other)).format == "flac"


def test_sound_is_taken_from_a_video_and_a_video_without_sound_is_refused() -> None:
    audio = decode(encode(tone(1.0, 48_000, 2), 48_000, "mp4", "aac", video=True))
    assert pitch(audio) == pytest.approx(440, abs=2)
    with pytest.raises(AudioError, match="no sound track"):
        decode(encode(tone(1.0, 48_000), 48_000, "mp4", "aac", video=True, sound=False))


def test_clipped_share() -> None:
    loud = np.clip(tone(0.5, 16_000, amplitude=2.0), -1, 1)
    share = np.mean(np.abs(loud) >= 0.999)
    assert decode(encode(loud, 16_000, "wav", "pcm_s16le")).clipped == pytest.approx(share, abs=1e-3)


def test_nan_and_infinity_in_floating_point_audio() -> None:
    samples = tone(0.5, 16_000)[0]
    samples[100], samples[200], samples[300] = np.nan, np.inf, 1e30
    audio = decode(wav(samples.astype("<f4").tobytes(), code=3, bits=32))
    assert np.isfinite(audio.samples).all() and np.abs(audio.samples).max() <= 1
    assert audio.samples[100] == 0 and audio.samples[200] == 1


def test_a_cut_off_file_gives_what_there_is() -> None:
    for container, codec in (("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("ogg", "libopus"), ("webm", "libopus")):
        whole = encode(tone(2.0, 48_000), 48_000, container, codec)
        audio = decode(whole[: len(whole) * 6 // 10])
        assert 0.4 < audio.seconds < 1.9, container
        assert pitch(audio) == pytest.approx(440, abs=2)


def test_a_damaged_middle_does_not_stop_the_rest() -> None:
    whole = bytearray(encode(tone(4.0, 44_100), 44_100, "mp3", "libmp3lame"))
    whole[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    assert decode(bytes(whole)).seconds > 3


def test_a_wav_written_to_a_pipe_that_claims_hours() -> None:
    payload = (tone(1.0, 16_000)[0] * 32767).astype("<i2").tobytes()
    for claim in (0x7FFFFFFF, 0xFFFFFFFF):
        assert decode(wav(payload, claim=claim)).seconds == pytest.approx(1.0, abs=0.01)


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000100ffff03000006"
    "0005576faed10000000049454e44ae426082"
)
NOT_AUDIO = {
    "text": b"The quick brown fox jumps over the lazy dog. " * 200,
    "markup": b"<!doctype html><html><body>not found</body></html>",
    "picture": PNG,
    "archive": b"PK\x03\x04" + bytes(4000),
    "zeros": bytes(50_000),
    "one byte": b"R",
    "random": np.random.default_rng(0).bytes(100_000),
    "header only": b"RIFF\x00\x00\x00\x00WAVE",
    "wav without data": wav(b""),
    "half an m4a": encode(tone(1.0, 44_100), 44_100, "ipod", "aac")[:3000],
    "start of a flac": encode(tone(1.0, 44_100), 44_100, "flac", "flac")[:60],
    "start of an ogg": encode(tone(1.0, 48_000), 48_000, "ogg", "libopus")[:40],
}


@pytest.mark.parametrize("kind", NOT_AUDIO)
def test_what_is_not_audio_or_broken_is_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(AudioError, match=r"is not audio|is damaged|is too short") as caught:
        decode(NOT_AUDIO[kind], "talk.wav")
    message = str(caught.value)
    assert message.startswith("talk.wav ") and message.endswith(".") and "\n" not in message and len(message) < 160


def test_playlists_open_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp3"
    secret.write_bytes(encode(tone(1.0, 44_100), 44_100, "mp3", "libmp3lame"))
    for index, text in enumerate(
        (
            f"ffconcat version 1.0\nfile '{secret}'\n",
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
            f"[playlist]\nFile1={secret}\n",
            f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\na={secret}\n",
        )
    ):
        playlist = tmp_path / f"list{index}.m3u8"
        playlist.write_text(text)
        with pytest.raises(AudioError, match="is not audio"):
            decode(playlist)


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    for path, message, code in (
        (tmp_path / "absent.wav", "absent.wav does not exist", "absent"),
        (tmp_path / "{x}.wav", "{x}.wav does not exist", "absent"),
        (tmp_path / "empty.wav" / "below.wav", "below.wav does not exist", "absent"),
        (tmp_path, "is a folder", "folder"),
        (tmp_path / "empty.wav", r"empty.wav is empty \(0 bytes\)", "empty"),
        (tmp_path / "pipe.wav", "not a regular file", "not_a_file"),
        ("/dev/zero", "not a regular file", "not_a_file"),
        ("x" * 5000, "cannot be opened", "not_opened"),
        ("null\0byte.wav", r"null\?byte.wav cannot be opened", "not_opened"),
        ("https://example.com/speech.mp3", "does not exist", "absent"),
    ):
        with pytest.raises(AudioError, match=message) as error:
            decode(path)
        assert error.value.code == f"audio.{code}"
    with pytest.raises(AudioError, match="The recording is empty"):
        decode(b"")
    with pytest.raises(TypeError, match="path or bytes"):
        decode(3)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "private.wav"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(AudioError, match="may not be read"):
        decode(path)


def test_silence_and_shortness() -> None:
    quiet = tone(0.5, 16_000, amplitude=0.0005)[0]  # -66 dBFS
    with pytest.raises(AudioError, match="is silent"):
        decode(wav((quiet * 32767).astype("<i2").tobytes()))
    with pytest.raises(AudioError, match="is silent"):
        decode(wav(bytes(32_000)))
    assert decode(wav((tone(0.5, 16_000, amplitude=0.002)[0] * 32767).astype("<i2").tobytes())).seconds == 0.5
    short = (tone(0.09, 16_000)[0] * 32767).astype("<i2").tobytes()
    with pytest.raises(AudioError, match=r"too short \(0.09 s\)"):
        decode(wav(short))


def half_an_hour_of_silence() -> bytes:
    """31 minutes of sound in a FLAC of less than half a megabyte."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as output:
        stream = output.add_stream("flac", rate=8000, layout="mono")
        stream.codec_context.format = "s16"
        silence = np.zeros((1, 4608), np.int16)
        for index in range(31 * 60 * 8000 // 4608):
            frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 8000, index * 4608
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def test_too_long_is_refused_by_the_claim_and_by_what_decodes() -> None:
    with pytest.raises(AudioError, match="longer than the 1 seconds allowed"):
        decode(encode(tone(2.0, 16_000), 16_000, "mp3", "libmp3lame"), max_seconds=1)
    assert decode(wav((tone(1.0, 16_000)[0] * 32767).astype("<i2").tobytes()), max_seconds=1).seconds == 1
    bomb = bytearray(half_an_hour_of_silence())
    assert len(bomb) < 2**19
    with pytest.raises(AudioError, match="longer than the 1800 seconds allowed"):
        decode(bytes(bomb))
    # The total number of samples: 36 bits from byte 21 of STREAMINFO; 0 says "not known".
    bomb[21] &= 0xF0
    bomb[22:26] = bytes(4)
    with pytest.raises(AudioError, match="longer than the 60 seconds allowed"):
        decode(bytes(bomb), max_seconds=60)


def test_too_much_time_and_memory() -> None:
    minute = encode(tone(60, 16_000), 16_000, "flac", "flac")
    start = time.monotonic()
    with pytest.raises(AudioError, match=r"within 0\.01 seconds"):
        decode(minute, timeout=0.01)
    assert time.monotonic() - start < 5
    with pytest.raises(AudioError, match="more than the 8 MB of memory"):
        decode(minute, memory_mb=8)
    assert decode(minute).seconds == pytest.approx(60, abs=0.01)


# the process that decodes, with another function in place of its `decode`
CHILD = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("child", {str(Path(audio.__file__).with_name("_decode.py"))!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
def decode(*limits):
    INSTEAD
child.decode = decode
child.serve()
"""


def test_a_decoder_that_hangs_or_crashes_leaves_the_process_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = wav((tone(0.5, 16_000)[0] * 32767).astype("<i2").tobytes())
    script = tmp_path / "child.py"
    for content, message, code in (
        (CHILD.replace("INSTEAD", "while True: pass"), "within 1 seconds", "time"),
        (CHILD.replace("INSTEAD", "os.abort()"), "is damaged", "damaged"),
        (CHILD.replace("INSTEAD", "os.kill(os.getpid(), 9)"), "of memory", "memory"),
        (CHILD.replace("INSTEAD", "os.kill(os.getpid(), 24)"), "within 1 seconds", "time"),
        (CHILD.replace("INSTEAD", "raise RuntimeError('it is\\x07 unwell')"), r"unwell\); convert it to WAV", "decoder_failed"),
        ("raise RuntimeError('it does not start')", r"\(no message\)", "decoder_failed"),
    ):
        script.write_text(content)
        server = audio._Server(script)
        with monkeypatch.context() as patch:
            patch.setattr("hdmole.speech.audio._server", server)
            with pytest.raises(AudioError, match=message) as error:
                decode(good, timeout=1)
            assert error.value.code == f"audio.{code}"
        server.close()
    assert decode(good).seconds == 0.5


def test_decoding_ends_where_nobody_wants_the_file_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("INSTEAD", "while True: pass"))
    server = audio._Server(script)
    monkeypatch.setattr("hdmole.speech.audio._server", server)
    before, asked = len(os.listdir("/proc/self/fd")), time.monotonic()

    def wanted() -> None:
        if time.monotonic() - asked > 0.5:
            raise Cancelled

    with asking(wanted), pytest.raises(Cancelled):
        decode(wav(bytes(32_000)), timeout=60)
    assert time.monotonic() - asked < 5 and len(os.listdir("/proc/self/fd")) == before + 1  # the socket of the server
    assert server._process is not None
    children = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children")
    wait_until(lambda: not children.read_text(), 10)  # nor does anything go on there
    server.close()


def test_one_process_decodes_file_after_file_and_is_started_again_when_it_ends() -> None:
    good = wav((tone(0.5, 16_000)[0] * 32767).astype("<i2").tobytes())
    server = audio._server
    with pytest.raises(AudioError, match="not audio"):
        decode(b"no audio at all")
    assert server._process is not None
    first = server._process
    with pytest.raises(AudioError, match="of memory"):
        decode(encode(tone(60, 16_000), 16_000, "flac", "flac"), memory_mb=8)
    assert decode(good).seconds == 0.5 and server._process is first
    first.kill()
    assert decode(good).seconds == 0.5 and server._process is not first


def test_no_process_and_no_descriptor_is_left() -> None:
    good = wav((tone(0.5, 16_000)[0] * 32767).astype("<i2").tobytes())
    decode(good)
    assert audio._server._process is not None
    children = Path(f"/proc/{audio._server._process.pid}/task/{audio._server._process.pid}/children")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        decode(good)
    with pytest.raises(AudioError, match="within"):
        decode(encode(tone(60, 16_000), 16_000, "flac", "flac"), timeout=0.01)
    assert len(os.listdir("/proc/self/fd")) == before
    wait_until(lambda: not children.read_text(), 10)  # the one that waits ends just after its answer


def test_mutated_files_never_hang_and_never_raise_anything_else() -> None:
    generator = np.random.default_rng(7)
    originals = [
        encode(tone(0.3, 16_000), 16_000, container, codec)
        for container, codec in (("wav", "pcm_s16le"), ("flac", "flac"), ("ipod", "aac"), ("webm", "libopus"))
    ]
    # A header like the 157 bytes that hang libsndfile: chunk sizes that point nowhere.
    files = [wav(bytes(113), claim=0xFFFFFFF0), wav(b"\x01" * 113, channels=0), wav(b"\x01" * 113, rate=0)]
    files += [wav(b"\x01" * 113, bits=0), wav(b"\x01" * 4000, rate=2**31 - 1), wav(b"\x01" * 4000, channels=65_535)]
    for original in originals:
        for _ in range(4):
            mutant = np.frombuffer(original, np.uint8).copy()
            where = generator.integers(0, min(len(mutant), 400), 8)
            mutant[where] = generator.integers(0, 256, 8)
            files.append(mutant.tobytes())
    outcomes = set()
    for file in files:
        start = time.monotonic()
        try:
            outcomes.add(type(decode(file, timeout=10)).__name__)
        except AudioError as error:
            assert "within" not in str(error)
            outcomes.add("AudioError")
        assert time.monotonic() - start < 10
    assert outcomes == {"Audio", "AudioError"}


def test_threads_decode_at_once() -> None:
    files = {f: encode(tone(0.5, 16_000, frequency=f), 16_000, "flac", "flac") for f in (300, 600, 900, 1200)}
    heard: dict[int, float] = {}

    def work(frequency: int) -> None:
        heard[frequency] = pitch(decode(files[frequency]))

    threads = [threading.Thread(target=work, args=(frequency,)) for frequency in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert heard == pytest.approx({frequency: frequency for frequency in files}, abs=3)


def test_neither_hdmole_audio_nor_the_decoder_imports_torch(tmp_path: Path) -> None:
    code = "import sys, hdmole.speech.audio; assert 'torch' not in sys.modules and 'av' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
    code = f"import sys, runpy; runpy.run_path({str(root / 'hdmole' / 'speech' / '_decode.py')!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, timeout=60)


def test_a_process_with_many_open_files_decodes(tmp_path: Path) -> None:
    """Files and pipes then have numbers that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip("this machine allows fewer open files")
    soundfile.write(tmp_path / "a.wav", speech_like(0.5, 1), 16_000)
    with open(os.devnull) as nothing, ExitStack() as opened:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1500, hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.callback(os.close, os.dup(nothing.fileno()))
        assert decode(tmp_path / "a.wav").seconds == pytest.approx(0.5)
