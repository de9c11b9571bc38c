"""Tables I to III and Figure 2 of the paper, beside what a comparison of ours found.

The paper counts characters of Mandarin, and we count words of English, so the error rates cannot be
compared. What can be is how a method changes the errors of another, in percent.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hdmole.figures.utterance import GATE_SCALE, LAYOUT, METHOD_COLOURS, accent_ticks
from hdmole.names import GENERAL, layer_label
from hdmole.study import paper
from hdmole.study.results import Results

_MODULES = {  # what a layer of the projector consists of, as the paper names it
    "q_proj": "W_q", "k_proj": "W_k", "v_proj": "W_v", "o_proj": "W_o", "fc1": "FFN \u2191", "fc2": "FFN \u2193",
}  # fmt: skip
# Whether our side of a row is there.
COMPUTED, TO_COME, LEFT_OUT = STATES = ("computed", "not computed yet", "not part of our comparison")
_COLUMNS = [
    "table", "label", "method", "domain", "against", "paper_trained", "trained", "paper_cer", "wer", "wer_low", "wer_high",
    "paper_change", "change", "change_low", "change_high", "state",
]  # fmt: skip


def paper_data(results: Results | None) -> pd.DataFrame:
    """Every row of the paper's tables, in each domain and against "base" and "full".

    The columns are `table`, `label`, `method` (ours; None without one), `domain` ("accent" for the
    paper's target, or "general", which only Table I has), `against`, `paper_trained` (millions of
    parameters), `trained` (parameters), `paper_cer` (%), `wer` with its interval (%), and the
    change of errors against `against` in %: `paper_change`, and ours as `change` with its interval.
    Below zero there are fewer errors. What is not known is NaN, intervals of few speakers too.
    `state` is one of `STATES`.
    """
    found = {(d.method, d.against, d.domain): d.relative for d in results.differences} if results else {}
    rows = []
    for row in paper.ROWS:
        entry = results.methods.get(row.method or "") if results else None
        for domain in ("accent", GENERAL) if row.table == "I" else ("accent",):
            cer = row.general if domain == GENERAL else row.target
            rate = entry.domains.get(domain) if entry else None
            expected = row.method is not None and (results is None or row.method in results.planned)
            state = COMPUTED if rate else TO_COME if expected else LEFT_OUT
            wer = {"wer": (rate.wer if domain == GENERAL else rate.mean_over_accents)} if rate else {}
            if rate and rate.has_interval:
                wer["wer_low"], wer["wer_high"] = rate.interval if domain == GENERAL else rate.mean_interval
            for against in ("base", "full"):
                base = paper.row(against)
                reference = (base.general if domain == GENERAL else base.target) if base else None
                relative = found.get((row.method or "", against, domain))
                change = {"change": relative.percent} if relative else {}
                if relative and rate and rate.has_interval:
                    change["change_low"], change["change_high"] = relative.interval
                if cer and reference and row.method != against:
                    change["paper_change"] = 100 * (cer / reference - 1)
                rows.append(
                    {
                        "table": row.table, "label": row.label, "method": row.method, "domain": domain, "against": against,
                        "paper_trained": row.trained, "trained": entry.trainable if entry else None, "paper_cer": cer, **wer, **change,
                        "state": state,
                    }
                )  # fmt: skip
    data = pd.DataFrame(rows, columns=_COLUMNS)
    numbers = _COLUMNS[5:-1]
    return data.assign(**{name: data[name].astype(float) for name in numbers})


def paper_changes(data: pd.DataFrame) -> go.Figure:
    """Changes of one table, domain and `against` of `paper_data`: the paper's diamonds, our discs.

    A label ends in a star where ours is not computed yet, and in a dash where it is left out.
    """
    figure = go.Figure()
    data = data.assign(label=data.label + data.state.map({COMPUTED: "", TO_COME: " *", LEFT_OUT: " –"}))
    theirs, ours = data[data.paper_change.notna()], data[data.change.notna()]
    figure.add_scatter(
        x=theirs.paper_change, y=theirs.label, mode="markers", name="The paper",
        marker=dict(size=11, symbol="diamond-open", color="#8A8A8A", line_width=2),
        hovertemplate="%{y}<br>the paper: %{x:+.1f} %<extra></extra>",
    )  # fmt: skip
    between = [f" [{a:+.1f}, {b:+.1f}]" if a == a else "" for a, b in zip(ours.change_low, ours.change_high, strict=True)]
    figure.add_scatter(
        x=ours.change, y=ours.label, mode="markers", name="This model", customdata=between,
        marker=dict(size=10, color=METHOD_COLOURS["hdmole"]),
        error_x=dict(
            symmetric=False, array=ours.change_high - ours.change, arrayminus=ours.change - ours.change_low, thickness=1.5, width=3,
        ),
        hovertemplate="%{y}<br>this model: %{x:+.1f} %%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=0, line=dict(color="#8A8A8A", dash="dot", width=1))
    figure.update_xaxes(title="change of errors (%)")
    figure.update_yaxes(
        categoryorder="array", categoryarray=list(data.label)[::-1], range=[-0.6, len(data) - 0.4], automargin=True
    )
    return figure.update_layout(
        **LAYOUT,
        height=130 + 16 * len(data),
        legend=dict(orientation="h", yanchor="bottom", y=0, yref="container", xanchor="left", x=0),
    )


def order_data(results: Results) -> pd.DataFrame:
    """Pairs of methods in one table, and whether their order here is the paper's.

    The columns are `table`, `domain`, `first` (the label of what makes fewer errors in the paper),
    `second`, `paper` (how many percent fewer or more errors `first` makes than `second`: below
    zero) and the same of ours as `ours`, `low` and `high`, and `order`: "same" or "opposite" where
    the whole interval lies on that side, else "open".
    """
    found = {(d.method, d.against, d.domain): d.relative for d in results.differences}
    rows = []
    for domain in ("accent", GENERAL):
        known = [(r, r.general if domain == GENERAL else r.target) for r in paper.ROWS]
        for pair in combinations([(r, cer) for r, cer in known if cer], 2):
            (first, less), (second, more) = sorted(pair, key=lambda entry: entry[1])
            relative = found.get((first.method or "", second.method or "", domain))
            if first.table == second.table and less < more and relative and not results.few_speakers(domain):
                low, high = relative.interval
                rows.append(
                    {
                        "table": first.table, "domain": domain, "first": first.label, "second": second.label,
                        "paper": 100 * (less / more - 1), "ours": relative.percent, "low": low, "high": high,
                        "order": "same" if high < 0 else "opposite" if low > 0 else "open",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows, columns=["table", "domain", "first", "second", "paper", "ours", "low", "high", "order"])


def active_data(routing: pd.DataFrame) -> pd.DataFrame:
    """Mean number of active experts by spoken accent and layer, from a `routing_table`.

    The columns are `spoken` (general speech first), `layer` (its plain name) and `active`. Layers
    come from the lowest to the highest.
    """
    seen = routing[routing.domain.isin(["accent", GENERAL])]
    found = seen.groupby(["spoken", "layer_index", "layer"], as_index=False).n_active.mean()
    found = found.assign(accent=found.spoken != GENERAL).sort_values(["accent", "spoken", "layer_index"], ignore_index=True)
    return pd.DataFrame({"spoken": found.spoken, "layer": found.layer.map(plain_layer), "active": found.n_active})


def plain_layer(name: str) -> str:
    """A part of the projector with the number of its layer: "W_q 1".

    Others keep their short names.
    """
    number, module = re.search(r"layers\.(\d+)\.", name), name.rpartition(".")[2]
    return f"{_MODULES[module]} {int(number[1]) + 1}" if number and module in _MODULES else layer_label(name)


def active(data: pd.DataFrame, experts: int) -> go.Figure:
    """`active_data` as a matrix, on a scale from none to all experts.

    It has a row per spoken accent.
    """
    spoken, layers = list(data.spoken.unique()), list(data.layer.unique())
    values = data.pivot(index="spoken", columns="layer", values="active").loc[spoken, layers].to_numpy(np.float32)
    numbers: dict[str, Any] = dict(
        text=[[f"{value:.1f}" for value in line] for line in values], texttemplate="%{text}", textfont_size=10
    )
    figure = go.Figure(
        go.Heatmap(
            x=layers, y=spoken, z=values, zmin=0, zmax=experts, colorscale=GATE_SCALE, colorbar=dict(title="experts", thickness=10),
            hovertemplate="spoken %{y}, %{x}: %{z:.2f} experts<extra></extra>", **numbers,
        )
    )  # fmt: skip
    figure.update_xaxes(title="part of the projector, and its layer", tickangle=-45, automargin=True, type="category")
    figure.update_yaxes(title="spoken", autorange="reversed", automargin=True, **accent_ticks(spoken))
    return figure.update_layout(**LAYOUT, height=180 + 24 * len(spoken))


def rows_computed(data: pd.DataFrame) -> tuple[int, int]:
    """How many rows of the tables have a result of ours, and how many will have one."""
    states = data.drop_duplicates(["table", "label"]).state
    return int((states == COMPUTED).sum()), int((states != LEFT_OUT).sum())
