"""The in-domain score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import _features

from hdmole.speech.domain import PHRASES, DomainScorer, decoder_features, domain_features, flags


def _table(seed: int, count: int = 30) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside = np.repeat([True, False], count)
    return pd.DataFrame([_features(rng, bool(i)) for i in inside]), inside


def test_every_feature_has_a_phrase_and_extremes_are_finite() -> None:
    uniform = np.full((5, 8), -np.log(8.0))
    nothing = domain_features(np.zeros(1600, np.float32), uniform, "", "", [], None, np.ones(3) / 3)
    silent = decoder_features(np.zeros(1600, np.float32), "", [], np.ones(3) / 3, 0.0)
    assert set(nothing) | set(silent) == set(PHRASES)
    assert all(np.isfinite(v) for v in (*nothing.values(), *silent.values()))
    assert nothing["empty"] == 1


def test_the_features_of_a_decoder_by_hand() -> None:
    found = decoder_features(np.ones(16_000, np.float32), "no " * 40, [-0.5, -1.5], np.array([1.0, 0.0]), np.exp(-2))
    assert found["token_log_prob"] == -1 and found["worst_token_log_prob"] == -1.5 and found["tokens_per_second"] == 2
    assert found["english"] == pytest.approx(-2) and found["accent_entropy"] == pytest.approx(0, abs=1e-6)
    assert (
        found["compression"] > 5 > 1 > decoder_features(np.ones(800, np.float32), "yes", [-1.0], np.ones(1), 1.0)["compression"]
    )


def test_it_separates_and_explains_and_survives_saving(tmp_path: Path) -> None:
    features, within = _table(0)
    scorer = DomainScorer.fit(features, np.where(within, "speech", "noise"), ["speech"])
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


def test_every_kind_counts_alike_and_each_outside_is_rejected() -> None:
    """A handful of rare speech beside hundreds of other utterances is let in; the rarer noise is kept out, too."""
    rng, counts = np.random.default_rng(0), {"speech": 400, "rare": 8, "noise": 400, "hiss": 20}
    middle = {"speech": (0, 0), "rare": (2, 3), "noise": (4, 0), "hiss": (0, -4)}
    kinds = np.repeat(list(counts), list(counts.values()))
    features = pd.DataFrame(rng.normal([middle[k] for k in kinds], 0.6), columns=["token_log_prob", "flatness"])
    scorer = DomainScorer.fit(features, kinds, ["speech", "rare"])
    passed = pd.Series(scorer.scores(features) >= scorer.threshold).groupby(kinds).mean()
    assert passed.speech > 0.9 and passed.rare > 0.8 and passed.noise <= 0.05 and passed.hiss <= 0.05


@pytest.mark.parametrize(
    ("text", "ctc", "sign"),
    [
        ("call anna at six", "call anna at six", ""),
        ("play play play play play play", "play", "the same word 6 times"),
        ("turn on the lights turn on the lights turn on the lights", "turn on the lights", "the same 4 words 3 times"),
        ("seven seven seven seven seven seven", "seven seven seven seven seven seven", ""),  # people do say that
        ("what is the weather what is the weather", "what is the weather", "says everything twice"),
        ("what is the weather what is the weather", "what is the weather what is the weather", ""),
        ("please turn the lights on now", "lights", "most of it is invented"),
        ("a b c d e f g h i j k l m n o p", "a b c d e f g h i j k l m n o p", "words a second"),
        ("", "", ""),
    ],
)
def test_loops_echoes_and_inventions_are_flagged(text: str, ctc: str, sign: str) -> None:
    found = flags(text, ctc, 2.0)
    assert (sign in "; ".join(found)) if sign else not found
