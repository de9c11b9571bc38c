"""The command line, as a user calls it: a process with arguments, output and an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import soundfile
from tiny import ACCENTS, speech_like

from hdmole.evaluate import ManifestError, read_manifest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "hdmole.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=180)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for k in range(3):
        soundfile.write(folder / f"{k}.wav", speech_like(1.5 + k / 2, k), 16_000)
    (folder / "notes.wav").write_text("not audio at all")
    return folder


@pytest.mark.parametrize(
    "command", [[], ["transcribe"], ["trace"], ["evaluate"], ["demo"], ["demo", "build"], ["demo", "info"], ["app"]]
)
def test_help_everywhere(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_transcribe_json_has_the_documented_shape_and_one_bad_file_spoils_only_itself(clips: Path, tiny_model: Path) -> None:
    done = run("transcribe", clips / "0.wav", clips / "notes.wav", clips / "1.wav", "--model", tiny_model, "--json")
    assert done.returncode == 1
    results = json.loads(done.stdout)
    assert [Path(r["file"]).name for r in results] == ["0.wav", "notes.wav", "1.wav"]
    assert set(results[1]) == {"file", "error"} and "Traceback" not in done.stderr
    for result in (results[0], results[2]):
        assert set(result["accent"]) == {"general", *ACCENTS}
        assert set(result["in_domain"]) == {"score", "verdict", "reasons"}
        assert all(set(w) == {"word", "start", "end", "confidence"} for w in result["words"])
        assert all({"name", "active_experts", "gate", "tau_global", "tau_local"} == set(layer) for layer in result["layers"])
        assert set(result["layers"][0]["gate"]) == set(ACCENTS)
        assert result["seconds"] > 1 and result["rtf"] > 0


def test_transcribe_text_warns_first(clips: Path, tiny_model: Path) -> None:
    done = run("transcribe", clips / "0.wav", "--model", tiny_model, "--method", "base")
    assert done.returncode == 0 and done.stdout.strip()
    assert "outside what the model was made for" in done.stderr  # a random model: nothing agrees with anything


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "magic"], "it has base, lora, full, hdmole"),
        (["--accent", "martian"], "give auto or one of general"),
        (["--model", "no/such-model"], "could not be had from the Hugging Face hub"),
    ],
)
def test_wrong_options_are_plain_sentences(clips: Path, tiny_model: Path, arguments: list[str], sentence: str) -> None:
    model = [] if "--model" in arguments else ["--model", tiny_model]
    done = run("transcribe", clips / "0.wav", *model, *arguments)
    assert done.returncode == 1 and sentence in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_trace_writes_the_tidy_table(clips: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run("trace", clips / "1.wav", "--out", tmp_path / "deep" / "t.parquet", "--model", tiny_model)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path / "deep" / "t.parquet")
    assert {"layer", "time", "expert", "accent", "gate", "tau_global", "tau_local", "n_active"} <= set(table)
    assert set(table.accent) == set(ACCENTS) and table.time.max() < 2.1


def test_evaluate_writes_rows_and_summary(clips: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = [
        {"audio": f"{k}.wav", "text": "Turn on the lights", "accent": a} for k, a in enumerate(("general", "indian", "german"))
    ]
    lines.append({"audio": "notes.wav", "text": "x", "accent": "german"})
    (clips / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("evaluate", "--manifest", clips / "m.jsonl", "--methods", "base,hdmole", "--out", tmp_path, "--model", tiny_model)
    assert done.returncode == 1 and "notes.wav" in done.stderr  # reported; the rest is done
    rows = pd.read_parquet(tmp_path / "utterances.parquet")
    assert len(rows) == 6 and set(rows.method) == {"base", "hdmole"} and (rows.words == 4).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["methods"]["base"]["domains"]["general"]["utterances"] == 1
    assert {"command", "commit", "date", "machine", "seed"} <= set(summary["provenance"])
    assert "| Frozen base |" in done.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("{", "Line 1 of m.jsonl is not valid JSON"),
        ('{"audio": "a.wav"}', "has no text and no accent"),
        ('{"audio": "a.wav", "text": "x", "accent": "y"}', "names a.wav, which does not exist"),
        ("[]", "has no audio and no text and no accent"),
    ],
)
def test_bad_manifests_are_plain_sentences(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ManifestError, match=sentence):
        read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(ManifestError, match="There is no manifest"):
        read_manifest(tmp_path / "none.jsonl")


def test_demo_info_reads_its_figures(tiny_model: Path) -> None:
    done = run("demo", "info", "--model", tiny_model, "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["accents"] == ["general", *ACCENTS] and info["trainable"]["hdmole"] > 0
    assert info["results"]["methods"]["base"]
