"""The claims about HDMoLE, their verdicts, and the paper's figures that they are judged by; by hand, with their signs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rows import ORIGIN, row, table

from hdmole.study import paper
from hdmole.study.bootstrap import summarise
from hdmole.study.claims import answer, claim_line, claim_text, claims, judge, plain_line, verdict
from hdmole.study.results import Claim, Difference, DomainRate, MethodResult, Relative, Results, ResultsError, load, save

LABELS = {"hdmole": "HDMoLE", "lora": "LoRA", "base": "Frozen base"}
MADE_BY_HAND = {  # claim -> its two methods, the domain, and the paper's difference, worked out from the paper's tables by hand
    "accents_full": ("hdmole", "full", "accent", 6.0),  # 16.58 / 15.64 = 1.0601
    "general_base": ("hdmole", "base", "general", 0.19),  # 3.69 - 3.50, in points
    "general_full": ("hdmole", "full", "general", -24.8),  # 3.69 / 4.91 = 0.7515
    "true_accent_full": ("true_accent", "full", "accent", -1.9),  # 15.35 / 15.64 = 0.9815
    "accents_lora_r": ("hdmole", "lora_r", "accent", -17.0),  # 16.58 / 19.98 = 0.8298
    "thresholds": ("hdmole", "no_thresholds", "accent", -4.7),  # 16.58 / 17.39 = 0.9534
    "local_routing": ("hdmole", "no_local", "accent", -9.5),  # 16.58 / 18.33 = 0.9045
    "global_routing": ("hdmole", "no_global", "accent", -11.6),  # 16.58 / 18.76 = 0.8838
    "accents_lora": ("hdmole", "lora", "accent", None),
    "accents_gated_lora": ("hdmole", "gated_lora", "accent", None),
}
NAMES = {method for mine, against, _, _ in MADE_BY_HAND.values() for method in (mine, against)}


def judged(name: str, value: float, low: float, high: float, **trainable: int) -> list[Claim]:
    """The claims of one difference, which has the given value and interval in the unit of the claim and far others elsewhere."""
    method, against, domain, _ = MADE_BY_HAND[name]
    measured, other = dict(interval=(low, high)), dict(interval=(-99.0, 99.0))
    if name == "general_base":
        numbers: dict[str, Any] = dict(points=value, **measured, relative=Relative(percent=77, **other))
    else:
        numbers = dict(points=77, **other, relative=Relative(percent=value, **measured))
    difference = Difference(domain=domain, method=method, against=against, **numbers)
    methods = {known: MethodResult(domains={}, trainable=trainable.get(known)) for known in NAMES}
    return claims(Results(methods=methods, differences=[difference], provenance=ORIGIN))


@pytest.mark.parametrize("name", MADE_BY_HAND)
def test_each_claim_is_about_its_methods_and_has_the_papers_difference(name: str) -> None:
    [claim] = judged(name, -30.0, -31.0, -29.0)
    expected = MADE_BY_HAND[name][3]
    assert (claim.name, claim.difference, claim.interval) == (name, -30.0, (-31.0, -29.0))
    assert claim.paper_difference == expected and claim.unit == ("points" if name == "general_base" else "percent")
    assert (claim.verdict, claim.paper_verdict) == ("established", None if expected is None else "established")
    assert claim.share is None


@pytest.mark.parametrize(
    ("name", "low", "high", "zero", "by_paper"),
    [
        # as good: at most as many errors, and by the paper at most 6.0 % more
        ("accents_full", -9.0, -1.0, "established", "established"),
        ("accents_full", -9.0, 0.0, "established", "established"),
        ("accents_full", -9.0, 0.1, "not established", "established"),  # an interval with zero in it is no equality
        ("accents_full", 0.0, 6.0, "not established", "established"),
        ("accents_full", 0.1, 6.0, "refuted", "established"),
        ("accents_full", 0.1, 6.1, "refuted", "not established"),
        ("accents_full", 6.0, 9.0, "refuted", "not established"),
        ("accents_full", 6.1, 9.0, "refuted", "refuted"),
        ("accents_full", -9.0, 9.0, "not established", "not established"),
        # as good as the base, and by the paper at most 0.19 points worse
        ("general_base", 0.01, 0.19, "refuted", "established"),
        ("general_base", -0.1, 0.2, "not established", "not established"),
        ("general_base", 0.2, 0.3, "refuted", "refuted"),
        ("general_base", 0.0, 0.0, "established", "established"),
        # better: fewer errors, and by the paper at least 17.0 % fewer
        ("accents_lora_r", -20.0, -17.0, "established", "established"),
        ("accents_lora_r", -20.0, -16.9, "established", "not established"),
        ("accents_lora_r", -17.0, -0.1, "established", "not established"),
        ("accents_lora_r", -16.9, -0.1, "established", "refuted"),
        ("accents_lora_r", -16.9, 0.0, "not established", "refuted"),
        ("accents_lora_r", -0.1, 0.0, "not established", "refuted"),
        ("accents_lora_r", 0.0, 0.0, "refuted", "refuted"),  # the same is not better
        ("accents_lora_r", 0.1, 1.0, "refuted", "refuted"),
        # the paper does not compare these
        ("accents_lora", -2.0, -0.1, "established", None),
        ("accents_gated_lora", -2.0, 0.1, "not established", None),
    ],
)
def test_a_claim_is_established_where_its_whole_interval_is(
    name: str, low: float, high: float, zero: str, by_paper: str | None
) -> None:
    [claim] = judged(name, (low + high) / 2, low, high)
    assert (claim.verdict, claim.paper_verdict) == (zero, by_paper)


def test_the_first_claim_names_the_share_of_the_parameters() -> None:
    [claim] = judged("accents_full", 1.0, 0.0, 2.0, hdmole=93, full=1001)
    assert claim.share == 9.3  # 93 / 1001 = 0.0929
    assert claim_text(claim) == "As good on accents as full fine-tuning with 9.3 % of its trainable parameters"
    for trainable in ({}, {"full": 1001}, {"hdmole": 93}):
        [claim] = judged("accents_full", 1.0, 0.0, 2.0, **trainable)
        assert claim.share is None and claim_text(claim) == "As good on accents as full fine-tuning"
    assert judged("general_full", 1.0, 0.0, 2.0, hdmole=93, full=1001)[0].share is None


def test_claims_come_in_order_and_only_of_what_was_compared() -> None:
    found = [
        Difference(
            domain=domain,
            method=method,
            against=against,
            points=0,
            interval=(0, 0),
            relative=Relative(percent=0, interval=(0, 0)),
        )
        for method, against, domain, _ in reversed(MADE_BY_HAND.values())
    ]
    methods = {name: MethodResult(domains={}) for name in NAMES}
    results = Results(methods=methods, differences=found, provenance=ORIGIN)
    assert [claim.name for claim in claims(results)] == list(MADE_BY_HAND)
    back = Difference(domain="accent", method="full", against="hdmole", points=0, interval=(0, 0))
    assert claims(results.model_copy(update={"differences": [back]})) == []
    # results of an older layout have no relative differences; what is judged in points can be judged there too
    old = [d.model_copy(update={"relative": None}) for d in found]
    assert [claim.name for claim in claims(results.model_copy(update={"differences": old}))] == ["general_base"]


def spoken(method: str, errors: int, speakers: int = 5, domain: str = "accent") -> list[dict[str, Any]]:
    """One row of 1,000 words a speaker; all speakers are alike, so that an interval is the value itself."""
    return [row(method, f"s{k}", errors, words=1000, accent="a", domain=domain) for k in range(speakers)]


def test_too_few_speakers_establish_nothing() -> None:
    for speakers, said in ((5, "established"), (4, "not established")):
        rows = table(*spoken("full", 100, speakers), *spoken("hdmole", 50, speakers))
        [claim] = claims(summarise(rows, ORIGIN))
        assert (claim.verdict, claim.paper_verdict, claim.difference) == (said, said, -50.0)
        assert claim.interval == ((-50.0, -50.0) if speakers == 5 else None)


def test_relative_differences_are_of_the_other_methods_errors() -> None:
    """10 and 8 errors in 100: 20 % fewer one way, 25 % more the other; without errors there is nothing to relate to."""
    rows = table(*spoken("full", 100), *spoken("hdmole", 80), *spoken("lora", 0))
    found = {(d.method, d.against): d.relative for d in summarise(rows, ORIGIN).differences}
    assert found["hdmole", "full"] == Relative(percent=-20.0, interval=(-20.0, -20.0))
    assert found["full", "hdmole"] == Relative(percent=25.0, interval=(25.0, 25.0))
    assert found["lora", "full"] == Relative(percent=-100.0, interval=(-100.0, -100.0))
    assert found["full", "lora"] is None
    # one of two speakers has all the errors, so that a draw without that one has none
    rows = table(row("full", "s0", 0), row("full", "s1", 4), row("hdmole", "s0", 1), row("hdmole", "s1", 1))
    found = {(d.method, d.against): d.relative for d in summarise(rows, ORIGIN).differences}
    assert found["hdmole", "full"] is None
    assert found["full", "hdmole"] == Relative(percent=100.0, interval=(-100.0, 300.0))


def results_of(folder: Path) -> pd.DataFrame:
    """A results folder: HDMoLE has 10 % more errors on accents than full fine-tuning, and 0.1 points more than the base."""
    rows = table(
        *spoken("base", 200), *spoken("full", 50), *spoken("hdmole", 55),
        *spoken("base", 10, domain="general"), *spoken("full", 20, domain="general"), *spoken("hdmole", 11, domain="general"),
    )  # fmt: skip
    results = summarise(rows.assign(errors=0), ORIGIN)  # what the summary says of errors does not matter
    for method, count in (("base", 0), ("full", 1000), ("hdmole", 96)):
        results.methods[method].trainable = count
    save(folder, results, rows)
    return rows


def test_verdicts_come_from_the_utterances_again(tmp_path: Path) -> None:
    results_of(tmp_path)
    found = [(c.name, c.difference, c.interval, c.verdict, c.paper_verdict, c.share) for c in judge(tmp_path)]
    assert found == [
        ("accents_full", 10.0, (10.0, 10.0), "refuted", "refuted", 9.6),
        ("general_base", 0.1, (0.1, 0.1), "refuted", "established", None),
        ("general_full", -45.0, (-45.0, -45.0), "established", "established", None),
    ]
    rows = results_of(tmp_path)
    rows.replace({"method": {"base": "lora"}}).to_parquet(tmp_path / "utterances.parquet")  # of which the summary knows nothing
    assert [claim.name for claim in judge(tmp_path)] == ["accents_full", "general_full", "accents_lora"]
    (tmp_path / "utterances.parquet").unlink()
    with pytest.raises(
        ResultsError, match=r"has no utterances\.parquet to judge; name a folder that `hdmole compare` or"
    ) as error:
        judge(tmp_path)
    assert error.value.code == "results.no_utterances" and str(tmp_path) in str(error.value)


# -- sentences ------------------------------------------------------------------------------------------------------------


def test_a_claim_as_a_line() -> None:
    [claim] = judged("accents_full", 5.84, 2.85, 8.94, hdmole=96, full=1000)
    assert claim_line(claim) == (
        "As good on accents as full fine-tuning with 9.6 % of its trainable parameters: **refuted** against zero, "
        "**not established** by the paper's margin of +6.0 % (+5.8 % [+2.9, +8.9])"
    )
    [claim] = judged("general_base", -0.004, -0.126, 0.12)
    assert claim_line(claim) == (
        "As good on general speech as the frozen base: **not established** against zero, "
        "**established** by the paper's margin of +0.19 points (+0.00 points [-0.13, +0.12])"
    )
    [claim] = judged("accents_lora", -9.0, -11.0, -7.0)
    line = "Better on accents than LoRA: **established** against zero"
    assert claim_line(claim) == f"{line} (-9.0 % [-11.0, -7.0]); the paper does not compare them"
    few = claim.model_copy(update={"interval": None, "verdict": "not established"})
    assert claim_line(few).endswith(
        "**not established** against zero (-9.0 %, too few speakers); the paper does not compare them"
    )


def test_a_claim_in_plain_words() -> None:
    """That two are equally good is answered by the paper's margin, that one is better by zero."""
    [claim] = judged("accents_full", 5.84, 2.85, 5.94, hdmole=96, full=1000)
    assert (claim.verdict, claim.paper_verdict, answer(claim)) == ("refuted", "established", "established")
    share = "As good on accents as full fine-tuning with 9.6 % of its trainable parameters"
    assert plain_line(claim) == f"{share}: **yes**. Measured: 6 % more errors."
    [claim] = judged("general_base", 0.8, -0.1, 1.5)
    assert answer(claim) == "not established"  # neither equal nor worse
    assert plain_line(claim).endswith("**not known**. Measured: a word error rate 0.8 points higher.")
    [claim] = judged("accents_lora", -9.0, -11.0, -7.0)
    assert plain_line(claim) == "Better on accents than LoRA: **yes**. Measured: 9 % fewer errors."
    [claim] = judged("general_full", 10.9, -1.9, 23.3)
    assert (claim.paper_verdict, answer(claim)) == ("refuted", "not established")
    [claim] = judged("general_base", -0.004, -0.126, 0.12)
    assert plain_line(claim).endswith("**yes**. Measured: no difference.")


def difference(points: float, low: float, high: float) -> Difference:
    return Difference(domain="accent", method="hdmole", against="lora", points=points, interval=(low, high))


@pytest.mark.parametrize(
    ("points", "low", "high", "said"),
    [
        (-1.5, -2.0, -1.0, "HDMoLE against LoRA: better, -1.5 points [-2.0, -1.0]"),
        (1.5, 1.0, 2.0, "HDMoLE against LoRA: worse, +1.5 points [+1.0, +2.0]"),
        (0.2, -0.4, 0.9, "HDMoLE against LoRA: no difference established, +0.2 points [-0.4, +0.9]"),
        (-0.5, -1.0, 0.0, "HDMoLE against LoRA: no difference established, -0.5 points [-1.0, +0.0]"),
        (0.5, 0.0, 1.0, "HDMoLE against LoRA: no difference established, +0.5 points [+0.0, +1.0]"),
        (-0.04, -0.05, -0.01, "HDMoLE against LoRA: better, +0.0 points [-0.1, +0.0]"),  # no minus before zero
    ],
)
def test_two_methods_differ_where_the_whole_interval_is_on_one_side(points: float, low: float, high: float, said: str) -> None:
    assert verdict(difference(points, low, high), LABELS) == said


def test_a_method_without_a_label_goes_by_its_name() -> None:
    assert verdict(difference(-1.5, -2.0, -1.0), {}).startswith("hdmole against lora: better")


# -- the paper ------------------------------------------------------------------------------------------------------------


def papers(table: str) -> dict[str | None, paper.Row]:
    """The rows of a table that the paper has, by our method."""
    return {found.method: found for found in paper.ROWS if found.table == table and found.target}


def test_the_papers_rows_say_what_the_paper_says_of_them() -> None:
    """What the paper's text says in words: 0.94 points more than full fine-tuning; thresholds are worth 0.81, routers 1.75 and 2.18."""
    first, second, third = papers("I"), papers("II"), papers("III")
    target = {name: found.target or 0 for name, found in (first | third).items()}
    general = {name: found.general or 0 for name, found in first.items()}
    assert len(first) == 11 and min(general.values()) == general["base"] == 3.50 and target["base"] == 25.65
    gains = [round(target[other] - target["hdmole"], 2) for other in ("full", "no_thresholds", "no_local", "no_global")]
    assert gains == [-0.94, 0.81, 1.75, 2.18]
    assert [round(general[name] - 3.50, 2) for name in ("hdmole", "full")] == [0.19, 1.41]
    accents = [found.target or 0 for found in second.values()]
    assert accents == sorted(accents, reverse=True) and round(accents[1] - accents[2], 2) == 1.23
    assert round(target["rank8"] - target["rank32"], 2) == 0.66 and target["rank8"] == target["hdmole"]
    counts = [found.trained or 0 for found in third.values()]
    assert counts == sorted(counts) and first["hdmole"].trained == third["rank8"].trained == 4.92
    assert round(100 * 4.92 / (first["full"].trained or 0), 1) == 9.6


def test_a_row_is_found_by_our_method() -> None:
    assert [found and found.target for found in map(paper.row, ("hdmole", "true_accent", "lora", "x"))] == [
        16.58,
        15.35,
        None,
        None,
    ]
    named = [found.method for found in paper.ROWS if found.method]
    assert len(named) == len(set(named)) + 1  # HDMoLE stands in Tables I and II


def test_claims_about_few_speakers_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    """Of two speakers there is no interval, so that nothing is established."""
    rows = table(*(row(method, f"s{k}", 1, domain="general") for method in ("base", "hdmole") for k in range(2)))
    results = summarise(rows, ORIGIN)
    results.claims = claims(results)
    assert [(claim.name, claim.interval) for claim in results.claims] == [("general_base", None)]
    save(tmp_path, results, rows)
    assert load(tmp_path).claims == results.claims


@pytest.mark.parametrize(("low", "high", "sure"), [(-2.0, -0.1, True), (0.1, 2.0, True), (-0.5, 1.5, False), (0.0, 1.5, False)])
def test_a_difference_is_established_if_its_interval_leaves_out_zero(low: float, high: float, sure: bool) -> None:
    """+0.8 [+0.0, +1.5] is none."""
    rate = DomainRate(
        wer=1.0, interval=(0.5, 1.5), errors=1, words=100, utterances=20, speakers=9, accents={}, mean_over_accents=1.0,
        mean_interval=(0.5, 1.5),
    )  # fmt: skip
    methods = {name: MethodResult(domains={"accent": rate}) for name in ("hdmole", "lora")}
    results = Results(methods=methods, differences=[difference(0.8, low, high)], provenance=ORIGIN)
    assert results.established("hdmole", "lora", "accent") is sure
    assert not results.established("hdmole", "base", "accent")
    rate.speakers = 2
    assert not results.established("hdmole", "lora", "accent")
