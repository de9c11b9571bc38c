"""Where sound stands in time, which track and which channels are read: files as people have them."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from hdmole.speech.audio import SAMPLE_RATE, Audio, AudioError, decode

RATE = 48_000


def bursts_at(*seconds: float, length: float, rate: int = RATE) -> np.ndarray:
    """(1, samples) of silence with a tone of 0.2 s at each of these times."""
    data = np.zeros((1, round(length * rate)), np.float32)
    for start in seconds:
        k = np.arange(round(0.2 * rate))
        data[0, round(start * rate) : round(start * rate) + len(k)] = 0.5 * np.sin(2 * np.pi * 1000 * k / rate)
    return data


def onsets(audio: Audio) -> list[float]:
    """Seconds at which the tones of `bursts_at` begin."""
    loud = np.flatnonzero(np.abs(audio.samples) > 0.05) / SAMPLE_RATE
    return [float(t) for t, before in zip(loud, [-9.0, *loud[:-1]], strict=True) if t - before > 0.2]


def mux(
    container: str, codec: str, tracks: list[np.ndarray], rate: int = RATE, late: float = 0.0,
    lost: tuple[float, float] = (0.0, 0.0), spoilt: tuple[float, float] = (0.0, 0.0),
) -> bytes:  # fmt: skip
    """A file of mono tracks: `late` by seconds, without the packets in `lost`, with nonsense in those in `spoilt`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        streams = [output.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        for stream, data in zip(streams, tracks, strict=True):
            context = stream.codec_context
            resampler = av.AudioResampler(
                format=context.format or "s16", layout="mono", rate=rate, frame_size=context.frame_size or None
            )
            frame = av.AudioFrame.from_ndarray(data, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                for packet in stream.encode(part):
                    at = float(packet.pts * packet.time_base)
                    if lost[0] <= at < lost[1]:
                        continue
                    if spoilt[0] <= at < spoilt[1]:
                        pts, dts, base = packet.pts, packet.dts, packet.time_base
                        packet = av.Packet(b"\xff" * packet.size)
                        packet.pts, packet.dts, packet.time_base, packet.stream = pts, dts, base, stream
                    packet.pts += round(late / packet.time_base)
                    packet.dts = packet.pts
                    output.mux(packet)
    return buffer.getvalue()


CLOCKED = [
    ("webm", "libopus"), ("ogg", "libopus"), ("ogg", "flac"), ("mp4", "aac"), ("mov", "pcm_s16le"), ("matroska", "flac"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), CLOCKED)
def test_missing_packets_leave_silence(container: str, codec: str) -> None:
    data = bursts_at(0.5, 1.5, 6.0, 7.0, length=8.0)
    audio = decode(mux(container, codec, [data], lost=(2.0, 5.5)))
    assert onsets(audio) == pytest.approx([0.5, 1.5, 6.0, 7.0], abs=0.02)
    assert audio.seconds == pytest.approx(8.0, abs=0.04)


@pytest.mark.parametrize(("container", "codec"), CLOCKED)
def test_a_late_start_is_silence(container: str, codec: str) -> None:
    audio = decode(mux(container, codec, [bursts_at(0.5, 2.5, length=3.0)], late=1.5))
    assert onsets(audio) == pytest.approx([2.0, 4.0], abs=0.02)


def test_a_piece_of_a_stream_that_began_long_ago_begins_at_its_first_frame() -> None:
    audio = decode(mux("webm", "libopus", [bursts_at(0.5, 2.5, length=3.0)], late=5000.0))
    assert onsets(audio) == pytest.approx([0.5, 2.5], abs=0.02)
    assert audio.seconds == pytest.approx(3.0, abs=0.03)


@pytest.mark.parametrize(("container", "codec"), [("webm", "libopus"), ("mp4", "aac"), ("matroska", "flac")])
def test_packets_that_cannot_be_decoded_leave_the_rest_where_it_was(container: str, codec: str) -> None:
    data = bursts_at(0.5, 1.5, 2.5, 3.5, 4.5, length=5.0)
    audio = decode(mux(container, codec, [data], spoilt=(1.9, 3.2)))
    found = onsets(audio)
    assert [*found[:2], *found[-2:]] == pytest.approx([0.5, 1.5, 3.5, 4.5], abs=0.02)
    assert audio.seconds == pytest.approx(5.0, abs=0.04)


def noisy(rate: int = RATE) -> np.ndarray:
    """Tones at 0.5, 1.5, 3.5 and 4.5 s in noise, so that all packets of a codec have much the same size."""
    noise = np.random.default_rng(0).normal(0, 0.01, (1, 5 * rate)).astype(np.float32)
    return np.asarray(bursts_at(0.5, 1.5, 3.5, 4.5, length=5.0, rate=rate) + noise)


CLOCKLESS = [("mp3", "libmp3lame", RATE), ("mp3", "libmp3lame", 16_000), ("adts", "aac", RATE), ("wav", "libmp3lame", RATE)]


@pytest.mark.parametrize(("container", "codec", "rate"), CLOCKLESS)
@pytest.mark.parametrize("share", [0.01, 0.2])
def test_damaged_bytes_take_the_time_that_they_stood_for(container: str, codec: str, rate: int, share: float) -> None:
    data = mux(container, codec, [noisy(rate)], rate)
    size = round(share * len(data))
    begin = len(data) // 2 - size // 2
    late = 1105 / rate if container == "wav" else 0.0  # a WAV file does not tell of the encoder's delay
    for damage in (bytes(size), np.random.default_rng(1).bytes(size)):
        audio = decode(data[:begin] + damage + data[begin + size :])
        found = np.array(onsets(audio)) - late
        assert [*found[:2], *found[-2:]] == pytest.approx([0.5, 1.5, 3.5, 4.5], abs=0.022)


@pytest.mark.parametrize(("container", "codec", "rate"), CLOCKLESS[:3])
@pytest.mark.parametrize("part", [slice(0, 1), slice(0, 7), slice(60, 64)])
def test_damaged_packets_take_their_time_also_at_the_beginning(container: str, codec: str, rate: int, part: slice) -> None:
    data = bytearray(mux(container, codec, [noisy(rate)], rate))
    with av.open(io.BytesIO(data)) as opened:
        packets = [(packet.pos, packet.size) for packet in opened.demux(audio=0) if packet.size]
    for at, size in packets[part]:
        data[at : at + size] = b"\xff" * size
    found = onsets(decode(bytes(data)))
    assert [found[0], *found[-2:]] == pytest.approx([0.5, 3.5, 4.5], abs=0.02)


def test_an_mp3_whose_tags_and_first_packets_are_damaged_begins_where_it_began() -> None:
    data = mux("mp3", "libmp3lame", [noisy()])
    assert onsets(decode(bytes(1500) + data[1500:])) == pytest.approx([0.5, 1.5, 3.5, 4.5], abs=0.02)
    with av.open(io.BytesIO(data)) as opened:  # one that begins within a packet is only shorter
        at = next(packet.pos for packet in opened.demux(audio=0) if packet.pts and packet.pts * packet.time_base >= 0.24)
    assert onsets(decode(data[at + 50 :])) == pytest.approx([0.26 - 0.024, 1.26 - 0.024, 3.26 - 0.024, 4.26 - 0.024], abs=0.03)


@pytest.mark.parametrize("lost", [(2.0, 4.4), (2.3, 4.4), (2.7, 3.4)])
def test_a_gap_inside_a_page_of_an_ogg_file_lies_before_its_last_packet(lost: tuple[float, float]) -> None:
    """FFmpeg ends a page with the packet that makes it longer than a second."""
    data = mux("ogg", "libopus", [bursts_at(0.5, 1.5, 2.05, 4.6, 5.6, length=6.0)], lost=lost)
    expected = [0.5, 1.5, *([2.05] if lost[0] > 2.25 else []), 4.6, 5.6]
    assert onsets(decode(data)) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("codec", "page"), [("libopus", 4), ("flac", 3), ("flac", -2)])
def test_a_missing_or_damaged_page_of_an_ogg_file_is_silence(codec: str, page: int) -> None:
    data = mux("ogg", codec, [bursts_at(0.5, 5.2, length=6.0)])
    starts = [k for k in range(len(data)) if data[k : k + 4] == b"OggS"]
    begin, end = starts[page], [*starts, len(data)][starts.index(starts[page]) + 1]
    damaged = data[: begin + 100] + bytes(100) + data[begin + 200 :]
    for broken in (data[:begin] + data[end:], damaged):
        audio = decode(broken)
        found = onsets(audio)
        assert found[0] == pytest.approx(0.5, abs=0.02) and (page == -2 or found[-1] == pytest.approx(5.2, abs=0.02))
        assert audio.seconds == pytest.approx(6.0, abs=0.03)


def test_packets_of_opus_that_claim_nonsense_leave_the_rest_where_it_was() -> None:
    audio = decode(mux("ogg", "libopus", [bursts_at(0.5, 1.5, 3.5, 4.5, length=5.0)], spoilt=(2.0, 3.2)))
    assert onsets(audio) == pytest.approx([0.5, 1.5, 3.5, 4.5], abs=0.02) and audio.seconds == pytest.approx(5.0, abs=0.04)


def test_a_block_with_the_time_of_another_moves_nothing() -> None:
    """Zeros in a WebM file make a block that says it is the first."""
    data = mux("webm", "libopus", [bursts_at(0.5, 1.5, 2.2, 3.5, 4.3, 5.5, length=6.0)])
    begin, end = int(len(data) * 0.49), int(len(data) * 0.51)
    audio = decode(data[:begin] + bytes(end - begin) + data[end:])
    assert audio.seconds == pytest.approx(6.0, abs=0.04) and onsets(audio)[-1] == pytest.approx(5.5, abs=0.02)


def test_blocks_of_adpcm_that_cannot_be_decoded_are_silence() -> None:
    audio = decode(mux("wav", "adpcm_ima_wav", [bursts_at(0.5, 1.5, 3.5, length=4.0)], spoilt=(2.0, 2.6)))
    assert onsets(audio) == pytest.approx([0.5, 1.5, 3.5], abs=0.02)


def test_a_damaged_first_packet_of_an_ogg_file_puts_no_silence_before_the_rest() -> None:
    """Its nonsense claims a length of 2.5 s, by which FFmpeg moves the beginning to before 0."""
    audio = decode(mux("ogg", "libopus", [bursts_at(0.5, 1.5, length=2.0)], spoilt=(-0.1, 0.01)))
    assert onsets(audio) == pytest.approx([0.5, 1.5], abs=0.02)
    assert audio.seconds == pytest.approx(2.0, abs=0.03)


def test_links_of_an_ogg_file_follow_each_other_whatever_their_rate() -> None:
    for codec, rates in (("libopus", (48_000, 48_000)), ("flac", (48_000, 16_000))):
        links = [mux("ogg", codec, [bursts_at(0.5, 1.5, length=2.0, rate=rate)], rate) for rate in rates]
        audio = decode(b"".join(links))
        assert onsets(audio) == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.02)
        assert audio.seconds == pytest.approx(4.0, abs=0.03)


def test_a_length_guessed_from_the_bit_rate_refuses_nothing() -> None:
    """A quiet beginning at a few bits a second makes FFmpeg expect hours of what is 24 s."""
    quiet, loud = np.zeros((1, 20 * RATE), np.float32), np.random.default_rng(0).normal(0, 0.2, (1, 4 * RATE)).astype(np.float32)
    data = mux("adts", "aac", [np.concatenate([quiet, loud], axis=1)])
    with av.open(io.BytesIO(data)) as container:
        assert container.duration and container.duration / av.time_base > 60
    assert decode(data, max_seconds=30).seconds == pytest.approx(24, abs=0.1)
    with pytest.raises(AudioError) as error:
        decode(data, max_seconds=20)
    assert error.value.code == "audio.too_long"


def test_where_the_first_track_is_silent_another_is_read() -> None:
    silent, spoken = np.zeros((1, 3 * RATE), np.float32), bursts_at(0.5, 2.0, length=3.0)
    for container, codec in (("mp4", "aac"), ("matroska", "flac")):
        assert onsets(decode(mux(container, codec, [silent, spoken]))) == pytest.approx([0.5, 2.0], abs=0.02)
    with pytest.raises(AudioError) as error:
        decode(mux("matroska", "flac", [silent, silent]))
    assert error.value.code == "audio.silent"


def stereo(left: np.ndarray, right: np.ndarray) -> Audio:
    data = (np.stack([left, right], axis=1) * 32767).astype("<i2").tobytes()
    return decode(wav(data, struct.pack("<HHIIHH", 1, 2, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 16)))


def wav(data: bytes, form: bytes) -> bytes:
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def levels(samples: np.ndarray) -> np.ndarray:
    """Level of each half second."""
    return np.asarray(np.sqrt((samples[: len(samples) // 8000 * 8000].reshape(-1, 8000) ** 2).mean(1)))


@pytest.mark.parametrize("share", [1.0, 0.9, 0.6])
def test_opposite_phase_is_decided_stretch_by_stretch(share: float) -> None:
    left = np.random.default_rng(0).normal(0, 0.1, 4 * SAMPLE_RATE)
    right = share * np.where(np.arange(len(left)) < 2 * SAMPLE_RATE, left, -left)
    audio = stereo(left, right)
    assert (levels(audio.samples) > 0.75 * levels(left)).all()
    np.testing.assert_allclose(audio.samples[:SAMPLE_RATE], ((left + right) / 2)[:SAMPLE_RATE], atol=1e-4)


def test_channels_with_nothing_in_common_are_averaged() -> None:
    left, right = np.random.default_rng(0).normal(0, 0.1, (2, 2 * SAMPLE_RATE))
    np.testing.assert_allclose(stereo(left, right).samples, (left + right) / 2, atol=1e-4)
    np.testing.assert_allclose(stereo(left, 0 * left).samples, left / 2, atol=1e-4)


@pytest.mark.parametrize(("bits", "valid"), [(32, 24), (32, 20), (32, 16), (24, 20), (16, 12), (16, 8), (32, 32)])
def test_samples_of_extensible_wav_fill_their_container_from_the_top(bits: int, valid: int) -> None:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    whole = np.round(wave * 2 ** (valid - 1)).astype(np.int64) << (bits - valid)
    data = b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in whole)
    size, guid = bits // 8, bytes.fromhex("0100000000001000800000aa00389b71")
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, SAMPLE_RATE, SAMPLE_RATE * size, size, bits, 22, valid, 4) + guid
    audio = decode(wav(data, form))
    np.testing.assert_allclose(audio.samples, wave, atol=2 ** -(valid - 1))
    assert audio.clipped == 0


@pytest.mark.parametrize("way", ["a long chunk before it", "Wave64", "not extensible", "all bits said to be valid", "no size"])
def test_24_bits_in_32_however_the_file_says_it(way: str) -> None:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    data = (np.round(wave * 2**23).astype("<i4") << 8).tobytes()
    plain = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 24)
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    bits, extra = (24 if way.startswith("all") else 32), (0 if way == "no size" else 22)
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, bits, extra, 24, 0x80000000) + guid
    content = wav(data, plain if way.startswith("not") else form)
    if way.startswith("a long"):
        content = content[:12] + b"JUNK" + struct.pack("<I", 99_999) + bytes(100_000) + content[12:]
    if way == "Wave64":
        rest = bytes.fromhex("f3acd3118cd100c04f8edb8a")
        chunks = [name + rest + struct.pack("<Q", 24 + len(body)) + body for name, body in ((b"fmt ", form), (b"data", data))]
        size = struct.pack("<Q", 40 + sum(map(len, chunks)))
        content = b"".join([bytes.fromhex("726966662e91cf11a5d628db04c10000"), size, b"wave" + rest, *chunks])
    np.testing.assert_allclose(decode(content).samples, wave, atol=2**-23)


def test_wav_with_numbers_in_the_other_byte_order_is_refused_and_not_read_as_noise() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, bursts_at(0.5, length=1.0)[0], RATE, format="WAV", subtype="PCM_16", endian="BIG")
    with pytest.raises(AudioError) as error:
        decode(buffer.getvalue())
    assert error.value.code == "audio.unknown_codec"


def test_wav_of_64_bit_integers() -> None:
    wave = 0.25 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    data = np.round(wave * 2.0**63).astype("<i8").tobytes()
    audio = decode(wav(data, struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 8 * SAMPLE_RATE, 8, 64)))
    np.testing.assert_allclose(audio.samples, wave, atol=1e-6)


def test_nist_sphere_is_read() -> None:
    wave = (0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE) * 32767).astype("<i2")
    head = (
        b"NIST_1A\n   1024\nchannel_count -i 1\nsample_count -i 16000\nsample_rate -i 16000\nsample_n_bytes -i 2\n"
        b"sample_byte_format -s2 01\nsample_sig_bits -i 16\nsample_coding -s3 pcm\nend_head\n"
    )
    audio = decode(head.ljust(1024, b" ") + wave.tobytes(), "SX1.WAV")
    np.testing.assert_allclose(audio.samples, wave / 32768, atol=1e-6)
    assert audio.format == "nistsphere"


def test_a_seek_to_a_place_that_no_file_has_is_not_the_end() -> None:
    """A CAF file whose chunk after the sound claims 2**62 bytes."""
    sound = (bursts_at(0.5, length=1.0, rate=SAMPLE_RATE)[0] * 32767).astype(">i2").tobytes()
    form = struct.pack(">d4sIIIII", SAMPLE_RATE, b"lpcm", 0, 2, 1, 1, 16)
    caf = b"caff" + struct.pack(">HH", 1, 0) + b"desc" + struct.pack(">q", len(form)) + form
    caf += b"data" + struct.pack(">q", 4 + len(sound)) + bytes(4) + sound + b"free" + struct.pack(">q", 2**62)
    assert onsets(decode(caf)) == pytest.approx([0.5], abs=0.01)


@pytest.mark.parametrize("place", [0x7FFF_FFFF, 2])
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_a_part_that_lies_nowhere_does_not_end_the_rest(container: str, place: int) -> None:
    """The middle one of the places of a track's parts is beyond the end of the file, or in its head."""
    # another track between its parts keeps the muxer from joining them
    sound = bursts_at(0.2, 1.7, length=2.0, rate=SAMPLE_RATE)
    data = interleaved(container, sound, np.zeros_like(sound))
    places = data.index(b"stco") + 12
    count = int.from_bytes(data[places - 4 : places], "big")
    middle = places + 4 * (count // 2)
    assert count > 4
    assert onsets(decode(data)) == pytest.approx([0.2, 1.7], abs=0.03)
    broken = data[:middle] + place.to_bytes(4, "big") + data[middle + 4 :]
    assert onsets(decode(broken)) == pytest.approx([0.2, 1.7], abs=0.03)


def interleaved(container: str, *tracks: np.ndarray) -> bytes:
    """A file whose AAC tracks lie in it in turns of half a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        packets = []
        for data in tracks:
            stream = output.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            frame = av.AudioFrame.from_ndarray(data, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE, 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                packets += stream.encode(part)
        for packet in sorted(packets, key=lambda p: (int(2 * p.pts * p.time_base), p.stream.index, p.pts)):
            output.mux_one(packet)
    return buffer.getvalue()


def test_tags_in_latin_1_do_not_matter() -> None:
    plain = wav(
        bursts_at(0.5, length=1.0, rate=SAMPLE_RATE)[0].astype("<f4").tobytes(),
        struct.pack("<HHIIHH", 3, 1, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 32),
    )
    name = "Grüße".encode("latin-1") + b"\0"
    tags = b"INFOINAM" + struct.pack("<I", len(name)) + name
    audio = decode(plain + b"LIST" + struct.pack("<I", len(tags)) + tags)
    assert onsets(audio) == pytest.approx([0.5], abs=0.01)


@pytest.mark.parametrize(
    ("container", "coding"),
    [("CAF", "ALAC_16"), ("CAF", "ALAC_24"), ("W64", "MS_ADPCM"), ("AU", "G721_32"), ("AU", "G723_24"), ("WAV", "GSM610")],
)
def test_rarer_codings_are_whole(container: str, coding: str) -> None:
    """FFmpeg cuts the end of ALAC in CAF twice; libsndfile's Wave64 claims to last for years."""
    buffer = io.BytesIO()
    soundfile.write(buffer, bursts_at(0.5, 2.7, length=3.0, rate=8000)[0], 8000, format=container, subtype=coding)
    audio = decode(buffer.getvalue())
    assert onsets(audio) == pytest.approx([0.5, 2.7], abs=0.02)
    assert audio.seconds == pytest.approx(3.0, abs=0.08)


@pytest.mark.parametrize("coding", ["G721_32", "NMS_ADPCM_16", "NMS_ADPCM_32"])
def test_codings_that_ffmpeg_takes_for_others_are_refused_and_not_read_as_noise(coding: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, bursts_at(0.5, length=1.0, rate=8000)[0], 8000, format="WAV", subtype=coding)
    with pytest.raises(AudioError) as error:
        decode(buffer.getvalue())
    assert error.value.code == "audio.unknown_codec"
