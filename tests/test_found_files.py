"""Manifests, ZIPs and texts as other systems write them, and PEFT's arguments."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import regex
import soundfile
import torch
from peft import get_peft_model
from torch import nn

from app.corpus import unpack
from app.utterance import UPLOADS
from hdmole import HDMoLEConfig, route
from hdmole.speech.audio import SAMPLE_RATE, AudioError
from hdmole.speech.manifest import ManifestError, fingerprint, read_manifest
from hdmole.speech.words import normalise


def manifest(folder: Path, *lines: dict[str, object]) -> Path:
    samples = np.repeat([0.1, 0.2, 0.3, 0.4], SAMPLE_RATE).astype(np.float32)
    soundfile.write(folder / "session.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    rows = [{"audio": "session.wav", "text": "one", "accent": "x", **line} for line in lines]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "m.jsonl"


def test_offset_and_duration_are_obeyed_and_each_part_has_its_own_name(tmp_path: Path) -> None:
    lines = read_manifest(manifest(tmp_path, {"offset": 1, "duration": 2}, {"offset": "3"}, {"duration": 0.5}, {}))
    found = [line.decode() for line in lines]
    assert [audio.seconds for audio in found] == [2.0, 1.0, 0.5, 4.0]
    assert [audio.samples[0] for audio in found] == pytest.approx([0.2, 0.4, 0.1, 0.1]) and found[0].samples[-1] == pytest.approx(
        0.3
    )
    assert len({line.name for line in lines}) == 4 and lines[2].name == "session.wav"
    whole = fingerprint(read_manifest(manifest(tmp_path, {})))
    assert whole != fingerprint(read_manifest(manifest(tmp_path, {"duration": 1})))


@pytest.mark.parametrize(
    "line",
    [{"offset": -1}, {"offset": "soon"}, {"duration": 0}, {"duration": float("nan")}, {"offset": True}, {"offset": 10**400}],
)
def test_what_is_no_number_of_seconds_is_refused(tmp_path: Path, line: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match=f"Line 1 of m.jsonl has the {next(iter(line))} .*; it must be a number") as error:
        read_manifest(manifest(tmp_path, line))
    assert error.value.code == "manifest.bad_seconds"


@pytest.mark.parametrize("field", ["start", "end_time", "channel", "Offset", "startSec", "frame_offset", "tempo"])
def test_fields_that_change_the_meaning_are_refused_by_name(tmp_path: Path, field: str) -> None:
    with pytest.raises(ManifestError, match=f"has the field {field}, which is not known here"):
        read_manifest(manifest(tmp_path, {field: 2}))


def test_fields_that_change_nothing_do_not_matter(tmp_path: Path) -> None:
    fields = {"start": 0, "end": None, "speed": 1.0, "channels": 1, "channel": 0, "segment_id": "7", "lang": "en"}
    assert read_manifest(manifest(tmp_path, fields))[0].decode().seconds == 4.0


def test_the_first_of_two_channels_is_not_taken_for_both(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"channel": 0})
    soundfile.write(tmp_path / "session.wav", np.full((SAMPLE_RATE, 2), 0.1), SAMPLE_RATE)
    with pytest.raises(AudioError, match=r"session.wav has 2 channels, of which the manifest names one"):
        read_manifest(path)[0].decode()


def test_a_part_beyond_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="has nothing at the offset 9"):
        read_manifest(manifest(tmp_path, {"offset": 9}))[0].decode()


class Unflagged(zipfile.ZipInfo):
    """An entry whose name is UTF-8 without saying so, as the Finder writes it."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(), self.flag_bits & ~0x800


UMLAUT = unicodedata.normalize("NFC", "gr\u00fc\u00dfe.flac")
LINE = json.dumps({"audio": UMLAUT, "text": "x", "accent": "general"}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ([("m.jsonl", LINE), (unicodedata.normalize("NFD", UMLAUT), b"1")], UMLAUT),
        ([("m.jsonl", LINE), (Unflagged(UMLAUT), b"1")], UMLAUT),
        ([("m.jsonl", unicodedata.normalize("NFD", LINE.decode()).encode()), (UMLAUT, b"1")], UMLAUT),
        ([("._m.jsonl", b"\0\5\x16\7"), ("m.jsonl", LINE), ("._" + UMLAUT, b"0"), (UMLAUT, b"1")], UMLAUT),
        ([("set\\m.JSONL", LINE), ("set\\" + UMLAUT, b"1")], UMLAUT),
        ([("m.jsonl", LINE.replace(b"gr", b"a\\\\gr")), ("a/" + UMLAUT, b"1")], UMLAUT),
    ],
)
def test_zips_of_any_system_are_read(tmp_path: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], name: str) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    packed.seek(0)
    [line] = read_manifest(unpack(packed, tmp_path))
    assert line.audio.name == name and line.audio.read_bytes() == b"1"


class Spelt(zipfile.ZipInfo):
    """An entry whose name is spelt as Windows in some country does, without saying so."""

    spelling = "cp437"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.spelling), self.flag_bits & ~0x800


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("cp1252", "gr\u00fc\u00dfe.flac"),
        ("gbk", "\u5f55\u97f3.flac"),
        ("cp932", "\u8868\u793a.flac"),
        ("cp949", "\ub179\uc74c.flac"),
        ("cp866", "\u0437\u0430\u043f\u0438\u0441\u044c.flac"),
    ],
)
def test_names_are_spelt_as_the_manifest_has_them(tmp_path: Path, spelling: str, name: str) -> None:
    packed, entry = io.BytesIO(), Spelt(f"set/{name}")
    entry.spelling = spelling
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(entry, b"1")
        archive.writestr("set/m.jsonl", json.dumps({"audio": name, "text": "x", "accent": "general"}))
    packed.seek(0)
    [line] = read_manifest(unpack(packed, tmp_path))
    assert line.audio.name == name and line.audio.read_bytes() == b"1"


@pytest.mark.parametrize(
    ("files", "named", "found"),
    [
        (["A.wav"], "a.WAV", "A.wav"),
        (["Set/Gr\u00dc\u00dfe.wav"], "set\\gr\u00fc\u00dfe.wav", "Gr\u00dc\u00dfe.wav"),
        (["a.wav", "A.wav"], "A.wav", "A.wav"),  # the very name comes first
        (["a.wav", "A.wav"], "a.WAV", None),
        (["b.wav"], "a.wav", None),
    ],
)
def test_names_that_differ_in_capitals_find_the_one_file_that_fits(
    tmp_path: Path, files: list[str], named: str, found: str | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": named, "text": "one", "accent": "x"}))
    for within in (None, [tmp_path]):
        if found is not None:
            assert read_manifest(tmp_path / "m.jsonl", within)[0].audio.name == found
            continue
        with pytest.raises(ManifestError) as error:
            read_manifest(tmp_path / "m.jsonl", within)
        assert error.value.code == ("manifest.several_cases" if len(files) > 1 else "manifest.no_such_audio")
        assert len(files) == 1 or "(A.wav, a.wav)" in str(error.value)


def test_a_link_in_other_capitals_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.wav").touch()
    (tmp_path / "set" / "A.wav").symlink_to(tmp_path / "secret.wav")
    (tmp_path / "set" / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "one", "accent": "x"}))
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "set" / "m.jsonl", [tmp_path / "set"])
    assert error.value.code == "manifest.no_such_audio"


@pytest.mark.parametrize("second", ["a.wav", "\u0041\u030a.wav"])
def test_two_files_of_one_name_in_a_zip_are_refused(tmp_path: Path, second: str) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of the second
        for name in ("m.jsonl", unicodedata.normalize("NFC", second), second):
            archive.writestr(name, json.dumps({"audio": "a.wav", "text": "x", "accent": "general"}))
    packed.seek(0)
    with pytest.raises(ManifestError) as error:
        unpack(packed, tmp_path)
    assert error.value.code == "manifest.zip_same_name"


def test_the_uploader_takes_what_phones_and_messengers_send() -> None:
    assert {"oga", "aac", "caf", "mov", "mka", "mkv", "amr", "3gp", "aif", "aiff", "opus", "w64", "au"} <= set(UPLOADS)


@pytest.mark.parametrize("apostrophe", "\u2019\u02bc\u2018\u00b4`\uff07\u2032\u201b\u02b9\u275b\u275c")
def test_every_apostrophe_is_the_same(apostrophe: str) -> None:
    assert normalise(f"At four O{apostrophe}Clock. {apostrophe}Yes{apostrophe}") == "at four o'clock yes"


@pytest.mark.parametrize(
    "character", "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u202a\u2066\ufe0f\u034f\x00\x08\x80\u2065\ufff5\U000e0002\u3164"
)
def test_what_shows_nothing_changes_nothing(character: str) -> None:
    assert normalise(f"{character}good mor{character}ning{character}") == "good morning"


# Every quotation mark (Unicode's Quotation_Mark, and ornaments) that is no apostrophe, alone and in pairs
MARKS = '"\u00ab\u00bb\u201a\u201c\u201d\u201e\u201f\u2039\u203a\u275d\u275e\u275f\u2760\u2e42\u300c\u300d\u301d\u301e\u301f\uff02\u2033\u2036'
PAIRS = ["''", "``", "\u2018\u2018", "\u2019\u2019", "\u2032\u2032", "\u275b\u275b", "\u00b4\u00b4", "'\u200b'", "'''"]


@pytest.mark.parametrize("mark", [*MARKS, *PAIRS])
def test_quotation_marks_divide_words_and_are_no_letters(mark: str) -> None:
    assert normalise(f"he said{mark}yes{mark} and {mark}no{mark}.") == "he said yes and no"


# Every hyphen and dash, and every space, by Unicode's properties Dash, Hyphen and White_Space
DASHES = [chr(code) for code in range(0x20000) if regex.match(r"\p{Dash}|(?!\u00ad)(?!\u30fb)(?!\uff65)\p{Hyphen}", chr(code))]
SPACES = [chr(code) for code in range(0x20000) if regex.match(r"\p{White_Space}", chr(code))]


def test_every_dash_and_every_space_divides_words() -> None:
    assert len(DASHES) > 25 and len(SPACES) == 25
    assert [normalise(f"rock{c}n{c}roll") for c in DASHES + SPACES] == ["rock n roll"] * len(DASHES + SPACES)


def test_whatever_character_stands_in_a_text_normalising_it_again_changes_nothing() -> None:
    """Every character inside a word and doubled, without the letters and symbols that nothing changes."""
    same = ("Cs", "Cn", "Co", "Lo", "So")
    characters = [
        c for c in map(chr, range(0xE0200)) if unicodedata.category(c) not in same or not unicodedata.is_normalized("NFKC", c)
    ]
    assert len(characters) > 10_000
    text = " ".join(f"a{c}b {c}{c}" for c in characters)
    for part in (regex.sub(r"\p{Han}|\p{Hiragana}|\p{Katakana}", "", unicodedata.normalize("NFKC", text)), text):
        once = normalise(part)
        assert [ascii(pair) for pair in zip(once.split(), normalise(once).split(), strict=True) if pair[0] != pair[1]] == []


def test_width_ligatures_and_composition_change_nothing() -> None:
    assert normalise("\uff28\uff45\uff4c\uff4c\uff4f\u3000\uff11\uff12") == normalise("hello 12") == "hello one two"
    assert normalise("\ufb01ne") == "fine" and normalise("\uff76\uff9e") == "\u30ac"
    assert normalise("cafe\u0301") == normalise("caf\u00e9") == "caf\u00e9"
    assert normalise("\u00a8 a \u00b8") == "a"  # a mark on its own is punctuation


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.lin(x))


def test_adapter_names_are_refused() -> None:
    model = get_peft_model(One(), HDMoLEConfig(accents=["a", "b"], target_modules=["lin"]))
    with route(torch.tensor([[0.2, 0.3, 0.5]])):
        assert model(torch.ones(1, 4)).shape == (1, 4)
        with pytest.raises(ValueError, match="does not take adapter_names"):
            model(torch.ones(1, 4), adapter_names=["default"])


def test_the_line_that_make_writes_lets_peft_be_imported_first(tmp_path: Path) -> None:
    [line] = [line for line in Path("Makefile").read_text().splitlines() if "hdmole_torchaudio.pth" in line]
    (tmp_path / "hdmole_torchaudio.pth").write_text(line.split("'")[1])
    code = f"import site; site.addsitedir({str(tmp_path)!r}); import peft, sys; assert 'torchaudio._extension' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_manifest_of_brackets_and_one_that_is_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "manifest.jsonl"
    for content in ("[" * 100_000, '{"a":' * 100_000):
        file.write_text(content)
        with pytest.raises(ManifestError, match="Line 1 of manifest") as caught:
            read_manifest(file)
        assert caught.value.code == "manifest.not_json"
    monkeypatch.setattr("hdmole.speech.manifest.LARGEST", 1000)
    with pytest.raises(ManifestError) as caught:
        read_manifest(file)
    assert caught.value.code == "manifest.too_large"
    with pytest.raises(ManifestError) as caught:
        read_manifest(Path("/dev/zero"))  # never ends
    assert caught.value.code == "manifest.absent"


def test_zips_that_unpack_to_too_much_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for code, files in (
        ("manifest.zip_bomb", {"a.wav": b"", "manifest.jsonl": bytes(30_000_000)}),
        ("manifest.zip_too_many", {f"{k}.wav": b"" for k in range(20_001)}),
    ):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
        with pytest.raises(ManifestError) as caught:
            unpack(content, tmp_path / "out")
        assert caught.value.code == code and not (tmp_path / "out").exists()
