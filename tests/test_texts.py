"""The texts of the app: every one has its Chinese, none is left over, and the pages open in both languages."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from driver import assert_no_exception, settle
from streamlit.testing.v1 import AppTest

from app import texts
from app.texts import Text, drawn, t
from hdmole.figures import utterance as figures
from hdmole.speech.audio import AudioError, decode
from hdmole.speech.manifest import ManifestError, read_manifest
from hdmole.study.claims import verdict
from hdmole.study.results import Difference, Results, provenance

ROOT = Path(__file__).resolve().parent.parent
CHINESE = json.loads(texts.FILE.read_text(encoding="utf-8"))
APP = sorted([*(ROOT / "app").glob("*.py"), *(ROOT / "pages").glob("*.py")])
LIBRARY = [
    ROOT / "hdmole" / f
    for f in (
        "names.py", "demo/synth.py", "figures/results.py", "figures/utterance.py", "speech/domain.py", "study/claims.py",
        "study/bootstrap.py", "study/compare.py", "study/config.py", "study/results.py", "study/routing_table.py", "study/tables.py",
    )
]  # fmt: skip
HAN = re.compile("[\u4e00-\u9fff]")
PAGES = ("home", "transcribe", "routing", "thresholds", "correspondence", "compare", "corpus", "report", "about")


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def given(argument: ast.expr) -> list[str]:
    """The literals an argument may be; something put together of pieces has no entry and is an error."""
    assert not isinstance(argument, ast.JoinedStr | ast.BinOp), ast.unparse(argument)
    if isinstance(argument, ast.IfExp):
        return given(argument.body) + given(argument.orelse)
    return [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []


def test_every_text_has_its_chinese() -> None:
    wanted = {
        text
        for file in APP
        for node in nodes(file)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("t", "Text") and node.args
        for text in given(node.args[0])
    }
    assert len(wanted) > 200 and not wanted - set(CHINESE)


def test_no_text_is_left_over() -> None:
    literals = {
        node.value
        for file in (*APP, *LIBRARY)
        for node in nodes(file)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    literals |= {
        n.target.id for f in LIBRARY for n in nodes(f) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    literals |= {node.arg for file in LIBRARY for node in nodes(file) if isinstance(node, ast.keyword) and node.arg}
    drawing = re.findall(r">([^<>]+)</text>", (ROOT / "assets" / "ui" / "method.svg").read_text())
    used = {*literals, *map(figures.accent_label, literals), *(text.replace("_", " ") for text in literals), *drawing}
    assert not set(CHINESE) - used


def test_both_languages_have_the_same_places_for_values() -> None:
    for english, chinese in CHINESE.items():
        assert chinese.strip(), english
        places = [sorted(re.findall(r"%?\{[^{}]*\}", text)) for text in (english, chinese)]
        assert places[0] == places[1], english
        assert english.count("`") == chinese.count("`") and english.count("**") == chinese.count("**"), english


def test_the_sign_of_a_change_stands_first() -> None:
    assert CHINESE["{points} points against the base"].startswith("{points}")  # streamlit takes the arrow from it


def test_texts_with_values(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Text("{method} is listening", method=Text("Frozen base"))
    assert step == t(step) == "Frozen base is listening" and t("a {b}") == "a {b}"
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert t(step) == "冻结的基座模型 正在识别" and t("not a text of the app") == "not a text of the app"
    difference = Difference(domain="accent", method="lora", against="base", interval=(-2.0, -1.0), points=-1.5)
    labels = {"lora": "LoRA", "base": t("Frozen base")}
    assert t(verdict(difference, labels)) == "LoRA 相对 冻结的基座模型：更好，-1.5 个百分点 [-2.0, -1.0]"
    made = Results(methods={}, differences=[], provenance=provenance(0, "cpu", run_seconds=3, config="", hours={}))
    shown = texts.origin(made)
    assert shown["运行秒数"] == 3 and shown["设备"] == "cpu" and len(shown) == 9  # neither configuration nor hours


def test_what_the_library_says_of_bad_files_is_translated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wav(samples: np.ndarray) -> bytes:
        content = io.BytesIO()
        soundfile.write(content, samples, 16_000, format="WAV")
        return content.getvalue()

    said = []
    for data in (b"", b"no audio at all", wav(np.zeros(16_000)), wav(np.ones(100) * 0.1), wav(np.ones(32_000) * 0.1)):
        with pytest.raises(AudioError) as error:
            decode(data, "clip.wav", max_seconds=1)
        said.append(str(error.value))
    manifest = tmp_path / "m.jsonl"
    for content in (None, b"", b"{", b"{}", b"\xff", b'{"audio": "a.wav", "text": "", "accent": "b"}'):
        if content is not None:
            manifest.write_bytes(content)
        with pytest.raises(ManifestError) as refused:
            read_manifest(manifest)
        said.append(str(refused.value))
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert len(set(said)) == 11 and all(re.search("[\u4e00-\u9fff]", t(sentence)) for sentence in said), said


def test_figures_are_translated_and_their_data_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    word = dict(position=0, word="German", start=0.0, end=1.0, expert=0, accent="german", value=0.5)
    changes = pd.DataFrame({"layer": ["a", "a"], "run": ["as trained", "changed"], "experts": [1.0, 2.0]})
    english = figures.word_heatmap(pd.DataFrame([word]))
    assert drawn(english) == figures.word_heatmap(pd.DataFrame([word]))
    monkeypatch.setattr(texts, "language", lambda: "zh")
    words, dots = drawn(english), drawn(figures.change_dots(changes, 3))
    assert words.layout.xaxis.ticktext == ("German",) and words.layout.yaxis.ticktext == ("德国",)
    assert words.data[0].y == ("german",) and words.data[0].colorbar.title.text == "门控"
    assert dots.data[-1].name == "更改后" and "，更改后：" in dots.data[-1].hovertemplate
    assert dots.layout.xaxis.title.text == "工作专家数（平均）" and "CJK" in dots.layout.font.family


@pytest.fixture
def open_page(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    monkeypatch.setenv("HDMOLE_MODEL", str(tiny_model))
    of_session = texts.language  # the driver labels options outside the session
    monkeypatch.setattr(texts, "language", lambda: of_session() if texts.get_script_run_ctx(suppress_warning=True) else "zh")

    def opened(page: str, locale: str = "", **query: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
        at.query_params.update(query)
        if locale:
            at.context["locale"] = locale
        return settle(at.switch_page(f"../pages/{page}.py").run())

    return opened


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_in_chinese(open_page: Callable[..., AppTest], page: str) -> None:
    at = open_page(page, lang="zh")
    assert_no_exception(at)
    assert HAN.search(at.title[0].value)
    said = [element.value for kind in (at.header, at.caption, at.info, at.warning) for element in kind]
    said += [element.label for kind in (at.button, at.metric, at.selectbox, at.text_input) for element in kind]
    assert [text for text in said if not HAN.search(text)] == []
    assert at.query_params["lang"] == "zh"


def test_the_language_is_chosen_and_stays(open_page: Callable[..., AppTest]) -> None:
    at = open_page("transcribe", locale="zh-CN")
    assert HAN.search(at.title[0].value) and at.query_params["lang"] == "zh"
    at.query_params.clear()  # as a link to another page does
    settle(at.switch_page("../pages/routing.py").run())
    assert HAN.search(at.title[0].value) and at.query_params["lang"] == "zh" and "layer" in at.query_params
    at.segmented_control(key="language").set_value("en").run()
    assert at.title[0].value == "Which expert worked when" and "lang" not in at.query_params
    assert open_page("about", locale="de-DE").title[0].value == "What the model can hear, and what it cannot"
