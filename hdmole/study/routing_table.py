"""Routing as a table: one row an utterance, layer and expert, and how experts correspond to accents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

from hdmole.method.routing import layers_of
from hdmole.method.tracing import Trace, trace

ROUTERS = {"combined": "gate", "global": "global_gate", "local": "local_probability"}
RESAMPLES = 200
DEALS = 50


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


def _assigned(table: pd.DataFrame, column: str) -> dict[str, Any]:
    weights = table.pivot_table(index=["utterance", "spoken", "speaker"], columns="expert", values=column, aggfunc="mean")
    about = weights.index.to_frame()
    return correspondence(weights.to_numpy().argmax(1), about.spoken.to_numpy(), about.speaker.to_numpy())
