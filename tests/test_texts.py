"""The texts of the app: every one has its Chinese, none is left over, and the pages open in both languages."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from driver import assert_no_exception, settle
from streamlit.testing.v1 import AppTest

from app import texts
from app.texts import drawn, t
from hdmole.figures import effect
from hdmole.figures import utterance as figures
from hdmole.speech.audio import AudioError
from hdmole.speech.domain import flags
from hdmole.speech.manifest import ManifestError
from hdmole.study.claims import claim_line, verdict
from hdmole.study.config import known_methods
from hdmole.study.results import Claim, Difference, Results, load, provenance
from hdmole.texts import Text

ROOT = Path(__file__).resolve().parent.parent
CHINESE = json.loads(texts.FILE.read_text(encoding="utf-8"))
APP = sorted([*(ROOT / "app").glob("*.py"), *(ROOT / "pages").glob("*.py")])
LIBRARY = [  # what the app shows of it
    *(ROOT / "hdmole" / name for name in ("names.py", "files.py", "demo/synth.py")),
    *(file for room in ("figures", "speech", "study") for file in sorted((ROOT / "hdmole" / room).glob("*.py"))),
]
HAN = re.compile("[\u4e00-\u9fff]")
EXTENDED = "hdmole-extended"
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
        for file in (*APP, *LIBRARY)
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
    literals |= {part for method in known_methods({"r": 2}).values() for part in method.label.split(", ")}
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


def test_a_table_across_has_a_column_for_each_method() -> None:
    summary = load(ROOT / "assets" / "demo" / "results")
    labels = {**summary.labels, "base": "a | b"}
    tall, wide = (
        [re.split(r"(?<!\\)\|", line)[1:-1] for line in texts.table(summary, labels, across).splitlines() if "---" not in line]
        for across in (False, True)
    )
    assert [list(column) for column in zip(*tall, strict=True)] == wide
    assert len(wide[0]) == 1 + len(summary.methods) and wide[1][0].strip() == "Trainable"


def sentences() -> Iterator[str]:
    """The sentence of every error that the app may show: written in its place, in a variable, or in a dictionary of sentences."""
    for file in (
        *APP,
        *(ROOT / "hdmole" / "speech").glob("*.py"),
        ROOT / "hdmole" / "files.py",
        *(ROOT / "hdmole" / "study" / name for name in ("evaluate.py", "results.py")),
    ):
        written: dict[str, set[str]] = {}
        for node in nodes(file):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants = {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                written.setdefault(node.targets[0].id, set()).update(text for text in constants if text.endswith("."))
        for node in nodes(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "AccessError",
                "AudioError",
                "ManifestError",
                "ModelError",
                "OutputError",
                "ResultsError",
            ):
                sentence = node.args[1]
                if isinstance(sentence, ast.Constant):
                    yield str(sentence.value)
                else:
                    name = sentence.value if isinstance(sentence, ast.Subscript) else sentence
                    assert isinstance(name, ast.Name) and written[name.id], f"{file.name}:{node.lineno}"
                    yield from written[name.id]


def test_every_error_of_audio_manifests_models_and_results_has_its_chinese() -> None:
    found = set(sentences())
    assert len(found) > 30 and "{name} is longer than the {seconds} seconds allowed; cut it into shorter pieces." in found
    assert not found - set(CHINESE)


def test_an_error_is_translated_with_the_errors_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = AudioError(
        "audio.silent",
        "{name} is silent (nothing above -60 dBFS); check the microphone and record it again.",
        name="a {b}.wav",
    )
    sentence = "None of the {count} recordings of {name} could be read; the first says: {reason}"
    nothing = ManifestError("manifest.nothing_read", sentence, count=2, name="list.jsonl", reason=silent)
    # the name of a file is shown as it is: no Markdown comes of it, in an error within an error neither
    assert t(nothing) == str(nothing).replace("{b}", r"\{b\}")
    monkeypatch.setattr(texts, "language", lambda: "zh")
    said = "list.jsonl 的 2 条录音都无法读取；第一条的原因：a \\{b\\}.wav 没有声音（全部低于 -60 dBFS）；请检查麦克风后重新录制。"
    assert t(nothing) == said == t(Text(nothing.sentence, **nothing.values))


def test_what_the_library_puts_together_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert t(flags("no " * 6, "no", 9.0)[0]) == "出现重复：同一个词连续出现 6 次"
    assert t(flags("turn it on " * 4, "turn it on", 9.0)[0]) == "出现重复：同样的 3 个词连续出现 4 次"
    assert [t(flag) for flag in flags("a b c d e f g h i j", "a b c d e f g h i j", 1.0)] == ["每秒 10 个词，没有人能说得这么快"]
    claim = Claim(
        name="accents_full", difference=5.8, interval=(2.9, 8.9), unit="percent", verdict="refuted", paper_difference=6.0,
        paper_verdict="not established", share=9.0,
    )  # fmt: skip
    assert t(claim_line(claim)) == (
        "仅用 9.0% 的可训练参数，口音上与全参数微调一样好：以零为界**不成立**，以论文的差距 +6.0 %为界**未能确认**（+5.8 % [+2.9, +8.9]）"
    )


def test_a_methods_label_is_translated_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts.label("HDMoLE, rank 4") == "HDMoLE, rank 4"
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert texts.label("LoRA, equal parameters, rank 4") == "LoRA，参数量相同，秩 4"
    assert texts.label("HDMoLE, experts trained with the true accent, rank 4") == "HDMoLE，专家按真实口音训练，秩 4"
    assert texts.method("hdmole-extended") == "HDMoLE（扩展版）" and texts.method("mine") == "mine"


def test_figures_are_translated_and_their_data_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    word = dict(position=0, word="German", start=0.0, end=1.0, expert=0, accent="german", value=0.5)
    changes = pd.DataFrame({"layer": ["a", "a"], "run": ["as trained", "changed"], "experts": [1.0, 2.0]})
    english = figures.word_heatmap(pd.DataFrame([word]), 1.0)
    assert drawn(english) == figures.word_heatmap(pd.DataFrame([word]), 1.0)
    monkeypatch.setattr(texts, "language", lambda: "zh")
    words, dots = drawn(english), drawn(effect.change_dots(changes, 3))
    assert words.layout.xaxis.ticktext == ("German",) and words.layout.yaxis.ticktext == ("德国",)
    assert words.data[0].y == ("german",) and words.data[0].colorbar.title.text == "门控"
    assert dots.data[-1].name == "更改后" and dots.data[-1].hovertemplate.startswith("%{y}，%{fullData.name}：")
    assert dots.layout.xaxis.title.text == "工作的专家" and "CJK" in dots.layout.font.family


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


@pytest.mark.parametrize(("page", "adapter"), [*product(PAGES, ["hdmole"]), ("routing", EXTENDED), ("thresholds", EXTENDED)])
def test_a_page_opens_in_chinese(open_page: Callable[..., AppTest], page: str, adapter: str) -> None:
    at = open_page(page, lang="zh", adapter=adapter)
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
