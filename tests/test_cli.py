"""The command line, as a user calls it: a process with arguments, output and an exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import soundfile
from safetensors.torch import load_file
from tiny import ACCENTS, METHODS, speech_like
from typer.testing import CliRunner

import hdmole.cli
from hdmole.study.bench import side_by_side
from hdmole.study.bootstrap import summarise
from hdmole.study.results import Results, base_digest, load, provenance, save

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"lora": "adapter_", "full": "", "hdmole": "adapter_", "hdmole-extended": "adapter_"}  # how their weights are named


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "hdmole.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=180)


def run_here(*arguments: object) -> tuple[int, str]:
    """The same without a process of its own: exit status, and what it wrote in one line."""
    done = CliRunner().invoke(hdmole.cli.app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for k in range(3):
        soundfile.write(folder / f"{k}.wav", speech_like(1.5 + k / 2, k), 16_000)
    (folder / "notes.wav").write_text("not audio at all")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["transcribe"],
        ["trace"],
        ["evaluate"],
        ["compare"],
        ["verdicts"],
        ["bench"],
        ["bench", "decode"],
        ["bench", "layer"],
        ["demo"],
        ["demo", "build"],
        ["demo", "info"],
        ["app"],
    ],
)
def test_help_everywhere(command: list[str]) -> None:
    done = CliRunner().invoke(hdmole.cli.app, [*command, "--help"], prog_name="hdmole", env={"COLUMNS": "200"})
    assert done.exit_code == 0 and f"Usage: {' '.join(['hdmole', *command])} [OPTIONS]" in done.stdout


def test_help_of_the_command_itself() -> None:
    done = run("--help")
    assert done.returncode == 0 and "Usage: python -m hdmole.cli [OPTIONS] COMMAND" in done.stdout


def test_transcribe_json_has_the_documented_shape_and_one_bad_file_spoils_only_itself(clips: Path, tiny_model: Path) -> None:
    started = time.monotonic()
    done = run("transcribe", clips / "0.wav", clips / "notes.wav", clips / "1.wav", "--model", tiny_model, "--json")
    lasted = time.monotonic() - started
    assert done.returncode == 1
    results = json.loads(done.stdout)
    assert [Path(r["file"]).name for r in results] == ["0.wav", "notes.wav", "1.wav"]
    assert results[1] == {
        "file": str(clips / "notes.wav"), "code": "audio.not_audio",
        "error": "notes.wav is not audio that can be read; give a WAV, FLAC, MP3, Ogg, M4A, MP4 or WebM file.",
    }  # fmt: skip
    assert "Traceback" not in done.stderr
    for result in (results[0], results[2]):
        assert set(result["accent"]) == {"general", *ACCENTS}
        assert set(result["in_domain"]) == {"score", "verdict", "reasons"}
        assert all(set(w) == {"word", "start", "end", "confidence"} for w in result["words"])
        assert all(
            {"name", "effective_experts", "active_experts", "gate", "share", "tau_global", "tau_local"} == set(layer)
            for layer in result["layers"]
        )
        assert set(result["layers"][0]["gate"]) == set(ACCENTS)
    assert [result["seconds"] for result in (results[0], results[2])] == [1.5, 2.0]
    assert 0 < sum(result["rtf"] * result["seconds"] for result in (results[0], results[2])) < lasted


def test_transcribe_text_warns_first(clips: Path, tiny_model: Path) -> None:
    status, output = run_here("transcribe", clips / "0.wav", "--model", tiny_model, "--method", "base")
    assert status == 0
    assert re.search(
        r"outside what the model was made for .* Do not trust the transcript. \w", output
    )  # a random model: nothing agrees with anything


def test_on_a_terminal_there_is_progress_and_transcripts_have_lines_of_their_own(clips: Path, tiny_model: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "hdmole.cli", "transcribe", clips / "0.wav", clips / "1.wav", "--model", tiny_model]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=end, stderr=end, cwd=ROOT, env=environment) as process:
        os.close(end)
        seen = b""
        try:
            while select.select([terminal], [], [], 120)[0] and (part := os.read(terminal, 65536)):
                seen += part
        except OSError:  # Linux's way to say that the other end is closed
            pass
        try:
            process.wait(30)
        finally:
            process.kill()
    os.close(terminal)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())  # without colours and cursor movements
    assert "Loading the model" in text and "Transcribing" in text and "Traceback" not in text and "Warning" not in text
    lines = re.split(r"[\r\n]+", text)
    assert [sum(line.startswith(f"{clips / name}\t") for line in lines) for name in ("0.wav", "1.wav")] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trace", "a.wav", "--out", "{folder}"], "is a folder; give the name of a parquet file"),
        (["trace", "a.wav", "--out", "{file}/t.parquet"], "file cannot be made (File exists); choose another --out"),
        (["evaluate", "--manifest", "m.jsonl", "--out", "{file}"], "file cannot be made (File exists); choose another --out"),
        (["demo", "build", "--work", "{file}/x"], "cannot be made (Not a directory); choose another --work"),
    ],
)
def test_where_results_cannot_be_written_is_said_before_the_work(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("hdmole.cli.load_model", lambda model: pytest.fail("the model was loaded"))
    status, output = run_here(*(a.format(folder=tmp_path, file=tmp_path / "file") for a in arguments))
    assert status == 1 and sentence in output


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path, tiny_model: Path) -> None:
    status, output = run_here("trace", tmp_path / "[bold]x.wav", "--out", tmp_path / "t.parquet", "--model", tiny_model)
    assert status == 1 and "Error: [bold]x.wav does not exist; check the path." in output


def test_the_app_starts_on_the_chosen_model_wherever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HDMOLE_MODEL", "some/model")  # what `HDMOLE_MODEL=some/model make app` does
    (tmp_path / "mine").mkdir()
    for arguments, model in (([], "some/model"), (["--model", "mine"], str(tmp_path / "mine"))):
        assert run_here("app", "--port", 8765, *arguments)[0] == 0
        assert os.environ["HDMOLE_MODEL"] == model
        assert started[-1][1:4] == ["-m", "streamlit", "run"] and started[-1][-2:] == ["--server.port", "8765"]
        assert started[-1][started[-1].index("--server.address") + 1] == "localhost"
        os.chdir(tmp_path)
    monkeypatch.setenv("HDMOLE_DATA", "")
    assert run_here("app", "--data", "mine", "--data", ".", "--address", "192.0.2.7")[0] == 0
    assert os.environ["HDMOLE_DATA"] == os.pathsep.join([str(tmp_path / "mine"), str(tmp_path)])
    assert started[-1][started[-1].index("--server.address") + 1] == "192.0.2.7" in started[-1][started[-1].index("::1") :]
    os.chdir(tmp_path)
    assert "There is no folder none" in run_here("app", "--data", "none")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "magic"], "it has base, lora, full, hdmole"),
        (["--accent", "martian"], "give auto or one of general"),
        (["--model", "no/such/model"], "could not be had from the Hugging Face hub"),  # a name no hub can have: nothing is asked
    ],
)
def test_wrong_options_are_plain_sentences(clips: Path, tiny_model: Path, arguments: list[str], sentence: str) -> None:
    status, output = run_here("transcribe", clips / "0.wav", "--model", tiny_model, *arguments)
    assert status == 1 and sentence in output


def test_trace_writes_the_tidy_table(clips: Path, tiny_model: Path, tmp_path: Path) -> None:
    status, output = run_here("trace", clips / "1.wav", "--out", tmp_path / "deep" / "t.parquet", "--model", tiny_model)
    assert status == 0, output
    table = pd.read_parquet(tmp_path / "deep" / "t.parquet")
    assert {"layer", "time", "expert", "accent", "gate", "tau_global", "tau_local", "n_active"} <= set(table)
    assert set(table.accent) == set(ACCENTS) and table.time.max() < 2.1


def test_evaluate_writes_rows_and_summary(clips: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = [
        {"audio": f"../{clips.name}/{k}.wav", "text": "Turn on, the LIGHTS!", "accent": a}
        for k, a in enumerate(("general", "indian", "german"))
    ]
    lines.append({"audio": f"../{clips.name}/notes.wav", "text": "x", "accent": "german"})
    (clips.parent / "lists").mkdir()
    (clips.parent / "lists" / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        "evaluate", "--manifest", clips.parent / "lists" / "m.jsonl", "--methods", "base,hdmole,base", "--out", tmp_path / "out",
        "--model", tiny_model,
    ]  # fmt: skip
    done = CliRunner().invoke(hdmole.cli.app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == 1 and f"../{clips.name}/notes.wav: notes.wav is not audio" in done.stderr  # the rest is done
    rows = pd.read_parquet(tmp_path / "out" / "utterances.parquet")
    assert len(rows) == 6 and set(rows.method) == {"base", "hdmole"} and (rows.words == 4).all()
    assert set(rows.reference) == {"turn on the lights"} and set(rows.utterance) == {f"../{clips.name}/{k}.wav" for k in range(3)}
    results = load(tmp_path / "out")
    assert results.methods["base"].domains["general"].utterances == 1
    assert results.provenance.command and results.provenance.base_sha256 == base_digest(tiny_model)
    assert "| Frozen base |" in done.stdout and "| indian | " in done.stdout


def test_verdicts_are_judged_anew_from_the_utterances(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        dict(method=method, seed=0, domain="general", accent="a", speaker=f"s{k}", utterance=f"u{k}", reference="", hypothesis="",
             errors=errors, words=1000) for method, errors in (("base", 10), ("hdmole", 11)) for k in range(5)
    )  # fmt: skip
    save(tmp_path, summarise(rows.assign(errors=0), provenance(0, "cpu")), rows)
    assert run_here("verdicts", tmp_path) == (
        0,
        "- As good on general speech as the frozen base: **refuted** against zero, **established** by the paper's margin of "
        "+0.19 points (+0.10 points [+0.10, +0.10])",
    )
    status, output = run_here("verdicts", tmp_path / "none")
    assert status == 1 and "has no summary.json; name a folder that `hdmole compare`" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", ","], "No method is given; this model has base, lora, full, hdmole, hdmole-extended."),
        (["--methods", "base,magic"], "This model has no method 'magic'"),
        (["--methods", "base", "--accent", "martian"], "There is no accent 'martian'"),
    ],
)
def test_evaluate_refuses_in_plain_sentences(arguments: list[str], sentence: str, tiny_model: Path, tmp_path: Path) -> None:
    manifest = tiny_model / "samples" / "manifest.jsonl"
    status, output = run_here("evaluate", "--manifest", manifest, "--out", tmp_path, "--model", tiny_model, *arguments)
    assert status == 1 and sentence in output and not list(tmp_path.iterdir())


def test_help_and_info_draw_nothing(tiny_model: Path) -> None:
    """Names come from `hdmole.names`, so that neither the figures nor plotly are imported for them."""
    code = (
        "import sys\nfrom hdmole.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([m for m in sys.modules if m in ('plotly', 'streamlit', 'hdmole.figures', 'hdmole.training.loop')])\n"
    )
    for arguments in (["--help"], ["demo", "info", "--model", str(tiny_model)]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr + done.stdout[-200:]


def test_demo_info_reads_its_figures(tiny_model: Path) -> None:
    done = CliRunner().invoke(hdmole.cli.app, ["demo", "info", "--model", str(tiny_model), "--json"])
    assert done.exit_code == 0, done.stderr
    info = json.loads(done.stdout)
    adapters = {name: tiny_model / "adapters" / name / f"{kind}model.safetensors" for name, kind in KINDS.items()}
    weights = {name: load_file(file) for name, file in adapters.items()}
    assert info["accents"] == ["general", *ACCENTS] and info["trainable"] == {
        "base": 0, **{name: sum(w.numel() for key, w in of.items() if "recogniser" not in key) for name, of in weights.items()}
    }  # fmt: skip
    assert Results.model_validate(info["results"]) == load(tiny_model / "results")


def test_demo_info_keeps_a_readme_up_to_date(tiny_model: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    assert run_here("demo", "info", "--model", tiny_model, "--readme", readme)[0] == 0
    text = readme.read_text()
    assert text.startswith("Before\n") and text.endswith("\nafter\n") and "| HDMoLE |" in text and "old" not in text
    for content, sentence in (("nothing here", "has no place for the table"), (None, "No such file")):
        readme.write_text(content) if content else readme.unlink()
        status, output = run_here("demo", "info", "--model", tiny_model, "--readme", readme)
        assert status == 1 and sentence in output


def test_bench_times_everything_side_by_side(tiny_model: Path) -> None:
    status, output = run_here("bench", "decode", "--model", tiny_model, "--rounds", 1, "--json")
    assert status == 0
    found = json.loads(output[output.index("{") :])
    assert set(found["transcription"]) == {*METHODS, "hdmole, traced", "hdmole-extended, traced"}
    times = found["transcription"]
    first = next(iter(times.values()))["seconds"]
    assert all(t["ratio"] == pytest.approx(t["seconds"] / first, rel=0.01) for t in times.values())
    assert found["provenance"]["rounds"] == 1


def test_bench_times_whole_transcriptions_of_recordings(tiny_model: Path, tmp_path: Path) -> None:
    for k, seconds in enumerate((1.0, 1.5)):
        soundfile.write(tmp_path / f"{k}.wav", speech_like(seconds), 16_000)
    files = [tmp_path / "0.wav", tmp_path / "1.wav"]
    status, output = run_here("bench", "decode", *files, "--model", tiny_model, "--rounds", 1, "--json")
    assert status == 0
    found = json.loads(output[output.index("{") :])
    assert set(found["transcription"]) == {name for method in METHODS for name in (method, f"{method}, together")}
    assert found["recordings"] == 2 and found["audio_seconds"] == 2.5
    assert all(t["rtf"] == pytest.approx(t["seconds"] / 2.5, abs=1e-4) for t in found["transcription"].values())
    status, output = run_here("bench", "decode", tmp_path / "absent.wav", "--model", tiny_model)
    assert status == 1 and "absent.wav" in output


def test_a_time_is_the_median_of_the_rounds_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two contenders by turns; their rounds last 9, 1, 5, 3 and 9, 2, 4, 12 seconds. The first round warms up."""
    now, lasts = [0.0], {"one": iter([9, 1, 5, 3]), "other": iter([9, 2, 4, 12])}
    monkeypatch.setattr("hdmole.study.bench.time.perf_counter", lambda: now[0])

    def work(name: str) -> None:
        now[0] += next(lasts[name])

    found = side_by_side({name: partial(work, name) for name in lasts}, rounds=3)
    assert found == {"one": {"seconds": 3, "ratio": 1}, "other": {"seconds": 4, "ratio": 1.333}}


def test_models_get_finds_what_is_here_and_says_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hdmole.models.pretrained._from_hub", lambda local: None)
    here = tmp_path / "whisper"
    here.mkdir()
    for file in ("config.json", "model.safetensors"):
        (here / file).write_text("{}")
    assert run_here("models", "get", "--folder", here) == (0, str(here))
    status, shown = run_here("models", "get", "whisper-huge")
    assert status == 1 and "no pretrained weights 'whisper-huge'; this library knows whisper-base" in shown
