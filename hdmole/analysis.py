"""What the routing of an adapted model is worth: correspondence of experts and accents, threshold frontier, attribution.

Each analysis is a function (runner, model, method) -> what goes into the results file. `runner` is a `compare.Runner`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import xlogy

from hdmole.adapt import Method, Speech, encoder_states, pad
from hdmole.asr import GENERAL
from hdmole.data import Corpus
from hdmole.intervention import intervene
from hdmole.results import count_errors
from hdmole.routing import layers_of, route
from hdmole.tracing import Trace, trace

PER_ACCENT = 60  # utterances an analysis looks at
ROUTERS = {"combined": "gate", "global": "global_gate", "local": "local_probability"}
SCALES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
TOP_K = (1, 2, 3, 4, 6, 8)
TOP_P = (0.3, 0.5, 0.7, 0.9)
RESAMPLES = 200
DEALS = 50


def chosen(speech: Speech, domains: tuple[str, ...] = ("accent", GENERAL)) -> list[int]:
    """The first utterances of each accent's test speech."""
    index = speech.corpus.index
    test = index[(index.split == "test") & index.domain.isin(domains)]
    return sorted(test.groupby("accent").head(PER_ACCENT).index.tolist())


def recogniser_results(corpus: Corpus, labels: list[str], posteriors: np.ndarray) -> dict[str, Any]:
    """Balanced accuracy and confusion matrix of the accent recogniser on test speech of the accents it knows."""
    rows = [i for i in corpus.select("test", GENERAL, "accent") if corpus.index.accent[i] in labels]
    matrix = np.zeros((len(labels), len(labels)), int)
    np.add.at(matrix, ([labels.index(corpus.index.accent[i]) for i in rows], posteriors[rows].argmax(1)), 1)
    spoken = matrix.sum(1) > 0
    return {
        "balanced_accuracy": round(float((matrix.diagonal()[spoken] / matrix.sum(1)[spoken]).mean()), 4),
        "mean_confidence": round(float(posteriors[rows].max(1).mean()), 4),
        "labels": labels,
        "confusion": matrix.tolist(),
    }


def correspondence(assigned: np.ndarray, accents: np.ndarray, speakers: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Purity and normalised mutual information of experts (U,) and accents (U,), with 95 % intervals over speakers (U,).

    Purity: the share of utterances whose expert serves mostly their accent. Both are above zero even by chance, and more so
    the fewer utterances there are: `chance` is their mean where the accents are dealt out anew, and as drawing speakers
    adds to that bias, the interval is moved to where the mean of the draws is the value.
    """
    rows, columns, of = (np.unique(values, return_inverse=True)[1] for values in (accents, assigned, speakers))
    counts = np.zeros((of.max() + 1, rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (of, rows, columns), 1)
    rng = np.random.default_rng(seed)
    tables = np.stack([counts[rng.integers(0, len(counts), len(counts))].sum(0) for _ in range(RESAMPLES)])
    dealt = np.zeros((DEALS, *counts.shape[1:]))
    for table in dealt:
        np.add.at(table, (rng.permutation(rows), columns), 1)
    result = {}
    for name, measure in (("purity", _purity), ("nmi", _mutual_information)):
        value, drawn = float(measure(counts.sum(0))), measure(tables)
        low, high = np.percentile(value + drawn - drawn.mean(), [2.5, 97.5]).clip(0, 1).round(4).tolist()
        result[name] = {"value": round(value, 4), "interval": [low, high], "chance": round(float(measure(dealt).mean()), 4)}
    return result


def _purity(tables: np.ndarray) -> np.ndarray:
    """Of contingency tables (..., accents, experts)."""
    return tables.max(-2).sum(-1) / tables.sum((-2, -1))


def _mutual_information(tables: np.ndarray) -> np.ndarray:
    """Mutual information over the mean of both entropies, as `sklearn.metrics.normalized_mutual_info_score` has it."""
    share = tables / tables.sum((-2, -1), keepdims=True)
    ours, theirs = (-xlogy(share.sum(axis), share.sum(axis)).sum(-1) for axis in (-2, -1))
    shared = ours + theirs + xlogy(share, share).sum((-2, -1))
    mean = (ours + theirs) / 2
    return np.where(mean > 1e-12, shared / np.maximum(mean, 1e-12), 1.0).clip(0, 1)


NUMBERS = ["posterior", "local_probability", "global_gate", "local_gate", "gate", "tau_global", "tau_local", "n_active"]


def in_llm(model: Any) -> bool:
    """Whether an HDMoLE layer lies in the LLM: its frames are tokens, of which the lengths of utterances say nothing."""
    return any("language_model" in name for name, _ in layers_of(model).values())


def routing_trace(model: Any, lengths: Sequence[int]) -> AbstractContextManager[Trace]:
    """A trace for `routing_table` of a batch of utterances of so many frames; where `in_llm`, of one utterance alone."""
    return trace(model) if in_llm(model) else trace(model, aggregate="mean", lengths=lengths)


def routing_table(traced: Trace, about: pd.DataFrame) -> pd.DataFrame:
    """One row an utterance, layer and expert: means over frames of what a `routing_trace` recorded.

    `about` says of each utterance of the trace its name (`utterance`), `domain`, `spoken` accent and `speaker`.
    """
    keys = ["utterance", "layer", "layer_index", "expert", "accent"]
    frame: pd.DataFrame = traced.to_frame().groupby(keys, as_index=False, sort=False)[NUMBERS].mean()
    known = about.iloc[frame.utterance].reset_index(drop=True)
    return pd.concat([known, frame[["layer", "layer_index", "expert", "accent"]], frame[NUMBERS].astype(np.float32)], axis=1)


def routing_summary(table: pd.DataFrame) -> dict[str, Any]:
    """How experts correspond to accents by a `routing_table`, per router and layer, and how many are at work."""
    seen = table[table.domain == "accent"]
    layers = list(table.sort_values("layer_index").layer.unique())
    result: dict[str, Any] = {"utterances": int(seen.utterance.nunique()), "routers": {}, "active": {}}
    for router, column in ROUTERS.items():
        result["routers"][router] = {
            "all": _assigned(seen, column),
            "layers": {layer: _assigned(seen[seen.layer == layer], column) for layer in layers},
        }
    for domain, of in table.groupby("domain"):
        result["active"][str(domain)] = {layer: round(float(of[of.layer == layer].n_active.mean()), 3) for layer in layers}
    return result


def routing(runner: Any, model: Any, method: Method) -> dict[str, Any]:
    """`routing_summary` of the test speech; the routing of each utterance goes to routing.parquet."""
    tables = []
    for speech, domains in ((runner.speech, ("accent", GENERAL, "unseen")), *((s, ("unseen",)) for s in runner.extra.values())):
        about = speech.corpus.index[["utterance", "domain", "accent", "speaker"]].rename(columns={"accent": "spoken"})

        @contextmanager
        def around(rows: list[int], lengths: list[int], about: pd.DataFrame = about) -> Iterator[None]:
            with routing_trace(model, lengths) as traced:
                yield
            tables.append(routing_table(traced, about.iloc[rows]))

        runner.errors(speech, model, method, chosen(speech, domains), around)
    table = pd.concat(tables, ignore_index=True)
    table.round(4).to_parquet(runner.analysed / "routing.parquet", index=False, compression="zstd")
    return routing_summary(table)


def _assigned(table: pd.DataFrame, column: str) -> dict[str, Any]:
    weights = table.pivot_table(index=["utterance", "spoken", "speaker"], columns="expert", values=column, aggfunc="mean")
    about = weights.index.to_frame()
    return correspondence(weights.to_numpy().argmax(1), about.spoken.to_numpy(), about.speaker.to_numpy())


def frontier(runner: Any, model: Any, method: Method) -> list[dict[str, Any]]:
    """Word error rate against mean active experts: thresholds scaled, and top-k and top-p in their place."""
    settings: list[tuple[str, float, dict[str, Any]]] = [
        ("thresholds", s, {"thresholds": "dynamic", "scale_thresholds": s}) for s in SCALES
    ]
    experts = len(runner.speech.recogniser.labels) - 1
    settings += [("top_k", k, {"thresholds": "top_k", "top_k": k}) for k in TOP_K if k <= experts]
    settings += [("top_p", p, {"thresholds": "top_p", "top_p": p}) for p in TOP_P]
    rows, points = chosen(runner.speech), []
    for choice, value, options in settings:
        active: list[np.ndarray] = []

        @contextmanager
        def around(
            _rows: list[int], lengths: list[int], options: dict[str, Any] = options, active: list[Any] = active
        ) -> Iterator[None]:
            with intervene(model, **options), routing_trace(model, lengths) as traced:
                yield
            active += [r["n_active"] for r in traced.records]

        table = runner.errors(runner.speech, model, method, rows, around)
        of = table.groupby(["domain", "accent"])[["errors", "words"]].sum()
        wer = (100 * of.errors / of.words).groupby("domain").mean()
        points.append(
            {"choice": choice, "value": value, "active": round(float(np.concatenate(active).mean()), 3),
             **{str(d): round(float(w), 3) for d, w in wer.items()}}
        )  # fmt: skip
    return points


@torch.no_grad()
def attribution(runner: Any, model: Any, method: Method) -> dict[str, Any]:
    """What each expert is worth: the change in log-likelihood per word of the reference when it is left out.

    `values` (accents, experts), in nats per word, below zero where the expert helps; `intervals` over speakers.
    """
    speech = runner.speech
    experts, index = speech.recogniser.labels[1:], speech.corpus.index
    rows = sorted(chosen(speech), key=lambda i: int(speech.states.spans[0, i, 1]))
    found = []
    for k in range(0, len(rows), 32):
        part = rows[k : k + 32]
        whole = log_likelihood(speech, model, method, part)
        words = [count_errors(text, "")[1] for text in index.text.iloc[part]]
        for expert in experts:
            with intervene(model, mask=[expert]):
                without = log_likelihood(speech, model, method, part)
            found.append(
                pd.DataFrame(
                    {"expert": expert, "accent": index.accent.to_numpy()[part], "speaker": index.speaker.to_numpy()[part],
                     "change": without - whole, "words": words}
                )
            )  # fmt: skip
    table = pd.concat(found)
    accents = [a for a in speech.recogniser.labels if a in set(table.accent)]
    values, intervals = [], []
    for accent in accents:
        cells = [_per_word(table[(table.accent == accent) & (table.expert == e)]) for e in experts]
        values.append([c[0] for c in cells])
        intervals.append([c[1] for c in cells])
    return {"accents": accents, "experts": experts, "values": values, "intervals": intervals, "utterances": len(rows)}


def _per_word(cell: pd.DataFrame) -> tuple[float, list[float]]:
    sums = cell.groupby("speaker")[["change", "words"]].sum().to_numpy()
    draws = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    drawn = sums[draws].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4), [round(float(low), 4), round(float(high), 4)]


@torch.no_grad()
def log_likelihood(speech: Speech, model: Any, method: Method, rows: list[int]) -> np.ndarray:
    """Log-probability (U,) of each utterance's reference, its end included, in nats."""
    device = next(model.parameters()).device
    states = encoder_states(speech, model, method, rows)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in states], batch_first=True)
    texts = speech.tokenizer(list(speech.corpus.index.text.iloc[rows]), add_special_tokens=False)["input_ids"]
    labels = pad([[*t, speech.tokenizer.eos_token_id] for t in texts]).to(device)
    with route(speech.posterior(rows, method).to(device)):
        out = model(
            encoder_states=torch.nn.utils.rnn.pad_sequence(states, batch_first=True), encoder_mask=mask.to(device), labels=labels
        )
    scores = out.logits[:, -labels.shape[1] - 1 : -1].float().log_softmax(-1)
    picked = scores.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
    return picked.sum(1).double().cpu().numpy()
