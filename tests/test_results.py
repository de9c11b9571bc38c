"""Counting errors, intervals, summaries and the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hdmole.names import METHOD_NAMES
from hdmole.speech.words import count_errors, normalise
from hdmole.study.claims import claim_lines, claim_text, claims, verdict
from hdmole.study.results import (
    COLUMNS,
    accent_differences,
    accent_table,
    bootstrap,
    few_speakers,
    markdown_table,
    summarise,
    write,
)

ROOT = Path(__file__).resolve().parent.parent


def _rows(errors: dict[str, list[int]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            dict(method=m, seed=0, domain="accent", accent=f"a{k % 2}", speaker=f"s{k}", utterance=f"u{k}", reference="x " * 10,
                 hypothesis="", errors=e, words=10)
            for m, counts in errors.items() for k, e in enumerate(counts)
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("你好吗", "你们好 吗", (1, 3)),
        ("a b c", "a b c", (0, 3)),
        ("a b c", "a x c", (1, 3)),
        ("a b c", "", (3, 3)),
        ("a", "a b c", (2, 1)),
        ("", "a b", (2, 0)),
    ],
)
def test_count_errors(reference: str, hypothesis: str, expected: tuple[int, int]) -> None:
    assert count_errors(reference, hypothesis) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don\u2019t  STOP, O'Brien!", "don't stop o'brien"), ("'quoted' - a_b 7:30", "quoted a b 7 30"), ("", ""),
        ("\u00dcber \u4f60\u597d", "\u00fcber \u4f60\u597d"), ("u\u0308ber", "\u00fcber"), ("हिन्दी में!", "हिन्दी में"),
    ],
)  # fmt: skip
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_the_mean_over_accents_has_an_interval_of_its_own() -> None:
    """Where one accent has most of the words, the interval of all words together lies nowhere near the mean."""
    rows = pd.concat([_rows({"base": [0] * 60}).assign(accent="easy"), _rows({"base": [4, 6, 5, 5, 4, 6]}).assign(accent="hard")])
    rows["speaker"] = [f"s{k}" for k in range(len(rows))]
    entry = summarise(rows)["methods"]["base"]["domains"]["accent"]
    low, high = entry["mean_interval"]
    assert entry["mean_over_accents"] == 25.0 and entry["interval"][1] < 15 < low < 25 < high < 35
    assert "| 25.0 [2" in markdown_table({"methods": summarise(rows)["methods"]}, METHOD_NAMES)
    assert accent_table(summarise(rows), METHOD_NAMES).splitlines()[2:] == [
        "| easy | 0.0 [0.0, 0.0] |",
        f"| hard | 50.0 [{entry['accents']['hard']['interval'][0]:.1f}, {entry['accents']['hard']['interval'][1]:.1f}] |",
    ]


def test_summary_adds_up_and_is_paired() -> None:
    rows = _rows({"base": [4, 2, 4, 2], "hdmole": [2, 1, 2, 1]})
    summary = summarise(rows)["methods"]
    assert summary["base"]["domains"]["accent"]["wer"] == 30.0
    assert summary["base"]["domains"]["accent"]["accents"]["a0"]["wer"] == 40.0
    assert summary["hdmole"]["domains"]["accent"]["mean_over_accents"] == 15.0
    change = summarise(rows)["differences"][1]
    assert (change["method"], change["points"]) == ("hdmole", -15.0) and change["interval"][1] < 0
    # paired: were the methods equal on every speaker, the difference would have no spread at all
    same = summarise(_rows({"base": [4, 2, 9, 0], "lora": [4, 2, 9, 0]}))["differences"]
    assert [d["interval"] for d in same] == [[0.0, 0.0]] * 2


def test_a_difference_is_called_only_where_its_interval_excludes_zero() -> None:
    rows = _rows({"lora": [4, 2, 5, 3] * 5, "hdmole": [2, 1, 3, 1] * 5, "full": [4, 3, 4, 3] * 5})
    found = {(d["method"], d["against"]): d for d in summarise(rows)["differences"]}
    assert len(found) == 6
    better, worse = found["hdmole", "lora"], found["lora", "hdmole"]
    assert better["points"] == -worse["points"] == -17.5 and better["interval"] == [-v for v in reversed(worse["interval"])]
    assert verdict(better, METHOD_NAMES).startswith("HDMoLE against LoRA: better, -17.5 points [-")
    assert ": worse, +17.5 points" in verdict(worse, METHOD_NAMES)
    assert "no difference established" in verdict(found["full", "lora"], METHOD_NAMES)


def test_differences_by_accent_have_the_sign_and_the_interval_of_their_speakers() -> None:
    rows = _rows({"base": [5, 2, 5, 2, 4, 2] * 2, "hdmole": [2, 2, 1, 2, 2, 2] * 2})  # a0 better, a1 the same
    few = rows[rows.speaker.isin(["s0", "s2", "s4", "s6"])]  # all better, but only four
    rows = pd.concat([rows, few.assign(domain="real_digits", accent="few")])
    found = accent_differences(rows, "hdmole", "base").set_index("accent")
    assert found.points["a0"] == pytest.approx(-30) and found.high["a0"] < 0 and found.points["a1"] == 0
    assert found.speakers["a0"] == 6 and found.speakers["few"] == 4 and found.points["few"] < 0
    assert np.isnan(found.low["few"]) and np.isnan(found.high["few"])
    other = accent_differences(rows, "base", "hdmole").set_index("accent")
    assert other.points["a0"] == -found.points["a0"] and other.low["a0"] == pytest.approx(-found.high["a0"])


def test_a_rate_of_few_speakers_is_shown_without_an_interval() -> None:
    summary = summarise(_rows({"base": [4, 2, 4, 2], "hdmole": [2, 1, 2, 1]}))
    assert few_speakers(summary, "accent") == 4 and few_speakers(summary, "none") == 0
    assert "[" not in markdown_table(summary, METHOD_NAMES) + accent_table(summary, METHOD_NAMES)
    assert "| HDMoLE |  | 15.0 |" in markdown_table(summary, METHOD_NAMES)
    enough = summarise(_rows({"base": [4, 2, 4, 2, 4], "hdmole": [2, 1, 2, 1, 2]}))
    assert few_speakers(enough, "accent") == 0 and "[" in markdown_table(enough, METHOD_NAMES)
    assert "[" not in accent_table(enough, METHOD_NAMES)  # of each accent, three or two


def test_bootstrap_covers_the_mean_and_narrows_with_speakers() -> None:
    rng = np.random.default_rng(0)
    few, many = (_rows({"base": list(rng.integers(0, 5, n))}) for n in (8, 200))
    widths = [np.diff(np.percentile(bootstrap(r), [2.5, 97.5]))[0] for r in (few, many)]
    assert widths[1] < widths[0]
    assert abs(bootstrap(many).mean() - 100 * many.errors.sum() / many.words.sum()) < 1


def test_written_results_read_back(tmp_path: Path) -> None:
    rows = _rows({"base": [1, 2]})
    write(tmp_path, rows, summarise(rows))
    assert list(pd.read_parquet(tmp_path / "utterances.parquet").columns) == COLUMNS
    assert json.loads((tmp_path / "summary.json").read_text())["methods"]["base"]["domains"]["accent"]["wer"] == 15.0


def test_readme_shows_the_table_of_the_results_file() -> None:
    summary = json.loads((ROOT / "assets" / "demo" / "results" / "summary.json").read_text())
    assert markdown_table(summary, METHOD_NAMES) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", [ROOT / "assets" / "demo" / "results", *(ROOT / "assets" / "results").glob("*")])
def test_summary_is_that_of_the_utterances(folder: Path) -> None:
    again = summarise(pd.read_parquet(folder / "utterances.parquet"))["methods"]
    stored = json.loads((folder / "summary.json").read_text())["methods"]
    for method, entry in again.items():
        for values in stored[method]["domains"].values():
            values.pop("per_seed", None)
            values.pop("change_against_base", None)  # only in files written before it went
        assert stored[method]["domains"] == entry["domains"]


def test_the_documentation_shows_the_comparison() -> None:
    summary = json.loads((ROOT / "assets" / "results" / "main" / "summary.json").read_text())
    text = (ROOT / "docs" / "compare.md").read_text()
    assert markdown_table(summary, {name: entry["label"] for name, entry in summary["methods"].items()}) in text
    assert claim_lines(summary) in text and "(by the estimate): **yes**" in text
    assert [c | {"claim": claim_text(c)} for c in summary["claims"]] == claims(summary)


CONDITIONS = (  # what is compared under which condition: results, HDMoLE, full fine-tuning and LoRA times accent mass in them
    ("Encoder, one epoch (the headline)", "main", "hdmole", "full", "gated_lora"),
    ("Encoder, two epochs", "longer", "hdmole", "full", "gated_lora"),
    ("Projector, four epochs", "projector", "hdmole", "full", "gated_lora"),
    ("Projector, two epochs", "variants", "hdmole", "full", "gated_lora"),
    ("the same, true accent known", "variants", "true_accent", "full", "gated_lora"),
    ("the same, a tenth of the speech", "variants", "hdmole_tenth", "full_tenth", "gated_lora_tenth"),
    ("Encoder, one epoch, twelve accents that conflict", "conflicts", "hdmole", "full", "gated_lora"),
    ("the same, true accent known", "conflicts", "true_accent", "full", "gated_lora"),
)


def test_the_table_of_conditions_says_what_the_results_say() -> None:
    lines = []
    for condition, folder, mine, full, gated in CONDITIONS:
        summary = json.loads((ROOT / "assets" / "results" / folder / "summary.json").read_text())
        found = {(d["method"], d["against"], d["domain"]): d for d in summary["differences"]}
        cells = []
        for against, domain in ((full, "accent"), (gated, "accent"), ("base", "general")):
            difference = found[mine, against, domain]
            low, high = difference["interval"]
            text = f"{difference['points']:+z.1f} [{low:+z.1f}, {high:+z.1f}]"
            cells.append(f"**{text}**" if low > 0 or high < 0 else text)
        seeds = len(summary["provenance"]["seeds"])
        lines.append(f"| {condition} | `{folder}` | {seeds} | {' | '.join(cells)} |")
    assert "\n".join(lines) in (ROOT / "docs" / "compare.md").read_text(), "\n".join(lines)
