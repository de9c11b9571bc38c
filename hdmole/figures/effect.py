"""Figures of what experts do: what each carries of a layer's change, and what a change of routing
does.

As in `hdmole.figures.utterance`, functions named `*_data` return the tidy table that is plotted,
and the others draw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hdmole.figures.utterance import LAYOUT, METHOD_COLOURS, accent_colours, accent_ticks, layer_ticks
from hdmole.names import SHARED, layer_label

SMALL = 0.1  # change of a word's probability below which an effect is called small


def carried_data(table: pd.DataFrame) -> pd.DataFrame:
    """What each expert weighs, and what it carries of the change of the layers' outputs, in
    percent.

    Args:
        table: a routing table of one utterance (`Trace.to_frame`).

    Returns:
        One row per expert: `expert`, `accent`, `weight` (its share of the weights) and `carried`.
        Both are means over the layers. Within a layer, frames of a large change count more. The
        shared expert has no weight of its own (NaN), and is left out where it carries nothing.
    """
    energy = table.change.astype(float) ** 2
    keys = ["layer_index", "expert", "accent"]
    parts = table.assign(
        carried=table.share * energy, shared=table.shared_share * energy, energy=energy, size=table.gate.abs()
    ).groupby(keys, as_index=False)[["carried", "shared", "energy", "size"]].sum()  # fmt: skip
    whole = parts.energy.where(parts.energy > 0)  # a layer that changes nothing counts for none
    weights = parts.groupby("layer_index")["size"].transform("sum")
    found = parts.assign(
        weight=100 * parts["size"] / weights.where(weights > 0),
        carried=100 * parts.carried / whole,
        shared=100 * parts.shared / whole,
    )
    data = found.groupby(["expert", "accent"], as_index=False)[["weight", "carried"]].mean().fillna(0.0)
    shared = float(found.shared.mean())
    if shared:
        row = pd.DataFrame({"expert": [len(data)], "accent": [SHARED], "weight": [np.nan], "carried": [shared]})
        data = pd.concat([data, row], ignore_index=True)
    return data


def carried_bars(data: pd.DataFrame) -> go.Figure:
    """`carried_data` as two bars per expert: hatched its share of the weights, full what it
    carries.
    """
    figure, accents = go.Figure(), list(data.accent)
    colours = accent_colours(accents)
    for column, name, pattern in (("weight", "share of the weights", "/"), ("carried", "share of the change", "")):
        figure.add_bar(
            x=data[column], y=accents, orientation="h", name=name, hovertemplate="%{y}, %{fullData.name}: %{x:.0f} %<extra></extra>",
            marker=dict(color=[colours[accent] for accent in accents], pattern=dict(shape=pattern, solidity=0.35)),
        )  # fmt: skip
    ends = [0.0, *data.weight.fillna(0), *data.carried]
    figure.update_xaxes(title="percent", range=[min(ends) - 1, max(100.0, *ends)])
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(accents))
    return figure.update_layout(
        **LAYOUT, height=140 + 34 * len(accents), barmode="group", bargap=0.25,
        legend=dict(orientation="h", yref="container", yanchor="bottom", y=0, x=0, traceorder="normal"),
    ).update_layout(margin_b=80)  # fmt: skip


def word_effect_data(words: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`ASR.likelihoods` under one change: how sure of each word the model is before and after it.

    The columns are `position`, `word`, `before` and `after` (probabilities), `change` (their
    difference), and `times`, how many times as likely the word became.
    """
    rows = []
    for position, entry in enumerate(words):
        before, after = float(np.exp(entry["before"])), float(np.exp(entry["after"][0]))
        times = float(np.exp(entry["after"][0] - entry["before"]))
        rows.append(
            {
                "position": position,
                "word": entry["word"],
                "before": before,
                "after": after,
                "change": after - before,
                "times": times,
            }
        )
    return pd.DataFrame(rows, columns=["position", "word", "before", "after", "change", "times"])


def times_as_likely(data: pd.DataFrame) -> float:
    """How many times as likely the words of `word_effect_data` became on average, a geometric mean;
    1 without words.
    """
    return float(np.exp(np.log(data.times).mean())) if len(data) else 1.0


def effect_size(data: pd.DataFrame) -> str:
    """The effect on the surest changed word of `word_effect_data`: "none", "small" (under 10
    points), or "large".
    """
    most = float(data.change.abs().max()) if len(data) else 0.0
    return "none" if most < 0.005 else "small" if most < SMALL else "large"


def word_effect(data: pd.DataFrame, method: str = "hdmole") -> go.Figure:
    """`word_effect_data` with one column per word: a ring as trained, a disc after the change."""
    colour = METHOD_COLOURS.get(method, METHOD_COLOURS["hdmole"])
    figure = go.Figure()
    for row in data.to_dict("records"):
        figure.add_scatter(
            x=[row["position"]] * 2, y=[100 * row["before"], 100 * row["after"]], mode="lines", showlegend=False, hoverinfo="skip",
            line=dict(color=METHOD_COLOURS["base"], width=2),
        )  # fmt: skip
    for column, name, symbol in (("before", "as trained", "circle-open"), ("after", "changed", "circle")):
        figure.add_scatter(
            x=data.position, y=100 * data[column], mode="markers", name=name, customdata=np.stack([data.word, data.times], -1),
            hovertemplate="“%{customdata[0]}”, %{fullData.name}: %{y:.0f} %<br>%{customdata[1]:.2f} times as likely<extra></extra>",
            marker=dict(symbol=symbol, size=11, color=colour, line_width=2),
        )  # fmt: skip
    figure.update_xaxes(
        tickmode="array", tickvals=data.position, ticktext=[escape(word, quote=False) for word in data.word],
        autotickangles=[0, -90], automargin=True, range=[-0.5, len(data) - 0.5], showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(title="sure of the word (%)", range=[-4, 104], tickvals=[0, 25, 50, 75, 100])
    return figure.update_layout(
        **LAYOUT, height=280, legend=dict(orientation="h", yref="container", yanchor="bottom", y=0, x=0)
    ).update_layout(margin_b=70)


def change_data(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Effective number of experts per layer in two runs.

    `before` and `after` are the `layers` of two transcripts. The columns are `layer`, `run` ("as
    trained" or "changed") and `experts`.
    """
    rows = [
        {"layer": layer_label(entry["name"]), "run": run, "experts": entry["effective_experts"]}
        for run, layers in (("as trained", before), ("changed", after))
        for entry in layers
    ]
    return pd.DataFrame(rows, columns=["layer", "run", "experts"])


def change_dots(data: pd.DataFrame, experts: int, method: str = "hdmole") -> go.Figure:
    """`change_data` with one row per layer. There are `experts` in all.

    A ring is the effective number of experts as trained, a disc that after the change.
    """
    figure = go.Figure()
    wide = data.pivot(index="layer", columns="run", values="experts").reindex(data.layer.unique())
    for layer, row in wide.iterrows():
        figure.add_scatter(
            x=[row["as trained"], row["changed"]], y=[layer, layer], mode="lines", showlegend=False, hoverinfo="skip",
            line=dict(color=METHOD_COLOURS["base"], width=2),
        )  # fmt: skip
    for run, symbol in (("as trained", "circle-open"), ("changed", "circle")):
        figure.add_scatter(
            x=wide[run], y=wide.index, mode="markers", name=run, hovertemplate="%{y}, %{fullData.name}: %{x:.2f} experts<extra></extra>",
            marker=dict(symbol=symbol, size=11, color=METHOD_COLOURS.get(method, METHOD_COLOURS["hdmole"]), line_width=2),
        )  # fmt: skip
    figure.update_xaxes(title="experts at work", range=[-0.2, experts + 0.2])
    figure.update_yaxes(autorange="reversed", automargin=True, **layer_ticks(wide.index))
    return figure.update_layout(
        **LAYOUT,
        height=160 + 17 * len(wide),
        legend=dict(orientation="h", yref="container", yanchor="bottom", y=0, x=0),
    ).update_layout(margin_b=80)
