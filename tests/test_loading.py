"""What is refused when a model is loaded: weights of another model, damaged ones, folders that are not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import hdmole.cli
from hdmole.speech.asr import ASR
from hdmole.speech.loading import ModelError, check_sums, find_model, write_sums

Weights = dict[str, Tensor]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def refused(model: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ASR.load(model, "cpu")
    said = str(caught.value)
    assert "\n" not in said and "http" not in said and len(said) < 500, said
    return caught.value


def without_one(weights: Weights) -> Weights:
    return dict(sorted(weights.items())[1:])


def half(weights: Weights) -> Weights:
    return dict(sorted(weights.items())[::2])


def renamed(weights: Weights) -> Weights:
    return {f"other.{key}": value for key, value in weights.items()}


def one_more(weights: Weights) -> Weights:
    return weights | {"of_another_model.weight": torch.zeros(2, 3)}


def larger(weights: Weights) -> Weights:
    key, value = max(weights.items())
    return weights | {key: torch.zeros(*(size + 1 for size in value.shape)) if value.dim() else torch.zeros(2)}


def damaged(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        key, first = max(weights.items())
        return weights | {key: torch.full_like(first, value)}

    return change


@pytest.mark.parametrize(
    "file", ["model.safetensors", f"adapters/lora/{ADAPTER}", f"adapters/hdmole/{ADAPTER}", "adapters/full/model.safetensors"]
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_one, "1 too few, 0 too many and 0 of another size, such as "), (half, "0 too many and 0 of another size"), (renamed, "such as "), (larger, "0 too few, 0 too many and 1 of another size, such as "),
        (one_more, "0 too few, 1 too many and 0 of another size, such as of_another_model.weight;"), (damaged(float("nan")), "values that are no numbers"),
        (damaged(float("inf")), "values that are no numbers"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_what_differs(
    model: Path, file: str, change: Callable[[Weights], Weights], said: str
) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(model / file)).items()}, model / file, {"format": "pt"})
    error = refused(model)
    assert said in str(error) and str(model) in str(error)
    assert error.code in ("model.other_weights", "model.not_numbers")


def test_the_sizes_are_named(model: Path) -> None:
    file = model / "adapters" / "lora" / ADAPTER
    weights = load_file(file)
    key = next(key for key in sorted(weights) if "lora_A" in key)
    save_file({name: value[:2].contiguous() if name == key else value for name, value in weights.items()}, file)
    assert f"and 1 of another size, such as {key}: (2, {weights[key].shape[1]}), not (4, {weights[key].shape[1]});" in str(
        refused(model)
    )


@pytest.mark.parametrize(("one", "other"), [("lora", "hdmole"), ("hdmole", "lora")])
def test_an_adapter_of_another_kind_is_refused(model: Path, one: str, other: str) -> None:
    shutil.rmtree(model / "adapters" / one)
    shutil.copytree(model / "adapters" / other, model / "adapters" / one)
    error = refused(model)
    assert error.code == "model.other_adapter" and error.values["kind"] == one.upper() and error.values["found"] == other.upper()


def test_full_weights_without_any_are_refused(model: Path) -> None:
    save_file({}, model / "adapters" / "full" / "model.safetensors")
    assert refused(model).code == "model.no_weights"


@pytest.mark.parametrize("file", ["model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_file_that_is_not_there_is_named(model: Path, file: str) -> None:
    (model / file).unlink()
    error = refused(model)
    assert error.code == "model.incomplete" and error.values["files"] == file


def test_a_domain_score_of_no_numbers_is_refused(model: Path) -> None:
    values = json.loads((model / "domain.json").read_text())
    (model / "domain.json").write_text(json.dumps(values | {"intercept": float("nan")}))
    assert "domain.json" in str(refused(model))


def test_files_are_those_whose_sums_were_written(model: Path) -> None:
    """Lines are as `sha256sum` writes them, so that `sha256sum -c SHA256SUMS` checks them too."""
    done = CliRunner().invoke(hdmole.cli.app, ["demo", "sums", "--model", str(model)])
    assert done.exit_code == 0 and done.output.strip() == str(model / "SHA256SUMS")
    lines = dict(reversed(line.split("  ")) for line in (model / "SHA256SUMS").read_text().splitlines())
    assert (
        lines["adapters/hdmole/adapter_model.safetensors"]
        == sha256((model / "adapters/hdmole" / ADAPTER).read_bytes()).hexdigest()
    )
    assert {"config.json", "model.safetensors", "domain.json", "tokenizer.json"} < set(lines) and not any(
        "results" in f for f in lines
    )
    assert ASR.load(model).methods == ["base", "lora", "full", "hdmole", "hdmole-extended"]
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1  # one bit of one weight
    (model / "model.safetensors").write_bytes(content)
    error = refused(model)
    assert error.code == "model.other_sum" and error.values["file"] == model / "model.safetensors"
    write_sums(model)
    check_sums(model)
    (model / "domain.json").unlink()
    assert refused(model).values["files"] == "domain.json"


def test_the_released_demo_has_sums_and_they_hold() -> None:
    assert (find_model("demo") / "SHA256SUMS").is_file()
    check_sums(find_model("demo"))
