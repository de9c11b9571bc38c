"""The recipe for real speakers on a tiny random Whisper: splits, stages, resuming, the released folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from tiny import speech_like
from tiny_whisper import tiny_whisper

from hdmole.demo import real
from hdmole.demo.real import LABELS, best_scale, build
from hdmole.demo.real_corpus import Sizes, plan, read_people
from hdmole.models import pretrained
from hdmole.speech.manifest import ManifestError
from hdmole.study.results import load


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adults, a child, digits and two kinds of general speech; ten speakers where they are kept apart."""
    root = tmp_path_factory.mktemp("people")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        folder = root / name
        folder.mkdir()
        for k, row in enumerate(rows):
            row["audio"] = f"{k}.wav"
            row["seconds"] = 0.5
            soundfile.write(folder / row["audio"], speech_like(0.5, k), 16_000)
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    text = "we call it bear"
    adults = [{"text": text, "accent": "Mandarin", "speaker": f"m{k}", "age": 30, "source": "m"} for k in range(10)]
    write("sentences", [*adults, {"text": text, "accent": "Mandarin", "speaker": "child", "age": 6, "source": "c"}])
    digits = [{"text": "one two", "accent": "French", "speaker": f"d{k}", "source": "d"} for k in range(10)]
    single = [{"text": "six", "accent": "German", "speaker": "lone", "source": "s"} for _ in range(30)]
    write("digits", [*digits, *single])
    free = [{"text": "a small coffee", "accent": "general", "speaker": None, "source": "p"} for _ in range(2)]
    kept = [{"text": text, "accent": "general", "speaker": f"t{k}", "source": "t", "licence": "CC BY-NC-SA"} for k in range(4)]
    write("general", [*free, *kept])
    return root


SIZES = Sizes(composed=2, synthetic=1, general=2, told_apart=3, orders=2, judged=4, judged_synthetic=1)


def test_no_speaker_is_in_two_splits(people: Path) -> None:
    table = read_people([people])
    assert (table.groupby(["source", "speaker"]).split.nunique() == 1).all()
    assert set(table[table.source == "m"].split) == {"train", "dev", "test"}
    assert set(table[table.source == "p"].split) == {"train"}  # without speakers they cannot be kept apart
    assert set(table[table.source == "t"].split) == {"dev", "test"}  # a licence that forbids commercial use
    assert dict(table.groupby("source").domain.first()) == {
        "m": "real_adults", "c": "real_children", "d": "real_digits", "s": "real_digits", "p": "real_general", "t": "real_general",
    }  # fmt: skip


def test_the_plan(people: Path) -> None:
    jobs = pd.DataFrame(plan(read_people([people]), SIZES, 0))
    assert not (jobs.domain[jobs.split == "train"] == "real_children").any()
    assert not jobs[(jobs.split == "train") & (jobs.domain == "real_general")].paths.map(lambda p: "t" in Path(p[0]).stem).any()
    composed = jobs[jobs.speaker == "lone"]
    assert len(composed) == 2 and all(len(p) == len(t.split()) for p, t in zip(composed.paths, composed.text, strict=True))
    made = jobs[jobs.kind == "say"]
    assert set(made.domain) == {"synthetic_general", "synthetic_accents"} and set(made.accent) == set(LABELS)
    assert not set(jobs.domain[jobs.kind == "read"]) & set(made.domain)
    accented = made[made.domain == "synthetic_accents"]
    assert accented.groupby("split").size().to_dict() == {"dev": 8, "recogniser": 16, "test": 8, "train": 8}
    real = jobs[(jobs.kind == "read") & (jobs.split == "train") & (jobs.domain == "real_adults")]
    assert real.groupby("speaker").augment.apply(sorted).map(tuple).unique().tolist() == [(False, True)]  # as it is, and varied


def test_without_recordings_a_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest\.jsonl"):
        read_people([tmp_path])


def test_the_whole_recipe_runs_resumes_and_releases(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "Sizes", lambda: SIZES)
    monkeypatch.setattr(real, "TRIALS", {m: [(1e-3, "encoder"), (1e-3, "both")] for m in real.METHODS})
    base, told = tiny_whisper(tmp_path), []
    how: dict[str, Any] = dict(base=base, methods=("lora", "hdmole", "full"), epochs=1, search=True, domain=False)
    results = build(tmp_path / "real", [people], 0, 1, tmp_path / "work", told.append, **how)
    assert results is not None and set(results.methods) == {"base", "lora", "hdmole", "full"}
    domains = set(results.methods["base"].domains)
    assert {"real_adults", "real_digits", "real_general", "synthetic_accents", "synthetic_general"} <= domains
    out = tmp_path / "real"
    trainable = {name: entry.trainable for name, entry in results.methods.items()}
    linears = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * (3 * 16 + 32 + 16)  # weights and biases, the keys without
    crossed = 2 * (4 * 16 * 16 + 3 * 16)  # the decoder has as many once more, and attends to the encoder
    assert (
        trainable["base"] == 0
        and trainable["full"] == {"encoder": linears, "both": 2 * linears + crossed}[results.methods["full"].place or ""]
    )
    assert len(results.trials) == 6 and {trial.place for trial in results.trials} == {"encoder", "both"}
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_sha256"] == pretrained.digest(base)
    assert (
        not (out / "adapters" / "full").exists()
        and str(tmp_path) not in (out / "adapters" / "lora" / "adapter_config.json").read_text()
    )
    again = build(out, [people], 0, 1, tmp_path / "work", told.append, **how)
    assert again is not None and again.methods == results.methods and load(out / "results").methods == results.methods
    assert sum("trainable parameters" in line for line in told) == 6  # nothing is trained twice
    stages = real.Build(tmp_path / "work", base, [people], SIZES, 0, 1.0, told.append)
    corpus, trial = stages.corpus(), real.Trial("hdmole", *real.TRIALS["hdmole"][0])
    model = stages.adapt(trial, corpus, np.zeros(0))
    values = {n: p.clone() for n, p in model.named_parameters() if "hdmole_B" in n}
    assert any(bool(v.abs().max() > 0) for v in values.values())
    stages.scale(trial, model, corpus, np.zeros(0))
    factor = best_scale(stages.dev(trial), stages.dev(None))[0]
    name, value = next(iter(values.items()))
    np.testing.assert_allclose(dict(model.named_parameters())[name].detach(), factor * value.detach(), rtol=1e-6)


def test_the_scale_with_fewest_errors_that_does_not_forget() -> None:
    base = {"1.0": {"real_adults": 30.0, "real_general": 10.0}}
    found = {
        "1.0": {"real_adults": 18.0, "real_general": 10.6},  # loses 0.1 points more than may be lost
        "0.8": {"real_adults": 20.0, "real_general": 10.5},
        "0.6": {"real_adults": 22.0, "real_general": 9.0},
    }
    assert best_scale(found, base) == (0.8, 0.0, 20.0)
    scale, over, adults = best_scale({"1.0": found["1.0"], "0.4": {"real_adults": 25.0, "real_general": 10.7}}, base)
    assert (scale, round(over, 3), adults) == (1.0, 0.1, 18.0)
