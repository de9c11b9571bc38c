"""Word error rates with bootstrap intervals over speakers, and differences of methods.

The bootstrap is that of Bisani and Ney (2004), "Bootstrap estimates for confidence intervals in ASR
performance evaluation", with speakers in place of utterances. Draws depend only on the number of
speakers and the seed. Two methods that were judged on the same speakers are therefore resampled
alike, and the interval of their difference is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import permutations
from statistics import fmean

import numpy as np
import pandas as pd

from hdmole.speech.words import rate_name
from hdmole.study.results import FEW_SPEAKERS, Difference, DomainRate, Interval, MethodResult, Provenance, Rate, Relative, Results

RESAMPLES = 1000  # of speakers, for word error rates
ROUTING_RESAMPLES = 200  # of speakers, for correspondence and attribution


def bootstrap(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """Word error rates (RESAMPLES,) in %, each over all words of one draw of speakers.

    `rows` has the columns `speaker`, `errors` and `words`.
    """
    sums = rows.groupby("speaker")[["errors", "words"]].sum().sort_index().to_numpy(float)
    totals = _drawn(len(sums), seed) @ sums
    return np.asarray(100 * totals[:, 0] / np.maximum(totals[:, 1], 1))


def bootstrap_mean(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """Means over accents (RESAMPLES,) of word error rates in %, each of one draw of speakers.

    `rows` has the columns `speaker`, `accent`, `errors` and `words`. If a draw has no speaker of an
    accent, that accent is left out of the draw's mean.
    """
    table = rows.pivot_table(index="speaker", columns="accent", values=["errors", "words"], aggfunc="sum", fill_value=0)
    drawn = _drawn(len(table), seed)
    errors, words = drawn @ table["errors"].to_numpy(float), drawn @ table["words"].to_numpy(float)
    return np.asarray(100 * np.ma.masked_array(errors / np.maximum(words, 1), words == 0).mean(1).filled(0.0))


def _drawn(speakers: int, seed: int) -> np.ndarray:
    """How often each speaker is drawn, (RESAMPLES, speakers)."""
    draws = np.random.default_rng(seed).integers(0, speakers, (RESAMPLES, speakers))
    numbered = draws + speakers * np.arange(RESAMPLES)[:, None]  # other numbers in each draw, so that one count does for all
    return np.bincount(numbered.ravel(), minlength=speakers * RESAMPLES).reshape(RESAMPLES, speakers)


def _interval(drawn: np.ndarray) -> Interval:
    """The middle 95 % of resampled values, to two decimals."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def _wer(rows: pd.DataFrame) -> float:
    """Word error rate in % of all words together."""
    return float(100 * rows.errors.sum() / max(1, rows.words.sum()))


def rate(rows: pd.DataFrame) -> Rate:
    """The word error rate over all words of some rows with the columns `COLUMNS`."""
    return Rate(
        wer=round(_wer(rows), 2), interval=_interval(bootstrap(rows)), errors=int(rows.errors.sum()), words=int(rows.words.sum()),
        utterances=len(rows), speakers=int(rows.speaker.nunique()),
    )  # fmt: skip


def domain_rate(rows: pd.DataFrame) -> DomainRate:
    """The word error rate of a domain's rows, of each accent, and their mean."""
    accents = {str(accent): rate(of_accent) for accent, of_accent in rows.groupby("accent", sort=False)}
    mean = round(float(np.mean([found.wer for found in accents.values()])), 2)
    return DomainRate(
        **rate(rows).to_dict(), accents=accents, mean_over_accents=mean, mean_interval=_interval(bootstrap_mean(rows))
    )


def summarise(rows: pd.DataFrame, provenance: Provenance) -> Results:
    """Word error rates of every method by domain and accent, and the differences of all methods.

    `rows` has the columns `COLUMNS`, and one row per utterance, method and training seed. Domains
    may have any names.
    """
    methods = {
        str(method): MethodResult(domains={str(domain): domain_rate(of) for domain, of in found.groupby("domain", sort=False)})
        for method, found in rows.groupby("method", sort=False)
    }
    results = Results(methods=methods, differences=differences(rows), provenance=provenance)
    if (name := rate_name(rows.reference.drop_duplicates())) != "WER":
        results.rate_name = name
    return results


def differences(rows: pd.DataFrame) -> list[Difference]:
    """Every method minus every other in each domain, in percentage points of WER.

    In the domain "accent" the means over accents are compared, in all others the rates over all
    words. Two methods are compared over the training seeds that both have, and the frozen base,
    which is not trained, over all seeds of the other. A difference below zero means that `method`
    makes fewer errors than `against`. The 95 % intervals are paired. If one includes zero, no
    difference is established. `relative` has the same in percent of the rate of `against`.
    """
    return [difference for domain, of in rows.groupby("domain", sort=False) for difference in _differences_in(str(domain), of)]


def _differences_in(domain: str, rows: pd.DataFrame) -> Iterator[Difference]:
    seeds = {str(method): frozenset(of.seed) for method, of in rows.groupby("method", sort=False)}

    @cache
    def resampled(method: str, over: frozenset[int]) -> tuple[float, np.ndarray]:
        """A method's rate over some seeds, and its resampled values."""
        of = rows[(rows.method == method) & rows.seed.isin(over)]
        return (_mean_over_accents(of), bootstrap_mean(of)) if domain == "accent" else (_wer(of), bootstrap(of))

    for method, against in permutations(seeds, 2):
        over = _seeds_compared(seeds, method, against)
        mine, theirs = resampled(method, over[0]), resampled(against, over[1])
        yield Difference(
            domain=domain, method=method, against=against, points=round(mine[0] - theirs[0], 2),
            interval=_interval(mine[1] - theirs[1]), relative=_relative(mine, theirs),
        )  # fmt: skip


def _seeds_compared(seeds: Mapping[str, frozenset[int]], method: str, against: str) -> tuple[frozenset[int], frozenset[int]]:
    """The seeds of two methods over which they are compared, as `differences` says."""
    common = seeds[method] & seeds[against]
    return (common, common) if common and "base" not in (method, against) else (seeds[method], seeds[against])


def _relative(mine: tuple[float, np.ndarray], theirs: tuple[float, np.ndarray]) -> Relative | None:
    """A rate and its resampled values, relative to another; None where the other may be zero."""
    if theirs[0] == 0 or (theirs[1] == 0).any():
        return None
    return Relative(percent=round(100 * (mine[0] / theirs[0] - 1), 2), interval=_interval(100 * (mine[1] / theirs[1] - 1)))


def _mean_over_accents(rows: pd.DataFrame) -> float:
    return fmean(_wer(of_accent) for _, of_accent in rows.groupby("accent"))


def accent_differences(rows: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """`method` minus `against` for each accent, paired over speakers as in `differences`.

    Args:
        rows: a table with the columns `COLUMNS`.
        method: the first method.
        against: the other method.

    Returns:
        One row per domain and accent that both methods have. `points` are percentage points of WER,
        below zero if `method` makes fewer errors. `low` and `high` bound their 95 % interval; they
        are NaN for an accent with fewer than `FEW_SPEAKERS` speakers. The other columns are
        `domain`, `accent` and `speakers`.
    """
    found = []
    for (domain, accent), of in rows[rows.method.isin([method, against])].groupby(["domain", "accent"], sort=False):
        seeds = {str(name): frozenset(rows_of.seed) for name, rows_of in of.groupby("method")}
        if len(seeds) < 2:
            continue
        mine, theirs = (
            of[(of.method == name) & of.seed.isin(over)]
            for name, over in zip((method, against), _seeds_compared(seeds, method, against), strict=True)
        )
        speakers = of.speaker.nunique()
        low, high = np.nan, np.nan
        if speakers >= FEW_SPEAKERS:
            low, high = np.percentile(bootstrap(mine) - bootstrap(theirs), [2.5, 97.5])
        found.append((domain, accent, _wer(mine) - _wer(theirs), low, high, speakers))
    return pd.DataFrame(found, columns=["domain", "accent", "points", "low", "high", "speakers"])
