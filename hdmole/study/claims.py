"""The claims about HDMoLE, and their verdicts.

Each claim is about a difference of two methods' errors: HDMoLE minus the other one. Below zero,
HDMoLE makes fewer errors. A claim says that the difference is at most a margin. There are three
verdicts, where [low, high] is the 95 % interval of the difference:

- "established": high <= margin. The whole interval fulfils the claim.
- "refuted": low > margin. The whole interval contradicts it.
- "not established": anything else, and whenever there are too few speakers for an interval.

An interval that includes the margin therefore never counts as success. Each claim is judged twice:

- against zero: the margin is 0. A claim that HDMoLE is *better* needs high < 0, and is refuted by
  low >= 0.
- against the paper: the margin is the difference that the paper itself reports
  (`hdmole.study.paper`), such as 6.0 % more errors than full fine-tuning on the target. Comparisons
  that the paper does not make have no such verdict.

Differences are relative, in percent of the other method's errors, because the paper's error rates
and ours lie far apart. What HDMoLE loses on general speech is in points of the error rate, as the
paper gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from hdmole.names import GENERAL
from hdmole.study import paper
from hdmole.study.bootstrap import summarise
from hdmole.study.results import UTTERANCES, Claim, ClaimName, Difference, Interval, Results, ResultsError, Verdict, load
from hdmole.texts import Text


@dataclass(frozen=True)
class _Asked:
    """A claim: how `method` compares with `against` in a domain."""

    method: str
    against: str
    domain: str
    text: Text
    better: bool = True  # rather than as good
    unit: Literal["points", "percent"] = "percent"


_CLAIMS: dict[ClaimName, _Asked] = {
    "accents_full": _Asked("hdmole", "full", "accent", Text("As good on accents as full fine-tuning"), better=False),
    "general_base": _Asked(
        "hdmole", "base", GENERAL, Text("As good on general speech as the frozen base"), better=False, unit="points"
    ),
    "general_full": _Asked("hdmole", "full", GENERAL, Text("Better on general speech than full fine-tuning")),
    "true_accent_full": _Asked(
        "true_accent", "full", "accent", Text("Told the true accent, better on accents than full fine-tuning")
    ),
    "accents_lora_r": _Asked("hdmole", "lora_r", "accent", Text("Better on accents than one LoRA of an expert's rank")),
    "thresholds": _Asked("hdmole", "no_thresholds", "accent", Text("Better on accents than without dynamic thresholds")),
    "local_routing": _Asked("hdmole", "no_local", "accent", Text("Better on accents than without local routing")),
    "global_routing": _Asked("hdmole", "no_global", "accent", Text("Better on accents than without global routing")),
    "accents_lora": _Asked("hdmole", "lora", "accent", Text("Better on accents than LoRA")),
    "accents_gated_lora": _Asked("hdmole", "gated_lora", "accent", Text("Better on accents than LoRA times accent mass")),
}


def claims(results: Results) -> list[Claim]:
    """The claims that the results can judge, each with its verdicts, the most important first."""
    found = {(d.method, d.against, d.domain): d for d in results.differences}
    made = []
    for name, asked in _CLAIMS.items():
        difference = found.get((asked.method, asked.against, asked.domain))
        if difference and (measured := _measured(asked, difference)):
            made.append(_judged(name, *measured, results))
    return made


def judge(folder: Path) -> list[Claim]:
    """The claims of a results folder, computed anew from its `utterances.parquet`.

    Raises:
        ResultsError: the folder has no results that can be read.
    """
    stored = load(folder)
    try:
        rows = pd.read_parquet(folder / UTTERANCES)
    except OSError:
        raise ResultsError(
            "results.no_utterances",
            "{folder} has no utterances.parquet to judge; name a folder that `hdmole compare` or `hdmole evaluate` wrote.",
            folder=folder,
        ) from None
    results = summarise(rows, stored.provenance)
    for method, entry in results.methods.items():
        entry.trainable = stored.methods[method].trainable if method in stored.methods else None
    return claims(results)


def _measured(asked: _Asked, difference: Difference) -> tuple[float, Interval] | None:
    """A difference and its interval in the unit of the claim; None if there is no relative one."""
    if asked.unit == "points":
        return difference.points, difference.interval
    relative = difference.relative
    return (relative.percent, relative.interval) if relative else None


def _judged(name: ClaimName, difference: float, interval: Interval, results: Results) -> Claim:
    asked = _CLAIMS[name]
    sure = None if results.few_speakers(asked.domain) else interval
    margin, share = _papers_difference(asked), None
    mine, theirs = (results.methods[method].trainable for method in (asked.method, asked.against))
    if name == "accents_full" and mine and theirs:
        share = round(100 * mine / theirs, 1)
    return Claim(
        name=name, difference=difference, interval=sure, unit=asked.unit, verdict=_verdict(sure, 0.0, asked.better),
        paper_difference=margin, paper_verdict=None if margin is None else _verdict(sure, margin, False), share=share,
    )  # fmt: skip


def _verdict(interval: Interval | None, margin: float, strict: bool) -> Verdict:
    """Whether a difference is at most `margin`, or below it if `strict`, by its interval."""
    if interval is None:
        return "not established"
    low, high = interval
    if strict:
        return "established" if high < margin else "refuted" if low >= margin else "not established"
    return "established" if high <= margin else "refuted" if low > margin else "not established"


def _papers_difference(asked: _Asked) -> float | None:
    """The paper's own difference, in the unit of the claim; None if the paper lacks a method."""
    rows = (paper.row(asked.method), paper.row(asked.against))
    mine, theirs = ((row.general if asked.domain == GENERAL else row.target) if row else None for row in rows)
    if mine is None or theirs is None:
        return None
    return round(mine - theirs, 2) if asked.unit == "points" else round(100 * (mine / theirs - 1), 1)


# -- as sentences ----------------------------------------------------------------------------------


def claim_text(claim: Claim) -> Text:
    """What a claim says."""
    if claim.share is None:
        return _CLAIMS[claim.name].text
    return Text("As good on accents as full fine-tuning with {share} % of its trainable parameters", share=f"{claim.share:.1f}")


def answer(claim: Claim) -> Verdict:
    """The verdict that answers a claim.

    That two methods are equally good needs a margin within which they count as equal, which is the
    paper's own difference. That one is better is judged against zero, as is all that the paper does
    not compare.
    """
    return claim.verdict if _CLAIMS[claim.name].better else claim.paper_verdict or claim.verdict


ANSWERS: dict[Verdict, Text] = {"established": Text("yes"), "refuted": Text("no"), "not established": Text("not known")}


def plain_line(claim: Claim) -> Text:
    """A claim with its answer in words and one number, in Markdown.

    For example "Better on accents than LoRA: **yes**. Measured: 9 % fewer errors."
    """
    size = f"{abs(claim.difference):.0f}" if claim.unit == "percent" else f"{abs(claim.difference):.1f}"
    if float(size) == 0:
        measured = Text("Measured: no difference.")
    elif claim.unit == "percent":
        measured = Text(
            "Measured: {size} % fewer errors." if claim.difference < 0 else "Measured: {size} % more errors.", size=size
        )
    else:
        measured = Text(
            "Measured: a word error rate {size} points lower." if claim.difference < 0
            else "Measured: a word error rate {size} points higher.", size=size,
        )  # fmt: skip
    return Text("{claim}: **{answer}**. {measured}", claim=claim_text(claim), answer=ANSWERS[answer(claim)], measured=measured)


def claim_line(claim: Claim) -> Text:
    """A claim with its verdicts and numbers, in Markdown."""
    digits, unit = (1, Text("%")) if claim.unit == "percent" else (2, Text("points"))
    measured = Text("{difference} {unit}", difference=f"{claim.difference:+z.{digits}f}", unit=unit)
    if claim.interval is None:
        measured = Text("{measured}, too few speakers", measured=measured)
    else:
        bounds = ", ".join(f"{bound:+z.{digits}f}" for bound in claim.interval)
        measured = Text("{measured} [{interval}]", measured=measured, interval=bounds)
    if claim.paper_difference is None or claim.paper_verdict is None:
        return Text(
            "{claim}: **{verdict}** against zero ({measured}); the paper does not compare them",
            claim=claim_text(claim), verdict=Text(claim.verdict), measured=measured,
        )  # fmt: skip
    return Text(
        "{claim}: **{verdict}** against zero, **{paper_verdict}** by the paper's margin of {margin} {unit} ({measured})",
        claim=claim_text(claim), verdict=Text(claim.verdict), paper_verdict=Text(claim.paper_verdict),
        margin=f"{claim.paper_difference:+z.{digits}f}", unit=unit, measured=measured,
    )  # fmt: skip


def verdict(difference: Difference, labels: Mapping[str, str]) -> Text:
    """A difference as a sentence.

    For example "HDMoLE against LoRA: no difference established, +0.2 points [-0.4, +0.9]".
    Points are percentage points of WER. The method is better if the whole interval lies below zero,
    and worse if it lies above. `labels` are the names of the methods.
    """
    low, high = difference.interval
    said = "better" if high < 0 else "worse" if low > 0 else "no difference established"
    method, against = labels.get(difference.method, difference.method), labels.get(difference.against, difference.against)
    return Text(
        "{method} against {against}: {said}, {points} points [{interval}]", method=method, against=against, said=Text(said),
        points=f"{difference.points:+z.1f}", interval=f"{low:+z.1f}, {high:+z.1f}",
    )  # fmt: skip
