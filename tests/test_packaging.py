"""What the package needs: pins in their ranges, every import in an extra, and the tuner without any extra."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hdmole

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRA_OF = {  # what each folder may import: the packages of its extra; of the others only those of the tuner
    "speech": "study", "training": "study", "study": "study", "cli.py": "study", "cli_demo.py": "study", "console.py": "study",
    "corpora": "study", "cli_data.py": "study",
    "demo": "demo", "figures": "app", "app": "app", "pages": "app",
}  # fmt: skip
LATER = {  # imported only where a trace becomes a table, and where several processes work together
    "hdmole/method/tracing.py": {"pandas", "pyarrow"},
    "hdmole/processes.py": {"accelerate"},
}

ALONE = """
import sys
from importlib.machinery import PathFinder

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Only
import torch
from torch import nn
import hdmole
from hdmole import AccentRecogniser, HDMoLEConfig, intervene, route, trace
from peft import PeftModel, get_peft_model

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
base.config = {"model_type": "custom"}
weights = {name: value.clone() for name, value in base.state_dict().items()}
recogniser = AccentRecogniser(["general", "a", "b"], n_mels=4, channels=8)
model = get_peft_model(base, HDMoLEConfig(accents=["a", "b"], target_modules=["0", "2"], recogniser=recogniser.arguments))
for name, parameter in model.named_parameters():
    if "hdmole_B" in name:
        nn.init.ones_(parameter)
x, pi = torch.randn(1, 6, 4), torch.tensor([[0.1, 0.6, 0.3]])
with route(pi), trace(model) as recorded:
    y = model(x)
assert recorded.arrays("0")["gate"].shape == (6, 2) and recorded.shifted(1).records
with route(pi), intervene(model, mask=["a", "b"]):
    assert not torch.equal(model(x), y)
model.save_pretrained(FOLDER)
again = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
again.load_state_dict(weights)
with route(pi):
    assert torch.equal(PeftModel.from_pretrained(again, FOLDER).eval()(x), y)
for use in (recorded.to_frame, lambda: recorded.save("t.parquet"), lambda: hdmole.ASR):
    try:
        use()
    except ModuleNotFoundError as error:
        assert "pip install 'hdmole[study]'" in str(error), error
    else:
        raise AssertionError("an extra was found")
print(sorted(BLOCKED & set(sys.modules)))
"""


def pins(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = dict(line.split("==") for line in lines if line and not line.startswith("-r"))
    return {canonicalize_name(package): version for package, version in found.items()}


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Requirements of the tuner and of an extra, with those of the extras it includes, by name."""
    found = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra] if extra else []):
        if requirement.name == "hdmole":
            for included in requirement.extras:
                found |= declared(included)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def brought(names: set[str]) -> set[str]:
    """The distributions of these names, with all that they require."""
    done: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        done.add(name)
        try:
            needed = [Requirement(r) for r in requires(name) or []]
        except ModuleNotFoundError:  # an optional one that is not installed
            continue
        found = {canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})}
        waiting |= found - done
    return done


def imported(path: Path) -> set[str]:
    """Names of the third-party packages that a file imports."""
    own = {"app", "hdmole", "pages", *(p.stem for p in (ROOT / "tests").glob("*.py")), *sys.stdlib_module_names}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found - own


def test_every_pin_lies_in_the_range_of_pyproject() -> None:
    ranges = declared() | declared("study") | declared("demo") | declared("app")
    pinned = pins("requirements.txt")
    assert set(pinned) == set(ranges)
    assert not {name for name, version in pinned.items() if not ranges[name].specifier.contains(version)}
    assert set(declared()) == {"torch", "transformers", "peft", "huggingface-hub", "numpy", "safetensors"}
    assert set(declared()) <= brought({"torch", "transformers", "peft"})


@pytest.mark.parametrize("folder", ["hdmole", "app", "pages", "tests"])
def test_every_import_is_in_the_extra_of_its_room(folder: str) -> None:
    owners, pinned = packages_distributions(), set(pins("requirements.txt")) | set(pins("requirements-dev.txt"))
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        allowed = set(declared(EXTRA_OF.get(parts[1] if folder == "hdmole" else folder)))
        if folder == "tests" or path.name == "screenshots.py":
            allowed = pinned
        for name in imported(path) - LATER.get("/".join(parts), set()):
            packages = {canonicalize_name(p) for p in owners.get(name, [name])}
            assert packages & allowed, f"{path.relative_to(ROOT)} imports {name}, which its extra does not bring"


def test_the_version_is_written_once() -> None:
    assert hdmole.__version__ == "0.2.0" and PROJECT["dynamic"] == ["version"]
    assert files("hdmole").joinpath("py.typed").is_file()


def test_the_tuner_works_without_any_extra(tmp_path: Path) -> None:
    kept = brought(set(declared()))
    blocked = {
        name
        for name, packages in packages_distributions().items()
        if not {canonicalize_name(p) for p in packages} & kept and name != "hdmole"
    }
    assert {"pandas", "pyarrow", "plotly", "streamlit", "librosa", "av", "soundfile", "scipy", "sklearn", "jiwer"} <= blocked
    code = f"BLOCKED = {blocked!r}\nFOLDER = {str(tmp_path)!r}\n{ALONE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]
