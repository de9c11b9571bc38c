"""The choice between the model for real people and the small model, on tiny models in their places."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from driver import assert_no_exception, cards, session, settle, wav
from streamlit.testing.v1 import AppTest
from tiny_whisper import tiny_adapters, tiny_whisper

from hdmole.models import pretrained
from hdmole.names import GENERAL_OF
from hdmole.speech import loading
from hdmole.study.bootstrap import summarise
from hdmole.study.results import base_digest, provenance, save

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("home", "transcribe", "routing", "thresholds", "correspondence", "compare", "paper", "corpus", "report", "about")
ERRORS = {"base": 4, "hdmole": 2}  # of 10 words, in each utterance of people


@pytest.fixture(scope="module")
def assets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as assets/real and assets/demo, and the base of the former in a cache."""
    folder = tmp_path_factory.mktemp("choice")
    base = tiny_whisper(folder)
    real = tiny_adapters(base, folder / "assets" / "real")
    (folder / "cache").mkdir()
    (folder / "cache" / "whisper-base").symlink_to(base)
    (folder / "assets" / "demo").symlink_to(tiny_model)
    rows = [
        {"method": method, "seed": 0, "domain": domain, "accent": "Mandarin", "speaker": f"s{k}", "utterance": f"{domain}-{k}",
         "reference": "a b c d e f g h i j", "hypothesis": "", "errors": errors if domain == "real_adults" else 1, "words": 10}
        for method, errors in ERRORS.items() for domain in (*list(GENERAL_OF)[1:], "real_general", "synthetic_general") for k in range(6)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    save(real / "results", summarise(table, provenance(0, "cpu", base_sha256=pretrained.digest(base))), table)
    return folder / "assets"


@pytest.fixture
def open_choice(assets: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    monkeypatch.delenv("HDMOLE_MODEL", raising=False)
    monkeypatch.setattr(loading, "ASSETS", assets)
    monkeypatch.setenv("HDMOLE_CACHE", str(assets.parent / "cache"))

    def opened(page: str, **query: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
        at.query_params.update(query)
        return settle(at.switch_page(f"../pages/{page}.py").run())

    return opened


def line(at: AppTest) -> str:
    """The line that says which model the page is about."""
    return next(caption.value for caption in at.caption if "You are looking at" in caption.value)


def words(at: AppTest) -> list[str]:
    """The heard words in all cards, with their confidences and times."""
    return re.findall(r"confidence [^<]*", cards(at))


def test_it_opens_on_the_model_for_people_and_the_other_is_one_click_away(open_choice: Callable[..., AppTest]) -> None:
    at = open_choice("transcribe", sample="indian_1")
    assert_no_exception(at)
    assert at.radio(key="model_choice").options == ["Real people (Whisper base)", "Controlled experiment (small model)"]
    assert "real people" in line(at) and at.query_params["model"] == "real"
    assert [f">{name}<" in cards(at) for name in ("Frozen base", "LoRA", "HDMoLE", "HDMoLE, extended")] == [
        True,
        True,
        True,
        False,
    ]
    assert ", synthetic" in at.selectbox(key="sample_choice").options[0]
    heard = words(at)
    settle(at.radio(key="model_choice").set_value("demo").run())
    assert_no_exception(at)
    assert "controlled experiment" in line(at) and at.query_params["model"] == "demo" and words(at) != heard
    assert session(at).utterance.sample == at.query_params["sample"] == "indian_1"
    at.query_params["model"] = "real"  # as going back does
    settle(at.run())
    assert "real people" in line(at) and at.radio(key="model_choice").value == "real" and words(at) == heard


def test_a_link_opens_the_small_model(open_choice: Callable[..., AppTest]) -> None:
    at = open_choice("routing", sample="indian_1", layer="layers.0.fc1", model="demo")
    assert_no_exception(at)
    assert "controlled experiment" in line(at) and at.selectbox(key="layer").value.endswith("layers.0.fc1")
    settle(at.switch_page("../pages/thresholds.py").run())
    assert "controlled experiment" in line(at) and at.query_params["model"] == "demo"
    settle(at.multiselect(key="change_layers").set_value(["linear_1"]).run())
    settle(at.radio(key="model_choice").set_value("real").run())  # it has no such layer
    assert_no_exception(at)
    assert at.multiselect(key="change_layers").value == []


@pytest.mark.parametrize(
    ("lacking", "command"), [("weights", "hdmole models get whisper-base"), ("folder", "hdmole demo build --real")]
)
def test_without_the_model_for_people_the_small_one_opens_and_says_what_is_missing(
    open_choice: Callable[..., AppTest], lacking: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path
) -> None:
    monkeypatch.setattr(pretrained, "_from_hub", lambda local: None)
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path))
    if lacking == "folder":
        (tmp_path / "demo").symlink_to(assets / "demo")
        monkeypatch.setattr(loading, "ASSETS", tmp_path)
    for page in ("home", "compare"):
        at = open_choice(page, model="real")
        assert_no_exception(at)
        assert "controlled experiment" in line(at) and command in line(at)
        assert at.radio(key="model_choice").options == ["Controlled experiment (small model)"]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_on_the_model_for_people(open_choice: Callable[..., AppTest], page: str) -> None:
    at = open_choice(page)
    assert_no_exception(at)
    assert "real people" in line(at) and at.query_params["model"] == "real" and not at.error
    if page == "correspondence":
        assert "hold no routing" in at.info[0].value
    if page == "paper":
        assert "controlled experiment" in at.info[0].value
    if page in ("routing", "report"):
        assert (
            at.selectbox(key="layer").value in at.selectbox(key="layer").options or at.query_params["layer"] == "encoder.0.k_proj"
        )


def test_results_of_people_and_of_a_synthesiser_are_not_counted_together(open_choice: Callable[..., AppTest]) -> None:
    at = open_choice("compare")
    assert_no_exception(at)
    assert not at.warning  # they are of this model's base
    assert at.markdown[0].value.startswith(
        "On real adults, HDMoLE makes **20.0 errors in 100 words**, 20.0 fewer than the frozen base. On real general speech, HDMoLE "
        "makes **10.0 errors in 100 words**; that this differs from the frozen base is not established."
    )
    assert at.segmented_control(key="speech").options == ["Real adults", "Synthetic accents"]
    for speech, kinds in (
        ("real_adults", "Real adults, Real general speech"),
        ("synthetic_accents", "Synthetic accents, Synthetic"),
    ):
        at.segmented_control(key="speech").set_value(speech).run()
        assert_no_exception(at)
        said = [caption.value for caption in at.caption]
        assert any(f"Speech: {kinds}" in text for text in said) and any(text.startswith("12 utterances") for text in said)


def test_a_recording_is_judged_and_its_routing_shown(open_choice: Callable[..., AppTest], assets: Path) -> None:
    at = open_choice("transcribe")
    at.segmented_control(key="way").set_value("Upload").run()
    settle(at.file_uploader(key="upload").upload("mine.wav", wav(), "audio/wav").run())
    for page in ("routing", "thresholds", "report"):
        settle(at.switch_page(f"../pages/{page}.py").run())
        assert_no_exception(at)
        assert session(at).utterance.name == "mine.wav"
    assert base_digest(assets / "real") == pretrained.digest(assets.parent / "cache" / "whisper-base")


def test_the_named_model_is_the_only_one(
    open_choice: Callable[..., AppTest], assets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(assets / "demo", tmp_path / "mine", symlinks=True))
    monkeypatch.setenv("HDMOLE_MODEL", str(folder))
    at = open_choice("about", model="real")
    assert_no_exception(at)
    assert not at.radio and session(at).model == "" and not any("You are looking" in caption.value for caption in at.caption)
    monkeypatch.setenv("HDMOLE_MODEL", "demo")
    assert "controlled experiment" in line(open_choice("about"))
