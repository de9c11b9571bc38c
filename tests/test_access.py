"""What a visitor can open, and what not: each test tries a way in that was once open."""

from __future__ import annotations

import ast
import contextlib
import http.client
import io
import json
import re
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
from driver import assert_no_exception, session, settle
from streamlit.testing.v1 import AppTest
from tiny import speech_like

from app import access, report, utterance
from app.cards import text_card
from app.corpus import Evaluation, unpack
from app.texts import drawn
from hdmole.figures import results as result_figures
from hdmole.figures import utterance as utterance_figures
from hdmole.speech.asr import ASR
from hdmole.speech.loading import ModelError
from hdmole.speech.manifest import ManifestError, read_manifest
from hdmole.study.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
REFUSED = "cannot be opened here"


@pytest.fixture
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody opened to visitors, with a text and a sound."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "passwords.txt").write_text("root:x")
    soundfile.write(folder / "private.wav", speech_like(1.0, 3), 16_000)
    return folder


@pytest.fixture(scope="module")
def judged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the model's samples."""
    out = tmp_path_factory.mktemp("judged") / "results"
    evaluate(ASR.load(tiny_model), tiny_model / "samples" / "manifest.jsonl", ["base", "hdmole"], out)
    return out


@pytest.fixture
def results(judged: Path, tmp_path: Path) -> Path:
    """A results folder that visitors may open."""
    return Path(shutil.copytree(judged, tmp_path / "mine"))


@pytest.mark.parametrize("name", ["passwords.txt", "private.wav"])
def test_results_play_no_file_from_elsewhere(
    open_app: Callable[..., AppTest], results: Path, secret: Path, name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[object] = []
    monkeypatch.setattr("streamlit.audio", lambda data, **_: played.append(data))
    monkeypatch.setattr("streamlit.delta_generator.DeltaGenerator.audio", lambda self, data, **_: played.append(data))
    table = pd.read_parquet(results / "recordings.parquet")
    utterance = table.utterance.iloc[0]
    named = [str(secret / name), f"../../{secret.parent.name}/{secret.name}/{name}", "link.wav"]
    (results / "link.wav").symlink_to(secret / name)
    for audio in named:
        table.assign(audio=audio).to_parquet(results / "recordings.parquet")
        assert access.audio_of(results, audio, tiny_model) is None
        for page, chosen in (("correspondence", {"map_utterance": utterance}), ("corpus", {}), ("compare", {})):
            at = open_app(page, results=str(results))
            for key, value in chosen.items():
                at.selectbox(key=key).set_value(value).run()
            assert_no_exception(at)
    assert played and (secret / name).read_bytes() not in played  # the model's own sample of these words is


def test_a_text_is_not_played_from_the_opened_folder_either(results: Path, tiny_model: Path) -> None:
    (results / "notes.wav").write_text("<html>")
    assert access.audio_of(results, "notes.wav", tiny_model) is None
    shutil.copy(next((tiny_model / "samples").glob("*.flac")), results / "own.flac")
    assert access.audio_of(results, "own.flac", tiny_model) == (results / "own.flac").read_bytes()


@pytest.mark.parametrize("page", ["compare", "correspondence", "corpus", "report"])
def test_results_elsewhere_are_refused_whether_they_exist_or_not(
    open_app: Callable[..., AppTest], results: Path, secret: Path, tmp_path: Path, page: str
) -> None:
    shutil.copytree(results, secret / "results")
    (tmp_path / "link").symlink_to(secret / "results")
    ways = [
        secret / "results", secret / "absent", secret / "passwords.txt", tmp_path / "link",
        f"{tmp_path}/../{secret.name}/results", "x" * 5000, "a\0b",
    ]  # fmt: skip
    said = set()
    for way in ways:
        at = open_app(page, results=str(way))
        assert_no_exception(at)
        said |= {error.value for error in at.error}
    assert len([s for s in said if REFUSED in s]) == 1 and not any(str(secret) in s for s in said)
    assert all(REFUSED in s for s in said), said


def test_without_data_only_the_repositorys_and_the_models_results_open(
    open_app: Callable[..., AppTest], results: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDMOLE_DATA", "")
    assert REFUSED in open_app("compare", results=str(results)).error[0].value
    for allowed in (str(tiny_model / "results"), "assets/results/archive/main", "this model's own"):
        assert not open_app("compare", results=allowed).error
    monkeypatch.setenv("HDMOLE_DATA", str(results.parent))
    assert not open_app("compare", results="mine").error  # relative to the folder that was named


def test_an_uploaded_results_folder_is_not_opened(
    open_app: Callable[..., AppTest],
    results: Path,
    secret: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HDMOLE_DATA", "")
    table = pd.read_parquet(results / "recordings.parquet").assign(audio=str(secret / "private.wav"))
    table.to_parquet(results / "recordings.parquet")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (*results.glob("*.*"), *(tiny_model / "samples").iterdir()):
            archive.write(file, file.name)
    task = Evaluation(ASR.load(tiny_model), packed, ["base"], tmp_path / "zip")
    task.wait(60)
    assert not task.error and (tmp_path / "zip" / "speech" / "summary.json").is_file()
    for way in (str(tmp_path / "zip" / "speech"), str(task.out), f"{task.key}/../speech"):
        assert REFUSED in open_app("corpus", results=way).error[0].value
    at = open_app("corpus", results=task.key)  # the evaluation itself is, and plays the recordings of the ZIP
    assert_no_exception(at)
    heard = pd.read_parquet(task.out / "recordings.parquet").audio
    assert len(heard) == 4 and all(access.audio_of(task.out, audio, tiny_model) for audio in heard)


def test_addresses_errors_and_downloads_keep_the_servers_folders_to_themselves(
    open_app: Callable[..., AppTest], tmp_path: Path, results: Path
) -> None:
    at = open_app("corpus")
    settle(at.button(key="corpus_samples").click().run())
    assert_no_exception(at)
    out = session(at).evaluation.out
    assert at.query_params["results"] in ([session(at).evaluation.key], session(at).evaluation.key)
    assert str(out.parent) not in repr(at)
    (results / "summary.json").write_text("[1]")
    at = open_app("compare", results="mine")  # relative to the folder that visitors may open
    assert "summary.json is not a summary" in at.error[0].value and str(tmp_path) not in at.error[0].value
    assert access.hide_folders("[Errno 13] no: '/srv/data/a.wav'") == "[Errno 13] no: 'a.wav'"


def test_a_manifest_elsewhere_is_refused(open_app: Callable[..., AppTest], secret: Path) -> None:
    (secret / "list.jsonl").write_text(json.dumps({"audio": "private.wav", "text": "x", "accent": "german"}))
    said = set()
    for name in ("list.jsonl", "none.jsonl"):
        at = open_app("corpus")
        at.text_input(key="corpus_path").set_value(str(secret / name)).run()
        settle(at.button(key="corpus_start").click().run())
        said.add(at.error[0].value)
        assert session(at).evaluation is None and not at.exception
    assert len(said) == 1 and REFUSED in said.pop()


@pytest.mark.parametrize("way", ["{}/private.wav", "{}/absent.wav", "../../{}/private.wav", "link.wav", "a\0.wav"])
def test_a_strangers_manifest_reads_its_own_files_only(tmp_path: Path, secret: Path, way: str) -> None:
    (tmp_path / "link.wav").symlink_to(secret / "private.wav")
    name = way.format(secret if way.startswith("{") else f"{secret.parent.name}/{secret.name}")
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(json.dumps({"audio": name, "text": "x", "accent": "german"}))
    with pytest.raises(ManifestError) as refused:
        read_manifest(manifest, [tmp_path])
    assert refused.value.code == "manifest.audio_elsewhere"


def test_an_uploaded_zip_with_links_or_paths_that_lead_out_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.wav")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for entry in (link, "../out.wav", "/etc/out.wav", "C:\\out.wav", "..\\out.wav", "a/../../out.wav"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("list.jsonl", "{}")
            archive.writestr(entry, "/etc/passwd")
        with pytest.raises(ManifestError) as refused:
            unpack(packed, tmp_path / "in")
        assert refused.value.code == "manifest.zip_leads_out" and not (tmp_path / "in").exists()


def test_names_are_data_in_markdown_and_in_pages(open_app: Callable[..., AppTest]) -> None:
    assert access.plain("HDMoLE, top-1 of real_digits") == "HDMoLE, top-1 of real_digits"
    assert access.plain("![x](http://a.b) <b> :red[y]") == r"\!\[x\](http:\u2060//a.b) \<b\> :\u2060red\[y\]".replace(
        r"\u2060", "\u2060"
    )
    said = " ".join(w.value for w in open_app("transcribe", sample="![x](http://a.b/c.png)", layer="[y](z)").warning)
    assert "http" in said and "![x](" not in said and "http://" not in said
    card = text_card("<script>1</script>", "a", "a")
    assert "<script>" not in card and "&lt;script&gt;" in card


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"RIFF\0\0\0\0WAVEfmt ", "audio/wav"), (b"fLaC", "audio/flac"), (b"OggS", "audio/ogg"), (b"ID3", "audio/mpeg"),
     (b"\0\0\0\x18ftypM4A ", "audio/mp4"), (b"\x1aE\xdf\xa3", "audio/webm"), (b"<html>RIFF", "")],
)  # fmt: skip
def test_the_type_of_audio_comes_from_its_content(content: bytes, kind: str) -> None:
    assert access.audio_type(content) == kind


def test_an_upload_cannot_name_itself_a_page(open_app: Callable[..., AppTest], tiny_model: Path) -> None:
    at = open_app("report", sample="indian_1")
    job = session(at).jobs[session(at).utterance.key]
    name = "data:text/html'><script>alert(1)</script>,x.wav"
    job.utterance = replace(job.utterance, name=name)
    page = report.html(job, "", "hdmole", job.routing("hdmole").layer.iloc[0], None, {})
    assert "<script>alert" not in page and "data:audio/flac;base64" in page and "data:text/html'" not in page
    packed = zipfile.ZipFile(
        io.BytesIO(report.data(job, "hdmole", job.routing("hdmole").layer.iloc[0], tiny_model / "none"))
    ).namelist()
    assert not any(mark in name for name in packed for mark in "<>\\:")


def test_weights_in_a_pickle_are_not_opened(tiny_model: Path, tmp_path: Path) -> None:
    for weights in ("model.safetensors", "adapters/lora/adapter_model.safetensors"):
        copied = tmp_path / Path(weights).stem
        shutil.copytree(tiny_model, copied)
        (copied / weights).rename((copied / weights).with_name("pytorch_model.bin" if weights[0] == "m" else "adapter_model.bin"))
        with pytest.raises(ModelError, match="safetensors"):
            ASR.load(copied)


def test_code_in_a_models_folder_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    for code in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
        code.parent.mkdir(exist_ok=True)
        code.write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\ndef generate(**_): ...\n")
    for file, kind in (
        ("tokenizer_config.json", "AutoTokenizer"),
        ("preprocessor_config.json", "AutoFeatureExtractor"),
        ("config.json", "AutoModel"),
    ):
        values = json.loads((folder / file).read_text())
        reference = "evil.Evil" if kind != "AutoTokenizer" else ["evil.Evil", None]
        (folder / file).write_text(json.dumps(values | {"auto_map": {kind: reference, "AutoConfig": "evil.Evil"}}))
    with contextlib.suppress(ModelError):
        ASR.load(folder)
    assert not ran.exists()


def test_an_adapter_beside_the_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """transformers would put it into the base, and read it from a pickle where there is no safetensors file."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(tiny_model / "adapters/lora/adapter_config.json", tmp_path / "model")
    with pytest.raises(ModelError, match=r"adapter_config.json beside the base") as caught:
        ASR.load(tmp_path / "model")
    assert caught.value.code == "model.adapter_in_base"


LURE = "<a href='http://evil.example'>x</a> ![x](http://evil.example)"


def lured(values: object) -> bool:
    """Whether a text, or one in an array, holds a link that plotly would show."""
    return any("<a" in str(value) for value in np.asarray(values, dtype=object).flat)


def test_names_in_figures_are_text() -> None:
    table = pd.DataFrame([{"accent": LURE, "method": "base", "label": LURE, "wer": 1.0, "low": 0.5, "high": 2.0, "speakers": 3}])
    (bar,), axis = (figure := drawn(result_figures.error_rates(table))).data, figure.layout.xaxis
    assert bar.x[0] == axis.tickvals[0] == bar.name == "&lt;a href='http://evil.example'&gt;x&lt;/a&gt; ![x](http://evil.example)"
    assert not lured(axis.ticktext)
    words = [SimpleNamespace(word=LURE, start=0.0, end=1.0)]
    cells = pd.DataFrame(
        [{"position": 0, "word": LURE, "start": 0.0, "end": 1.0, "expert": 0, "accent": LURE, "value": 1.0, "call": 0,
          "time": 0.0, "frame": 0, "gate": 1.0}]
    )  # fmt: skip
    heat = drawn(utterance_figures.word_heatmap(cells, 1.0))
    assert not any(
        lured(part) for part in (heat.data[0].y, heat.data[0].customdata, heat.layout.xaxis.ticktext, heat.layout.yaxis.ticktext)
    )
    heat = drawn(utterance_figures.gate_heatmap(cells, 1.0, words=words))
    assert not lured(heat.layout.yaxis.ticktext) and not lured(heat.layout.yaxis.tickvals) and not lured(heat.data[1].y)
    errors = pd.DataFrame({"mine": [1], "theirs": [2], "utterances": [3]})
    pair = drawn(result_figures.pair_scatter(errors, LURE, LURE, 1, ("#000000", "#000000")))
    assert not lured(list(pair.layout.meta.values()))


def test_an_accent_a_file_and_a_sentence_are_no_markdown(
    open_app: Callable[..., AppTest], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages on which their names stand outside of figures and tables."""
    real = utterance.samples
    clips = [replace(clip, accent=LURE, text=LURE) for clip in real(tiny_model)]
    monkeypatch.setattr(utterance, "samples", lambda folder: clips)
    for page in ("home", "transcribe", "routing", "thresholds"):
        at = open_app(page)
        assert_no_exception(at)
        shown = [text.value for kind in (at.markdown, at.caption, at.header, at.subheader, at.info, at.warning) for text in kind]
        shown += [label for button in at.button for label in (button.label, button.help or "")]
        shown += [option for pills in at.get("button_group") for option in pills.options]
        open_links = [text for text in shown if "![x](" in text or re.search(r"(?<!\\)<a href", text)]
        assert not open_links, page


_PICKLES = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "load_peft_weights"}


def test_every_call_that_reads_a_model_runs_no_code_and_opens_no_pickle() -> None:
    """All calls in library, app and scripts. `PeftModel.from_pretrained` is called in one place, which looks first."""
    models = {"SpeechLLM", "Whisper", "family", "kind", "super()", "AutoModelForCTC", "AutoModelForCausalLM"}
    read = {"AutoTokenizer", "PreTrainedTokenizerFast", "AutoFeatureExtractor", "AutoProcessor", "ClipExtractor"}
    json_only = {"PeftConfig", "LoraConfig", "GenerationConfig"}
    found: list[str] = []
    for file in sorted(f for part in ("hdmole", "app", "pages", "runs") for f in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            where, options = f"{file.name}:{node.lineno}: {called}", {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in _PICKLES and "allow_pickle" not in options, where
            if not called.endswith(".from_pretrained"):
                continue
            kind = called.removesuffix(".from_pretrained")
            found.append(kind)
            assert kind in models | read | json_only or (kind, file.name) == ("PeftModel", "loading.py"), where
            assert kind in json_only | {"PeftModel"} or options.get("trust_remote_code") == "False", where
            assert kind not in models or options.get("use_safetensors") == "True", where
    assert found.count("PeftModel") == 1 and len(found) >= 12


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [("{}", "http://{}", 101), ("evil.example", "http://evil.example", 403), ("{}", "http://evil.example", 403)],
)
def test_a_page_of_another_host_cannot_speak_to_the_app(app_url: str, host: str, origin: str, status: int) -> None:
    own = app_url.removeprefix("http://")
    request = http.client.HTTPConnection(own, timeout=30)
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    request.request("GET", "/_stcore/stream", headers={"Host": host.format(own), "Origin": origin.format(own), **upgrade})
    assert request.getresponse().status == status


def test_damaged_tables_and_endless_names_get_a_sentence(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model / "results", folder)
    table = (folder / "utterances.parquet").read_bytes()
    for content in (table[: len(table) // 2], b""):
        for name in ("utterances.parquet", "recordings.parquet"):
            (folder / name).write_bytes(content)
        at = open_app("corpus", results=str(folder))
        assert not at.exception and "parquet is damaged or empty" in at.error[0].value
    at = open_app("compare", results="x/" + 5_000 * "y")
    assert not at.exception and "cannot be opened here" in at.error[0].value
