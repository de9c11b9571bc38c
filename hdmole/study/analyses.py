"""Analyses of an adapted model's routing.

They look at how experts and accents correspond, at thresholds, and at attribution. Each analysis
takes a `Subject` and returns the values for the results file. `ANALYSES` holds them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from hdmole.files import written
from hdmole.method.intervention import intervene
from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.routing import adapter_of
from hdmole.names import GENERAL
from hdmole.speech.decoding import token_log_probs
from hdmole.speech.words import count_errors
from hdmole.study.bootstrap import ROUTING_RESAMPLES
from hdmole.study.results import RecogniserResult
from hdmole.study.routing_table import routing_summary, routing_table, routing_trace
from hdmole.training.adapt import Adaptation, Around, Speech, encoder_states
from hdmole.training.data import Corpus
from hdmole.training.preparation import SpeechError

PER_ACCENT = 60  # number of utterances per accent in an analysis
SCALES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
TOP_K = (1, 2, 3, 4, 6, 8)
TOP_P = (0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Subject:
    """An adapted model that is analysed, and the speech it is analysed on.

    Args:
        model: PEFT model with an active HDMoLE adapter.
        speech: the test speech, with accent posteriors.
        extra: further test sets, by domain.
        hear: transcribes rows of a test set and counts errors. The table has one row per utterance
            and the columns domain, accent, errors and words. The third argument gives the context
            manager in which each batch is decoded.
        log_likelihood: gives the log-probability (rows,) of the references of rows of `speech`, in
            nats.
        folder: where tables that are too large for the results file are written.
    """

    model: nn.Module
    speech: Speech
    extra: Mapping[str, Speech]
    hear: Callable[[Speech, list[int], Around], pd.DataFrame]
    log_likelihood: Callable[[list[int]], np.ndarray]
    folder: Path


def mean_rates(table: pd.DataFrame) -> dict[str, float]:
    """Mean over accents of the word error rate in %, for each domain.

    Args:
        table: one row per utterance, with the columns domain, accent, errors and words.
    """
    sums = table.groupby(["domain", "accent"])[["errors", "words"]].sum()
    rates = (100 * sums.errors / sums.words).groupby("domain").mean()
    return {str(domain): round(float(rate), 3) for domain, rate in rates.items()}


def chosen(speech: Speech, domains: tuple[str, ...] = ("accent", GENERAL)) -> list[int]:
    """Rows of the first `PER_ACCENT` test utterances of each accent."""
    index = speech.corpus.index
    test = index[(index.split == "test") & index.domain.isin(domains)]
    return sorted(test.groupby("accent").head(PER_ACCENT).index.tolist())


def recogniser_results(corpus: Corpus, labels: list[str], posteriors: np.ndarray) -> RecogniserResult:
    """Balanced accuracy and confusion matrix of the accent recogniser.

    Test speech in the accents that the recogniser knows is used.

    Args:
        corpus: the speech.
        labels: the N + 1 classes of the recogniser.
        posteriors: accent posterior of each utterance, (utterances, N + 1).
    """
    rows = [i for i in corpus.select("test", GENERAL, "accent") if corpus.index.accent[i] in labels]
    matrix = np.zeros((len(labels), len(labels)), int)
    np.add.at(matrix, ([labels.index(corpus.index.accent[i]) for i in rows], posteriors[rows].argmax(1)), 1)
    spoken = matrix.sum(1) > 0
    return RecogniserResult(
        balanced_accuracy=round(float((matrix.diagonal()[spoken] / matrix.sum(1)[spoken]).mean()), 4),
        mean_confidence=round(float(posteriors[rows].max(1).mean()), 4),
        labels=labels,
        confusion=matrix.tolist(),
    )


def routing(subject: Subject) -> dict[str, Any]:
    """The `routing_summary` of the test speech.

    The routing of each utterance is written to routing.parquet in the subject's folder.
    """
    tables = []
    for speech, domains in (
        (subject.speech, ("accent", GENERAL, "unseen")),
        *((other, ("unseen",)) for other in subject.extra.values()),
    ):
        about = speech.corpus.index[["utterance", "domain", "accent", "speaker"]].rename(columns={"accent": "spoken"})

        @contextmanager
        def around(rows: list[int], lengths: list[int], about: pd.DataFrame = about) -> Iterator[None]:
            with routing_trace(subject.model, lengths) as traced:
                yield
            tables.append(routing_table(traced, about.iloc[rows]))

        subject.hear(speech, chosen(speech, domains), around)
    table = pd.concat(tables, ignore_index=True)
    with written(subject.folder / "routing.parquet") as part:
        table.round(4).to_parquet(part, index=False, compression="zstd")
    return routing_summary(table).to_dict()


def frontier(subject: Subject) -> list[dict[str, Any]]:
    """Word error rate and mean number of active experts for other choices of experts.

    Thresholds are multiplied by each of `SCALES`, or replaced by top-k or top-p. In the paper's
    gate a threshold is also the sum of its branch's weights, so that 0 is left out there.

    Returns:
        One dict per setting: `choice` and `value` name the setting, `active` is the mean number of
        active experts, and each domain has its mean word error rate in %.
    """
    config = adapter_of(subject.model)[1]
    learned = {} if config.learned else {"thresholds": "relu"}
    scales = [s for s in SCALES if s or config.thresholds != "dynamic"]
    settings: list[tuple[str, float, dict[str, Any]]] = [("thresholds", s, learned | {"scale_thresholds": s}) for s in scales]
    experts = len(_recogniser(subject.speech).labels) - 1
    settings += [("top_k", k, {"thresholds": "top_k", "top_k": k}) for k in TOP_K if k <= experts]
    settings += [("top_p", p, {"thresholds": "top_p", "top_p": p}) for p in TOP_P]
    rows, points = chosen(subject.speech), []
    for choice, value, options in settings:
        active: list[np.ndarray] = []

        @contextmanager
        def around(
            _rows: list[int], lengths: list[int], options: dict[str, Any] = options, active: list[np.ndarray] = active
        ) -> Iterator[None]:
            with intervene(subject.model, **options), routing_trace(subject.model, lengths) as traced:
                yield
            active += [r.arrays["n_active"] for r in traced.records]

        rates = mean_rates(subject.hear(subject.speech, rows, around))
        points.append({"choice": choice, "value": value, "active": round(float(np.concatenate(active).mean()), 3), **rates})
    return points


def attribution(subject: Subject) -> dict[str, Any]:
    """Attribution: the change in log-likelihood of the reference when one expert is left out.

    Returns:
        A dict with `values` (accents, experts) in nats per word. A value below zero means that the
        expert helps. `intervals` are 95 % intervals from a bootstrap over speakers.
    """
    speech, labels = subject.speech, _recogniser(subject.speech).labels
    experts, index = labels[1:], speech.corpus.index
    rows = sorted(chosen(speech), key=lambda i: int(speech.states.spans[0, i, 1]))
    found = []
    for k in range(0, len(rows), 32):
        part = rows[k : k + 32]
        whole = subject.log_likelihood(part)
        words = [count_errors(text, "")[1] for text in index.text.iloc[part]]
        for expert in experts:
            with intervene(subject.model, mask=[expert]):
                without = subject.log_likelihood(part)
            found.append(
                pd.DataFrame(
                    {"expert": expert, "accent": index.accent.to_numpy()[part], "speaker": index.speaker.to_numpy()[part],
                     "change": without - whole, "words": words}
                )
            )  # fmt: skip
    table = pd.concat(found)
    accents = [a for a in labels if a in set(table.accent)]
    values, intervals = [], []
    for accent in accents:
        cells = [_per_word(table[(table.accent == accent) & (table.expert == e)]) for e in experts]
        values.append([c[0] for c in cells])
        intervals.append([c[1] for c in cells])
    return {"accents": accents, "experts": experts, "values": values, "intervals": intervals, "utterances": len(rows)}


def _per_word(cell: pd.DataFrame) -> tuple[float, list[float]]:
    sums = cell.groupby("speaker")[["change", "words"]].sum().to_numpy()
    draws = np.random.default_rng(0).integers(0, len(sums), (ROUTING_RESAMPLES, len(sums)))
    drawn = sums[draws].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4), [round(float(low), 4), round(float(high), 4)]


@torch.no_grad()
def log_likelihood(speech: Speech, model: nn.Module, adaptation: Adaptation, rows: list[int]) -> np.ndarray:
    """Log-probability (U,) in nats of each reference, including the end-of-sequence token."""
    device = next(model.parameters()).device
    states = encoder_states(speech, model, adaptation, rows)
    texts = speech.tokenizer(list(speech.corpus.index.text.iloc[rows]), add_special_tokens=False)["input_ids"]
    ids = [[*text, speech.tokenizer.eos_token_id] for text in texts]
    picked = token_log_probs(model, states, ids, speech.posterior(rows, adaptation).to(device))
    likelihood: np.ndarray = picked.sum(1).double().cpu().numpy()
    return likelihood


def _recogniser(speech: Speech) -> AccentRecogniser:
    if speech.recogniser is None:
        raise SpeechError("speech.no_recogniser", "An analysis of routing needs speech with an accent recogniser.")
    return speech.recogniser


ANALYSES: dict[str, Callable[[Subject], Any]] = {"routing": routing, "frontier": frontier, "attribution": attribution}
