"""Which room of the library may import which; no circles, and nothing that judges speech imports a trainer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# what a room may import beside itself and the modules that lie in no room (names, errors)
ROOMS = {
    "method": set(),
    "models": {"method"},
    "speech": {"method", "models"},
    "corpora": {"speech"},
    "training": {"method", "models", "speech"},
    "study": {"method", "models", "speech", "training"},
    "figures": {"study"},
    "demo": {"method", "models", "speech", "training", "study"},
}
OPEN = {"names", "errors", "files", "processes", "texts", "_torchaudio"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """The project's modules that a file imports anywhere, those for type checkers among them."""
    modules = {module_of(f) for f in (ROOT / "hdmole").rglob("*.py")}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in full]
        yield from (name for name in names if name.split(".")[0] in ("hdmole", "app", "pages", "tests"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    allowed = ROOMS[room] | {room} | OPEN
    for file in (ROOT / "hdmole" / room).rglob("*.py"):
        for name in imports(file):
            parts = name.split(".")
            assert parts[0] == "hdmole" and (len(parts) == 1 or parts[1] in allowed), f"{module_of(file)} imports {name}"


def test_every_folder_is_a_room() -> None:
    assert {f.parent.name for f in (ROOT / "hdmole").glob("*/__init__.py")} == set(ROOMS)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module_of(f): set(imports(f)) - {"hdmole"} for f in (ROOT / "hdmole").rglob("*.py")}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.timeout(450)
def test_judging_speech_and_opening_the_app_import_no_trainer() -> None:
    """In one process, because importing torch and transformers takes long."""
    code = (
        "import sys\nfrom importlib import import_module\n"
        "for module in sys.argv[1:]:\n    import_module(module)\n"
        "    print(module, [m for m in ('transformers.trainer', 'hdmole.training.loop') if m in sys.modules])\n"
    )
    modules = ["hdmole.speech.asr", "hdmole.study.results", "hdmole.study.evaluate", "hdmole.figures.results", "app.main"]
    done = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and done.stdout.splitlines()[-5:] == [f"{module} []" for module in modules], done.stderr[-500:]


def test_the_library_imports_neither_the_app_nor_what_it_is_made_with() -> None:
    for file in (ROOT / "hdmole").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (app|pages|streamlit)\b", file.read_text(), re.M), file
