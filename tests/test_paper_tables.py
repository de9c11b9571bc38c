"""The paper's tables and Figure 2 beside ours: the data by hand, and the page with all, some or no results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from driver import assert_no_exception
from rows import ORIGIN, row, table
from streamlit.testing.v1 import AppTest

from app import results, texts
from hdmole.figures import paper as figures
from hdmole.study import paper
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import claims
from hdmole.study.results import Results, base_digest, save
from hdmole.study.routing_table import ROUTERS

ERRORS = {  # of 1,000 words on accents and on general speech, for each of five speakers who are all alike
    "base": (200, 10), "full": (100, 20), "hdmole": (110, 11), "lora_r": (150, 12), "moa": (90, 15), "rank4": (120, 11), "rank8": (130, 11),
}  # fmt: skip


def measured(*methods: str, speakers: int = 5) -> tuple[Results, pd.DataFrame]:
    rows: list[dict[str, Any]] = []
    for method in methods or ERRORS:
        for domain, errors in zip(("accent", "general"), ERRORS[method], strict=True):
            rows += [row(method, f"s{k}", errors, words=1000, accent="indian", domain=domain) for k in range(speakers)]
    found = summarise(table(*rows), ORIGIN.model_copy())
    for method, entry in found.methods.items():
        entry.trainable = {"base": 0, "full": 4000, "hdmole": 380}.get(method)
    found.planned = {method: [0] for method in ("moral", "rank2", "hdmole")}
    return found, table(*rows)


def at(data: pd.DataFrame, method: str, domain: str = "accent", against: str = "full", of: str = "I") -> dict[str, Any]:
    chosen = data[(data.table == of) & (data.method == method) & (data.domain == domain) & (data.against == against)]
    return dict(chosen.iloc[0])


def test_without_results_the_papers_own_changes_are_there() -> None:
    data = figures.paper_data(None)
    assert (
        len(data) == 18 * 4 + 4 * 2 + 6 * 2 and data.wer.isna().all() and data.change.isna().all() and data.trained.isna().all()
    )
    assert at(data, "hdmole")["paper_change"] == pytest.approx(6.01, abs=0.005)  # 16.58 / 15.64
    assert at(data, "hdmole", against="base")["paper_change"] == pytest.approx(-35.36, abs=0.005)  # 16.58 / 25.65
    assert at(data, "hdmole", "general", "base")["paper_change"] == pytest.approx(5.43, abs=0.005)  # 3.69 / 3.50
    assert at(data, "true_accent", of="II")["paper_change"] == pytest.approx(-1.85, abs=0.005)  # 15.35 / 15.64
    assert at(data, "rank32", of="III", against="base")["paper_change"] == pytest.approx(-37.93, abs=0.005)  # 15.92 / 25.65
    assert pd.isna(at(data, "full")["paper_change"]) and pd.isna(at(data, "lora")["paper_cer"])  # itself; not in the paper
    assert (at(data, "full")["paper_trained"], at(data, "hdmole", "general")["paper_cer"]) == (51.0, 3.69)
    assert figures.rows_computed(data) == (0, len([r for r in paper.ROWS if r.method])) == (0, 26)
    assert at(data, "moral")["state"] == "not computed yet"
    assert set(data[data.method.isna()].state) == {"not part of our comparison"}  # MOELoRA and rank 64


def test_our_changes_are_beside_them_with_their_intervals() -> None:
    data = figures.paper_data(measured()[0])
    mine = at(data, "hdmole")
    assert (mine["wer"], mine["wer_low"], mine["wer_high"], mine["trained"]) == (11.0, 11.0, 11.0, 380)
    assert (mine["change"], mine["change_low"], mine["change_high"]) == (10.0, 10.0, 10.0)  # 110 errors against 100
    assert at(data, "hdmole", "general", "base")["change"] == 10.0 and at(data, "hdmole", "general")["change"] == -45.0
    assert at(data, "hdmole", of="II", against="base")["change"] == -45.0  # 110 against 200
    assert pd.isna(at(data, "full")["change"]) and pd.isna(at(data, "moral")["wer"])
    assert figures.rows_computed(data) == (8, 10)  # HDMoLE counts in Tables I and II; MoRAL and rank 2 are to come
    states = [at(data, method)["state"] for method in ("hdmole", "moral", "loramoe")]
    assert states == ["computed", "not computed yet", "not part of our comparison"]
    few = at(figures.paper_data(measured(speakers=4)[0]), "hdmole")
    assert (few["wer"], few["change"]) == (11.0, 10.0) and pd.isna(few["wer_low"]) and pd.isna(few["change_low"])
    assert set(data.columns) == set(figures.paper_data(None).columns)


def test_the_figure_has_the_papers_rows_and_ours() -> None:
    data = figures.paper_data(measured("base", "hdmole")[0])
    chosen = data[(data.table == "I") & (data.domain == "accent") & (data.against == "base")]
    theirs, ours = figures.paper_changes(chosen).data
    assert len(theirs.x) == 10 and theirs.marker.symbol == "diamond-open"  # all of the paper's but the base itself
    assert (list(ours.y), list(ours.x), list(ours.customdata)) == (["HDMoLE"], [-45.0], [" [-45.0, -45.0]"])
    names = figures.paper_changes(chosen).layout.yaxis.categoryarray
    assert {"Base", "HDMoLE", "MoRAL *", "LoRAMoE –", "MOELoRA –"} <= set(names) and len(names) == 18 and names[-1] == "Base"
    few = figures.paper_data(measured("base", "hdmole", speakers=2)[0])
    assert list(figures.paper_changes(few[few.table == "II"]).data[1].customdata) == [""]


def test_pairs_in_another_order_than_the_papers() -> None:
    """In the paper HDMoLE makes fewer errors than MoA, here 110 to 90; and rank 8 fewer than rank 4, here 130 to 120."""
    pairs = figures.order_data(measured()[0])
    turned = pairs[pairs.order == "opposite"]
    found = {(r.table, r.domain, r["first"], r.second) for _, r in turned.iterrows()}
    assert found == {
        ("I", "accent", "HDMoLE", "MoA"), ("I", "accent", "Full fine-tuning", "MoA"), ("III", "accent", "Rank 8", "Rank 4"),
    }  # fmt: skip
    moa = turned[(turned["first"] == "HDMoLE") & (turned.second == "MoA")].iloc[0]
    assert (moa.ours, moa.low, moa.high) == (22.22, 22.22, 22.22) and moa.paper == pytest.approx(
        -11.81, abs=0.005
    )  # 16.58 / 18.80
    same = pairs[pairs.order == "same"]
    assert len(pairs) == len(turned) + len(same) == 10 + 10 + 1  # pairs of five methods in two domains, and of two ranks
    assert figures.order_data(measured(speakers=4)[0]).empty
    mixed = measured("base", "full")[0]
    for difference in mixed.differences:
        assert difference.relative is not None
        difference.relative.interval = (-1.0, 1.0)
    assert list(figures.order_data(mixed).order) == ["open", "open"]


def routing() -> pd.DataFrame:
    layers = ["multi_modal_projector.layers.0.q_proj", "multi_modal_projector.layers.1.fc2", "multi_modal_projector.linear_2"]
    return pd.DataFrame(
        dict(domain=domain, spoken=spoken, utterance=f"{spoken}{k}", layer=layer, layer_index=index, expert=expert, accent="x",
             n_active=float(index + k + (spoken == "general")), speaker="s", **dict.fromkeys(ROUTERS, 0.5))
        for domain, spoken in (("accent", "indian"), ("general", "general"), ("accent", "german"), ("unseen", "french"))
        for k in (0, 1) for index, layer in reversed(list(enumerate(layers))) for expert in (0, 1, 2)
    )  # fmt: skip


def test_active_experts_by_accent_and_layer() -> None:
    data = figures.active_data(routing())
    assert list(data.spoken.unique()) == ["general", "german", "indian"]  # unseen accents have no expert
    assert list(data.layer.unique()) == ["W_q 1", "FFN \u2193 2", "linear_2"]
    assert list(data.active) == [1.5, 2.5, 3.5] + 2 * [0.5, 1.5, 2.5]
    [heat] = figures.active(data, 3).data
    assert (heat.zmin, heat.zmax, heat.z.shape, heat.text[0][0]) == (0, 3, (3, 3), "1.5")


# -- the page -------------------------------------------------------------------------------------------------------------


def test_what_results_say_in_a_few_sentences() -> None:
    """110 errors against 200 in 1,000 words on accents, 11 against 10 on general speech."""
    assert results.message(measured()[0]) == (
        "On accents, HDMoLE makes **11.0 errors in 100 words**, 9.0 fewer than the frozen base. "
        "On general speech, HDMoLE makes **1.1 errors in 100 words**, 0.1 more than the frozen base. "
        "It trains 9.5 % of what full fine-tuning trains."
    )
    few = results.message(measured("base", "hdmole", speakers=4)[0])
    assert few.count("that this differs from the frozen base is not established") == 2 and "It trains" not in few


def said(at: AppTest) -> str:
    return "\n".join(
        element.value.replace("\u00a0", " ")
        for kind in (at.markdown, at.caption, at.info, at.header, at.subheader)
        for element in kind
    )


def test_the_page_without_results_shows_the_paper(
    open_app: Callable[..., AppTest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    at = open_app("paper")
    assert_no_exception(at)
    assert "`sh runs/paper.sh`" in at.info[0].value and len(at.get("plotly_chart")) == 2
    assert "| HDMoLE | 4.92 M |  | 16.58 % · -35.4 % | not computed yet | 3.69 % · +5.4 % | not computed yet |" in said(at)
    assert "| MOELoRA | 4.92 M |  | 19.95 % · -22.2 % | not part of our comparison |" in said(at)
    assert "Ours: not computed yet." in said(at) and "stand in the paper's order" not in said(at)


def test_the_page_with_some_of_the_results(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PUBLISHED", tmp_path)
    found, rows = measured()
    found.provenance.base_sha256 = base_digest(tiny_model)
    found.claims = claims(found)
    save(tmp_path / "paper", found, rows)
    routing().to_parquet(tmp_path / "paper" / "routing.parquet")
    at = open_app("paper", against="full")
    assert_no_exception(at)
    text = said(at)
    assert "8 of 10 rows are computed so far; `sh runs/paper.sh` goes on." in text and not at.info
    assert "with 9.5 % of its trainable parameters: **refuted** against zero, **refuted** by the paper's margin of +6.0 %" in text
    line = "| HDMoLE | 4.92 M | 380 | 16.58 % · +6.0 % | 11.0 % · +10.0 % [+10.0, +10.0] | 3.69 % · -24.8 % | 1.1 % · -45.0 % [-45.0, -45.0] |"
    assert line in text and "| MoRAL | 1.99 M |  | 19.28 % · +23.3 % | not computed yet |" in text
    # opposite are HDMoLE and MoA, full fine-tuning and MoA, ranks 4 and 8
    assert "Of 21 pairs of methods **18 stand in the paper's order**, 3 in the opposite one, and 0 are open" in text
    assert "On accents, **HDMoLE** against **MoA**: +22.2 % [+22.2, +22.2] here, -11.8 % in the paper." in text
    assert "makes 20.0 times the errors of general speech, the paper's 7.3 times" in text and len(at.get("plotly_chart")) == 3
    at.segmented_control(key="paper_table").set_value("III").run()
    assert_no_exception(at)
    assert "| Rank 64 | 35.55 M |  | 15.98 % · +2.2 % | not part of our comparison |" in said(at)
    assert "| Rank 2 |  |  | not in the paper | not computed yet |" in said(at) and at.query_params["table"] == "III"
    monkeypatch.setattr(texts, "language", lambda: "zh")
    assert_no_exception(at.run())
    assert "尚未计算" in said(at)
