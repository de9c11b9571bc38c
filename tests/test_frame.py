"""The frame around the code: what `make help` says, what the continuous check runs."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_make_help_names_every_command() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    lines = dict(re.findall(r"^make (\w+) +(\S.*)$", shown, re.MULTILINE))
    assert {"help", "app", "test"} <= set(lines) == set(declared.group(1).split())


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
