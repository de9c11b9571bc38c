"""The frame around the code: what `make help` says, which packages are needed, what the continuous check runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def _pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line and not line.startswith("-r"))
    return {canonicalize_name(package): version for package, version in pins.items()}


def test_make_help_names_every_command() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    lines = dict(re.findall(r"^make (\w+) +(\S.*)$", shown, re.MULTILINE))
    assert {"help", "app", "test"} <= set(lines) == set(declared.group(1).split())


def test_every_pin_lies_in_the_range_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    pins = _pins("requirements.txt")
    assert set(pins) == set(ranges)
    assert not {name for name, version in pins.items() if not ranges[name].contains(version)}
    assert {"streamlit", "torch", "transformers", "peft", "torchaudio", "plotly", "pandas", "librosa"} <= set(pins)


def test_every_import_is_declared() -> None:
    owners = packages_distributions()
    needed, development = set(_pins("requirements.txt")), set(_pins("requirements-dev.txt"))
    own = {"app", "hdmole", "pages", *(p.stem for p in (ROOT / "tests").glob("*.py")), *sys.stdlib_module_names}
    for path in (p for folder in ("hdmole", "app", "pages", "tests") for p in (ROOT / folder).rglob("*.py")):
        tool = "tests" in path.parts or path.name == "screenshots.py"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in {n.split(".")[0] for n in names} - own:
                packages = {canonicalize_name(p) for p in owners.get(name, [name])}
                declared = packages & (needed | development if tool else needed)
                assert declared, f"{path.relative_to(ROOT)} imports {name}, which no requirement brings"


def test_no_test_waits_without_end() -> None:
    """Commands and requests have a timeout, `wait` and the like an argument, and no loop sleeps but `wait_until`'s."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                timed = any(keyword.arg == "timeout" for keyword in node.keywords)
                assert timed or ast.unparse(node.func) not in ("subprocess.run", "urllib.request.urlopen"), where
                assert node.args or timed or node.func.attr not in ("wait", "join", "result", "acquire"), where
            if isinstance(node, ast.While) and path.name != "driver.py":
                assert "sleep" not in ast.unparse(node), where


def test_the_continuous_check_needs_a_browser_and_runs_the_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "HDMOLE_REQUIRE_BROWSER=1" in script and "chromium" in script and re.search(r"^make test$", script, re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "Apache License" in (ROOT / "LICENSE").read_text()
