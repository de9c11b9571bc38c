"""`hdmole export`: an HDMoLE adapter for one accent as a plain LoRA, and what is said of the difference."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ACCENTS, TARGETS
from typer.testing import CliRunner

from hdmole import HDMoLEConfig
from hdmole.cli import app
from hdmole.method.intervention import intervene
from hdmole.method.tracing import Record, Trace
from hdmole.models.speech_llm import SpeechLLM
from hdmole.speech.asr import ASR
from hdmole.speech.audio import decode
from hdmole.study.export import mean_gates, read_posterior


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with one more adapter that is routed by the accent alone."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("export") / "model"))
    known = ASR.load(folder).models["hdmole"].base_model.hdmole_recogniser["default"]
    config = HDMoLEConfig(accents=ACCENTS, r=2, target_modules=TARGETS, routing="global", recogniser=known.arguments)
    adapter: Any = get_peft_model(SpeechLLM.from_pretrained(folder, dtype=torch.float32), config)  # type: ignore[arg-type]
    adapter.base_model.set_recogniser(known)
    for name, parameter in adapter.named_parameters():
        if "hdmole_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.save_pretrained(folder / "adapters" / "accent-alone")
    return folder


def text_log_probs(model: Any, posterior: list[float] | None) -> torch.Tensor:
    """Of five tokens after a sound, by a model on the tiny base; HDMoLE models are routed by `posterior`."""
    given = {} if posterior is None else {"accent_posterior": torch.tensor([posterior])}
    states = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(
            encoder_states=states,
            encoder_mask=torch.ones(1, 9, dtype=torch.bool),
            labels=torch.tensor([[5, 6, 7, 8, 2]]),
            **given,
        )
    return out.logits.log_softmax(-1)


def test_an_adapter_that_only_the_accent_routes_is_exported_as_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.json").write_text(json.dumps({"german": 0.75, "general": 0.25}))
    status, output = run(
        "--posterior", tmp_path / "mixed.json", "--model", model, "--method", "accent-alone", "--out", tmp_path / "lora"
    )
    assert status == 0 and "LoRA of rank 6" in output and "equal to the adapter under this posterior" in output, output
    plain = PeftModel.from_pretrained(SpeechLLM.from_pretrained(model, dtype=torch.float32), tmp_path / "lora").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    routed = ASR.load(model).models["accent-alone"]
    expected = text_log_probs(routed, [0.25, 0, 0.75, 0])
    torch.testing.assert_close(text_log_probs(plain, None), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(text_log_probs(routed, [0, 1.0, 0, 0]), expected, atol=1e-2)


@pytest.mark.parametrize("method", ["hdmole", "hdmole-extended"])
def test_a_gate_that_changes_from_frame_to_frame_gets_its_mean_and_the_difference_is_said(
    model: Path, tmp_path: Path, method: str
) -> None:
    out, speech = tmp_path / "lora", model / "samples" / "manifest.jsonl"
    status, output = run("--accent", "german", "--model", model, "--method", method, "--out", out, "--speech", speech)
    assert status == 0 and "It is an approximation" in output and "Recordings: 1. Their word error rate is" in output, output
    found = json.loads((out / "export.json").read_text())
    assert not found["exact"] and found["posterior"] == {"general": 0, "indian": 0, "german": 1, "scottish": 0}
    assert 0 < found["gate_missed"] < 100 and found["recordings"] == 1 and found["provenance"]["command"]
    asr = ASR.load(model)
    routed = asr.transcribe(decode(model / "samples" / "german_1.flac"), method, "german", want_trace=True)
    assert routed.trace is not None
    held = {layer: routed.trace.arrays(layer)["gate"].mean(0) for layer in routed.trace.layer_names}
    base = SpeechLLM.from_pretrained(model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, out).eval()
    adapter = asr.models[method]
    with ExitStack() as changed:
        for layer, gate in held.items():
            changed.enter_context(intervene(adapter, [layer], gate=gate.tolist()))
        expected = text_log_probs(adapter, [0, 0, 1.0, 0])
    torch.testing.assert_close(text_log_probs(plain, None), expected, rtol=1e-3, atol=1e-4)


def test_the_mean_gate_and_what_it_misses() -> None:
    """Two frames, (1, 0) and (0.5, 0.5), in two traces: the mean is (0.75, 0.25) and misses 4 x 0.25 of 2."""
    traces = [Trace(["a", "b"], [Record("first", 0, 0, {"gate": np.array([gate], np.float32)})]) for gate in ([1, 0], [0.5, 0.5])]
    held, missed = mean_gates(traces)
    assert held["first"].tolist() == [0.75, 0.25] and missed == pytest.approx(0.5)


def test_what_cannot_be_exported_is_said(model: Path, tmp_path: Path) -> None:
    out, speech = tmp_path / "lora", model / "samples" / "manifest.jsonl"
    assert "Give either --accent or --posterior." in run("--out", out)[1]
    asked = ["--model", model, "--out", out, "--accent"]
    for more, sentence in (
        (["german"], "The gate of hdmole changes from frame to frame"),
        (["martian"], "There is no accent 'martian'"),
        (["auto"], "A LoRA is for one accent"),
        (["german", "--method", "lora"], "no HDMoLE adapter"),
    ):
        status, output = run(*asked, *more)
        assert status == 1 and sentence in output, output
    (tmp_path / "one.jsonl").write_text(
        speech.read_text().splitlines()[0].replace("general_1", str(model / "samples" / "general_1"))
    )
    assert "has no recording in the accent german" in run(*asked, "german", "--speech", tmp_path / "one.jsonl")[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[0.5, 0.5]", "must give probabilities"),
        ('{"a": 0.5}', "must give probabilities"),
        ('{"a": 1.5, "b": -0.5}', "must give probabilities"),
        ('{"a": 0.5, "c": 0.5}', "by the names of accents; these are general, a, b"),
    ],
)
def test_a_posterior_that_is_none_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_posterior(tmp_path / "p.json", ["general", "a", "b"])
    (tmp_path / "p.json").write_text('{"b": 1}')
    assert read_posterior(tmp_path / "p.json", ["general", "a", "b"]).tolist() == [0, 0, 1]


def test_the_table_in_the_docs_is_what_was_measured() -> None:
    root = Path(__file__).resolve().parent.parent
    found, text = json.loads((root / "assets" / "results" / "export.json").read_text()), (root / "docs" / "models.md").read_text()
    for method in ("hdmole", "hdmole-extended"):
        own = [one for one in found if one["method"] == method]
        words = sum(one["words"] for one in own)
        rates = [sum(one["wer"][of] * one["words"] for one in own) / words for of in ("base", "adapter", "lora")]
        missed = sum(one["gate_missed"] for one in own) / len(own)
        assert len(own) == 8 and f"{words} words in all" in text
        assert f"| `{method}` | {missed:.0f} % | {rates[0]:.1f} % | {rates[1]:.1f} % | {rates[2]:.1f} % |" in text
