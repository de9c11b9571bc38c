"""The in-domain score: is this audio of the kind that the model was made for?

There is one score per utterance. It needs no reference. Its features say whether the CTC head and
the LLM agree, whether both are sure, whether the accent recogniser knows the accent, and whether
the sound resembles speech. For a model without a CTC head they say how sure its decoder is of the
words and of English, and how much of the text is said twice. A logistic regression weighs them. Its
coefficients lie in `domain.json` beside the weights of the method whose transcripts it judges, with
their measured quality and the command that made them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from hdmole.files import write_json
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.words import character_disagreement
from hdmole.texts import Text

SCORE = "domain.json"  # file of a score, in the folder of the method that it judges
DIGIT_WORDS = {"zero", "oh", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "double", "triple"}
# feature -> what is said when it speaks against the audio
PHRASES = {
    "word_disagreement": "the language model wrote other words than the sounds suggest",
    "character_disagreement": "the language model wrote other letters than the sounds suggest",
    "alignment_gap": "the transcript fits the sounds badly",
    "token_log_prob": "the language model is unsure of its words",
    "worst_token_log_prob": "the language model is very unsure of at least one word",
    "ctc_entropy": "the encoder cannot tell which sounds these are",
    "ctc_peak": "the encoder is unsure of the sounds it names",
    "accent_entropy": "the accent is like none that is known",
    "tokens_per_second": "the amount of text does not fit the length of the audio",
    "speech_share": "too little or too much of the audio behaves like speech",
    "flatness": "the sound is noise-like or tone-like rather than speech-like",
    "empty": "no words were heard",
    "english": "the language does not sound like English",
    "compression": "the text repeats itself",
}
UNSPOKEN = Text("nobody speaks in it")


def flags(text: str, ctc_text: str | None, seconds: float) -> list[str]:
    """What looks wrong with a transcript, in plain words; empty if nothing does.

    An LLM that does not follow the sound repeats words, writes everything twice, or invents text.
    `ctc_text` is None if the model has no CTC head, which would say what the sounds hold.
    """
    words = text.split()
    found: list[str] = []
    for size in range(1, 7):
        same, most = 0, 0
        for i in range(size, len(words)):
            same = same + 1 if words[i] == words[i - size] else 0
            most = max(most, same)
        times = most // size + 1
        if times >= (5 if size == 1 else 3) and not set(words) <= DIGIT_WORDS:
            found.append(
                Text("it repeats itself: the same word {times} times in a row", times=times)
                if size == 1
                else Text("it repeats itself: the same {size} words {times} times in a row", size=size, times=times)
            )
            break
    half = len(words) // 2
    sounded = words if ctc_text is None else ctc_text.split()
    if not found and half >= 3 and words[:half] == words[half : 2 * half] and len(sounded) < 1.5 * half:
        found.append("it says everything twice, an echo that the sounds do not hold")
    if len(words) >= 4 and len(sounded) <= len(words) / 3:
        found.append("most of it is invented: the sounds hold far fewer words")
    elif len(words) > 8 and len(words) / max(0.1, seconds) > 6:
        found.append(Text("{count} words a second are more than anybody says", count=f"{len(words) / seconds:.0f}"))
    return found


def domain_features(
    samples: np.ndarray,
    ctc_log_probs: np.ndarray,
    ctc_text: str,
    text: str,
    token_log_probs: list[float],
    alignment_score: float | None,
    posterior: np.ndarray,
    blank: int = 0,
) -> dict[str, float]:
    """The features of the in-domain score, by name.

    Parameters
    ----------
    samples : (S,) 16 kHz
    ctc_log_probs : (T, vocabulary)
    ctc_text, text : transcripts of the CTC head and the LLM
    token_log_probs : log-probabilities of the LLM's tokens, in nats
    alignment_score : mean log-probability per frame of the LLM's tokens aligned to the CTC head;
        None if they do not fit
    posterior : (N + 1,) accent posterior
    blank : id of the CTC head's blank
    """
    probs = np.exp(ctc_log_probs)
    best = ctc_log_probs.max(-1)
    spoken = ctc_log_probs.argmax(-1) != blank
    greedy = float(best.mean())
    return {
        "word_disagreement": min(2.0, Levenshtein.distance(ctc_text.split(), text.split()) / max(1, len(text.split()))),
        "character_disagreement": character_disagreement(ctc_text, text),
        "alignment_gap": min(8.0, greedy - alignment_score) if alignment_score is not None else 8.0,
        "ctc_entropy": float(-(probs * ctc_log_probs).sum(-1).mean()),
        "ctc_peak": float(np.exp(best[spoken]).mean()) if spoken.any() else 0.0,
        "empty": float(not text or not ctc_text),
        **_common_features(samples, token_log_probs, posterior),
    }


def decoder_features(
    samples: np.ndarray, text: str, token_log_probs: list[float], posterior: np.ndarray, english: float
) -> dict[str, float]:
    """The features of the in-domain score of a model without a CTC head, by name.

    `english` is the probability that English is spoken; the rest is as in `domain_features`. The
    compression ratio of the text is that of Whisper's own `transcribe.py`.
    """
    written = text.encode()
    return {
        "english": max(-8.0, float(np.log(max(english, 1e-9)))),
        "compression": len(written) / max(1, len(zlib.compress(written))),
        **_common_features(samples, token_log_probs, posterior),
    }


def _common_features(samples: np.ndarray, token_log_probs: list[float], posterior: np.ndarray) -> dict[str, float]:
    """The features that need no CTC head."""
    spectrum = np.abs(np.fft.rfft(_frames(samples) * np.hanning(512))) ** 2 + 1e-10
    level = 10 * np.log10(spectrum.mean(-1))
    loud = level > level.max() - 30
    flat = np.exp(np.log(spectrum).mean(-1)) / spectrum.mean(-1)
    count = max(1, len(token_log_probs))
    return {
        "token_log_prob": max(-5.0, float(np.sum(token_log_probs)) / count),
        "worst_token_log_prob": max(-8.0, float(min(token_log_probs, default=0.0))),
        "accent_entropy": float(-(posterior * np.log(posterior + 1e-9)).sum()),
        "tokens_per_second": count / max(0.1, len(samples) / SAMPLE_RATE),
        "speech_share": float(loud.mean()),
        "flatness": float(np.log10(flat[loud].mean())),
    }


def _frames(samples: np.ndarray, size: int = 512, hop: int = 256) -> np.ndarray:
    padded = np.pad(samples, (0, max(0, size - len(samples))))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]


@dataclass
class DomainScorer:
    """A logistic regression over the features and their squares, saved as JSON."""

    names: list[str]
    mean: list[float]
    scale: list[float]
    weights: list[float]  # of the features, then of their squares
    intercept: float
    threshold: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, features: pd.DataFrame, kinds: np.ndarray, inside: Collection[str], reject: float = 0.95) -> DomainScorer:
        """Fit the regression.

        Every kind of sound has the same weight, however many utterances it has.

        Args:
            features: one row per utterance, one column per feature.
            kinds: (U,) kind of sound of each utterance.
            inside: the kinds that are in domain.
            reject: share of each kind outside that the threshold must reject.
        """
        # slow to import, and only training needs it
        from sklearn.linear_model import LogisticRegression

        mean, scale = features.mean(), features.std().replace(0, 1)
        scorer = cls(list(features.columns), list(mean), list(scale), [], 0.0, 0.5)
        within = np.isin(kinds, list(inside))
        counts = pd.Series(kinds).map(pd.Series(kinds).value_counts()).to_numpy(float)
        weight = 1 / counts
        for side in (within, ~within):
            weight[side] *= len(kinds) / 2 / weight[side].sum()
        model = LogisticRegression(C=0.03, max_iter=2000)
        model.fit(scorer._design(features.to_numpy(float)), within, sample_weight=weight)
        scorer.weights, scorer.intercept = model.coef_[0].tolist(), float(model.intercept_[0])
        scores = scorer.scores(features)
        scorer.threshold = max(float(np.quantile(scores[kinds == kind], reject)) for kind in set(kinds[~within]))
        return scorer

    def _design(self, values: np.ndarray) -> np.ndarray:
        z = np.clip((values - np.array(self.mean)) / np.array(self.scale), -4, 4)
        return np.concatenate([z, z**2], -1)

    def scores(self, features: pd.DataFrame) -> np.ndarray:
        """Probability (rows,) that each row is in domain."""
        design = self._design(features[self.names].to_numpy(float))
        return np.asarray(1 / (1 + np.exp(-(design @ np.array(self.weights) + self.intercept))))

    def score(self, features: dict[str, float]) -> dict[str, Any]:
        """Score from 0 to 1, verdict (true: in domain) and, if false, up to two reasons."""
        table = pd.DataFrame([features])
        score = float(self.scores(table)[0])
        inside = score >= self.threshold
        reasons: list[str] = []
        if not inside:
            parts = (self._design(table[self.names].to_numpy(float))[0] * np.array(self.weights)).reshape(2, -1).sum(0)
            order = np.argsort(parts)
            reasons = [PHRASES.get(self.names[i], self.names[i]) for i in order[:2] if parts[i] < 0]
        return {"score": round(score, 4), "verdict": bool(inside), "reasons": reasons}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> DomainScorer:
        """Read what `save` wrote.

        Raises ValueError if a number in it is NaN or infinite, or one is missing.
        """
        scorer = cls(**json.loads(path.read_text(encoding="utf-8")))
        numbers = [*scorer.mean, *scorer.scale, *scorer.weights, scorer.intercept, scorer.threshold]
        if not np.isfinite(numbers).all() or 4 * len(scorer.names) != len(numbers) - 2:
            raise ValueError(f"{path.name} does not hold the numbers of a score")
        return scorer


def verdict_of_all(found: list[dict[str, Any]], spans: list[tuple[float, float]]) -> dict[str, Any]:
    """One verdict on a recording from the verdicts on its segments.

    The score is the mean of the segments' scores, weighted by their length. The verdict is that of
    most seconds. `outside` lists the spans of the segments that are out of domain.

    Args:
        found: what `DomainScorer.score` returned for each segment.
        spans: start and end of each segment in seconds.
    """
    seconds = np.array([end - start for start, end in spans])
    beyond = np.array([not result["verdict"] for result in found])
    inside = bool(seconds[beyond].sum() < seconds.sum() / 2)
    reasons = [reason for result in found for reason in result["reasons"]]
    return {
        "score": round(float(np.average([result["score"] for result in found], weights=seconds)), 4),
        "verdict": inside,
        "reasons": [] if inside else sorted(set(reasons), key=lambda r: -reasons.count(r))[:2],
        "outside": [[round(max(0.0, start), 2), round(end, 2)] for (start, end), out in zip(spans, beyond, strict=True) if out],
    }
