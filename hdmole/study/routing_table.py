"""Tables of routing, with one row per utterance, layer and expert, and their summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

from hdmole.method.routing import layers_of
from hdmole.method.tracing import Trace, trace
from hdmole.names import GENERAL
from hdmole.study.bootstrap import ROUTING_RESAMPLES
from hdmole.study.results import Correspondence, Measure, RouterResult, Routing

# Column of a routing table that holds weights of experts -> label of the router.
ROUTERS = {"gate": "Combined gate", "global_gate": "Global router", "local_probability": "Local router"}
DEALS = 50  # random assignments of accents, for the level of chance


def correspondence(assigned: np.ndarray, accents: np.ndarray, speakers: np.ndarray, seed: int = 0) -> Correspondence:
    """Purity and normalised mutual information of experts and accents.

    The 95 % intervals are over speakers. Even by chance both measures are above zero, the more so
    the fewer utterances there are. `chance` is therefore their mean over `DEALS` random assignments
    of the accents to the utterances. Resampling speakers increases this bias. Each interval is
    therefore shifted so that the mean of the resampled values is the measured value.

    Args:
        assigned: the expert of each utterance (U,).
        accents: the accent of each utterance (U,).
        speakers: the speaker of each utterance (U,).
        seed: seed of the resampling and of the random assignments.
    """
    rows, columns, of = (np.unique(values, return_inverse=True)[1] for values in (accents, assigned, speakers))
    counts = np.zeros((of.max() + 1, rows.max() + 1, columns.max() + 1))
    np.add.at(counts, (of, rows, columns), 1)
    rng = np.random.default_rng(seed)
    tables = np.stack([counts[rng.integers(0, len(counts), len(counts))].sum(0) for _ in range(ROUTING_RESAMPLES)])
    dealt = np.zeros((DEALS, *counts.shape[1:]))
    for table in dealt:
        np.add.at(table, (rng.permutation(rows), columns), 1)

    def measured(measure: Callable[[np.ndarray], np.ndarray]) -> Measure:
        value, drawn = float(measure(counts.sum(0))), measure(tables)
        low, high = np.percentile(value + drawn - drawn.mean(), [2.5, 97.5]).clip(0, 1).round(4).tolist()
        return Measure(value=round(value, 4), interval=(low, high), chance=round(float(measure(dealt).mean()), 4))

    return Correspondence(purity=measured(purity), nmi=measured(mutual_information))


def purity(tables: np.ndarray) -> np.ndarray:
    """The share of utterances that belong to the most frequent accent of their expert.

    `tables` (..., accents, experts) counts utterances; the result is (...).
    """
    return np.asarray(tables.max(-2).sum(-1) / tables.sum((-2, -1)))


def mutual_information(tables: np.ndarray) -> np.ndarray:
    """Mutual information of accents and experts, divided by the mean of their entropies.

    `tables` (..., accents, experts) counts utterances; the result is (...), from 0 (independent) to
    1 (each determines the other). It is `sklearn.metrics.normalized_mutual_info_score` for many
    tables at once.
    """
    share = tables / tables.sum((-2, -1), keepdims=True)
    ours, theirs = (-xlogy(share.sum(axis), share.sum(axis)).sum(-1) for axis in (-2, -1))
    shared = ours + theirs + xlogy(share, share).sum((-2, -1))
    mean = (ours + theirs) / 2
    return np.where(mean > 1e-12, shared / np.maximum(mean, 1e-12), 1.0).clip(0, 1)


NUMBERS = ["posterior", "local_probability", "global_gate", "local_gate", "gate", "tau_global", "tau_local", "n_active"]


def in_llm(model: Any) -> bool:
    """Whether an HDMoLE layer lies in the LLM, or in the decoder of Whisper.

    The frames of such a layer are tokens, so lengths of utterances do not apply to them.
    """
    return any("language_model" in name or "model.decoder." in name for name, _ in layers_of(model).values())


def routing_trace(model: Any, lengths: Sequence[int]) -> AbstractContextManager[Trace]:
    """A trace for `routing_table`, of a batch of utterances with `lengths` (U,) encoder states.

    If layers lie in the LLM (`in_llm`), the batch must be one utterance.
    """
    if in_llm(model):
        return trace(model)
    step = model.seconds_per_state
    parts = {
        part: [math.ceil(count * step / seconds) for count in lengths]
        for part, seconds in model.seconds_per_frame.items()
        if seconds == seconds  # layers without frames have NaN
    }
    return trace(model, aggregate="mean", lengths=parts)


def routing_table(traced: Trace, about: pd.DataFrame) -> pd.DataFrame:
    """Means over frames of a `routing_trace`, one row per utterance, layer and expert.

    `about` has one row per utterance of the trace, with its name (`utterance`), `domain`, `spoken`
    accent and `speaker`.
    """
    keys = ["utterance", "layer", "layer_index", "expert", "accent"]
    frame: pd.DataFrame = traced.to_frame().groupby(keys, as_index=False, sort=False)[NUMBERS].mean()
    known = about.iloc[frame.utterance].reset_index(drop=True)
    return pd.concat([known, frame[["layer", "layer_index", "expert", "accent"]], frame[NUMBERS].astype(np.float32)], axis=1)


def routing_summary(table: pd.DataFrame, method: str | None = None) -> Routing:
    """How experts correspond to accents in a `routing_table`, and how many experts are active.

    `method` is the HDMoLE adapter whose table it is; None for hdmole.
    """
    seen = table[table.domain == "accent"]
    layers = [str(layer) for layer in table.sort_values("layer_index").layer.unique()]
    return Routing(
        method=method,
        utterances=int(seen.utterance.nunique()),
        routers={
            column: RouterResult(
                all=_assigned(seen, column), layers={layer: _assigned(seen[seen.layer == layer], column) for layer in layers}
            )
            for column in ROUTERS
        },
        active={str(domain): _active(of, layers) for domain, of in table.groupby("domain")},
        active_by_accent={
            str(accent): _active(of, layers) for accent, of in table[table.domain.isin(("accent", GENERAL))].groupby("spoken")
        },
    )


def _active(of: pd.DataFrame, layers: list[str]) -> dict[str, float]:
    """Mean number of active experts in each layer."""
    return {layer: round(float(of[of.layer == layer].n_active.mean()), 3) for layer in layers}


def _assigned(table: pd.DataFrame, column: str) -> Correspondence:
    """Correspondence of accents and experts, by each utterance's expert of largest mean weight."""
    weights = table.pivot_table(index=["utterance", "spoken", "speaker"], columns="expert", values=column, aggfunc="mean")
    about = weights.index.to_frame()
    return correspondence(weights.to_numpy().argmax(1), about.spoken.to_numpy(), about.speaker.to_numpy())
