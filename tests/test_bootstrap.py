"""Bootstrap intervals and differences, with examples computed by hand and their signs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import ORIGIN, of_speakers, row, table

from hdmole.study.bootstrap import RESAMPLES, _interval, accent_differences, bootstrap, bootstrap_mean, differences, summarise
from hdmole.study.results import FEW_SPEAKERS, Difference, Relative
from hdmole.study.tables import accent_table, markdown_table


def test_a_bootstrap_draws_speakers_and_counts_all_their_words() -> None:
    """Two speakers: drawn twice, the first has 4 errors in 10 words, the second none in 30; both together 4 in 40."""
    drawn = bootstrap(table(row("base", "s0", 4, 10), row("base", "s1", 0, 30)))
    shares = {rate: float((drawn == rate).mean()) for rate in (40, 10, 0)}
    assert drawn.shape == (RESAMPLES,) and sum(shares.values()) == 1
    assert shares[40] == pytest.approx(1 / 4, abs=0.05) and shares[10] == pytest.approx(1 / 2, abs=0.05)


def test_a_bootstrap_of_means_leaves_out_accents_that_were_not_drawn() -> None:
    """s0 speaks a (10 %) and b (50 %), s1 only a (40 %). Together a is 5 in 20; without s0 the mean is of a alone."""
    rows = table(row("base", "s0", 1, accent="a"), row("base", "s0", 5, accent="b"), row("base", "s1", 4, accent="a"))
    drawn = bootstrap_mean(rows)
    assert drawn.shape == (RESAMPLES,) and set(drawn) == {(10 + 50) / 2, (25 + 50) / 2, 40.0}


def test_a_bootstrap_of_means_counts_all_words_of_a_speaker() -> None:
    """s0 has 4 errors in 10 words twice, s1 none in 10. Both together have 8 in 30."""
    rows = table(row("base", "s0", 4), row("base", "s0", 4), row("base", "s1", 0))
    assert sorted(set(bootstrap_mean(rows))) == pytest.approx([0, 100 * 8 / 30, 40])


def test_methods_are_resampled_alike() -> None:
    twice, once = table(*of_speakers("lora", [8, 2, 0, 4])), table(*of_speakers("hdmole", [4, 1, 0, 2]))
    for resampled in (bootstrap, bootstrap_mean):
        np.testing.assert_allclose(resampled(twice), 2 * resampled(once))
        assert len(set(resampled(once))) > 3 and (resampled(once, seed=1) != resampled(once)).any()


def test_speakers_without_words_do_not_divide_by_zero() -> None:
    silent = table(row("base", "s0", 0, 0), row("base", "s1", 0, 0))
    assert set(bootstrap(silent)) == set(bootstrap_mean(silent)) == {0.0}
    found = summarise(silent, ORIGIN).methods["base"].domains["accent"]
    assert found.wer == found.mean_over_accents == 0 and found.words == 0


def test_an_interval_is_the_middle_95_percent() -> None:
    assert _interval(np.arange(1001) / 10) == (2.5, 97.5)  # 0.0, 0.1 ... 100.0
    assert _interval(np.full(7, 1.23456)) == (1.23, 1.23)


def test_a_summary_adds_up() -> None:
    rows = table(
        row("base", "s0", 4, 10, "a"), row("base", "s1", 2, 10, "a"), row("base", "s0", 1, 40, "b"),
        row("base", "s0", 3, 20, "general", "general"), row("hdmole", "s0", 0, 10, "a"),
    )  # fmt: skip
    results = summarise(rows, ORIGIN)
    assert list(results.methods) == ["base", "hdmole"] and results.provenance == ORIGIN
    accent = results.methods["base"].domains["accent"]
    assert (accent.errors, accent.words, accent.utterances, accent.speakers) == (7, 60, 3, 2)
    assert accent.wer == 11.67  # 7 of 60
    assert {name: found.wer for name, found in accent.accents.items()} == {"a": 30.0, "b": 2.5}
    assert accent.mean_over_accents == 16.25  # of 30 and 2.5
    assert accent.interval == (10.0, 20.0)  # s0 alone has 5 errors in 50 words, s1 alone 2 in 10, both 7 in 60
    assert accent.mean_interval == (16.25, 21.25)  # s0 alone: a 40, b 2.5; s1 alone: a 20; both: a 30, b 2.5
    assert results.methods["hdmole"].domains.keys() == {"accent"}
    # of "accent" the means over accents are compared, 0 - 16.25; of other domains all words together
    assert [(d.domain, d.method, d.against, d.points) for d in results.differences] == [
        ("accent", "base", "hdmole", 16.25), ("accent", "hdmole", "base", -16.25),
    ]  # fmt: skip


def test_a_difference_is_method_minus_against_with_a_paired_interval() -> None:
    """Speaker by speaker LoRA has 3, 1, 2, 2 and HDMoLE 1, 1, 2, 0 errors in 10 words: 20 % and 10 %."""
    rows = table(*of_speakers("lora", [3, 1, 2, 2], domain="general"), *of_speakers("hdmole", [1, 1, 2, 0], domain="general"))
    first, second = differences(rows)
    assert (first.method, first.against, first.points, second.points) == ("lora", "hdmole", 10.0, -10.0)
    assert (second.method, second.against, second.domain) == ("hdmole", "lora", "general")
    assert second.interval == (-first.interval[1], -first.interval[0])
    # HDMoLE is never worse on a speaker, so that no draw is above zero; were the draws not paired, some would be
    assert second.interval[0] < -10 < second.interval[1] <= 0


def test_methods_are_compared_over_the_seeds_that_both_have_and_the_base_over_all() -> None:
    """a has 2 and 4 errors of 10 with its seeds, b 2 with its only one, the base 5; no speaker differs from another."""
    rows = [{**r, "seed": seed} for seed, errors in ((0, 2), (1, 4)) for r in of_speakers("a", [errors] * 6)]
    rows = table(*rows, *of_speakers("b", [2] * 6), *of_speakers("base", [5] * 6))
    found = {(d.method, d.against): (d.points, d.interval) for d in differences(rows)}
    assert found["a", "b"] == (0, (0, 0)) and found["a", "base"] == (-20, (-20, -20)) and found["b", "base"] == (-30, (-30, -30))
    assert accent_differences(rows, "b", "a").points.tolist() == [0]
    assert accent_differences(rows, "a", "base").points.tolist() == [-20]


def test_a_relative_difference_is_in_percent_of_the_other_rate() -> None:
    """Every speaker has 3 errors in 90 words by the base and 2 by HDMoLE: 3.33 % and 2.22 %, a third less or half more."""
    rows = table(*(row(method, f"s{k}", errors, 90) for method, errors in (("base", 3), ("hdmole", 2)) for k in range(6)))
    more, less = differences(rows)
    assert (less.method, less.points, less.interval) == ("hdmole", -1.11, (-1.11, -1.11))
    assert less.relative == Relative(percent=-33.33, interval=(-33.33, -33.33))
    assert more.relative == Relative(percent=50.0, interval=(50.0, 50.0))
    rows = table(*(row(method, f"s{k}", errors, 100) for method, errors in (("base", 1), ("hdmole", 2)) for k in range(6)))
    assert differences(rows)[1].relative == Relative(percent=100.0, interval=(100.0, 100.0))


@pytest.mark.parametrize("errors", [[0, 0, 0], [0, 0, 3]], ids=["no errors", "no errors in some draws"])
def test_nothing_is_relative_to_a_rate_that_may_be_zero(errors: list[int]) -> None:
    against_base = differences(table(*of_speakers("base", errors), *of_speakers("hdmole", [1, 1, 1])))[1]
    assert against_base.method == "hdmole" and against_base.relative is None


def test_rates_of_all_words_and_means_over_accents_are_told_apart() -> None:
    """Nine tenths of the words are of an accent without errors: all words 5 %, the mean over accents 25 %."""
    both = [row("base", f"e{k}", 0, accent="easy") for k in range(54)] + [
        row("base", f"h{k}", 5, accent="hard") for k in range(6)
    ]
    rows = pd.concat([table(*both), table(*both).assign(method="hdmole", errors=0)])
    for domain, points in (("accent", 25.0), ("unseen", 5.0)):
        found = differences(rows.assign(domain=domain))[0]
        assert found.points == points and found.interval[0] > (0 if domain == "unseen" else 20)
    rate = summarise(rows, ORIGIN).methods["base"].domains["accent"]
    assert rate.wer == 5.0 and rate.mean_over_accents == 25.0 and rate.interval[1] < 12 < 20 < rate.mean_interval[0]


def test_differences_by_accent() -> None:
    """Accent a: 12 errors less in 60 words, -20 points; b: 2 more in 40, +5 points, and only four speakers."""
    rows = table(
        *of_speakers("base", [4, 4, 4, 4, 4, 4], accent="a"), *of_speakers("hdmole", [2, 2, 2, 2, 2, 2], accent="a"),
        *of_speakers("base", [1, 1, 1, 1], accent="b"), *of_speakers("hdmole", [2, 2, 1, 1], accent="b"),
        *of_speakers("lora", [9, 9, 9, 9, 9], accent="a"), row("base", "s0", 1, accent="c"), row("hdmole", "s0", 1, accent="d"),
    )  # fmt: skip
    found = accent_differences(rows, "hdmole", "base")
    assert list(found.accent) == ["a", "b"] and list(found.domain) == ["accent"] * 2  # c and d lack one of the methods
    assert list(found.points) == pytest.approx([-20, 5]) and list(found.speakers) == [6, 4]
    assert (found.low[0], found.high[0]) == pytest.approx((-20, -20))  # every speaker gains the same, and draws are paired
    assert np.isnan(found.low[1]) and np.isnan(found.high[1])
    other = accent_differences(rows, "base", "hdmole")
    assert list(other.points) == pytest.approx([20, -5]) and (other.low[0], other.high[0]) == pytest.approx((20, 20))
    assert accent_differences(rows, "lora", "base").points.tolist() == pytest.approx([50])


@pytest.mark.parametrize(("speakers", "enough"), [(4, False), (5, True)])
def test_five_speakers_are_enough_for_an_interval(speakers: int, enough: bool) -> None:
    assert FEW_SPEAKERS == 5
    rows = table(*of_speakers("base", [2] * speakers), *of_speakers("hdmole", [1] * speakers))
    results = summarise(rows, ORIGIN)
    assert results.few_speakers("accent") == (0 if enough else speakers) and results.few_speakers("none") == 0
    rate = results.methods["base"].domains["accent"]
    assert rate.has_interval == enough and rate.text() == rate.mean_text() == ("20.0 [20.0, 20.0]" if enough else "20.0")
    assert ("[" in markdown_table(results)) == ("[" in accent_table(results)) == enough
    assert np.isnan(accent_differences(rows, "hdmole", "base").low[0]) != enough


def test_a_rate_of_characters_is_named() -> None:
    rows = table(*of_speakers("base", [2] * 5), *of_speakers("hdmole", [1] * 5))
    assert summarise(rows, ORIGIN).rate_name is None and "rate_name" not in summarise(rows, ORIGIN).to_dict()
    results = summarise(rows.assign(reference="\u6253\u5f00\u706f"), ORIGIN)
    assert results.to_dict()["rate_name"] == "CER"
    assert markdown_table(results).startswith("| Method (CER in %) |") and accent_table(results).startswith(
        "| Accent (CER in %) |"
    )


def test_few_speakers_are_those_of_the_method_that_has_fewest() -> None:
    results = summarise(
        table(*of_speakers("base", [1] * 9), *of_speakers("lora", [1] * 3), *of_speakers("full", [1] * 4)), ORIGIN
    )
    assert results.few_speakers("accent") == 3


def test_everything_keeps_the_order_of_the_rows() -> None:
    rows = table(
        *(row(method, f"s{k}", k, 3 if accent == "z" else 10, accent, domain) for method in ("lora", "base")
          for domain, accent in (("unseen", "y"), ("accent", "z"), ("accent", "b"), ("accent", "c"), ("accent", "a")) for k in (0, 1)),
    )  # fmt: skip
    results = summarise(rows, ORIGIN)
    assert list(results.methods) == ["lora", "base"] and list(results.methods["base"].domains) == ["unseen", "accent"]
    assert list(results.methods["base"].domains["accent"].accents) == ["z", "b", "c", "a"]
    assert [(d.domain, d.method) for d in results.differences] == [
        ("unseen", "lora"), ("unseen", "base"), ("accent", "lora"), ("accent", "base"),
    ]  # fmt: skip
    assert results.methods["base"].domains["accent"].mean_over_accents == 7.92  # of 16.67, 5, 5 and 5: 7.9175
    rows = rows[(rows.accent != "y") | (rows.method == "base")].sort_values("accent", key=lambda a: a != "y", kind="stable")
    assert rows.accent.iloc[0] == "y"  # the first accent lacks a method, the others are compared
    assert list(accent_differences(rows, "lora", "base").accent) == ["z", "b", "c", "a"]


def test_the_interval_of_one_accent_is_that_of_a_domain_with_this_accent_alone() -> None:
    errors = [0, 1, 3, 7, 15, 31, 9, 4, 22, 12, 2, 5]
    rows = table(
        *(row("lora", f"s{k}", e, 40, "a", "general") for k, e in enumerate(errors)),
        *(row("base", f"s{k}", e, 40, "a", "general") for k, e in enumerate(reversed(errors))),
    )
    found = accent_differences(rows, "lora", "base")
    assert (round(found.low[0], 2), round(found.high[0], 2)) == differences(rows)[0].interval
    rows = rows.assign(accent=["a" if k % 3 else "b" for k in range(24)])
    interval = differences(rows)[0].interval  # of all words, whatever their accents
    assert interval == differences(rows.assign(accent="a"))[0].interval != differences(rows.assign(domain="accent"))[0].interval


ROWS = st.lists(
    st.tuples(st.sampled_from(["base", "hdmole"]), st.integers(0, 5), st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 9)),
    min_size=1, max_size=20,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(found: list[tuple[str, int, str, int, int]], random: Any) -> None:
    rows = table(*(row(m, f"s{s}", e, w, a, "accent" if a == "a" else "unseen") for m, s, a, e, w in found))
    shuffled = rows.sample(frac=1, random_state=random.randrange(1000))
    one, other = summarise(rows, ORIGIN), summarise(shuffled, ORIGIN)
    assert one.methods == other.methods

    def key(difference: Difference) -> tuple[str, str]:
        return difference.domain, difference.method

    assert sorted(one.differences, key=key) == sorted(other.differences, key=key)


@settings(max_examples=20, deadline=None)
@given(ROWS)
def test_a_method_does_not_differ_from_itself(found: list[tuple[str, int, str, int, int]]) -> None:
    rows = table(*(row("base", f"s{s}", e, w, a) for _, s, a, e, w in found))
    rows = pd.concat([rows, rows.assign(method="hdmole"), rows.assign(method="lora", errors=rows.errors + 1)])
    by_pair = {(d.method, d.against): d for d in summarise(rows, ORIGIN).differences}
    same = by_pair["hdmole", "base"]
    assert (same.points, same.interval) == (0.0, (0.0, 0.0))
    for (method, against), difference in by_pair.items():
        back = by_pair[against, method]
        assert difference.points == -back.points and difference.interval == (-back.interval[1], -back.interval[0])
        assert method != "lora" or difference.points > 0 < difference.interval[0]
