"""On which machine, and from which commit of this repository, something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def commit(root: Path) -> str:
    """The commit of this repository at `root`, with a mark if the code has been changed since.

    The package may be installed inside the repository of another project. If `root` is not this
    repository, the commit is that in the environment variable HDMOLE_COMMIT, which whoever copies
    the code to another machine sets, or "unknown".
    """
    elsewhere = os.environ.get("HDMOLE_COMMIT", "unknown")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve() or not git(
            "ls-files", "hdmole/study/results.py"
        ):
            return elsewhere
        return git("rev-parse", "HEAD") + (" (with local changes)" if git("status", "--porcelain", "--", "hdmole") else "")
    except (OSError, subprocess.CalledProcessError):
        return elsewhere


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
