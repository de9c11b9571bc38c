"""The in-domain score of the model for real speakers: is this English speech that it can hear?

Inside is speech of real and synthetic speakers, outside are silence, noise, music and speech in
other languages. The sounds are those of the demo model, the recordings those of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from hdmole.demo.corpus import plan_outside, render
from hdmole.demo.real_corpus import Sizes, plan, read_people
from hdmole.demo.synth import Synthesiser
from hdmole.speech.asr import ASR
from hdmole.speech.domain import DomainScorer
from hdmole.study.results import InDomain, provenance

OUTSIDE = "outside_"  # domains of sounds that are not English speech begin with it


def in_domain(out: Path, folders: Sequence[Path], seed: int, report: Callable[[str], None], most: int = 40) -> InDomain:
    """Fit the in-domain score on dev speech and sounds, and save it as the model's `domain.json`.

    A sound in which nobody speaks, or no word is heard, is outside without a score, and
    counts as 0.

    Args:
        out: the released folder.
        folders: as in `hdmole.demo.real.build`.
        seed: random seed of the recipe.
        report: called with each line about the progress.
        most: utterances of each domain and split that are used at most.

    Returns:
        Figures of the score on test speech and sounds.
    """
    (out / "domain.json").unlink(missing_ok=True)
    asr = ASR.load(out)
    planned = plan(read_people(folders), Sizes(), seed)
    planned += [{**job, "seed": [seed + 3, number]} for number, job in enumerate(plan_outside(most, seed))]
    tables = {}
    with Synthesiser() as synthesiser:
        for split in ("dev", "test"):
            jobs = pd.DataFrame([{"domain": job["domain"], "job": job} for job in planned if job["split"] == split])
            rows = [
                {"domain": domain, **_features(asr, render(job, synthesiser))}
                for domain, group in jobs.groupby("domain")
                for job in group.job.sample(min(most, len(group)), random_state=seed)
            ]
            tables[split] = pd.DataFrame(rows)
            report(f"in-domain score: {split} features of {len(rows)} utterances")
    dev, test = tables["dev"].dropna(), tables["test"]
    names = [column for column in dev.columns if column != "domain"]
    inside = [domain for domain in set(dev.domain) if not domain.startswith(OUTSIDE)]
    scorer = DomainScorer.fit(dev[names], dev.domain.to_numpy(), inside)
    heard = test[names].notna().all(axis=1).to_numpy()
    scores = np.zeros(len(test))
    scores[heard] = scorer.scores(test[heard])
    within = test.domain.isin(inside).to_numpy()
    domains = sorted(set(test.domain))
    result = InDomain(
        auroc=round(float(roc_auc_score(within, scores)), 4),
        auroc_by_domain={
            d: round(float(roc_auc_score(within[keep], scores[keep])), 4)
            for d in domains if d.startswith(OUTSIDE) for keep in [within | (test.domain == d).to_numpy()]
        },
        accepted={d: round(float((scores[test.domain == d] >= scorer.threshold).mean()), 3) for d in domains},
        utterances={d: int((test.domain == d).sum()) for d in domains},
    )  # fmt: skip
    scorer.provenance = {**provenance(seed, str(asr.device)).to_dict(), **result.to_dict()}
    scorer.save(out / "domain.json")
    report(f"in-domain score: AUROC {result.auroc:.3f} on test, {result.auroc_by_domain}; accepted {result.accepted}")
    return result


def _features(asr: ASR, sound: np.ndarray) -> dict[str, float]:
    """The features of a sound's first segment; none if nobody speaks in it or no word is heard."""
    segment = asr.segment(sound)[0]
    heard = asr.decode_batch([segment], "base")[0]
    return asr.domain_features(segment, heard) if heard.text else {}
