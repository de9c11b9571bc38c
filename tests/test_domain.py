"""The in-domain score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from tiny import _features

from hdmole.domain import PHRASES, DomainScorer, domain_features


def _table(seed: int, count: int = 30) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside = np.repeat([True, False], count)
    return pd.DataFrame([_features(rng, bool(i)) for i in inside]), inside


def test_every_feature_has_a_phrase_and_extremes_are_finite() -> None:
    uniform = np.full((5, 8), -np.log(8.0))
    nothing = domain_features(np.zeros(1600, np.float32), uniform, "", "", [], None, np.ones(3) / 3)
    assert set(nothing) == set(PHRASES)
    assert all(np.isfinite(v) for v in nothing.values())
    assert nothing["empty"] == 1


def test_it_separates_and_explains_and_survives_saving(tmp_path: Path) -> None:
    scorer = DomainScorer.fit(*_table(0))
    test, inside = _table(1)
    scores = scorer.scores(test)
    assert scores[inside].min() > scores[~inside].max()
    assert (scorer.scores(_table(0)[0])[inside] >= scorer.threshold).mean() >= 0.9
    scorer.save(tmp_path / "domain.json")
    loaded = DomainScorer.load(tmp_path / "domain.json")
    np.testing.assert_allclose(loaded.scores(test), scores)
    said = loaded.score(dict(test[~inside].iloc[0]))
    assert said["verdict"] is False and said["reasons"] and set(said["reasons"]) <= set(PHRASES.values())
    assert loaded.score(dict(test[inside].iloc[0])) == {"score": round(float(scores[0]), 4), "verdict": True, "reasons": []}
