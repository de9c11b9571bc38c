"""The pages about results: Compare, and which results are offered, in Streamlit's own driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from driver import assert_no_exception, clicks
from streamlit.testing.v1 import AppTest

from app import results
from hdmole.study.bootstrap import summarise
from hdmole.study.results import load, provenance, save

ROOT = Path(__file__).resolve().parent.parent


def test_comparison_is_read_from_the_results(open_app: Callable[..., AppTest], tiny_model: Path) -> None:
    at = open_app("compare")
    assert_no_exception(at)
    text = " ".join(markdown.value for markdown in at.markdown)
    summary = load(tiny_model / "results")
    assert f"{summary.methods['hdmole'].domains['accent'].mean_over_accents:.1f}" in text
    assert summary.provenance.commit in " ".join(caption.value for caption in at.caption)
    assert "HDMoLE against Frozen base: " in text
    rows, charts = len(at.dataframe[0].value), len(at.get("plotly_chart"))
    assert charts == 4  # rates, cost, difference by accent, pairs
    at.selectbox(key="against").set_value("lora").run()
    at.selectbox(key="compared_accent").set_value("indian").run()
    assert_no_exception(at)
    assert "HDMoLE against LoRA: " in " ".join(markdown.value for markdown in at.markdown)
    assert 0 < len(at.dataframe[0].value) < rows and set(at.dataframe[0].value.accent) == {"indian"}


def test_decodings_of_several_seeds_can_be_told_apart(open_app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    main = str(ROOT / "assets" / "results" / "archive" / "main")
    at = open_app("compare", results=main, against="full", accent="real_digits/German", speech="real_digits", method="nobody")
    assert_no_exception(at)
    chosen = [at.selectbox(key=key).value for key in ("compared", "against", "compared_accent")]
    assert chosen == ["hdmole", "full", "real_digits/German"] and at.segmented_control(key="speech").value == "real_digits"
    assert at.query_params["against"] == "full" and "method" not in at.query_params
    assert {"German", "German · Real digits"} <= set(at.selectbox(key="compared_accent").options)

    def table() -> pd.DataFrame:
        return next(shown.value for shown in at.dataframe if "reference" in shown.value or "utterance" in shown.value)

    rows = table()
    assert set(rows.accent) == {"German"} and set(rows.domain) == {"real_digits"} and set(rows.seed) == {0, 1, 2, 3, 4}
    said = " ".join(caption.value for caption in at.caption)
    assert (
        f"{len(rows):,} decodings, of the training seeds that both have: 0, 1, 2, 3, 4" in said
        and "fewer than five speakers" in said
    )
    with monkeypatch.context() as patched:
        clicks(patched, "pairs", {"x": 1, "y": 0})
        at.run()
        assert_no_exception(at)
        one = table()
        assert 0 < len(one) < len(rows) and set(one["errors hdmole"]) == {0} and set(one["errors full"]) == {1}
    at.run()
    assert len(table()) == len(rows)
    at.selectbox(key="against").set_value("base").run()
    assert_no_exception(at)
    assert "utterances, of the training seed that both have: 0" in " ".join(caption.value for caption in at.caption)


def test_only_results_of_the_repository_are_said_to_be_of_unseen_speakers(
    open_app: Callable[..., AppTest], tiny_model: Path
) -> None:
    for folder, ours in ((ROOT / "assets" / "results" / "archive" / "main", True), (tiny_model / "results", False)):
        at = open_app("compare", results=str(folder))
        assert any("no method was trained on, thin" in caption.value for caption in at.caption) == ours


def test_differences_of_few_speakers_have_no_verdict(open_app: Callable[..., AppTest], tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [
            dict(method=method, seed=0, domain="accent", accent="indian", speaker=f"s{k}", utterance=f"u{k}", reference="a b",
                 hypothesis="a", errors=errors, words=2)
            for method, errors in (("base", 1), ("hdmole", 0)) for k in range(2)
        ]
    )  # fmt: skip
    save(tmp_path, summarise(rows, provenance(0, "cpu")), rows)
    at = open_app("compare", results=str(tmp_path))
    assert_no_exception(at)
    text = " ".join(markdown.value for markdown in at.markdown)
    assert "-50.0 points; too few speakers (2) to say how sure" in text and ": better," not in text


def test_own_results_are_compared_and_a_wrong_folder_is_said(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path
) -> None:
    at = open_app("compare", results=str(tiny_model / "results"))
    assert_no_exception(at)
    assert at.dataframe and at.query_params["results"] == str(tiny_model / "results")
    at.text_input[0].set_value(str(tmp_path)).run()
    assert "summary.json" in at.error[0].value and not at.exception
    (tmp_path / "summary.json").write_text("[1]")
    at.run()
    assert "is not a summary" in at.error[0].value and not at.exception


def test_a_results_folder_and_the_list_of_results_do_not_contradict(open_app: Callable[..., AppTest], tiny_model: Path) -> None:
    at = open_app("compare", results=str(tiny_model / "results"))
    assert at.text_input(key="results_given").value == str(tiny_model / "results")
    at.selectbox(key="results_name").set_value("this model's own").run()
    assert at.text_input(key="results_given").value == ""
    assert_no_exception(at)


def test_archived_results_are_not_among_those_of_the_model(tiny_model: Path) -> None:
    demo, tiny = (SimpleNamespace(folder=folder) for folder in (ROOT / "assets" / "demo", tiny_model))
    assert set(results.archived(demo)) == {"main", "longer", "conflicts", "places", "projector", "variants"}
    assert not set(results.archived(demo)) & set(results.folders(demo)) and results.archived(tiny) == {}
    assert next(iter(results.folders(demo))) == "this model's own" and list(results.folders(tiny)) == ["this model's own"]


@pytest.mark.parametrize("digest", ["own", "0123", None])
def test_the_papers_comparison_is_shown_where_it_is_of_this_base(
    digest: str | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    found, asr = load(tiny_model / "results"), SimpleNamespace(folder=tiny_model)
    found.provenance.base_sha256 = found.provenance.base_sha256 if digest == "own" else digest
    save(tmp_path / "paper", found, pd.read_parquet(tiny_model / "results" / "utterances.parquet"))
    assert list(results.folders(asr)) == ["this model's own", *(["paper"] if digest == "own" else [])]


def test_results_of_another_base_are_said_to_be_so(tiny_model: Path, tmp_path: Path) -> None:
    asr, other = SimpleNamespace(folder=tiny_model), load(tiny_model / "results")
    assert results.other_base(asr, tmp_path, other) == ""  # the digest decides
    for digest, line in (("0123", "These results are of another base"), (None, "These results do not record which base")):
        other.provenance.base_sha256 = digest
        assert results.other_base(asr, tmp_path, other).startswith(line)
        own = results.other_base(asr, tiny_model / "results", other)  # without a digest they are those of the model they lie with
        assert own.startswith(line) if digest else own == ""


def test_an_archived_comparison_is_opened_by_name_alone_and_marked(
    open_app: Callable[..., AppTest], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "archived", lambda asr: {"main": ROOT / "assets" / "results" / "archive" / "main"})
    at = open_app("compare")
    assert_no_exception(at)
    assert at.selectbox(key="results_name").value == "this model's own" and not at.warning
    assert "main (archive, of an earlier base)" in at.selectbox(key="results_name").options
    at.selectbox(key="results_name").set_value("main").run()
    assert_no_exception(at)
    assert "take them for those of an earlier base" in at.warning[0].value and at.query_params["results"] == "main"


def test_a_results_table_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "utterances.parquet"
    for number in (1, 2):
        pd.DataFrame({"utterance": ["a"], "errors": [number]}).to_parquet(file)
        os.utime(file, ns=(number, number))
        assert list(results.read_table(file).errors) == [number]
