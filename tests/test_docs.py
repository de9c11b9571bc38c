"""The documents: the README's Python runs, what they name exists, their prose fits the line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny_speech_llm

from app.screenshots import PAGES
from hdmole.method.tracing import Trace

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ROOMS = ("hdmole", "app", "pages", "assets", "runs", "docs", "tests", ".ci")


def prose(text: str) -> str:
    """A document without code, tables, and what commands write between marks such as `<!-- results -->`."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not re.match(r"\s*\||    ", line))


def test_the_example_of_the_readme_runs() -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    posterior = torch.tensor([[0.2, 0.7, 0.1], [1.0, 0.0, 0.0]])
    given: dict[str, Any] = {
        "model": tiny_speech_llm().language_model,
        "inputs": {"input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]]), "max_new_tokens": 2},
        "accent_posterior": posterior,
    }
    exec(example, given)
    trace = given["t"]
    assert isinstance(trace, Trace)
    table: pd.DataFrame = trace.to_frame()
    assert set(table.accent) == {"indian", "german"} and {"gate", "tau_global", "tau_local", "n_active"} <= set(table.columns)
    assert table.layer.nunique() == 4  # q_proj and v_proj in two layers
    first = table[(table.utterance == 0) & (table.accent == "indian")]
    assert (first.global_gate - 0.5).abs().max() < 1e-6  # 0.7 of 0.8 reaches tau = 1/2 alone, and gets all of it
    assert (table[table.utterance == 1].global_gate == 0).all()  # certainly general: no accent to route by


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(file: Path) -> None:
    text = file.read_text()
    linked = [to.split("#")[0] for to in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", to)]
    assert not [to for to in linked if not (file.parent / to).exists()]
    named = re.findall(
        rf"`((?:{'|'.join(map(re.escape, ROOMS))})/[\w./-]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    )
    # what old commits have, or what a script that a page names is yet to write
    gone = {"assets/results/onego", "assets/results/paper"}
    assert not [path for path in named if path not in gone and not (ROOT / path).exists() and "NAME" not in path]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_prose_fits_100_characters(file: Path) -> None:
    long = [line for line in prose(file.read_text()).splitlines() if len(line) > 100 and "](" not in line]
    assert not long


def docstrings_and_comments(file: Path) -> Iterator[str]:
    """Their lines, without the quotes that end a docstring, tables, and rulers between sections."""
    text = file.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            written = node.body[0]
            yield from lines[written.lineno - 1 : written.end_lineno]
    yield from (line for line in lines if line.lstrip().startswith("# ") and not line.lstrip().startswith("# --"))


@pytest.mark.parametrize("room", ["hdmole", "app", "pages"])
def test_docstrings_and_comments_fit_100_characters(room: str) -> None:
    found = {file.relative_to(ROOT): docstrings_and_comments(file) for file in (ROOT / room).rglob("*.py")}
    assert found
    assert not {
        f"{file}: {line}"
        for file, lines in found.items()
        for line in lines
        if len(line.removesuffix('"""')) > 100 and not re.match(r"\s*\|", line)
    }


def test_every_file_of_tests_is_described() -> None:
    described = re.findall(r"^\| (`test_.*) \|.*\|$", (ROOT / "docs" / "testing.md").read_text(), re.M)
    named = [name for row in described for name in re.findall(r"`(test_\w+)`", row)]
    assert sorted(named) == sorted(file.stem for file in (ROOT / "tests").glob("test_*.py"))


def test_every_page_of_the_app_has_its_picture_and_every_experiment_its_entry() -> None:
    app = (ROOT / "docs" / "app.md").read_text()
    assert {f"screenshots/{page}.png" for page in PAGES} <= set(re.findall(r"\]\(([^)]+)\)", app))
    entries = re.findall(
        r"^\| (\S+) \|.*\]\(experiments/([\w-]+\.md)\) \|$", (ROOT / "docs" / "experiments.md").read_text(), re.M
    )
    assert {page for _, page in entries} == {f.name for f in (ROOT / "docs" / "experiments").glob("*.md")}
    assert [date for date, _ in entries] == sorted((date for date, _ in entries), reverse=True)
    for _, page in entries:
        heads = re.findall(r"^## (\w+)$", (ROOT / "docs" / "experiments" / page).read_text(), re.M)
        assert heads == ["Question", "Command", "Result", "Conclusion"], page


def test_the_version_is_the_same_everywhere() -> None:
    from hdmole import __version__

    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    newest = re.search(r"^## \[(\d\S+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation and newest and citation[1] == newest[1] == __version__


def test_the_workflow_calls_the_check() -> None:
    assert re.search(r"^\s+- run: \.ci/run$", (ROOT / ".github" / "workflows" / "check.yml").read_text(), re.M)
