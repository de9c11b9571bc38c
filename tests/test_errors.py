"""What is said of bad input: one sentence, a code for programs, and the values that translations need."""

from __future__ import annotations

import ast
import pickle
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdmole.errors import UserError
from hdmole.speech.audio import AudioError
from hdmole.speech.loading import ModelError
from hdmole.speech.manifest import ManifestError

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "AdaptationError": "adaptation",
    "AudioError": "audio",
    "ConfigError": "config",
    "ManifestError": "manifest",
    "ModelError": "model",
    "ResultsError": "results",
    "SpeechError": "speech",
}


def raised() -> Iterator[tuple[str, ast.Call]]:
    """Every place in the project that makes one of these errors."""
    for folder in ("hdmole", "app", "pages"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                    yield f"{file.name}:{node.lineno}", node


def test_the_sentence_holds_its_values() -> None:
    error = AudioError("audio.too_short", "{name} is too short ({length} s).", name="a.wav", length="0.05")
    assert str(error) == "a.wav is too short (0.05 s)." and error.code == "audio.too_short"
    assert error.sentence == "{name} is too short ({length} s)." and error.values == {"name": "a.wav", "length": "0.05"}
    assert isinstance(error, UserError) and isinstance(error, ValueError)


@given(st.text(alphabet=string.printable))
def test_any_value_stands_in_the_sentence_as_it_is(value: str) -> None:
    assert str(ManifestError("manifest.empty", "{name} is empty.", name=value)) == f"{value} is empty."


def test_values_with_braces_or_unusual_names_are_left_alone() -> None:
    assert str(ModelError("model.x", "{name} and {code}", name="{0} {name!r}", code="{")) == "{0} {name!r} and {"
    with pytest.raises(KeyError, match="name"):
        AudioError("audio.silent", "{name} is silent.")


def test_an_error_crosses_to_another_process_whole() -> None:
    error = pickle.loads(pickle.dumps(ModelError("model.no_config", "{folder} holds nothing.", folder=Path("a{b}"))))
    assert type(error) is ModelError and str(error) == "a{b} holds nothing."
    assert (error.code, error.values) == ("model.no_config", {"folder": Path("a{b}")})


def test_codes_begin_with_their_kind() -> None:
    codes = [(where, KINDS[call.func.id], call.args[0]) for where, call in raised() if isinstance(call.func, ast.Name)]
    assert len(codes) > 25
    for where, kind, code in codes:
        text = ast.unparse(code).strip("f'\"")
        assert text.startswith(f"{kind}."), f"{where}: {text}"
