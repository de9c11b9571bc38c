"""Mutation testing: how many small changes to the code the tests notice (docs/testing.md).

mutmut makes the changes and runs the tests in a temporary copy of the code, so nothing is written here. For each target
this prints how many mutants were killed and the difference that each of the others makes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {  # what is mutated, and the tests that hold it
    "gate": ("hdmole/method/gate.py", ["tests/test_gate.py", "tests/test_paper.py"]),
    "layer": ("hdmole/method/tuner/layer.py", ["tests/test_layer.py", "tests/test_paper.py"]),
    "alignment": ("hdmole/speech/alignment.py", ["tests/test_alignment.py"]),
    "results": ("hdmole/study/results.py", ["tests/test_results.py", "tests/test_bootstrap.py"]),
    "claims": ("hdmole/study/claims.py", ["tests/test_claims.py"]),
    "bootstrap": ("hdmole/study/bootstrap.py", ["tests/test_bootstrap.py"]),
    "loop": ("hdmole/training/loop.py", ["tests/test_loop.py", "tests/test_adapt.py", "tests/test_data.py"]),
}
# These need large files, or take long and kill no more.
LEFT_OUT = ["published", "conditions", "order_of_rows", "differ_from_itself", "saved_before", "is_the_papers"]
COPIED = ["hdmole", "tests", "app", "assets/ui", "assets/demo/samples"]
# An installed copy of the package is imported when Python starts (see the Makefile). mutmut must import the changed one.
START = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "hdmole"]:
    del sys.modules[name]
from mutmut.__main__ import cli
cli()
"""
KILLED = {"killed", "timeout", "segfault"}


def mutate(target: str, folder: Path) -> None:
    """Run mutmut on one of `TARGETS` in an empty `folder` and print what came of it."""
    module, tests = TARGETS[target]
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {
        "source_paths": ["hdmole"],
        "only_mutate": [module],
        "also_copy": COPIED[2:],
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--timeout=60", "-k", f"not ({' or '.join(LEFT_OUT)})"],
        "timeout_multiplier": 3.0,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    project = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text("\n".join([project, "[tool.mutmut]", *lines, ""]))
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, "run", "--max-children", "1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=7200)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if "Running" not in line and "Generating" not in line]
        sys.exit("\n".join([f"mutmut failed on {target}:", *said[-40:], done.stderr]))
    os.chdir(folder)
    codes = json.loads(Path("mutants", f"{module}.meta").read_text())["exit_code_by_key"]
    others = {name: status for name, code in codes.items() if (status := status_by_exit_code[code]) not in KILLED}
    for name, status in others.items():
        print(f"# {name}: {status}\n{get_diff_for_mutant(name, path=Path(module))}\n")
    killed = len(codes) - len(others)
    print(f"{target}: {killed} of {len(codes)} killed, {100 * killed / len(codes):.1f} %")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or TARGETS:
        with tempfile.TemporaryDirectory() as temporary:
            mutate(chosen, Path(temporary))
