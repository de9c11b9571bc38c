"""Runs one version of the project on the demo model, and compares what two versions wrote; `runs/same_as.sh` calls it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

# what differs from one run to the next: time, folders, the machine's state
FLEETING = {"rtf", "date", "command", "commit", "file", "audio"}
# keys of summary.json that version 2 of its layout renamed
RENAMED = {"combined": "gate", "global": "global_gate", "local": "local_probability"}


def run(out: Path) -> None:
    """Run the version of hdmole in the current folder, by its own command line, and keep what it wrote in `out`."""
    sys.path.insert(0, str(Path.cwd()))
    from hdmole.cli import app  # one process for all commands: torch is imported once

    def command(file: str, *arguments: str) -> None:
        with (out / file).open("w") as written, redirect_stdout(written):
            app(arguments, standalone_mode=False)

    out.mkdir()
    folder = Path("assets/demo/samples")
    samples = [str(sample) for sample in sorted(folder.glob("*.flac"))]
    string_together(samples, str(out / "long.wav"))
    for method in ("base", "lora", "full", "hdmole"):
        command(f"{method}.json", "transcribe", *samples, str(out / "long.wav"), "--method", method, "--json")
    for sample in (*samples, str(out / "long.wav")):
        name = f"trace-{Path(sample).stem}"
        command(f"{name}.txt", "trace", sample, "--out", str(out / f"{name}.parquet"))
    command("evaluate.txt", "evaluate", "--manifest", str(folder / "manifest.jsonl"), "--out", str(out / "evaluation"))
    command("info.txt", "demo", "info")


def string_together(samples: list[str], out: str) -> None:
    """Write the samples as one recording with 0.4 s of silence after each: long enough to be cut into segments."""
    sounds = [soundfile.read(sample, dtype="float32") for sample in samples]
    rate = sounds[0][1]
    pause = np.zeros(int(0.4 * rate), np.float32)
    soundfile.write(out, np.concatenate([part for sound, _ in sounds for part in (sound, pause)]), rate)


def differing(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two values read from JSON differ. Entries that only the later one has are no difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in (k for k in before if k not in FLEETING):
            later = key if key in after else RENAMED.get(key, key)
            if later in after:
                yield from differing(before[key], after[later], f"{where}/{key}")
            else:
                yield f"{where}/{key} is gone"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for k, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differing(one, other, f"{where}/{k}")
    elif before != after:
        yield f"{where}: {before!r} became {after!r}"


def differing_tables(before: pd.DataFrame, after: pd.DataFrame) -> Iterator[str]:
    """The columns that differ in any bit or are gone; columns that only the later table has are no difference."""
    if len(before) != len(after):
        yield f": {len(before)} rows became {len(after)}"
        return
    for name in (c for c in before.columns if c not in FLEETING):
        if name not in after:
            yield f": column {name} is gone"
        elif before[name].dtype != after[name].dtype or not before[name].equals(after[name]):
            yield f": column {name} differs"


def plain_text(file: Path) -> str:
    """What was printed, without the folder, its size and the names of output files."""
    lines = [line for line in file.read_text().splitlines() if " MB, on " not in line]
    return re.sub(r"-> \S+$", "", "\n".join(lines), flags=re.MULTILINE)


def compare(before: Path, after: Path) -> list[str]:
    """Every difference between two folders of outputs, each in a line."""
    found = []
    for file in sorted(f for f in before.rglob("*") if f.is_file()):
        name, other = file.relative_to(before), after / file.relative_to(before)
        if not other.is_file():
            found.append(f"{name} is missing")
        elif file.suffix == ".json":
            found += [name.as_posix() + d for d in differing(json.loads(file.read_text()), json.loads(other.read_text()))]
        elif file.suffix == ".parquet":
            found += [name.as_posix() + d for d in differing_tables(pd.read_parquet(file), pd.read_parquet(other))]
        elif file.suffix == ".txt" and plain_text(file) != plain_text(other):
            found.append(f"{name} differs")
    return found


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]))
    else:
        folders = [Path(argument) for argument in sys.argv[2:]]
        found = compare(*folders)
        count = sum(1 for f in folders[0].rglob("*") if f.is_file())
        print("\n".join(found) or f"No difference in {count} files.")
        sys.exit(bool(found))
