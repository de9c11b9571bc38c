"""Files are whole or not there; a full disk and a second command are said in a sentence; what was killed goes on to the same result."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import soundfile
import torch
from driver import wait_until
from tiny import speech_like

from hdmole.files import OutputError, alone, disk_space, write_json, write_text, written
from hdmole.speech.asr import ASR
from hdmole.study import evaluate
from hdmole.training.loop import last_checkpoint


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    write_text(file, "one")
    with pytest.raises(RuntimeError), written(file) as part:
        part.write_text("half")
        assert file.read_text() == "one" and part.suffix == file.suffix
        raise RuntimeError
    assert file.read_text() == "one" and [f.name for f in file.parent.iterdir()] == ["file.txt"]
    write_text(file, "two")
    assert file.read_text() == "two" and [f.name for f in file.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for content in ("one", "two"):
        with written(folder) as part:
            part.mkdir()
            (part / content).write_text(content)
    assert [f.name for f in tmp_path.rglob("*")] == ["adapter", "two"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"wer": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "x.json", {"text": "é"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n "text": "é"\n}\n'


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)"),
     OSError(errno.EDQUOT, "quota"), OSError(errno.EFBIG, "x"), RuntimeError("I/O error: File too large (os error 27)")],
)  # fmt: skip
def test_a_full_disk_is_a_sentence(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(OutputError, match=r"no space left on the disk for .*/model; make some") as caught,
        disk_space(tmp_path / "model"),
    ):
        raise error
    assert caught.value.code == "output.disk_full"
    with pytest.raises(KeyError), disk_space(tmp_path):
        raise KeyError("x")


def test_a_disk_that_really_is_full() -> None:
    """/dev/full fails every write as a full disk does."""
    with pytest.raises(OutputError), disk_space(Path("/dev/full")), open("/dev/full", "w") as full:
        full.write("x" * 100_000)


def test_one_command_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with alone(folder):
        with pytest.raises(OutputError, match=r"Another command is writing to .*out") as caught, alone(folder):
            pass
        assert caught.value.code == "output.in_use"
        with alone(tmp_path / "other"):
            pass
    with alone(folder):
        assert not list(folder.iterdir())


@pytest.mark.parametrize("state", [None, "", '{"global_step": 4'])
def test_an_unfinished_checkpoint_is_passed_over(tmp_path: Path, state: str | None) -> None:
    for step, content in ((4, "{}"), (20, '{"global_step": 20}'), (100, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("")
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-4"]
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_process_ends_with_its_parent_even_if_that_is_killed() -> None:
    child = "import os, time; from hdmole.processes import end_with_parent; end_with_parent(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], timeout=60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait(10)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or "(zombie)" in Path(f"/proc/{pid}/status").read_text(), 10)


def judge(model: Path, manifest: Path, out: Path, ready: Event) -> None:
    """Evaluate, one recording after the other; `ready` is set when the model is loaded."""
    torch.set_num_threads(1)
    evaluate.BATCH = 1
    sys.argv = ["judge", str(out)]  # which the results record
    asr = ASR.load(model, "cpu")
    ready.set()
    evaluate.evaluate(asr, manifest, ["base", "hdmole"], out)


def killed(model: Path, manifest: Path, out: Path, seconds: float) -> float:
    """Evaluate in a process of its own and kill it after so many seconds. The time it took, or 0 if it was killed.

    The processes are forks of one that has imported everything and has no threads.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["hdmole.speech.asr", "hdmole.study.evaluate", "librosa.feature"])
    ready = context.Event()
    child = context.Process(target=judge, args=(model, manifest, out, ready))
    child.start()
    assert ready.wait(120)
    started = time.monotonic()
    child.join(seconds)
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return 0.0 if child.exitcode else time.monotonic() - started


@pytest.mark.timeout(450)
def test_an_evaluation_that_is_killed_goes_on_to_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    lines = []
    for k in range(3):
        soundfile.write(tmp_path / f"{k}.wav", speech_like(0.5 + 0.1 * k, k), 16_000)
        lines.append(
            {"audio": f"{k}.wav", "text": "turn on the lights", "accent": ["general", "indian"][k % 2], "speaker": f"s{k}"}
        )
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

    needed, chance, kills = killed(tiny_model, manifest, tmp_path / "whole", 120), random.Random(22), 0
    assert needed > 0
    while not killed(tiny_model, manifest, tmp_path / "killed", (chance.uniform(0.1, 0.3) + 0.15 * kills) * needed):
        kills += 1
    assert kills >= 2
    files = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert files == ["recordings.parquet", "routing.parquet", "summary.json", "utterances.parquet"]
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == files
    one, other = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("whole", "killed"))
    assert one["failed"] == other["failed"] == []
    for name in files[:2] + files[3:]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    for out, summary in (("whole", one), ("killed", other)):
        assert summary["provenance"].pop("command").endswith(f" {out}")  # each names its own folder
        del summary["provenance"]["date"]
    assert one == other
