"""`hdmole compare` on a tiny model and tones: every method, resuming, the analyses, bad configurations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
from driver import in_brackets
from streamlit.testing.v1 import AppTest
from tiny import ACCENTS, SENTENCES, speech_like, tiny_speech
from typer.testing import CliRunner

from hdmole.cli import app
from hdmole.method.intervention import intervene
from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tracing import trace
from hdmole.processes import claim, rank_and_count
from hdmole.speech.decoding import Decoded
from hdmole.study import analyses
from hdmole.study import compare as comparing
from hdmole.study.analyses import log_likelihood
from hdmole.study.compare import Runner, compare
from hdmole.study.config import ConfigError, known_methods, read_config
from hdmole.study.results import base_digest, load
from hdmole.study.routing_table import ROUTERS
from hdmole.study.tables import markdown_table
from hdmole.training import adapt as adapting
from hdmole.training import preparation
from hdmole.training.adapt import Adaptation, AdaptationError
from hdmole.training.preparation import speech_of

pytestmark = pytest.mark.timeout(900)  # the first test that needs the comparison waits for it

ROOT = Path(__file__).resolve().parent.parent
METHODS = [
    "full",
    "lora",
    "gated_lora",
    "hdmole",
    "extended",
    "merged",
    "rank2",
    "moa",
    "encoder",
    "llm",
]
CONFIG = """
model = "{model}"
methods = {methods}
seeds = [0]
epochs = {epochs}
trial_epochs = 1
watched = ["hdmole"]
[seeds_of]
hdmole = [0, 1]
[hdmole]
r = 2
threshold_rate = 0.5
[extended]
r = 1
shared_expert_rank = 1
router_accent = 0.0
[method.encoder]
kind = "extended"
rate = "extended"
place = "encoder"
options = {{r = 1}}
[method.llm]
kind = "hdmole"
rate = "hdmole"
place = "llm"
options = {{r = 1}}
[manifests]
train = "train.jsonl"
dev = "dev.jsonl"
test = "test.jsonl"
[rates]
full = [1e-3, 2e-3]
lora = [2e-3, 4e-3]
gated_lora = [2e-3, 4e-3]
hdmole = [2e-3, 4e-3]
extended = [2e-3, 4e-3]
merged = [2e-3, 4e-3]
moa = [2e-3, 4e-3]
"""


def corpus(folder: Path, model: Path, methods: list[str], epochs: float, train: int = 36) -> Path:
    """Manifests of tones in four "accents" with speakers apart, and a configuration; returns the configuration's path."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", train), ("dev", 4), ("test", 8)):
        lines = []
        for k in range(count):
            accent = ["general", *ACCENTS][k % 4]
            name = f"{split}-{k}.wav"
            soundfile.write(folder / name, speech_like(0.5 + 0.1 * (k % 3), k % 4 + 10 * (split != "train")), 16_000)
            text = SENTENCES[k % len(SENTENCES)]
            lines.append({"audio": name, "text": text, "accent": accent, "speaker": f"{split}-{k % 2}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "config.toml"
    config.write_text(CONFIG.format(model=model, methods=json.dumps(methods), epochs=epochs))
    return config


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """A base that is read once, an accent recogniser of few steps, and few rounds of timing: none is what these tests look at."""
    read = cache(adapting.load_base)
    with pytest.MonkeyPatch.context() as patch:
        for module in (adapting, comparing):
            patch.setattr(module, "load_base", lambda *where: deepcopy(read(*where)))
        patch.setattr(preparation, "RECOGNISER_EPOCHS", (1.0, 0.5))
        patch.setattr(comparing, "SPEED_ROUNDS", 1)
        yield


@pytest.fixture
def two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points of the frontier of thresholds in place of fifteen, for tests that look at no point."""
    for name in ("SCALES", "TOP_K", "TOP_P"):
        monkeypatch.setattr(analyses, name, (1,) if name != "TOP_P" else ())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path, list[str]]:
    folder = tmp_path_factory.mktemp("compare")
    said: list[str] = []
    config = corpus(folder / "speech", tiny_model, METHODS, 1)
    compare(config, folder / "out", said.append)
    return config, folder / "out", said


def test_every_method_is_trained_judged_and_reported(made: tuple[Path, Path, list[str]], tiny_model: Path) -> None:
    """The projector has 14 linear layers: ten of 32 to 32 features, two to 64, two back; 1024 inputs and outputs together.

    Full fine-tuning trains their 18,432 weights and 512 biases, and five normalisations of 64. LoRA of rank 8 trains 8 * 1024.
    HDMoLE has three experts of rank 2 (6144), routers of three outputs (1536) and two thresholds a layer (28); the extended
    variant three experts and a shared one of rank 1 (4096), and routers of three inputs (126), two thresholds and a gate a layer.
    """
    config, out, _ = made
    results = load(out)
    methods = results.methods
    assert list(methods) == ["base", *METHODS]
    rows = pd.read_parquet(out / "utterances.parquet")
    assert rows.groupby(["method", "seed"]).size().to_dict() == {
        (m, s): 8 for m in ["base", *METHODS] for s in ((0, 1) if m == "hdmole" else (0,))
    }
    size = {name: entry.trainable or 0 for name, entry in methods.items()}
    assert (size["base"], size["full"], size["lora"], size["gated_lora"]) == (0, 18_432 + 512 + 5 * 64, 8 * 1024, 8 * 1024)
    assert size["hdmole"] == size["rank2"] == size["merged"] == 6144 + 1536 + 28
    assert (size["moa"], size["extended"]) == (6144 + 1536, 4096 + 126 + 28 + 14)  # MoA has no thresholds
    twins = [rows[(rows.method == name) & (rows.seed == 0)].drop(columns="method") for name in ("hdmole", "rank2")]
    pd.testing.assert_frame_equal(*(twin.reset_index(drop=True) for twin in twins))
    trained = sum("trainable parameters" in line for line in made[2])
    assert trained == 14 + len(METHODS)  # all trials, all methods but rank2, and a second seed of HDMoLE
    assert methods["hdmole"].seeds == [0, 1] and set(methods["hdmole"].dev or ()) == {"accent", "general"}
    assert set(methods["hdmole"].domains["accent"].per_seed or ()) == {0, 1}
    tried = [(trial.accent, trial.learning_rate) for trial in results.trials if trial.method == "hdmole"]
    assert len(tried) == 2 and methods["llm"].learning_rate == min(tried)[1]
    assert len(results.trials) == 14 and not results.planned
    assert {"accent", "general"} <= set(next(iter(results.curves["hdmole"].values())))
    assert [claim.name for claim in results.claims[:3]] == ["accents_full", "general_base", "general_full"]
    assert results.decoding_time["base"] == 1 and set(results.decoding_time) == {"base", "hdmole"}  # those that are watched
    assert "Decoding time |" in markdown_table(results) and methods["encoder"].place == "encoder"
    recogniser, origin = results.accent_recogniser, results.provenance
    assert recogniser is not None and sum(map(sum, recogniser.confusion)) == 8 and len(recogniser.labels) == 4
    assert origin.data_sha256 and origin.base_sha256 == base_digest(tiny_model) and origin.config == config.read_text()


def test_methods_that_learn_from_less_speech_take_as_many_steps(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, _ = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    asked = []
    monkeypatch.setattr(adapting, "fit", lambda model, batches, *rest, epochs, **more: asked.append((batches.batches, epochs)))
    full = comparison.known["full"]
    for name, method in (("full", full), ("tenth", replace(full, share=0.1))):
        adapting.adapt(speech, method, tmp_path / name, epochs=2, rate=0, seed=0, report=lambda text: None)
    (all_of, twice), (few, often) = (({i for batch in batches for i in batch}, epochs) for batches, epochs in asked)
    assert few < all_of and len(few) == round(0.1 * len(all_of)) and often == 10 * twice


def test_a_learning_rate_that_is_given_needs_no_trial(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    given = {name: [rates[0]] for name, rates in comparison.rates.items()}
    runner = Runner(replace(comparison, rates=given), tmp_path, speech, extra, lambda text: None)
    assert {name: runner.rate(name) for name in given} == {name: rates[0] for name, rates in comparison.rates.items()}
    assert not any(runner.tried(name) for name in given)
    names = [task.name for task in runner.tasks()]
    first = ["base-0", *(f"{m}-0" for m in METHODS)]
    after = first.index("hdmole-0") + 1
    assert names == [*first[:after], "routing", "frontier", "attribution", *first[after:], "hdmole-1"]
    assert [task.name for task in runner.tasks() if task.ready()] == [n for n in names if n[-1].isdigit() and n != "rank2-0"]
    tuned = Runner(comparison, tmp_path, speech, extra, lambda text: None).tasks()
    assert [task.name for task in tuned[:4]] == ["base-0", "full-0.001", "full-0.002", "full-0"]
    assert [task.ready() for task in tuned[:4]] == [True, True, True, False]  # a run waits for its trials


def test_a_task_has_one_process(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    one, other = (Runner(comparison, tmp_path, speech, extra, lambda text: None, rank) for rank in (0, 1))
    task = one.tasks()[0]
    with ExitStack() as held:
        assert claim(task, tmp_path, held) and not claim(other.tasks()[0], tmp_path, held)
    with ExitStack() as held:
        assert claim(other.tasks()[0], tmp_path, held)


def test_the_results_so_far_name_what_is_planned(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    shutil.copytree(out, tmp_path / "out")
    for gone in ("hdmole-1", "lora-0"):
        shutil.rmtree(tmp_path / "out" / "work" / gone)
    for gone in ("trials/full-0.001", "trials/moa-0.004"):  # without all trials, a learning rate is not known
        shutil.rmtree(tmp_path / "out" / "work" / gone)
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    Runner(comparison, tmp_path / "out", speech, extra, lambda text: None).publish()
    found, whole = load(tmp_path / "out"), load(out)
    assert found.planned == {"full": [0], "lora": [0], "hdmole": [1], "moa": [0]}
    assert set(found.methods) == set(whole.methods) - {"full", "lora", "moa"} and found.methods["hdmole"].seeds == [0]
    assert found.methods["extended"] == whole.methods["extended"] and found.routing == whole.routing
    assert len(pd.read_parquet(tmp_path / "out" / "utterances.parquet")) == 8 * len(found.methods)


def test_settings_hold_what_decides_and_no_defaults(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    early, recogniser = np.full_like(speech.posteriors, 0.25), speech.recogniser
    assert recogniser is not None
    runner = Runner(comparison, tmp_path, replace(speech, others={"early": (recogniser, early)}), extra, lambda text: None)
    known = {"kind": "hdmole", "options": {"r": 1}, "epochs": 1, "rate": 0.1, "seed": 3, "speech": runner.digest}
    same = Adaptation("a", "hdmole", {"r": 1})
    assert runner.settings(same, 1, 0.1, 3) == runner.settings(replace(same, label="b", rate="full"), 1, 0.1, 3) == known
    assert runner.settings(replace(same, router_rate=0.5), 1, 0.1, 3) == known | {"router_rate": 0.5}
    by_early = runner.settings(replace(same, recogniser="early"), 1, 0.1, 3)
    other = Runner(comparison, tmp_path, replace(speech, others={"early": (recogniser, early + 0.01)}), extra, lambda text: None)
    assert by_early["posteriors"] != other.settings(replace(same, recogniser="early"), 1, 0.1, 3)["posteriors"]
    missing = replace(same, recogniser="better")
    runner.methods["mine"], runner.comparison.rates["mine"] = missing, [1.0]
    assert not runner.finished("mine", 0)  # others can be judged until it is there
    with pytest.raises(AdaptationError, match="no accent posteriors by the recogniser 'better'"):
        runner.settings(missing, 1, 0.1, 3)


def test_analyses(made: tuple[Path, Path, list[str]]) -> None:
    config, out, _ = made
    results = load(out)
    assert results.routing is not None and results.attribution is not None and set(results.routing.routers) == set(ROUTERS)
    for found in results.routing.routers.values():
        for values in (found.all, *found.layers.values()):
            low, high = values.purity.interval
            assert 0 <= low <= high <= 1 and 0.33 <= values.purity.value <= 1
    routes = pd.read_parquet(out / "routing.parquet")
    assert set(results.routing.active_by_accent) == {"general", *ACCENTS}
    layer = next(iter(results.routing.active["general"]))
    spoken = routes[(routes.spoken == ACCENTS[0]) & (routes.layer == layer)]
    assert results.routing.active_by_accent[ACCENTS[0]][layer] == pytest.approx(spoken.n_active.mean(), abs=1e-3)
    assert results.routing.active_by_accent["general"] == results.routing.active["general"]
    assert routes.groupby(["utterance", "layer"]).posterior.sum().between(0, 1.001).all()
    points = pd.DataFrame([point.to_dict() for point in results.frontier])
    scaled = points[points.choice == "thresholds"].sort_values("value")
    assert scaled.active.is_monotonic_decreasing and scaled.value.min() == 0.5 and scaled.active.iloc[-1] == 0
    assert points[(points.choice == "top_k") & (points.value == 2)].active.item() >= 2
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    runner = Runner(comparison, out, speech, extra, lambda text: None)
    model, index = runner.trained("hdmole", runner.analysed), speech.corpus.index
    experts = sorted(ACCENTS)
    assert (results.attribution.accents, results.attribution.experts) == (["general", *experts], experts)
    for accent, values in zip(results.attribution.accents, results.attribution.values, strict=True):
        rows = [i for i in speech.corpus.select("test") if index.accent[i] == accent]
        words = sum(len(index.text[i].split()) for i in rows)
        whole = log_likelihood(speech, model, runner.methods["hdmole"], rows)
        for expert, value in zip(experts, values, strict=True):
            with intervene(model, mask=[expert]):
                without = log_likelihood(speech, model, runner.methods["hdmole"], rows)
            assert value == pytest.approx((without - whole).sum() / words, abs=2e-4)


def test_analyses_see_and_change_layers_of_the_encoder(made: tuple[Path, Path, list[str]]) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    runner = Runner(comparison, out, speech, extra, lambda text: None)
    model = runner.trained("encoder", out / "work" / "encoder-0")
    rows, seen = speech.corpus.select("test", "accent"), []

    @contextmanager
    def around(rows: list[int], lengths: list[int]) -> Iterator[None]:
        with intervene(model, thresholds="top_k", top_k=1), trace(model, lengths=lengths) as traced:
            yield
        seen.append((len(rows), traced.to_frame()))

    adapting.hear(speech, model, runner.methods["encoder"], rows, around)
    assert sum(count for count, _ in seen) == len(rows)
    for count, table in seen:
        assert table.layer.str.contains("audio_tower").all() and table.utterance.nunique() == count
        assert (table.n_active_global == 1).all()


def test_the_app_shows_a_comparison(
    made: tuple[Path, Path, list[str]], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDMOLE_MODEL", str(tiny_model))
    monkeypatch.setenv("HDMOLE_DATA", str(made[1].parent))
    for page, figures in (("compare", 7), ("correspondence", 4)):
        at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
        at.query_params["results"] = str(made[1])
        at.switch_page(f"../pages/{page}.py").run()
        assert not at.exception and not at.error, (at.exception, at.error)
        assert len(at.get("plotly_chart")) == figures
    at.selectbox(key="corpus_layer").set_value(in_brackets(at.selectbox(key="corpus_layer").options[0])).run()
    at.segmented_control(key="router").set_value("local_probability").run()
    assert not at.exception


def test_a_second_call_trains_nothing_and_says_the_same(made: tuple[Path, Path, list[str]]) -> None:
    config, out, said = made
    before, count = load(out), len(said)
    again = compare(config, out, said.append)
    assert again is not None and not any("step" in line for line in said[count:])
    assert again == before.model_copy(update={"provenance": again.provenance})


@pytest.mark.usefixtures("two_settings")
def test_what_was_made_with_other_settings_is_made_anew(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    shutil.copytree(out, tmp_path / "out")
    said: list[str] = []
    kept = config.read_text()
    try:
        config.write_text(kept.replace(json.dumps(METHODS), '["full", "hdmole"]').replace("\nr = 2\n", "\nr = 3\n"))
        again = compare(config, tmp_path / "out", said.append)
    finally:
        config.write_text(kept)
    before = load(out)
    assert again is not None and again.methods["full"] == before.methods["full"]
    assert (again.methods["hdmole"].trainable or 0) > (before.methods["hdmole"].trainable or 0)
    assert "hdmole-0: its settings have changed, so it is made anew" in said
    assert again.attribution != before.attribution and not any(line.startswith("full-0: its") for line in said)


@pytest.mark.usefixtures("two_settings")
def test_what_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path, tiny_model: Path) -> None:
    config = corpus(tmp_path / "speech", tiny_model, ["hdmole"], 15)
    text = config.read_text().replace("[2e-3, 4e-3]", "[2e-3]").replace("[1e-3, 2e-3]", "[1e-3]").replace("[0, 1]", "[0]")
    config.write_text(text)
    whole = compare(config, tmp_path / "whole", lambda text: None)

    def cut(text: str) -> None:
        if "step 24 of 30" in text and "adapter" in text:
            raise KeyboardInterrupt

    shutil.copytree(tmp_path / "whole" / "work" / "speech", tmp_path / "cut" / "work" / "speech")
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path / "cut", cut)
    assert list((tmp_path / "cut" / "work" / "hdmole-0" / "adapter-training").glob("checkpoint-*"))
    said: list[str] = []
    resumed = compare(config, tmp_path / "cut", said.append)
    assert not any("step 15 of 30" in line and "adapter" in line for line in said)  # it did not start anew
    assert whole is not None and resumed is not None and resumed.attribution == whole.attribution
    one, other = (pd.read_parquet(tmp_path / name / "utterances.parquet") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.usefixtures("two_settings")
def test_other_speech_is_noticed_and_accents_without_an_expert_are_unseen(tmp_path: Path, tiny_model: Path) -> None:
    """A changed manifest makes speech and runs anew; a test accent that train lacks has a table row but no expert."""
    config = corpus(tmp_path / "speech", tiny_model, ["hdmole"], 1, train=12)
    config.write_text(
        config.read_text().replace("[2e-3, 4e-3]", "[2e-3]").replace("[1e-3, 2e-3]", "[1e-3]").replace("[0, 1]", "[0]")
    )
    first = compare(config, tmp_path / "out", lambda text: None)
    assert first is not None and "unseen" not in first.methods["hdmole"].domains
    manifest = tmp_path / "speech" / "test.jsonl"
    manifest.write_text(manifest.read_text().replace(f'"{ACCENTS[0]}"', '"welsh"'))
    said: list[str] = []
    again = compare(config, tmp_path / "out", said.append)
    assert again is not None and any(line.startswith("speech: the manifests") for line in said)
    assert "hdmole-0: its settings have changed, so it is made anew" in said
    assert set(again.methods["hdmole"].domains["unseen"].accents) == {"welsh"} and again.attribution and again.routing
    assert "welsh" not in again.attribution.accents and again.routing.active.keys() == {"accent", "general", "unseen"}
    manifest.write_text(
        "".join(line + "\n" for line in manifest.read_text().splitlines() if '"general"' in line or "welsh" in line)
    )
    with pytest.raises(ValueError, match="test manifest has none of the accents"):
        compare(config, tmp_path / "out", lambda text: None)


def test_a_kill_while_an_adapter_is_saved_loses_nothing(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, _ = made
    comparison = read_config(config)
    speech, _ = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    for name in ("full", "hdmole"):
        method, folder = comparison.known[name], tmp_path / name

        def train(method: Any = method, folder: Path = folder) -> Any:
            return adapting.adapt(speech, method, folder, epochs=1, rate=1e-3, seed=0, report=lambda text: None)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # the moment before it is whole
            with pytest.raises(KeyboardInterrupt):
                train()
        assert not folder.exists()
        train()
        assert folder.is_dir() and not folder.with_name(f".part-{name}").exists()


def test_an_adapter_that_is_gone_is_said_not_made_up(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    config, out, _ = made
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "work" / "hdmole-0" / "adapter")
    (tmp_path / "out" / "work" / "hdmole-0" / "frontier.json").unlink()
    with pytest.raises(ConfigError, match="hdmole-0 has lost its adapter"):
        compare(config, tmp_path / "out", lambda text: None)
    assert not (tmp_path / "out" / "work" / "hdmole-0" / "adapter").exists()


def test_processes_share_the_work(tmp_path: Path, made: tuple[Path, Path, list[str]]) -> None:
    """Two processes find what one finds, from speech that is encoded already."""
    config, out, _ = made
    shutil.copytree(out / "work" / "speech", tmp_path / "out" / "work" / "speech")
    small = tmp_path / "config.toml"
    text = config.read_text().replace(json.dumps(METHODS), '["full", "hdmole"]')
    small.write_text(text.replace('"train.', f'"{config.parent}/train.').replace('"dev.', f'"{config.parent}/dev.')
                     .replace('"test.', f'"{config.parent}/test.'))  # fmt: skip
    command = ["compare", "--config", str(small), "--out", str(tmp_path / "out"), "--processes", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "hdmole.cli", *command], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    mine, alone = load(tmp_path / "out"), load(out)
    assert list(mine.methods) == ["base", "full", "hdmole"] and mine.attribution == alone.attribution
    assert mine.methods == {name: alone.methods[name] for name in mine.methods}


def test_accelerate_gives_each_process_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_and_count() == (0, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert rank_and_count() == (3, 4) and os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert "LOCAL_RANK" not in os.environ and "RANK" not in os.environ  # the Trainer would share one run otherwise


def test_every_method_adapts_the_place_of_the_configuration(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    """LoRA's rank is then the one that is equal there."""
    config, out, _ = made
    comparison = read_config(config)
    speech, extra = speech_of(comparison.data, comparison.model, comparison.manifests, out / "work", lambda text: None)
    for place in ("encoder", "llm"):
        known = known_methods({"r": 1, "router_input": "ax"}, place)
        runner = Runner(replace(comparison, known=known), tmp_path, speech, extra, lambda text: None)
        sizes = {}
        for name in ("full", "lora", "gated_lora", "hdmole", "moral", "adamole"):
            model = adapting.with_adapter(adapting.load_base(speech.base), runner.methods[name], speech.recogniser)
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert trained and all(("audio_tower" if place == "encoder" else "language_model") in n for n in trained)
            sizes[name] = adapting.trainable(model)
        assert abs(sizes["lora"] - sizes["hdmole"]) < 0.25 * sizes["hdmole"] < 0.25 * sizes["adamole"]
        assert sizes["moral"] < sizes["hdmole"]  # without thresholds
        assert sizes["gated_lora"] == sizes["lora"]


def test_a_run_with_the_true_accent_is_judged_with_it(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test and dev speech are routed by the accent that was spoken, of which the recogniser has no idea."""
    rows = [("train", "accent", "indian"), ("test", "accent", "german"), ("test", "general", "general")]
    speech = tiny_speech(tmp_path / "speech", tiny_model, [*rows, ("test", "accent", "scottish"), ("dev", "accent", "indian")])
    (tmp_path / "config.toml").write_text(CONFIG.format(model=tiny_model, methods='["hdmole", "true_accent"]', epochs=1))
    heard: list[list[list[float]]] = []

    def greedy(model: Any, states: list[Any], tokenizer: Any, posterior: Any) -> list[Decoded]:
        heard.append(posterior.tolist())
        return [Decoded("", [], [])] * len(states)

    monkeypatch.setattr(adapting, "greedy", greedy)
    runner = Runner(read_config(tmp_path / "config.toml"), tmp_path / "out", speech, {}, lambda text: None)
    for name in ("true_accent", "hdmole"):
        method = runner.methods[name]
        model = adapting.with_adapter(adapting.load_base(speech.base), method, speech.recogniser)
        runner.errors(speech, model, method, runner.test_rows())
        runner.dev(model, method)
    general, indian, german, scottish = np.eye(4).tolist()
    assert heard == [[german, general, scottish], [indian], [[0.25] * 4] * 3, [[0.25] * 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 1", "epochs = "), "not valid TOML"),
        (("[rates]", "[nonsense]"), "nonsense"),
        (("lora = [2e-3, 4e-3]\ngated", "gated"), "no learning rates to try for lora"),
        (("full = [1e-3, 2e-3]", "full = [1e-3]"), "more learning rates for one method"),
        (('"full"', '"ful"'), "names ful; the methods are base, full"),
        (("methods", 'data = "x"\nmethods'), "either data .* or manifests"),
        (("[manifests]", "rank = 2\n[manifests]"), "rank"),
        (("[hdmole]", '[method.mine]\nkind = "magic"\n[hdmole]'), "The kind of a method"),
        (("[hdmole]", '[method.mine]\nkind = "lora"\n[hdmole]'), "needs options.r"),
        (("[hdmole]", '[method.mine]\nkind = "lora"\noptions = {r = 2, alpha = 3}\n[hdmole]'), "unexpected keyword"),
        (("seeds = [0]", "seeds = 3"), "seeds is a list"),
        (("seeds = [0]", "seeds = []"), "seeds is a list"),
        (("seeds = [0]", "seeds = [0, -1]"), "seeds is a list"),
        (("hdmole = [0, 1]", "hdmol = [0, 1]"), "seeds_of is a table"),
        (("full = [1e-3, 2e-3]", "full = 1e-3"), "rates.full is a list"),
        (("full = [1e-3, 2e-3]", 'full = ["a", "b"]'), "each of rates.full is a number above 0"),
        (("full = [1e-3, 2e-3]", "full = [[1e-3], [2e-3]]"), "each of rates.full is a number above 0"),
        (("epochs = 1\n", 'epochs = "many"\n'), "epochs is a number above 0"),
        (("trial_epochs = 1", "trial_epochs = 0"), "trial_epochs is a number above 0"),
        (('train = "train.jsonl"', "train = 3"), "train is a path in quotes"),
        (('watched = ["hdmole"]', 'watched = "hdmole"'), "watched is a list of names"),
        (("seeds = [0]", 'seeds = [0]\nplace = "ear"'), "The place of a method is one of projector, encoder, llm"),
    ],
)
def test_bad_configurations_get_a_sentence(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(model="demo", methods='["full", "lora"]', epochs=1).replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_config(file)


def test_missing_and_mixed_up_speech_get_a_sentence(tmp_path: Path, tiny_model: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["compare", "--config", str(tmp_path / "none.toml"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "There is no configuration" in result.stderr
    config = corpus(tmp_path / "speech", tiny_model, ["full"], 1, train=4)
    shutil.copy(tmp_path / "speech" / "train.jsonl", tmp_path / "speech" / "dev.jsonl")
    result = runner.invoke(app, ["compare", "--config", str(config), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "in both train and dev" in result.stderr


def test_own_methods_and_all_known_ones_are_described(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    own = '\n[method.mine]\nlabel = "mine"\nkind = "hdmole"\nrate = "hdmole"\noptions = {r = 3}\n'
    file.write_text(CONFIG.format(model="demo", methods='["full", "lora", "mine"]', epochs=1) + own)
    assert read_config(file).known["mine"].options == {"r": 3}
    known = known_methods({"threshold_rate": 0.5, "alpha": 3.0}, "projector", {"r": 3, "router_rate": 2.0})
    assert len({m.label for m in known.values()}) == len(known)
    assert (known["moa"].threshold_rate, known["moa"].router_rate) == (0.5, 1.0) and known["moa"].options["alpha"] == 3
    assert (known["extended"].threshold_rate, known["extended"].router_rate) == (1.0, 2.0)
    assert known["extended"].options == {"r": 3} and known["rank16"].options == {"alpha": 3.0, "r": 16}
    assert known["ear"].train_with == known["loramoe"].train_with == "accent" and known["hdmole"].train_with == "recogniser"


def test_the_configurations_of_published_results_fit_the_demo_model() -> None:
    experts = {"paper.toml": 8, "people.toml": 2}
    for file in sorted((ROOT / "runs").glob("*.toml")):
        comparison = read_config(file)
        sizes = {}
        for name in ("full", "hdmole", "extended"):
            base = adapting.load_base(ROOT / "assets" / "demo")
            accents = AccentRecogniser(["general", *(f"accent {k}" for k in range(experts[file.name]))])
            sizes[name] = adapting.trainable(adapting.with_adapter(base, comparison.known[name], accents))
        assert sizes["hdmole"] <= 0.096 * sizes["full"] and sizes["extended"] <= 0.096 * sizes["full"], file.name
