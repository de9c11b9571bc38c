"""The Corpus page and the work behind it: many recordings judged, cancelled, gone on with, unpacked."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from driver import assert_no_exception, session, settle
from streamlit.testing.v1 import AppTest
from tiny import METHODS, SECONDS

from app import corpus, jobs
from app.corpus import Evaluation, unpack
from app.turns import Ticket
from hdmole.names import accent_named
from hdmole.speech.asr import ASR
from hdmole.speech.manifest import ManifestError
from hdmole.study import evaluate as evaluation
from hdmole.study.evaluate import Cancelled, evaluate
from hdmole.study.results import base_digest, load


def test_a_corpus_is_judged_and_its_recordings_can_be_searched(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path
) -> None:
    at = open_app("corpus")
    assert_no_exception(at)
    at.text_input(key="corpus_path").set_value(str(tiny_model / "samples" / "manifest.jsonl")).run()
    settle(at.button(key="corpus_start").click().run())
    assert_no_exception(at)
    task = session(at).evaluation
    assert task.summary.provenance.recordings == 4 and list(task.summary.methods) == METHODS
    names = {f.name for f in task.out.iterdir()}
    assert names == {"summary.json", "utterances.parquet", "recordings.parquet", "routing.parquet"}
    rows = at.dataframe[0].value
    assert len(rows) == 4 and set(rows.seconds) == {SECONDS} and (rows.level < 0).all()
    at.text_input(key="corpus_text").set_value("jazz").run()
    assert list(at.dataframe[0].value.accent) == ["indian"]
    for page in ("compare", "correspondence", "corpus"):
        other = open_app(page, results=task.key)
        assert_no_exception(other)
        assert other.get("plotly_chart")
    assert len(other.dataframe[0].value) == 4  # of another session, from the link
    settle(other.button(key="corpus_samples").click().run())
    assert_no_exception(other)
    assert session(other).evaluation.out != task.out and other.session_state.corpus_results == ""
    other.text_input(key="corpus_results").set_value(str(tiny_model / "results")).run()
    assert "has no recordings.parquet" in other.error[0].value and not other.exception
    (tmp_path / "running" / "unfinished").mkdir(parents=True)  # as a reload finds it while the work goes on
    other.text_input(key="corpus_results").set_value(str(tmp_path / "running")).run()
    assert "not finished yet" in other.info[0].value and not other.error and not other.exception


def test_recordings_go_when_their_tab_has_been_closed_for_long(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, tabs = io.BytesIO(), {"open"}
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (tiny_model / "samples").iterdir():
            archive.write(file, file.name)
    monkeypatch.setattr(jobs, "session_open", lambda name: name in tabs)
    asr, tasks = ASR.load(tiny_model), {}
    for name in ("open", "closed"):
        monkeypatch.setattr(jobs, "session_id", lambda name=name: name)
        tasks[name] = Evaluation(asr, packed, ["base"], tmp_path / name)
        tasks[name].wait(60)
        assert (tmp_path / name / "speech" / "manifest.jsonl").is_file()
    corpus.forget_closed()
    assert (tmp_path / "closed" / "speech").is_dir()  # it was closed just now
    monkeypatch.setattr(corpus, "KEPT", 0.0)
    corpus.forget_closed()
    assert not (tmp_path / "closed" / "speech").exists() and (tmp_path / "closed" / "results" / "summary.json").is_file()
    assert (tmp_path / "open" / "speech" / "manifest.jsonl").is_file()


def test_an_evaluation_is_shown_with_its_own_model(
    open_app: Callable[..., AppTest], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = open_app("corpus")
    settle(at.button(key="corpus_samples").click().run())
    assert at.dataframe and session(at).evaluation.of(ASR.load(tiny_model))
    monkeypatch.setattr(Evaluation, "of", lambda task, asr: False)  # as if the visitor had chosen another one
    assert not at.run().dataframe and not at.exception
    monkeypatch.setattr(Evaluation, "running", True)
    assert "of the other model goes on" in at.run().info[0].value


def test_results_without_base_and_hdmole_are_compared_too(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path
) -> None:
    evaluate(ASR.load(tiny_model), tiny_model / "samples" / "manifest.jsonl", ["lora", "full"], tmp_path / "two")
    at = open_app("compare", results=str(tmp_path / "two"))
    assert_no_exception(at)
    assert at.get("plotly_chart")


def test_a_corpus_that_cannot_be_read_gets_a_sentence(open_app: Callable[..., AppTest], tmp_path: Path) -> None:
    at = open_app("corpus")
    at.text_input(key="corpus_path").set_value(str(tmp_path / "none.jsonl")).run()
    settle(at.button(key="corpus_start").click().run())
    assert "There is no manifest" in at.error[0].value and not at.exception
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("deep/list.jsonl", "{}")
        archive.writestr("list.jsonl", "{}")
    assert unpack(packed, tmp_path / "in" / "side") == tmp_path / "in" / "side" / "list.jsonl"
    long = io.BytesIO()
    with zipfile.ZipFile(long, "w") as archive:
        archive.writestr("m.jsonl", "{}")
        archive.writestr("a" * 300, "x")
    with pytest.raises(ManifestError, match="cannot be unpacked"):
        unpack(long, tmp_path / "long")
    with pytest.raises(ManifestError, match="not a ZIP"):
        unpack(io.BytesIO(b"no zip"), tmp_path)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ManifestError, match="has no manifest"):
        unpack(empty, tmp_path)


def test_a_zip_is_unpacked_by_the_worker_and_forgotten_when_it_is_replaced(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path
) -> None:
    asr, packed = ASR.load(tiny_model), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (tiny_model / "samples").iterdir():
            archive.write(file, file.name.replace("manifest", "list"))
    at = open_app("corpus")
    task = session(at).evaluation = Evaluation(asr, packed, ["base"], tmp_path / "zip")
    task.wait(60)
    assert task.summary is not None and (tmp_path / "zip" / "speech" / "list.jsonl").is_file()
    settle(at.run().button(key="corpus_samples").click().run())
    assert session(at).evaluation is not task and session(at).evaluation.summary is not None
    assert not (tmp_path / "zip" / "speech").exists() and (tmp_path / "zip" / "results" / "summary.json").is_file()
    wrong = session(at).evaluation = Evaluation(asr, io.BytesIO(b"no zip"), ["base"], tmp_path / "wrong")
    wrong.wait(60)
    at.run()
    assert "not a ZIP" in at.error[0].value and not at.exception


def test_others_are_heard_while_a_corpus_is_judged(tiny_model: Path, tmp_path: Path) -> None:
    asr = ASR.load(tiny_model)
    lines = (tiny_model / "samples" / "manifest.jsonl").read_text().splitlines()
    for k, line in enumerate(lines):
        lines[k] = json.dumps(json.loads(line) | {"audio": str(tiny_model / "samples" / json.loads(line)["audio"])})
    (tmp_path / "many.jsonl").write_text("\n".join(lines * 100))
    corpus = [
        Evaluation(asr, tmp_path / "many.jsonl", ["base"], tmp_path / str(k)) for k in range(max(1, (os.cpu_count() or 2) // 2))
    ]
    job = jobs.Job(asr, jobs.Utterance("a.flac", next((tiny_model / "samples").glob("*.flac")).read_bytes()))
    job.wait(120)
    assert list(job.transcripts) == METHODS and all(task.running for task in corpus)
    for task in corpus:
        task.cancel()
        task.wait(60)
        assert not task.running


def test_an_evaluation_goes_on_where_it_was_cancelled(
    open_app: Callable[..., AppTest],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 4)
    lines = (tiny_model / "samples" / "manifest.jsonl").read_text().splitlines()
    (tmp_path / "broken.wav").write_text("no audio")
    for k in range(4):  # names that are not alike
        lines[k] = json.dumps(json.loads(lines[k]) | {"audio": str(tiny_model / "samples" / json.loads(lines[k])["audio"])})
    lines.append(json.dumps({"audio": "broken.wav", "text": "x", "accent": "german"}))
    manifest = tmp_path / "many.jsonl"
    manifest.write_text("\n".join(lines * 2))
    asr, heard = ASR.load(tiny_model), []
    segment = asr.segment
    monkeypatch.setattr(asr, "segment", lambda audio: heard.append(1) or segment(audio))

    def stop(at: int, error: type[BaseException]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done == at:
                raise error

        return progress

    methods, out = ["base", "hdmole"], tmp_path / "out"
    steps: list[float] = []
    whole = evaluate(asr, manifest, methods, tmp_path / "whole", progress=lambda done, total: steps.append(done / total))
    assert steps == sorted(steps) and steps[-1] == 1 and len(set(steps)) > 10  # not one for each batch of 4
    assert len(heard) == 8
    heard.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(asr, manifest, methods, out, progress=stop(4, KeyboardInterrupt))
    assert not (out / "summary.json").exists()
    results = evaluate(asr, manifest, methods, out, progress=stop(8, Cancelled))
    assert results.provenance.recordings == 8 and results.provenance.of == 10
    (out / "unfinished").rename(out / "parts")  # as version 0.1 left it
    results = evaluate(asr, manifest, methods, out)
    assert len(heard) == 8 and len(results.failed) == 2 and not (out / "unfinished").exists() and not (out / "parts").exists()
    assert results == load(out) and results.provenance.base_sha256 == base_digest(tiny_model)
    for name in ("utterances", "recordings", "routing"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(f / f"{name}.parquet") for f in (out, tmp_path / "whole")))
    assert results.methods == whole.methods and results.routing == whole.routing

    evaluate(asr, manifest, methods, out, progress=stop(4, Cancelled))
    heard.clear()
    evaluate(asr, manifest, ["base"], out)  # another question: nothing of the old one is taken
    assert len(heard) == 8 and not (out / "routing.parquet").exists()

    at = open_app("corpus")
    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "_progress", staticmethod(stop(4, Cancelled)))
        task = Evaluation(asr, manifest, ["base"], tmp_path / "app")
        task.wait(60)
    session(at).evaluation = task
    at.run()
    assert "Cancelled after" in at.warning[0].value
    session(at).evaluation = none = Evaluation(asr, manifest, ["base"], tmp_path / "none")
    none.cancel()
    none.wait(60)
    at.run()
    assert none.summary is None and "Cancelled before anything was heard" in at.info[0].value
    assert at.button(key="corpus_go_on")
    session(at).evaluation = task
    at.run()
    settle(at.button(key="corpus_go_on").click().run())
    assert not at.exception and session(at).evaluation.summary.provenance.recordings == 10


def test_a_cancelled_evaluation_that_had_to_wait_says_so(tiny_model: Path, tmp_path: Path) -> None:
    asr = ASR.load(tiny_model)
    taken = [Ticket("others", False) for _ in range(jobs.TURNS.count)]  # all turns, so that it cannot begin
    for ticket in taken:
        assert jobs.TURNS.take(ticket, lambda: False, lambda place, seconds: None)
    task = Evaluation(asr, tiny_model / "samples" / "manifest.jsonl", ["base"], tmp_path / "none")
    task.cancel()
    task.wait(60)
    for ticket in taken:
        jobs.TURNS.give(ticket, 1.0)
    assert not task.running and task.summary is None and not task.error


@pytest.mark.parametrize(
    ("name", "means"),
    [
        *(
            ("Indian", "indian"),
            ("en-IN", "indian"),
            (" INDIAN  accent", "indian"),
            ("Chinese", "mandarin"),
            ("zh_CN", "mandarin"),
        ),
        *(("West Indian", "west_indian"), ("General", "general"), ("polish", "polish"), ("de", "de"), ("", "")),
    ],
)
def test_accents_are_matched_as_people_name_them(name: str, means: str) -> None:
    """A name that a model knows itself goes before what it may mean; one of an accent that it lacks stays."""
    assert accent_named(name, ["general", "indian", "mandarin", "west_indian"]) == means
