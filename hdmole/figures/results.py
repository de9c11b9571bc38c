"""Figures of results: word error rates, training curves, and the routing of a corpus.

As in `hdmole.figures.utterance`, functions named `*_data` return the tidy table that is plotted,
and the others draw it. The results are those that `hdmole evaluate`, `compare` and `demo build`
write. All word error rates (WER) are in percent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hdmole.figures.utterance import GATE_SCALE, LAYOUT, METHOD_COLOURS, accent_colours, accent_ticks
from hdmole.names import GENERAL, GENERAL_OF, accent_label
from hdmole.study.results import Attribution, Interval, Rate, RecogniserResult, Results

MAIN_METHODS = ("base", "lora", "gated_lora", "full", "hdmole", "hdmole-extended", "extended")  # the others are variants of these
# titles of axes, by domain
_AXES = {
    "accent": "word error rate, accents (%)",
    "real_adults": "word error rate, real adults (%)",
    "synthetic_accents": "word error rate, synthetic accents (%)",
    GENERAL: "word error rate, general speech (%)",
    "real_general": "word error rate, real general speech (%)",
    "synthetic_general": "word error rate, synthetic general speech (%)",
}
GREY = "#8A8A8A"  # can be read on light and on dark pages
# marks of accents without an expert
NO_EXPERT = ("x", "triangle-up", "star", "cross", "square", "triangle-down", "diamond", "hourglass")
# A legend below the figure, away from the tools above it.
_BELOW: dict[str, Any] = dict(orientation="h", yref="container", yanchor="bottom", y=0, xanchor="left", x=0)


def error_rate_data(results: Results, domain: str = "accent") -> pd.DataFrame:
    """Word error rates with their intervals, one row per accent and method.

    The columns are `accent`, `method`, `label`, `wer`, `low`, `high` and `speakers`. The general
    domain that belongs to `domain` (`GENERAL_OF`) follows its accents. Variants of the main methods
    are left out. `low` and `high` are NaN if there are few speakers.
    """
    rows, labels = [], results.labels
    for method in _main(results):
        domains = results.methods[method].domains
        rates: dict[str, Rate] = dict(domains[domain].accents) if domain in domains else {}
        if (general := GENERAL_OF.get(domain)) in domains:
            rates[str(general)] = domains[str(general)]
        for accent, rate in rates.items():
            low, high = _interval(rate, rate.interval)
            rows.append(
                {
                    "accent": accent, "method": method, "label": labels[method], "wer": rate.wer, "low": low, "high": high,
                    "speakers": rate.speakers,
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["accent", "method", "label", "wer", "low", "high", "speakers"])


def _interval(rate: Rate, interval: Interval) -> Interval:
    """An interval of a rate; NaN if there are few speakers."""
    return interval if rate.has_interval else (np.nan, np.nan)


def _between(low: pd.Series, high: pd.Series, form: str) -> list[str]:
    """Intervals as texts for the hover hints; empty where they are NaN."""
    return [f" [{a:{form}}, {b:{form}}]" if a == a else "" for a, b in zip(low, high, strict=True)]


def _main(results: Results) -> list[str]:
    """The main methods in the results; all methods if there is no main one."""
    return [m for m in results.methods if m in MAIN_METHODS] or list(results.methods)


def error_rates(data: pd.DataFrame) -> go.Figure:
    """Bars of `error_rate_data`, with intervals."""
    figure = go.Figure()
    for method in data.method.unique():
        rows = data[data.method == method]
        figure.add_bar(
            x=rows.accent, y=rows.wer, name=rows.label.iloc[0], marker_color=METHOD_COLOURS.get(method),
            error_y=dict(
                symmetric=False, array=rows.high - rows.wer, arrayminus=rows.wer - rows.low, thickness=1, width=2, color=GREY
            ),
            customdata=[*zip(_between(rows.low, rows.high, ".1f"), rows.speakers.tolist(), strict=True)],
            hovertemplate="%{x}: %{y:.1f} %%{customdata[0]}, speakers: %{customdata[1]}",
        )  # fmt: skip
    figure.update_yaxes(title="word error rate (%)", rangemode="tozero")
    figure.update_xaxes(tickangle=-35, automargin=True, **accent_ticks(data.accent.unique()))
    return figure.update_layout(
        **LAYOUT,
        height=340,
        barmode="group",
        legend=_BELOW,
    )


def forgetting_data(results: Results, domain: str = "accent") -> pd.DataFrame:
    """Word error rates on accents and on general speech with their intervals, one row per method.

    The columns are `method`, `label`, `accents`, `accents_low`, `accents_high`, `general`,
    `general_low`, `general_high` and `trainable`. For the domain "accent", `accents` is the mean
    over accents, for others the rate of all words. `general` is of the domain that belongs to it
    (`GENERAL_OF`). Methods without one of the domains are left out.
    """
    rows, labels, against = [], results.labels, GENERAL_OF.get(domain, "")
    for method in _main(results):
        entry = results.methods[method]
        accent, general = entry.domains.get(domain), entry.domains.get(against)
        if accent and general:
            mean = domain == "accent"
            low, high = _interval(accent, accent.mean_interval if mean else accent.interval)
            general_low, general_high = _interval(general, general.interval)
            rows.append(
                {
                    "method": method, "label": labels[method], "accents": accent.mean_over_accents if mean else accent.wer,
                    "accents_low": low, "accents_high": high, "general": general.wer, "general_low": general_low,
                    "general_high": general_high, "trainable": entry.trainable,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def forgetting(data: pd.DataFrame, domain: str = "accent") -> go.Figure:
    """WER on accents against WER on general speech, from `forgetting_data` of the same domain.

    The dotted line is the base's WER on general speech.
    """
    figure = go.Figure()
    for row in data.to_dict("records"):
        name = row["label"]
        figure.add_scatter(
            x=[row["general"]], y=[row["accents"]], mode="markers", name=name,
            marker=dict(size=13, color=METHOD_COLOURS.get(row["method"])),
            error_x=dict(symmetric=False, array=[row["general_high"] - row["general"]], arrayminus=[row["general"] - row["general_low"]]),
            error_y=dict(symmetric=False, array=[row["accents_high"] - row["accents"]], arrayminus=[row["accents"] - row["accents_low"]]),
            hovertemplate="%{fullData.name}<br>general %{x:.1f} %<br>accents %{y:.1f} %<extra></extra>",
        )  # fmt: skip
    figure.update_traces(error_x=dict(thickness=1, width=3, color=GREY), error_y=dict(thickness=1, width=3, color=GREY))
    base = data[data.method == "base"]
    if len(base):
        figure.add_vline(x=float(base.general.iloc[0]), line=dict(color=METHOD_COLOURS["base"], dash="dot", width=1))
    figure.update_xaxes(title=_AXES[GENERAL_OF[domain]])
    figure.update_yaxes(title=_AXES[domain])
    return figure.update_layout(**LAYOUT, height=340, legend=_BELOW)


def parameters(data: pd.DataFrame, domain: str = "accent") -> go.Figure:
    """WER on accents against the number of trained parameters, from `forgetting_data`.

    The dotted line is the base's WER.
    """
    figure = go.Figure()
    for row in data[data.trainable > 0].to_dict("records"):
        figure.add_scatter(
            x=[row["trainable"]], y=[row["accents"]], mode="markers", name=row["label"],
            marker=dict(size=13, color=METHOD_COLOURS.get(row["method"])),
            error_y=dict(symmetric=False, array=[row["accents_high"] - row["accents"]], arrayminus=[row["accents"] - row["accents_low"]],
                         thickness=1, width=3, color=GREY),
            hovertemplate="%{x:,} parameters<br>accents %{y:.1f} %",
        )  # fmt: skip
    base = data[data.method == "base"]
    if len(base):
        figure.add_hline(y=float(base.accents.iloc[0]), line=dict(color=METHOD_COLOURS["base"], dash="dot", width=1))
    trained = data.trainable[data.trainable > 0]
    figure.update_xaxes(title="trained parameters", type="log")
    if len(trained):
        figure.update_xaxes(range=[np.log10(trained.min()) - 0.6, np.log10(trained.max()) + 0.6])
    figure.update_yaxes(title=_AXES[domain])
    return figure.update_layout(**LAYOUT, height=340, legend=_BELOW)


def variant_data(results: Results, against: str = "hdmole") -> pd.DataFrame:
    """Every method minus `against` on accents and on general speech, in percentage points of WER.

    The columns are `method`, `label`, `domain`, `points`, `low` and `high` (95 % interval) and
    `trainable`. Below zero, the method makes fewer errors. The intervals are NaN if there are few
    speakers.
    """
    labels = results.labels
    few = {domain for domain in ("accent", GENERAL) if results.few_speakers(domain)}
    rows = [
        {
            "method": d.method, "label": labels[d.method], "domain": d.domain, "points": d.points,
            "low": np.nan if d.domain in few else d.interval[0], "high": np.nan if d.domain in few else d.interval[1],
            "trainable": results.methods[d.method].trainable,
        }
        for d in results.differences
        if d.against == against and d.domain in ("accent", GENERAL)
    ]  # fmt: skip
    columns = ["method", "label", "domain", "points", "low", "high", "trainable"]
    return pd.DataFrame(rows, columns=columns).sort_values("points", ignore_index=True)


def variants(data: pd.DataFrame) -> go.Figure:
    """`variant_data` as dots with intervals, one row per method.

    Accents and general speech stand side by side. Zero is the method compared against.
    """
    domains = {"accent": "Accents", GENERAL: "General"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(domains.values()), shared_yaxes=True, horizontal_spacing=0.03)
    order = list(data[data.domain == "accent"].label)
    for column, domain in enumerate(domains, start=1):
        rows = data[data.domain == domain].set_index("label").reindex(order).reset_index()
        colours = [METHOD_COLOURS.get(m, METHOD_COLOURS["hdmole"]) for m in rows.method]
        figure.add_trace(_differences(rows, rows.label, colours), row=1, col=column)
        figure.add_vline(x=0, row=1, col=column, line=dict(color=GREY, dash="dot", width=1))
    figure.update_xaxes(nticks=4, tickangle=0)
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_annotations(font_size=13)
    both: dict[str, Any] = dict(xref="paper", x=0.5, yref="paper", y=0, yanchor="top", yshift=-24, showarrow=False)
    # one title for both axes; two would overlap on a phone
    figure.add_annotation(text="points of word error rate", **both)
    return figure.update_layout(**LAYOUT, height=170 + 20 * len(order)).update_layout(margin_t=60, margin_b=50)


def _differences(rows: pd.DataFrame, names: pd.Series, colours: Any) -> go.Scatter:
    """Dots with their intervals. A ring marks a difference that is not established."""
    sure = (rows.high < 0) | (rows.low > 0)
    return go.Scatter(
        x=rows.points, y=names, mode="markers", showlegend=False,
        error_x=dict(
            symmetric=False, array=rows.high - rows.points, arrayminus=rows.points - rows.low, thickness=1.5, width=3,
            color=GREY,
        ),
        marker=dict(size=10, color=colours, line_width=2, symbol=["circle" if s else "circle-open" for s in sure]),
        customdata=_between(rows.low, rows.high, "+.1f"),
        hovertemplate="%{y}<br>%{x:+.1f} points%{customdata}<extra></extra>",
    )  # fmt: skip


def accent_differences(data: pd.DataFrame, method: str) -> go.Figure:
    """Differences of two methods by accent, as dots with intervals.

    `data` is the table of `hdmole.study.bootstrap.accent_differences` with a `label` for each
    accent. Zero is the method compared against.
    """
    figure = go.Figure(_differences(data, data.label, METHOD_COLOURS.get(method, METHOD_COLOURS["hdmole"])))
    figure.add_vline(x=0, line=dict(color=GREY, dash="dot", width=1))
    figure.update_xaxes(title="points of word error rate")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return figure.update_layout(**LAYOUT, height=120 + 20 * len(data))


def curve_data(results: Results) -> pd.DataFrame:
    """Word error rates on dev speech during training.

    The columns are `method`, `label`, `step`, `accent` (mean over accents) and `general`.
    """
    labels = results.labels
    rows = [
        {"method": method, "label": labels[method], "step": step, **rates}
        for method, points in results.curves.items()
        for step, rates in points.items()
    ]
    return pd.DataFrame(rows, columns=["method", "label", "step", "accent", GENERAL]).sort_values(["method", "step"])


def curves(data: pd.DataFrame) -> go.Figure:
    """`curve_data` as lines over training steps, on accents and on general speech."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=["Accents, mean", "General speech"], horizontal_spacing=0.08)
    for method in data.method.unique():
        rows = data[data.method == method]
        for column, domain in enumerate(("accent", GENERAL), start=1):
            figure.add_scatter(
                row=1, col=column, x=rows.step, y=rows[domain], mode="lines+markers", name=rows.label.iloc[0],
                showlegend=column == 1, legendgroup=method, line_color=METHOD_COLOURS.get(method),
                hovertemplate="step %{x}: %{y:.1f} %",
            )  # fmt: skip
    figure.update_xaxes(title="training step", rangemode="tozero")
    figure.update_yaxes(title="word error rate, dev speech (%)", col=1)
    return figure.update_layout(**LAYOUT, height=340, legend=_BELOW).update_layout(margin_t=60)


def frontier_data(results: Results) -> pd.DataFrame:
    """Word error rates by the way of choosing experts.

    The columns are those of `hdmole.study.results.FrontierPoint`.
    """
    return pd.DataFrame([point.to_dict() for point in results.frontier], columns=["choice", "value", "active", "accent", GENERAL])


def frontier(data: pd.DataFrame) -> go.Figure:
    """WER on accents against the mean number of experts with any weight, one line per way of
    choosing.
    """
    figure = go.Figure()
    ways = (
        ("thresholds", "thresholds scaled", "solid", "circle"),
        ("top_k", "top-k", "dash", "square"),
        ("top_p", "top-p", "dot", "diamond"),
    )
    for choice, name, dash, symbol in ways:
        rows = data[data.choice == choice].sort_values("active")
        figure.add_scatter(
            x=rows.active, y=rows.accent, mode="lines+markers", name=name,
            line=dict(color=METHOD_COLOURS["hdmole"], dash=dash), marker=dict(size=9, symbol=symbol), customdata=np.stack([rows.value, rows[GENERAL]], -1),
            hovertemplate="%{customdata[0]:g}: %{x:.2f} experts<br>accents %{y:.1f} %, general %{customdata[1]:.1f} %",
        )  # fmt: skip
    figure.update_xaxes(title="experts with any weight (mean)", rangemode="tozero")
    figure.update_yaxes(title="word error rate, accents (%)")
    return figure.update_layout(**LAYOUT, height=320, legend=_BELOW)


# -- a corpus' routing -----------------------------------------------------------------------------


def correspondence_data(routing: pd.DataFrame, router: str = "gate", layer: str | None = None) -> pd.DataFrame:
    """Mean weight of each expert for each spoken accent.

    Args:
        routing: a table of `hdmole.study.routing_table.routing_table`.
        router: one of `hdmole.study.routing_table.ROUTERS`.
        layer: name of a layer; by default the mean over all layers.

    Returns:
        One row per spoken accent and expert: `domain`, `spoken`, `expert` (its number), `accent`
        (its name), `weight` and `utterances`.
    """
    rows = routing if layer is None else routing[routing.layer == layer]
    found = rows.groupby(["domain", "spoken", "expert", "accent"], sort=False).agg(
        weight=(router, "mean"), utterances=("utterance", "nunique")
    ).reset_index()  # fmt: skip
    order = {name: k for k, name in enumerate([*routing.sort_values("expert").accent.unique(), GENERAL])}
    found["order"] = found.spoken.map(lambda name: order.get(name, len(order)))
    return found.sort_values(["order", "spoken", "expert"], ignore_index=True).drop(columns="order")


def largest_row(data: pd.DataFrame) -> float:
    """The largest sum of weights of a spoken accent in `correspondence_data`."""
    return float(data.groupby("spoken").weight.sum().max())


def on_the_diagonal(data: pd.DataFrame) -> dict[str, int]:
    """Of the spoken accents with an expert in `correspondence_data` (`all`), those whose own expert
    weighs most (`count`).
    """
    own = data[data.spoken.isin(set(data.accent))]
    best = own.loc[own.groupby("spoken").weight.idxmax()]
    return {"count": int((best.spoken == best.accent).sum()), "all": len(best)}


def correspondence(data: pd.DataFrame) -> go.Figure:
    """`correspondence_data` as a matrix with a row per spoken accent and a column per expert.

    The colour scale ends at `largest_row`. Even weights look even on it, and a single expert that
    has all the weight of its accent is as bright as can be.
    """
    most = largest_row(data)
    figure = _matrix(
        data, ("spoken", "accent", "weight"), "mean weight", 2 if most > 0.5 else 3, zmin=0, zmax=most, colorscale=GATE_SCALE,
        hovertemplate="spoken %{y}, expert %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    return figure.update_xaxes(title="expert")


def map_data(routing: pd.DataFrame, router: str = "gate") -> pd.DataFrame:
    """The first two principal components of each utterance's routing (layers x experts).

    The columns are `utterance`, `domain`, `spoken`, `speaker`, `x` and `y`.
    """
    from sklearn.decomposition import PCA

    about = ["utterance", "domain", "spoken", "speaker"]
    vectors = routing.pivot_table(index=about, columns=["layer", "expert"], values=router, sort=False)
    if min(vectors.shape) < 2:  # one utterance or one number has no two components
        return vectors.index.to_frame(index=False).assign(x=0.0, y=0.0)
    points = PCA(2, random_state=0).fit_transform(vectors.to_numpy(float))
    return vectors.index.to_frame(index=False).assign(x=points[:, 0], y=points[:, 1])


def utterance_map(data: pd.DataFrame, experts: Sequence[str]) -> go.Figure:
    """`map_data` as one mark per utterance, in the colour of its accent's expert.

    Accents without an expert have grey marks of different shapes. If two experts share a colour,
    the second has rings.
    """
    colours = accent_colours(experts)
    first = {colour: name for name, colour in reversed(colours.items())}
    figure, marks = go.Figure(), cycle(NO_EXPERT)
    for spoken in sorted(
        data.spoken.unique(), key=lambda name: ([*colours].index(name) if name in colours else len(colours), name)
    ):
        rows, colour = data[data.spoken == spoken], colours.get(spoken, GREY)
        symbol = next(marks) if spoken not in colours else "circle" if first[colour] == spoken else "circle-open"
        figure.add_scatter(
            x=rows.x, y=rows.y, mode="markers", name=accent_label(spoken), customdata=rows[["utterance", "speaker"]],
            marker=dict(size=7, color=colour, symbol=symbol),
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}",
        )  # fmt: skip
    figure.update_xaxes(title="first principal component", showticklabels=False)
    figure.update_yaxes(title="second", showticklabels=False)
    return figure.update_layout(**LAYOUT, height=420)


def attribution_data(results: Results) -> pd.DataFrame:
    """How leaving an expert out changes the log-likelihood, in nats per word.

    The columns are `spoken`, `accent` (that of the expert), `change`, `low` and `high`.
    """
    found = results.attribution or Attribution(accents=[], experts=[], values=[], intervals=[], utterances=0)
    rows = [
        {"spoken": spoken, "accent": expert, "change": value, "low": interval[0], "high": interval[1]}
        for spoken, values, intervals in zip(found.accents, found.values, found.intervals, strict=True)
        for expert, value, interval in zip(found.experts, values, intervals, strict=True)
    ]
    return pd.DataFrame(rows, columns=["spoken", "accent", "change", "low", "high"])


def attribution(data: pd.DataFrame) -> go.Figure:
    """`attribution_data` as a matrix. Brown means that the expert helps the accent.

    Leaving such an expert out makes the words less likely. Changes that are not established, whose
    interval includes zero, have no colour.
    """
    percent = data.assign(change=100 * np.expm1(data.change))  # of the mean word
    most = max(1e-6, float(percent.change.abs().max()))
    figure = _matrix(
        percent, ("spoken", "accent", "change"), "change of a word's probability (%)", 1, zmin=-most, zmax=most, colorscale="PuOr",
        hovertemplate="spoken %{y}, without expert %{x}: probability of a word %{customdata:+.1f} %<extra></extra>",
    )  # fmt: skip
    cells = figure.data[0]
    sure = data.assign(sure=(data.low > 0) | (data.high < 0)).pivot(index="spoken", columns="accent", values="sure")
    cells.update(customdata=cells.z, z=np.where(sure.loc[list(cells.y), list(cells.x)], cells.z, 0))
    return figure.update_xaxes(title="expert left out")


def pair_data(utterances: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Two methods side by side, one row per utterance and seed.

    `fewer errors` is how many word errors fewer `method` makes than `against`.
    """
    keys = ["utterance", "seed", "domain", "accent", "speaker", "reference", "words"]
    mine, theirs = (
        utterances[utterances.method == name].set_index(keys)[["hypothesis", "errors"]].add_suffix(f" {name}")
        for name in (method, against)
    )
    table = mine.join(theirs, how="inner").reset_index()
    table.insert(len(keys), "fewer errors", table[f"errors {against}"] - table[f"errors {method}"])
    return table.sort_values("fewer errors", ascending=False, ignore_index=True, kind="stable")


def pair_counts(table: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Number of `utterances` by errors of `method` (`mine`) and of `against` (`theirs`).

    `table` is that of `pair_data`.
    """
    columns = {f"errors {method}": "mine", f"errors {against}": "theirs"}
    return table.rename(columns=columns).groupby(["mine", "theirs"]).size().rename("utterances").reset_index()


def pair_scatter(
    data: pd.DataFrame, mine: str, theirs: str, seeds: int = 1, colours: tuple[str, str] = (GREY, GREY)
) -> go.Figure:
    """`pair_counts` as discs. Below the diagonal the first method makes fewer errors.

    A disc has the colour of the method with fewer errors. With several `seeds`, each counted unit
    is a decoding, not an utterance.
    """
    better = np.where(data.mine < data.theirs, colours[0], np.where(data.mine > data.theirs, colours[1], GREY))
    figure = go.Figure(
        go.Scatter(
            x=data.theirs, y=data.mine, mode="markers", customdata=data.utterances, showlegend=False,
            marker=dict(size=np.sqrt(data.utterances), sizemin=3, sizeref=np.sqrt(data.utterances.max()) / 40, color=better),
            hovertemplate="%{customdata} decodings: %{y} errors against %{x}<extra></extra>"
            if seeds > 1
            else "%{customdata} utterances: %{y} errors against %{x}<extra></extra>",
        )
    )  # fmt: skip
    most = int(max(data.mine.max(), data.theirs.max(), 1))
    figure.add_shape(type="line", x0=0, y0=0, x1=most, y1=most, line=dict(color=GREY, dash="dot", width=1))
    figure.update_layout(meta={"mine": mine, "theirs": theirs})
    figure.update_xaxes(title="word errors, %{meta.theirs}", range=[-0.7, most + 0.7])
    figure.update_yaxes(title="word errors, %{meta.mine}", range=[-0.7, most + 0.7])
    return figure.update_layout(**LAYOUT, height=340)


def confusion_data(recogniser: RecogniserResult) -> pd.DataFrame:
    """The accent recogniser's confusion matrix, one row per pair of accents.

    The columns are `spoken`, `recognised`, `utterances` and `percent` of the utterances of the
    spoken accent.
    """
    rows, labels = [], recogniser.labels
    for spoken, row in zip(labels, recogniser.confusion, strict=True):
        total = max(1, sum(row))
        rows += [
            {"spoken": spoken, "recognised": label, "utterances": n, "percent": 100 * n / total}
            for label, n in zip(labels, row, strict=True)
        ]
    return pd.DataFrame(rows, columns=["spoken", "recognised", "utterances", "percent"])


def confusion_matrix(data: pd.DataFrame) -> go.Figure:
    """`confusion_data` as a matrix with a row per spoken accent and a column per recognised one."""
    figure = _matrix(
        data, ("spoken", "recognised", "percent"), "%", 0, zmin=0, zmax=100, colorscale=GATE_SCALE,
        hovertemplate="%{y} taken for %{x}: %{z:.1f} %<extra></extra>",
    )  # fmt: skip
    return figure.update_xaxes(title="recognised as").update_layout(height=380)


def _matrix(data: pd.DataFrame, names: tuple[str, str, str], title: str, digits: int, **heat: Any) -> go.Figure:
    """A heatmap that shows its numbers with so many `digits` after the point.

    `names` are the columns with row, column and value.
    """
    row, column, value = names
    rows, columns = list(data[row].unique()), list(data[column].unique())
    values = data.pivot(index=row, columns=column, values=value).loc[rows, columns].to_numpy(np.float32)
    bar = dict(title=dict(text=title, side="right" if len(title) > 1 else "top"), thickness=10)
    text = [[_short(value, digits) for value in line] for line in values]
    # plotly would shrink it to 6
    size = 11 if max((len(number) for line in text for number in line), default=0) <= 3 else 9
    numbers: dict[str, Any] = dict(text=text, texttemplate="%{text}", textfont_size=size)
    figure = go.Figure(go.Heatmap(x=columns, y=rows, z=values, colorbar=bar, **numbers, **heat))
    figure.update_xaxes(tickangle=-35, automargin=True, **accent_ticks(columns))
    figure.update_yaxes(title="spoken", autorange="reversed", automargin=True, **accent_ticks(rows))
    return figure.update_layout(**LAYOUT, height=420)


def _short(value: float, digits: int) -> str:
    """A number in few characters, for a narrow cell: .12, 1.0."""
    if value != value:
        return ""
    value = round(float(value), digits) + 0.0  # turns -0 into 0
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}") if abs(value) < 0.995 else f"{value:.{min(digits, 1)}f}"
