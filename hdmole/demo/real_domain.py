"""The in-domain score of the model for real speakers: is this English speech that it can hear?

Inside is speech of real and synthetic speakers, outside are silence, noise, music and speech in
other languages. The sounds are those of the demo model, the recordings those of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from hdmole.demo.corpus import plan_outside, render
from hdmole.demo.real_corpus import Sizes, plan, read_people
from hdmole.demo.synth import Synthesiser
from hdmole.speech.asr import ASR
from hdmole.speech.decoding import Encoded
from hdmole.speech.domain import SCORE, DomainScorer
from hdmole.speech.transcript import together
from hdmole.study.results import InDomain, provenance

OUTSIDE = "outside_"  # domains of sounds that are not English speech begin with it


def in_domain(out: Path, folders: Sequence[Path], seed: int, report: Callable[[str], None], most: int = 40) -> InDomain:
    """Fit an in-domain score for each method on dev speech and sounds, and save it as `domain.json`
    in the folder of the method.

    A sound in which nobody speaks, or no word is heard, is outside without a score, and
    counts as 0.

    Args:
        out: the released folder.
        folders: as in `hdmole.demo.real.build`.
        seed: random seed of the recipe.
        report: called with each line about the progress.
        most: utterances of each domain and split that are used at most.

    Returns:
        Figures of the default method's score on test speech and sounds.
    """
    asr = ASR.load(out)
    planned = plan(read_people(folders), Sizes(), seed)
    planned += [{**job, "seed": [seed + 3, number]} for number, job in enumerate(plan_outside(most, seed))]
    sounds = {}
    with Synthesiser() as synthesiser:
        for split in ("dev", "test"):
            jobs = pd.DataFrame([{"domain": job["domain"], "job": job} for job in planned if job["split"] == split])
            sounds[split] = [
                (domain, asr.segment(render(job, synthesiser))[0])
                for domain, group in jobs.groupby("domain")
                for job in group.job.sample(min(most, len(group)), random_state=seed)
            ]
            report(f"in-domain score: {len(sounds[split])} {split} sounds")
    results = {}
    for method in asr.methods:
        tables = {split: _features(asr, method, *zip(*found, strict=True)) for split, found in sounds.items()}
        scorer, results[method] = _fitted(tables["dev"], tables["test"], method)
        scorer.provenance = {**provenance(seed, str(asr.device)).to_dict(), **results[method].to_dict()}
        scorer.save((out if method == "base" else out / "adapters" / method) / SCORE)
        told = results[method]
        report(f"in-domain score of {method}: AUROC {told.auroc:.3f} on test, {told.auroc_by_domain}; accepted {told.accepted}")
    return results[asr.default]


def _fitted(dev: pd.DataFrame, test: pd.DataFrame, method: str) -> tuple[DomainScorer, InDomain]:
    """A score fitted on the features of dev sounds, and how good it is on those of test sounds."""
    dev = dev.dropna()
    names = [column for column in dev.columns if column != "domain"]
    inside = [domain for domain in set(dev.domain) if not domain.startswith(OUTSIDE)]
    scorer = DomainScorer.fit(dev[names], dev.domain.to_numpy(), inside)
    heard = test[names].notna().all(axis=1).to_numpy()
    scores = np.zeros(len(test))
    scores[heard] = scorer.scores(test[heard])
    within = test.domain.isin(inside).to_numpy()
    domains = sorted(set(test.domain))
    return scorer, InDomain(
        method=method,
        auroc=round(float(roc_auc_score(within, scores)), 4),
        auroc_by_domain={
            d: round(float(roc_auc_score(within[keep], scores[keep])), 4)
            for d in domains if d.startswith(OUTSIDE) for keep in [within | (test.domain == d).to_numpy()]
        },
        accepted={d: round(float((scores[test.domain == d] >= scorer.threshold).mean()), 3) for d in domains},
        utterances={d: int((test.domain == d).sum()) for d in domains},
    )  # fmt: skip


def _features(asr: ASR, method: str, domains: Sequence[str], segments: Sequence[Encoded]) -> pd.DataFrame:
    """The features of what a method hears in each sound; NaN if nobody speaks or no word is heard."""
    rows: list[dict[str, Any]] = [{"domain": domain} for domain in domains]
    spoken = [k for k, segment in enumerate(segments) if segment.spoken]
    for part in together([segments[k] for k in spoken]):
        numbers = [spoken[k] for k in part]
        found = asr.decode_batch([segments[k] for k in numbers], method)
        for k, heard in zip(numbers, found, strict=True):
            rows[k] |= asr.domain_features(segments[k], heard) if heard.text else {}
    return pd.DataFrame(rows)
