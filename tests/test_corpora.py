"""Corpora as manifests: tiny folders in the layout of the real ones, and what is wrong with a manifest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from hdmole.cli import app
from hdmole.corpora.check import Check, check_manifests, report
from hdmole.corpora.importing import AccentMap, Imported, import_corpus
from hdmole.corpora.kinds import KINDS, read_corpus
from hdmole.corpora.rows import CorpusError
from hdmole.speech.manifest import ManifestError, read_manifest


def sound(file: Path, seconds: float = 0.5, level: float = 0.1, rate: int = 16_000, **how: Any) -> Path:
    """A file that has a level of its own, so that its sound is its own too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.full(round(seconds * rate), level, np.float32), rate, **how)
    return file


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def imported(kind: str, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], Imported]:
    """The lines of the manifest that a corpus gives, and what was counted."""
    out = folder.parent / "made" / "manifest.jsonl" if folder.is_dir() else folder.with_name("made.jsonl")
    found = import_corpus(kind, folder, out, **options)
    assert len(read_manifest(out)) == found.recordings  # the reader takes what was written
    return [json.loads(line) for line in out.read_text().splitlines()], found


# --- Kaldi ------------------------------------------------------------------------------------


def kaldi_folder(folder: Path) -> Path:
    """Two long recordings with segments, as a recipe of Kaldi writes them into data/train."""
    for name, level in (("meeting1", 0.1), ("meeting2", 0.2)):
        sound(folder.parent.parent / "wav" / f"{name}.wav", 4, level)
    write(folder / "wav.scp", "meeting1 wav/meeting1.wav", f"meeting2 {folder.parent.parent}/wav/meeting2.wav")
    write(folder / "segments", "anna-1 meeting1 0.5 2.25", "anna-2 meeting2 1 -1", "ben-1 meeting1 3.00 4.00")
    write(folder / "text", "anna-1 good <NOISE> morning", "anna-2 hello there", "ben-1 <NOISE>")
    write(folder / "utt2spk", "anna-1 anna", "anna-2 anna", "ben-1 ben")
    write(folder / "spk2accent", "anna Scottish", "ben Irish")
    return folder


def test_a_kaldi_folder_with_segments(tmp_path: Path) -> None:
    folder = kaldi_folder(tmp_path / "data" / "train")
    for place, split in ((folder, ""), (folder.parent, "train")):
        lines, found = imported("kaldi", place, split=split)
        audio = str(tmp_path / "wav" / "meeting1.wav")
        assert lines[0] == {
            "audio": audio, "text": "good morning", "accent": "Scottish", "speaker": "anna", "offset": 0.5, "duration": 1.75,
        }  # fmt: skip
        assert lines[1]["offset"] == 1.0 and "duration" not in lines[1]  # to the end of the file
        assert found.left_out == {"no text": 1} and found.speakers == 1 and found.accents == {"Scottish": 2}


def test_a_long_file_is_decoded_once_for_lines_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hdmole.speech.manifest

    asked: list[Path] = []
    real = hdmole.speech.manifest.decode
    monkeypatch.setattr("hdmole.speech.manifest.decode", lambda file, **limits: asked.append(file) or real(file, **limits))
    sound(tmp_path / "a.wav", 3)
    rows = [{"audio": "a.wav", "text": "x", "accent": "y", "offset": k, "duration": 0.5 + k} for k in range(3)]
    write(tmp_path / "m.jsonl", *map(json.dumps, rows))
    assert [line.decode().seconds for line in read_manifest(tmp_path / "m.jsonl")] == [0.5, 1.5, 1.0]
    assert asked == [tmp_path / "a.wav"]
    sound(tmp_path / "a.wav", 2, 0.3)  # a file that has changed is decoded anew
    assert read_manifest(tmp_path / "m.jsonl")[1].decode().seconds == 1.0 and len(asked) == 2


def test_kaldi_without_segments_and_with_accents_by_utterance(tmp_path: Path) -> None:
    sound(tmp_path / "d" / "a.flac")
    write(tmp_path / "d" / "wav.scp", "u1\ta.flac", "u2\tgone.flac")
    write(tmp_path / "d" / "text", "u1\tone  two", "u2\tthree")
    write(tmp_path / "d" / "utt2accent", "u1 Welsh", "u2 Welsh")
    lines, found = imported("kaldi", tmp_path / "d")
    assert lines == [{"audio": str(tmp_path / "d" / "a.flac"), "text": "one two", "accent": "Welsh"}]
    assert found.left_out == {"audio missing": 1} and found.first_left_out["audio missing"].endswith("gone.flac")


@pytest.mark.parametrize(
    ("file", "line", "code"),
    [
        ("wav.scp", "u2 sph2pipe -f wav a.sph |", "corpus.command"),
        ("wav.scp", "u2 | cat a.wav", "corpus.command"),
        ("wav.scp", "u2 wav.ark:1024", "corpus.archive"),
        ("wav.scp", "u1 b.wav", "corpus.twice"),
        ("segments", "u1 u1 2 1", "corpus.bad_segment"),
        ("segments", "u1 u1 0", "corpus.bad_segment"),
        ("segments", "u1 u7 0 1", "corpus.no_such_recording"),
        ("text", "u1 \udcff", "corpus.not_text"),
    ],
)
def test_kaldi_folders_that_are_refused(tmp_path: Path, file: str, line: str, code: str) -> None:
    sound(tmp_path / "d" / "a.wav")
    write(tmp_path / "d" / "wav.scp", "u1 a.wav")
    write(tmp_path / "d" / "text", "u1 one")
    with (tmp_path / "d" / file).open("a", encoding="utf-8", errors="surrogateescape") as added:
        added.write(f"{line}\n")
    with pytest.raises(CorpusError) as error:
        import_corpus("kaldi", tmp_path / "d", tmp_path / "m.jsonl", accent="x")
    assert error.value.code == code and not (tmp_path / "m.jsonl").exists()


def test_a_command_in_wav_scp_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "d" / "wav.scp", f"u1 touch {tmp_path}/run |")
    write(tmp_path / "d" / "text", "u1 one")
    with pytest.raises(CorpusError, match=r"is a command .*, which is never run here"):
        import_corpus("kaldi", tmp_path / "d", tmp_path / "m.jsonl", accent="x")
    assert not (tmp_path / "run").exists()


# --- NeMo, tables -----------------------------------------------------------------------------


def test_a_manifest_of_nemo(tmp_path: Path) -> None:
    sound(tmp_path / "n" / "clips" / "a.wav", 3)
    rows = [
        {"audio_filepath": "clips/a.wav", "text": "one", "duration": 3.0, "dialect": "Welsh", "speaker": 7},
        {"audio_filepath": "clips/a.wav", "text": "two", "offset": 1.0, "duration": 0.5, "pred_text": "too"},
    ]
    write(tmp_path / "n" / "train_manifest.json", *map(json.dumps, rows))
    write(tmp_path / "n" / "test_manifest.json", json.dumps(rows[0]))
    lines, _ = imported("nemo", tmp_path / "n", split="train", accent="general")
    assert [(line["accent"], line.get("offset"), line["duration"]) for line in lines] == [
        ("Welsh", None, 3.0),
        ("general", 1.0, 0.5),
    ]
    assert lines[0]["speaker"] == "7"
    with pytest.raises(CorpusError, match=r"holds test_manifest\.json, train_manifest\.json; choose one with --split"):
        list(read_corpus("nemo", tmp_path / "n"))
    for field, value, code in (
        ("start_time", 1, "manifest.unknown_field"),
        ("audio_filepath", ["a", "b"], "corpus.not_one_file"),
    ):
        write(tmp_path / "bad.json", json.dumps(rows[0] | {field: value}))
        with pytest.raises((CorpusError, ManifestError)) as error:
            list(read_corpus("nemo", tmp_path / "bad.json"))
        assert error.value.code == code


@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_a_table_with_columns_of_other_names(tmp_path: Path, mark: str) -> None:
    sound(tmp_path / "t" / "a b.wav", 3)
    rows = [
        ["File", "Words", "Region", "offset", "duration"],
        ["a b.wav", '"one"', "Cork", "", ""],
        ["a b.wav", "two", "", "1", "0.5"],
    ]
    write(tmp_path / "t" / "all.csv", *map(mark.join, rows))
    columns = {"text": "Words", "accent": "Region"}
    lines, found = imported("csv", tmp_path / "t", columns=columns)
    assert lines == [{"audio": str(tmp_path / "t" / "a b.wav"), "text": "one", "accent": "Cork"}]
    assert found.left_out == {"no accent": 1}
    lines, _ = imported("csv", tmp_path / "t" / "all.csv", columns=columns, accent="Kerry")
    assert lines[1] == {"audio": "a b.wav", "text": "two", "accent": "Kerry", "offset": 1.0, "duration": 0.5}
    with pytest.raises(CorpusError, match=r"all.csv has no field for text, it has File, Words, .*--column text=NAME"):
        list(read_corpus("csv", tmp_path / "t"))
    with pytest.raises(CorpusError, match="has no field Wrods; it has File"):
        list(read_corpus("csv", tmp_path / "t", columns={"text": "Wrods"}))


# --- lhotse -----------------------------------------------------------------------------------


def recording(file: Path, kind: str = "file", **more: Any) -> dict[str, Any]:
    source = {"type": kind, "channels": [0], "source": str(file)}
    return {"id": "r1", "sources": [source], "sampling_rate": 16_000, "num_samples": 48_000, "duration": 3.0, **more}


SUPERVISIONS = [
    {"id": "s1", "recording_id": "r1", "start": 0.5, "duration": 1.25, "channel": 0, "text": "one", "speaker": "anna", "custom": {"accent": "Welsh"}},
    {"id": "s2", "recording_id": "r1", "start": 0.0, "duration": 3.0, "channel": 0, "text": "two", "language": "Kerry"},
]  # fmt: skip


def packed(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def test_recordings_and_supervisions_of_lhotse(tmp_path: Path) -> None:
    audio = sound(tmp_path / "a.wav", 3)
    packed(tmp_path / "l" / "x_recordings_train.jsonl.gz", recording(audio))
    packed(tmp_path / "l" / "x_supervisions_train.jsonl.gz", *SUPERVISIONS)
    packed(tmp_path / "l" / "x_supervisions_dev.jsonl.gz", *SUPERVISIONS)
    lines, found = imported("lhotse", tmp_path / "l", split="train")
    assert lines == [
        {"audio": str(audio), "text": "one", "accent": "Welsh", "speaker": "anna", "offset": 0.5, "duration": 1.25}
    ] and found.left_out == {"no accent": 1}
    lines, _ = imported("lhotse", tmp_path / "l", split="train", columns={"accent": "language"})
    assert lines == [{"audio": str(audio), "text": "two", "accent": "Kerry"}]  # the whole file needs no part
    with pytest.raises(CorpusError, match=r"There is no x_recordings_dev\.jsonl\.gz beside"):
        list(read_corpus("lhotse", tmp_path / "l", "dev"))


def test_cuts_of_lhotse(tmp_path: Path) -> None:
    audio = sound(tmp_path / "a.wav", 3)
    cut = {"id": "c1", "start": 1.0, "duration": 1.5, "channel": 0, "type": "MonoCut", "recording": recording(audio)}
    cut["supervisions"] = [SUPERVISIONS[0] | {"start": 0.25}]
    lines, _ = imported("lhotse", packed(tmp_path / "l" / "cuts.jsonl.gz", cut))
    assert [(line["offset"], line["duration"]) for line in lines] == [(1.25, 1.25)]
    resampled, slower = ({"name": name, "kwargs": kwargs} for name, kwargs in (
        ("Resample", {"source_sampling_rate": 8000, "target_sampling_rate": 16_000}), ("Speed", {"factor": 0.9}),
    ))  # fmt: skip
    cut["recording"] = recording(audio, transforms=[resampled])
    assert len(imported("lhotse", packed(tmp_path / "l" / "cuts.jsonl.gz", cut))[0]) == 1
    for wrong, code in (
        (recording(audio, transforms=[slower]), "corpus.transformed"),
        (recording(Path(f"touch {tmp_path}/run"), "command"), "corpus.command"),
        (recording(audio, channel_ids=[0, 1]), "corpus.channel"),
        (None, "corpus.mixed_cut"),
    ):
        changed = {key: value for key, value in (cut | {"recording": wrong}).items() if value is not None}
        with pytest.raises(CorpusError) as error:
            list(read_corpus("lhotse", packed(tmp_path / "l" / "cuts.jsonl.gz", changed)))
        assert error.value.code == code
    assert not (tmp_path / "run").exists()


# --- Hugging Face -----------------------------------------------------------------------------


def arrow_table(folder: Path) -> Any:
    import pyarrow

    content = [sound(folder / f"{k}.flac", 0.5, 0.1 * (k + 1)).read_bytes() for k in range(2)]
    table = pyarrow.table({
        "audio": [{"bytes": content[0], "path": "zero.flac"}, {"bytes": content[1], "path": None}, {"bytes": None, "path": "1.flac"}],
        "sentence": ["one", "two", "three"],
        "accent": [1, 0, 1],
        "speaker_id": [4, 5, 4],
    })  # fmt: skip
    about = {"info": {"features": {"accent": {"names": ["Cork", "Kerry"], "_type": "ClassLabel"}, "audio": {"_type": "Audio"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(about)})


def check_rows(lines: list[dict[str, Any]], folder: Path) -> None:
    assert [(line["text"], line["accent"], line["speaker"]) for line in lines] == [
        ("one", "Kerry", "4"), ("two", "Cork", "5"), ("three", "Kerry", "4"),
    ]  # fmt: skip
    assert [line["audio"] for line in lines] == [
        "manifest-audio/0000-0000000.flac", "manifest-audio/0000-0000001.wav", str(folder / "1.flac"),
    ]  # fmt: skip
    made = read_manifest(folder.parent.parent / "made" / "manifest.jsonl") if folder.parent.name == "hf" else []
    assert [round(float(line.decode().samples[0]), 1) for line in made] == ([0.1, 0.2, 0.2] if made else [])


def test_a_saved_dataset(tmp_path: Path) -> None:
    import pyarrow

    table = arrow_table(tmp_path / "hf" / "train")
    with pyarrow.ipc.new_stream(tmp_path / "hf" / "train" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    write(tmp_path / "hf" / "dataset_dict.json", json.dumps({"splits": ["train"]}))
    write(tmp_path / "hf" / "train" / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    lines, _ = imported("huggingface", tmp_path / "hf", split="train")
    check_rows(lines, tmp_path / "hf" / "train")
    with pytest.raises(CorpusError, match="has the splits train; choose one with --split"):
        list(read_corpus("huggingface", tmp_path / "hf"))


def test_parquet_files_of_the_hub(tmp_path: Path) -> None:
    from pyarrow import parquet

    table = arrow_table(tmp_path / "clone" / "data")
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        parquet.write_table(table, tmp_path / "clone" / "data" / f"{name}.parquet")
    lines, _ = imported("huggingface", tmp_path / "clone", split="test")
    check_rows(lines, tmp_path / "clone" / "data")
    with pytest.raises(CorpusError, match="has the splits test, train; choose one"):
        list(read_corpus("huggingface", tmp_path / "clone"))


def test_an_audiofolder(tmp_path: Path) -> None:
    sound(tmp_path / "af" / "train" / "clips" / "a.wav")
    write(tmp_path / "af" / "train" / "metadata.csv", "file_name,transcription,accent", 'clips/a.wav,"Well, no.",Cork')
    write(
        tmp_path / "af" / "dev" / "metadata.jsonl",
        json.dumps({"file_name": "../train/clips/a.wav", "text": "no", "accent": "Cork"}),
    )
    assert [line["text"] for line in imported("huggingface", tmp_path / "af", split="train")[0]] == ["Well, no."]
    assert [line["text"] for line in imported("huggingface", tmp_path / "af", split="dev")[0]] == ["no"]
    with pytest.raises(CorpusError, match="holds no Hugging Face dataset"):
        list(read_corpus("huggingface", tmp_path / "af" / "train" / "clips"))


# --- corpora by name --------------------------------------------------------------------------


def test_common_voice(tmp_path: Path) -> None:
    head = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
    rows = [
        ["c1", "common_voice_en_1.mp3", "5f", 'He said "no', "", "2", "0", "", "", "England English,Lancashire", "", "en", ""],
        ["c2", "common_voice_en_2.mp3", "60", "One.", "", "2", "0", "", "", "Texas", "", "en", "Singleword"],
        ["c3", "common_voice_en_2.mp3", "61", "Two.", "", "2", "0", "", "", "", "", "en", ""],
    ]  # fmt: skip
    write(tmp_path / "en" / "train.tsv", *map("\t".join, [head.split(), *rows]))
    for name in ("common_voice_en_1.mp3", "common_voice_en_2.mp3"):
        sound(tmp_path / "en" / "clips" / name, format="MP3")
    table = write(tmp_path / "accents.csv", "from,to", "england english,British", "*,other")
    lines, found = imported("commonvoice", tmp_path / "en", split="train", accents=table)
    assert [(line["text"], line["accent"], line["speaker"]) for line in lines] == [
        ('He said "no', "British", "c1"),
        ("One.", "other", "c2"),
    ]
    assert lines[0]["audio"].endswith("en/clips/common_voice_en_1.mp3") and found.left_out == {"no accent": 1}


def test_kespeech(tmp_path: Path) -> None:
    for part, speaker in (("train_phase1", "1001"), ("train_phase2", "1002"), ("test", "1003")):
        name = f"{speaker}_5f3a"
        audio = sound(tmp_path / "k" / "Audio" / speaker / "phase1" / f"{name}.wav")
        folder = tmp_path / "k" / "Tasks" / "ASR" / part
        write(folder / "wav.scp", f"{name} {audio.relative_to(tmp_path / 'k')}")
        write(folder / "text", f"{name} \u6253\u5f00<SPOKEN_NOISE>\u7a97\u6237")
        write(folder / "utt2spk", f"{name} {speaker}")
        write(folder / "utt2subdialect", f"{name} {'Mandarin' if part == 'test' else 'Ji-Lu'}")
    lines, _ = imported("kespeech", tmp_path / "k", split="train")  # both phases
    assert [(line["speaker"], line["accent"]) for line in lines] == [("1001", "Ji-Lu"), ("1002", "Ji-Lu")]
    assert lines[0]["text"] == "\u6253\u5f00 \u7a97\u6237"
    assert imported("kespeech", tmp_path / "k", split="test")[1].accents == {"Mandarin": 1}
    assert imported("kespeech", tmp_path / "k", split="train_phase2")[0][0]["speaker"] == "1002"


def test_aishell_1(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "data_aishell"
    for part, name in (("train", "BAC009S0002W0122"), ("dev", "BAC009S0724W0121"), ("test", "BAC009S0764W0121")):
        sound(folder / "wav" / part / name[6:11] / f"{name}.wav")
    write(
        folder / "transcript" / "aishell_transcript_v0.8.txt",
        "BAC009S0002W0122 \u800c \u697c\u5e02",
        "BAC009S0724W0121 \u5e7f\u5dde",
        "BAC009S0764W0121 \u751a\u81f3",
    )
    for place in (tmp_path / "a", folder):
        lines, _ = imported("aishell", place, split="train")
        assert [(line["text"], line["accent"], line["speaker"]) for line in lines] == [("\u800c\u697c\u5e02", "general", "S0002")]
        assert "duration" not in lines[0] and lines[0]["audio"].endswith("wav/train/S0002/BAC009S0002W0122.wav")
    with pytest.raises(CorpusError, match=r"AISHELL-1 in .* cannot be read .*docs/data.md"):
        imported("aishell", tmp_path, split="train")


def test_aishell_2(tmp_path: Path) -> None:
    for part, name in (("data", "IC0001W0001"), ("dev", "ID0012W0002"), ("test", "IT0055W0013")):
        folder = tmp_path / "a" / "AISHELL-2" / "iOS" / part
        sound(folder / "wav" / name[1:6] / f"{name}.wav")
        write(folder / "trans.txt", f"{name}\t\u542cbeat it")
    lines, _ = imported("aishell2", tmp_path / "a", split="train")
    assert [(line["text"], line["accent"], line["speaker"]) for line in lines] == [("\u542cBEAT IT", "general", "C0001")]
    assert imported("aishell2", tmp_path / "a", split="test")[0][0]["audio"].endswith("iOS/test/wav/T0055/IT0055W0013.wav")


def test_wenetspeech(tmp_path: Path) -> None:
    path = "audio/train/youtube/B00000/Y0000000000.opus"
    sound(tmp_path / "w" / path, 4, rate=48_000, format="OGG", subtype="OPUS")
    parts = [
        {"sid": "Y0_S0", "begin_time": 0.5, "end_time": 2.25, "confidence": 1.0, "subsets": ["L", "S"], "text": "\u4f60\u597d"},
        {"sid": "Y0_S1", "begin_time": 2.5, "end_time": 3.0, "confidence": 0.95, "subsets": ["L"], "text": "\u55ef"},
    ]
    about = {
        "audios": [{"aid": "Y0", "path": path, "duration": 4.0, "md5": "0", "source": "youtube", "tags": [], "segments": parts}]
    }
    write(tmp_path / "w" / "WenetSpeech.json", json.dumps(about))
    lines, _ = imported("wenetspeech", tmp_path / "w", split="S")
    assert [(line["text"], line["accent"], line["offset"], line["duration"]) for line in lines] == [
        ("\u4f60\u597d", "general", 0.5, 1.75)
    ]
    assert len(imported("wenetspeech", tmp_path / "w", split="L")[0]) == 2


def test_l2_arctic(tmp_path: Path) -> None:
    for speaker, name in (("ABA", "arctic_a0001"), ("YKWK", "arctic_a0001"), ("suitcase_corpus", "aba")):
        sound(tmp_path / "l2" / speaker / "wav" / f"{name}.wav", rate=44_100)
        write(tmp_path / "l2" / speaker / "transcript" / f"{name}.txt", "Author of the danger trail")
    lines, _ = imported("l2arctic", tmp_path / "l2", split="read")
    assert {(line["speaker"], line["accent"]) for line in lines} == {("aba", "Arabic"), ("ykwk", "Korean")}
    lines, _ = imported("l2arctic", tmp_path / "l2", split="suitcase")
    assert [(line["speaker"], line["accent"]) for line in lines] == [("aba", "Arabic")]


def test_edacc(tmp_path: Path) -> None:
    folder = tmp_path / "e" / "edacc_v1.0"
    sound(folder / "data" / "EDACC-C06.wav", 3, rate=32_000)
    write(
        folder / "dev" / "segments",
        "EDACC-C06-000 EDACC-C06 0.00 0.89",
        "EDACC-C06-001 EDACC-C06 1.5 3",
        "EDACC-C06-002 EDACC-C06 1 2",
    )
    write(
        folder / "dev" / "text",
        "EDACC-C06-000 <laugh> C ELEVEN",
        "EDACC-C06-001 HELLO",
        "EDACC-C06-002 IGNORE_TIME_SEGMENT_IN_SCORING",
    )
    write(folder / "dev" / "utt2spk", "EDACC-C06-000 EDACC-C06-A", "EDACC-C06-001 EDACC-C06-B", "EDACC-C06-002 EDACC-C06-A")
    write(folder / "dev" / "conv.list", "EDACC-C06")
    questions = [
        "PARTICIPANT_ID", "What is your gender?", "What\u2019s your ethnic background? ", "What is your higher level of education?",
        "How would you describe your accent in English? (e.g. Italian, Glaswegian)",
        "Do you speak any second languages? separate them with commas  (e.g., Mandarin,Catalan,French )",
        "What\u2019s your year of birth? (e.g., 1992)", "What year did you start learning English? (e.g., 1999)",
    ]  # fmt: skip
    answers = ['EDACC-C06-A,Male,Asian,MSc,Indonesian ,"Malay,Dutch",1992,1999', "EDACC-C06-B,Female,White,BSc,,,1990,"]
    write(folder / "linguistic_background.csv", ",".join(f'"{question}"' for question in questions), *answers)
    files = sorted(folder.rglob("*"))
    lines, found = imported("edacc", tmp_path / "e", split="dev")
    assert lines == [
        {"audio": str(folder / "data" / "EDACC-C06.wav"), "text": "C ELEVEN", "accent": "Indonesian", "speaker": "EDACC-C06-A", "duration": 0.89}
    ]  # fmt: skip
    assert found.left_out == {"no accent": 1, "no text": 1} and sorted(folder.rglob("*")) == files  # nothing is written into it


def test_speechocean762(tmp_path: Path) -> None:
    sound(tmp_path / "s" / "WAVE" / "SPEAKER0001" / "000010011.WAV", format="WAV")
    write(tmp_path / "s" / "train" / "wav.scp", "000010011\tWAVE/SPEAKER0001/000010011.WAV")
    write(tmp_path / "s" / "train" / "text", "000010011\tWE CALL IT BEAR")
    write(tmp_path / "s" / "train" / "utt2spk", "000010011\t0001")
    lines, _ = imported("speechocean762", tmp_path / "s", split="train")
    audio = str(tmp_path / "s" / "WAVE" / "SPEAKER0001" / "000010011.WAV")
    assert lines == [{"audio": audio, "text": "WE CALL IT BEAR", "accent": "Mandarin", "speaker": "0001"}]


@pytest.mark.parametrize("spelt", [str.upper, str.lower])
def test_timit(tmp_path: Path, spelt: Any) -> None:
    for part, region, speaker in (
        ("TRAIN", "DR1", "FCJF0"),
        ("TEST", "DR8", "MPAM0"),
        ("TEST", "DR2", "FDRW0"),
        ("TEST", "DR6", "FJDM0"),
    ):
        file = tmp_path / "t" / spelt(f"{part}/{region}/{speaker}/SX127.WAV")
        sound(file, format="NIST", subtype="PCM_16")
        write(file.with_suffix(spelt(".TXT")), "0 48128 The emperor had a mean temper.")
        write(file.with_suffix(spelt(".PHN")), "0 48128 h#")
        sound(file.with_name(f"{file.name}.wav"))  # what some copies have beside it
    found = {split: imported("timit", tmp_path / "t", split=split)[0] for split in KINDS["timit"].splits}
    assert {split: sorted(line["speaker"] for line in lines) for split, lines in found.items()} == {
        "train": ["fcjf0"], "test": ["fdrw0", "fjdm0", "mpam0"], "dev": ["fdrw0"], "core": ["mpam0"],
    }  # fmt: skip
    [line] = found["train"]
    assert line["text"] == "The emperor had a mean temper." and line["accent"] == "New England"
    decoded = read_manifest(tmp_path / "made" / "manifest.jsonl")[0].decode()
    assert decoded.format == "nistsphere" and decoded.seconds == 0.5 and found["core"][0]["accent"] == "Army Brat"


# --- accents ----------------------------------------------------------------------------------


def test_accents_are_one_without_capitals_and_a_table_groups_them(tmp_path: Path) -> None:
    table = write(
        tmp_path / "accents.csv", "from,to", "united states english,American", "Scottish English,British", "England English,British",
        '"India and South Asia (India, Pakistan, Sri Lanka)",Indian', ",general", "*,",
    )  # fmt: skip
    plain, groups = AccentMap(), AccentMap(table)
    assert [plain.group(accent) for accent in ("Indian", "indian", "INDIAN accent", "", "Irish,Welsh")] == [
        "Indian", "Indian", "Indian", "", "Irish,Welsh",
    ]  # fmt: skip
    for accent, group in (
        ("United_States-English", "American"),
        ("India and South Asia (India, Pakistan, Sri Lanka)", "Indian"),
        ("Lancashire,England English", "British"),
        ("England English|Scottish English", "British"),  # two of one group
        ("England English,United States English", None),  # of two groups
        ("Texas|India and South Asia (India, Pakistan, Sri Lanka)", "Indian"),
        ("", "general"),
        ("Klingon", None),  # all others are left out
    ):
        assert groups.group(accent) == group
    with pytest.raises(CorpusError, match="needs a heading with the columns from and to; it has a, b"):
        AccentMap(write(tmp_path / "bad.csv", "a,b", "1,2"))


# --- the check --------------------------------------------------------------------------------


def manifest(file: Path, *rows: dict[str, Any]) -> Path:
    return write(file, *(json.dumps({"text": "one", "accent": "x", **row}, ensure_ascii=False) for row in rows))


@pytest.fixture
def checked(tmp_path: Path) -> Check:
    sound(tmp_path / "a.wav", 1.5, 0.1)
    sound(tmp_path / "b.wav", 0.5, 0.2, rate=8000)
    sound(tmp_path / "copy.wav", 1.5, 0.1)
    write(tmp_path / "broken.wav", "no audio")
    train = manifest(
        tmp_path / "train.jsonl",
        {"audio": "a.wav", "speaker": "anna", "accent": "Welsh"},
        {"audio": "b.wav", "speaker": "ben", "accent": "welsh", "text": "two"},
        {"audio": "copy.wav"},
        {"audio": "gone.wav"},
        {"audio": "broken.wav"},
        {"audio": "a.wav", "start": 1},
        {"audio": "a.wav", "offset": 1, "text": "?!"},
    )
    test = manifest(
        tmp_path / "test.jsonl", {"audio": "copy.wav", "speaker": "anna"}, {"audio": "a.wav", "duration": 0.25, "text": "new"}
    )
    return check_manifests([train, test], ["welsh", "x"])


def test_what_is_in_a_manifest_and_what_is_wrong_with_it(checked: Check) -> None:
    train, _ = checked.manifests
    assert train.recordings == 4 and train.speakers == 2 and train.without_speaker == 2
    assert train.hours == pytest.approx((1.5 + 0.5 + 1.5 + 0.5) / 3600, abs=1e-4)
    assert {name: (count.recordings, count.speakers) for name, count in train.accents.items()} == {"Welsh": (2, 2), "x": (2, 0)}
    assert train.seconds == {"shortest": 0.5, "median": 1.0, "longest": 1.5} and train.rates == {"16000": 3, "8000": 1}
    assert train.problems == {
        "missing audio": 1, "unreadable audio": 1, "wrong lines": 1, "no text": 1, "sound of an earlier recording": 1,
        "accent spelt in another way before": 1, "text of an earlier recording": 1,
    }  # fmt: skip
    assert "broken.wav is not audio" in train.examples["unreadable audio"][0]
    assert "has the field start" in train.examples["wrong lines"][0]
    assert train.characters == {"t": 1, "w": 1, "e": 2, "n": 2, "o": 3} and checked.bad


def test_what_is_on_both_sides(checked: Check) -> None:
    [overlap] = checked.overlaps
    assert (overlap.speakers, overlap.audio, overlap.texts) == (["anna"], ["copy.wav"], 1)
    said = report(checked)
    assert "train.jsonl: 4 recordings, 0.00 hours, 2 speakers, 2 recordings without a speaker" in said
    assert "speakers on both sides                     1: anna" in said


def test_the_commands(tmp_path: Path) -> None:
    folder = kaldi_folder(tmp_path / "data" / "train")
    out = tmp_path / "new" / "m.jsonl"
    done = CliRunner().invoke(app, ["data", "import", "kaldi", str(folder), "--out", str(out)])
    assert done.exit_code == 0 and "2 recordings of 1 speakers" in done.stdout and "Left out, no text: 1" in done.stderr
    done = CliRunner().invoke(app, ["data", "check", str(out)])
    assert done.exit_code == 0 and "m.jsonl: 2 recordings" in done.stdout
    write(out, json.dumps({"audio": "gone.wav", "text": "x", "accent": "y"}))
    done = CliRunner().invoke(app, ["data", "check", str(out), "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["manifests"][0]["problems"] == {"missing audio": 1}
    for arguments, sentence in (
        (["kaldy", str(folder)], "There is no kind of corpus kaldy; choose one of kaldi"),
        (["kespeech", str(folder)], "KeSpeech has the parts train"),
        (["kaldi", str(tmp_path / "none")], "give the data folder with wav.scp"),
        (["csv", str(folder)], "holds no table"),
        (["kaldi", str(folder), "--column", "tone=x"], "--column tone=x is not understood"),
    ):
        done = CliRunner().invoke(app, ["data", "import", *arguments, "--out", str(out)])
        assert done.exit_code == 1 and sentence in done.stderr.replace("\n", " ")


def test_the_help_names_every_kind() -> None:
    said = CliRunner().invoke(app, ["data", "import", "--help"], env={"COLUMNS": "200"}).stdout
    assert not [kind for kind in KINDS if kind not in said]
