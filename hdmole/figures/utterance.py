"""Figures of the app: pure functions from tidy data to plotly figures.

* `*_data` functions select and average, and return the tidy table that is plotted (and offered as CSV)
* figure functions only draw what they are given; they know nothing of models, pages or files
* a colour means one thing everywhere: `METHOD_COLOURS` for methods, `accent_colours` for accents and their experts
* times are seconds, frequencies hertz, levels decibels under the loudest cell
* texts are constants, so that they can be translated: plotly puts numbers (`meta`) and names (`fullData.name`) into them
* heatmaps go out as float32 or int8 arrays, and long audio is averaged down to `MAX_COLUMNS` or `MEL_COLUMNS` columns
* a plotly heatmap returns no clicks, so an invisible scatter lies over each one that can be clicked
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from scipy.optimize import isotonic_regression

from hdmole.names import GENERAL, accent_label, layer_label

# LoRA and full fine-tuning differ in lightness too: their hues alone look the same to people who do not see green.
METHOD_COLOURS = {"base": "#8A8A8A", "lora": "#3A9AD0", "gated_lora": "#14507A", "full": "#7350B5", "hdmole": "#E0672F"}
GATES = {"gate": "Combined gate", "global_gate": "Global router", "local_gate": "Local router"}
ACTIVE = {"gate": "n_active", "global_gate": "n_active_global", "local_gate": "n_active_local"}  # their counts of experts
MAX_COLUMNS = 600  # of a heatmap that can be clicked, which has a mark a cell
MEL_COLUMNS = 1_000  # of a spectrogram
WORD_LABELS = 60  # more words than this on one axis cannot be read

# Okabe and Ito (2008) without black and yellow, which vanish on dark or on white pages; brown and dark purple instead.
_EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#A0522D", "#7F3C8D")
_GENERAL_COLOUR = "#8A8A8A"
# Viridis without its darkest end, so that a small gate differs from an expert that is off on a dark page too.
GATE_SCALE = sample_colorscale("Viridis", np.linspace(0.2, 1, 12))
_WAVE_COLOUR = "#71839A"  # no method's and no accent's
_MEL_TICKS = (250, 1_000, 2_000, 4_000)  # Hz
# One line drawn as two, which shows on every colour and page.
ON_ANY_COLOUR: tuple[dict[str, Any], ...] = (
    dict(width=4, color="rgba(255,255,255,0.7)"),
    dict(width=2, color="#000000", dash="dash"),
)
# A font that an exported image has too: with a web font of the page, its labels would be measured in one and drawn in another.
LAYOUT: dict[str, Any] = dict(
    margin=dict(l=8, r=8, t=36, b=8), hoverlabel=dict(namelength=-1), dragmode=False, font_family="Arial, Helvetica, sans-serif"
)


def exported(figure: go.Figure) -> go.Figure:
    """The same for a file of its own, where Streamlit does not make room for what stands on the axes."""
    return go.Figure(figure).update_xaxes(automargin=True).update_yaxes(automargin=True)


class TimedWord(Protocol):
    """A word with its start and end in seconds, as `hdmole.speech.asr` gives it."""

    @property
    def word(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


def accent_colours(accents: Iterable[str]) -> dict[str, str]:
    """Colour of each accent, in the model's order; the general domain is grey. After eight experts colours repeat."""
    names = [name for name in accents if name != GENERAL]
    colours = {name: _EXPERT_COLOURS[i % len(_EXPERT_COLOURS)] for i, name in enumerate(names)}
    return {GENERAL: _GENERAL_COLOUR, **colours}


# -- the sound -----------------------------------------------------------------------------------------------------------


def envelope(samples: np.ndarray, rate: int, points: int = 1_200) -> pd.DataFrame:
    """Waveform reduced to at most `points` stretches: columns `time` (s, middle of the stretch), `low`, `high`."""
    width = max(1, -(-len(samples) // points))
    padded = np.pad(samples, (0, -len(samples) % width), mode="edge") if len(samples) else np.zeros(0, np.float32)
    stretches = padded.reshape(-1, width)
    time = (np.arange(len(stretches)) + 0.5) * width / rate
    return pd.DataFrame({"time": time, "low": stretches.min(1, initial=0), "high": stretches.max(1, initial=0)})


def mel_spectrogram(samples: np.ndarray, rate: int, bins: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (T,) in s, frequencies (bins,) in Hz, and levels (bins, T) as int8 dB, 0 at the loudest and -80 at least."""
    import librosa

    samples = np.pad(samples, (0, max(0, 512 - len(samples))))
    hop = max(rate // 100, -(-len(samples) // MEL_COLUMNS))
    power = librosa.feature.melspectrogram(
        y=samples.astype(np.float32),
        sr=rate,
        n_fft=max(512, hop),
        hop_length=hop,
        win_length=max(400, hop),
        n_mels=bins,
    )
    levels = 10 * np.log10(np.maximum(power, 1e-12) / max(float(power.max()), 1e-12))
    frequencies = librosa.mel_frequencies(n_mels=bins + 2, fmin=0, fmax=rate / 2)[1:-1]
    times = np.arange(power.shape[1]) * hop / rate
    return times, frequencies, np.maximum(levels, -80).round().astype(np.int8)


def spectrogram_data(samples: np.ndarray, rate: int) -> pd.DataFrame:
    """The mel spectrogram as one row a cell: `time` (s), `frequency` (Hz), `level` (dB)."""
    times, frequencies, levels = mel_spectrogram(samples, rate)
    columns = dict(
        time=np.repeat(times, len(frequencies)), frequency=np.tile(frequencies, len(times)), level=levels.T.reshape(-1)
    )
    return pd.DataFrame(columns).round({"time": 4, "frequency": 1})


def sound(samples: np.ndarray, rate: int, words: Sequence[TimedWord] = (), start: float = 0.0) -> go.Figure:
    """Waveform over mel spectrogram on one time axis, with the words, if any, between their start and end.

    `samples` begin at `start` seconds of the recording.
    """
    wave = envelope(samples, rate)
    wave["time"] += start
    times, frequencies, levels = mel_spectrogram(samples, rate)
    times = times + start
    mel = _mel(frequencies)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.3, 0.7], vertical_spacing=0.04)
    outline = dict(
        x=np.concatenate([wave.time, wave.time[::-1]]).astype(np.float32),
        y=np.concatenate([wave.high, wave.low[::-1]]).astype(np.float32),
    )
    figure.add_scatter(
        **outline, row=1, col=1, fill="toself", mode="lines", line=dict(width=0.5, color=_WAVE_COLOUR),
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_heatmap(
        x=times.astype(np.float32), y=mel.astype(np.float32), z=levels, row=2, col=1, colorscale="Cividis", zmin=-80, zmax=0,
        customdata=np.repeat(frequencies.round().astype(np.int16)[:, None], len(times), 1),
        colorbar=dict(title="dB", thickness=10, len=0.72, y=0.36),
        hovertemplate="%{x:.2f} s, %{customdata} Hz<br>%{z} dB<extra></extra>",
    )  # fmt: skip
    peak = max(0.05, float(np.abs(samples).max(initial=0)))
    figure.update_yaxes(range=[-1.1 * peak, 1.1 * peak], title="level", showticklabels=False, row=1, col=1)
    ticks = [tick for tick in _MEL_TICKS if tick <= rate / 2]
    figure.update_yaxes(
        title="frequency (Hz)", range=[0, float(_mel(rate / 2))], tickvals=_mel(np.array(ticks)), ticktext=ticks, row=2, col=1
    )
    figure.update_xaxes(range=[start, start + len(samples) / rate])
    figure.update_xaxes(title="time (s)", row=2, col=1)
    figure.update_layout(**LAYOUT, height=300)
    _mark_words(figure, words)
    return figure


def accent_posterior(posterior: Mapping[str, float]) -> go.Figure:
    """One bar an accent: how sure the accent recogniser is, in percent, in the model's order (general first)."""
    names = list(posterior)
    shares = [100 * float(posterior[name]) for name in names]
    colours = accent_colours(names)
    figure = go.Figure(
        go.Bar(
            x=shares, y=names, orientation="h", marker_color=[colours[name] for name in names],
            text=[f"{share:.0f} %" for share in shares], textposition="outside", cliponaxis=False,
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(range=[0, 118], title="accent recogniser's posterior (%)", tickvals=[0, 25, 50, 75, 100])
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(names))
    return figure.update_layout(**LAYOUT, height=300)


# -- the routing: data ---------------------------------------------------------------------------------------------------


def layer_names(table: pd.DataFrame) -> list[str]:
    """Names of the layers in a routing table, in the model's order."""
    return list(table.drop_duplicates("layer").sort_values("layer_index").layer)


def gate_data(table: pd.DataFrame, layer: str, which: str = "gate") -> pd.DataFrame:
    """Rows of one layer: `time`, `frame`, `expert`, `accent` and the value `which`, one of `GATES`."""
    return _of_layer(table, layer)[["call", "time", "frame", "expert", "accent", which]].reset_index(drop=True)


def active_data(table: pd.DataFrame) -> pd.DataFrame:
    """How many experts are on: one row a layer and frame, with `n_active`, `n_active_global`, `n_active_local`."""
    columns = ["layer_index", "layer", "call", "time", "frame", "n_active", "n_active_global", "n_active_local"]
    return table.drop_duplicates(["layer_index", "call", "time", "frame"])[columns].reset_index(drop=True)


def threshold_data(table: pd.DataFrame, layer: str, time: float | None = None) -> pd.DataFrame:
    """What each router's threshold of one layer cuts: one row a router and expert.

    `weight` is the number that is compared with `threshold`: pi_i / m for the global router, p_i for the local one,
    averaged over frames, or at the frame that lasts over `time` (s). `lowest` and `highest` are its range over the frames
    that were averaged, `share_on` the share of these frames in which the expert got through.
    """
    rows = _of_layer(table, layer)
    rows = rows if time is None else frame_at(rows, time)
    mass = rows.groupby(["call", "time", "frame"], dropna=False).posterior.transform("sum")
    rows = rows.assign(accent_share=(rows.posterior / mass.where(mass > 0)).fillna(0.0))
    parts = []
    for router, weight in (("global", "accent_share"), ("local", "local_probability")):
        grouped = rows.assign(on=rows[f"{router}_gate"] > 0).groupby(["expert", "accent"], as_index=False)
        part = grouped.agg(
            weight=(weight, "mean"), lowest=(weight, "min"), highest=(weight, "max"),
            threshold=(f"tau_{router}", "mean"), share_on=("on", "mean"),
        )  # fmt: skip
        parts.append(part.assign(router=router))
    return pd.concat(parts, ignore_index=True)


def frame_at(rows: pd.DataFrame, time: float) -> pd.DataFrame:
    """Those of a routing table's rows whose frame lasts over `time` (s): the last frame that has begun by then."""
    begun = rows.time[rows.time <= time + 1e-6]
    frame: pd.DataFrame = rows[rows.time == (rows.time.min() if begun.empty else begun.max())]
    return frame


def overview_data(table: pd.DataFrame, which: str = "gate") -> pd.DataFrame:
    """Mean over the utterance's frames of `which`: one row a layer and expert."""
    return table.groupby(["layer_index", "layer", "expert", "accent"], as_index=False).agg({which: "mean"})


def word_data(table: pd.DataFrame, words: Sequence[TimedWord], which: str = "gate") -> pd.DataFrame:
    """Mean of `which` over all layers and the frames of each word: `position`, `word`, `start`, `end`, `expert`, `accent`, `value`."""
    rows = []
    frames: pd.DataFrame = table.groupby(["time", "expert", "accent"], as_index=False).agg({which: "mean"})
    for position, word in enumerate(words):
        inside = frames[(frames.time >= word.start - 1e-6) & (frames.time < word.end - 1e-6)]
        inside = inside if len(inside) else frame_at(frames, word.start)
        for (expert, accent), part in inside.groupby(["expert", "accent"]):
            rows.append(
                {"position": position, "word": word.word, "start": word.start, "end": word.end, "expert": expert, "accent": accent,
                 "value": float(part[which].mean())}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["position", "word", "start", "end", "expert", "accent", "value"])


def worth_data(attribution: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`ASR.attribution` as `word_data` has it: `value` is the change in log-probability (nats) without the expert."""
    rows = [
        {"position": position, "word": entry["word"], "start": entry["start"], "end": entry["end"], "expert": expert,
         "accent": accent, "value": value}
        for position, entry in enumerate(attribution)
        for expert, (accent, value) in enumerate(entry["change"].items())
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["position", "word", "start", "end", "expert", "accent", "value"])


# -- the routing: figures ------------------------------------------------------------------------------------------------


def gate_heatmap(
    data: pd.DataFrame, which: str = "gate", words: Sequence[TimedWord] = (), span: tuple[float, float] | None = None,
    tau: float | None = None,
) -> go.Figure:  # fmt: skip
    """Expert x time of one layer's `gate_data`; cells where an expert is off stay empty. Cells can be clicked.

    A frame is drawn around `span`, start and end in seconds. `tau` is the router's threshold, where the scale begins.
    """
    times, accents, values, axis = _grid(data, "accent", "expert", which)
    figure = go.Figure(
        go.Heatmap(
            x=times, y=accents, z=np.where(values > 0, values, np.nan).astype(np.float32), colorscale=GATE_SCALE, zmin=0,
            zmax=max(0.05, float(np.nanmax(values, initial=0))), hoverongaps=False, hoverinfo="skip",
            colorbar=dict(title=dict(text="gate" if tau is None else "gate over τ = %{meta.tau}", side="right"), thickness=10),
            meta=None if tau is None else {"tau": f"{tau:.3f}"},
        )
    )  # fmt: skip
    _clickable(figure, times, accents, values, "expert %{y}<br>%{x:.2f} s<br>gate %{customdata:.3f}<extra></extra>")
    colours = accent_colours(accents)
    text = [f"{accent_label(name)} <span style='color:{colours[name]}'>■</span>" for name in accents]
    figure.update_yaxes(tickmode="array", tickvals=list(accents), ticktext=text)
    return _over_time(figure, times, words, axis, span).update_layout(height=360)


def word_heatmap(data: pd.DataFrame, worth: bool = False) -> go.Figure:
    """Expert x word of `word_data`, or with `worth` of `worth_data`: there brown is where the word needs the expert."""
    accents = list(data.sort_values("expert").accent.unique())
    values = data.pivot(index="accent", columns="position", values="value").loc[accents].to_numpy(np.float32)
    words = data.drop_duplicates("position").word
    most = max(0.05, float(np.abs(values).max(initial=0)))
    figure = go.Figure(
        go.Heatmap(
            x=np.arange(values.shape[1]), y=accents, z=values, zmin=-most if worth else 0, zmax=most,
            colorscale="PuOr" if worth else GATE_SCALE, customdata=np.tile(words.to_numpy(), (len(accents), 1)),
            colorbar=dict(title=dict(text="nats" if worth else "gate", side="right"), thickness=10),
            hovertemplate="“%{customdata}”, expert %{y}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        tickmode="array", tickvals=np.arange(len(words)), ticktext=[escape(word, quote=False) for word in words], side="top",
        autotickangles=[0, -90], automargin=True, showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(accents))
    return figure.update_layout(**LAYOUT, height=360).update_layout(margin_t=72)  # the tools over it cover no word


def active_heatmap(
    data: pd.DataFrame,
    experts: int,
    words: Sequence[TimedWord] = (),
    which: str = "n_active",
    span: tuple[float, float] | None = None,
) -> go.Figure:
    """Layer x time of `active_data`: how many of the `experts` are on. Cells can be clicked; `span` as in `gate_heatmap`."""
    data = data.assign(label=data.layer.map(layer_label))
    times, layers, values, axis = _grid(data, "label", "layer_index", which)
    figure = go.Figure(
        go.Heatmap(
            x=times, y=layers, z=values.astype(np.float32), colorscale="Cividis", zmin=0, zmax=experts, hoverinfo="skip",
            colorbar=dict(title=dict(text="experts on", side="right"), thickness=10, dtick=max(1, experts // 4)),
        )
    )  # fmt: skip
    _clickable(figure, times, layers, values, "%{y}<br>%{x:.2f} s<br>%{customdata:.1f} experts on<extra></extra>")
    return _over_time(figure, times, words, axis, span).update_layout(height=160 + 17 * len(layers))


def threshold_bars(data: pd.DataFrame, dynamic: bool = True) -> go.Figure:
    """Both routers of one layer's `threshold_data`: a bar an expert, full where it exceeds the dashed threshold.

    Where experts are not chosen by thresholds (`dynamic` is false), none is drawn, and full are those on in half of the frames.
    """
    tau = data.groupby("router").threshold.mean()
    titles = ["Global, τ = %{meta.global}", "Local, τ = %{meta.local}"] if dynamic else ["Global", "Local"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, shared_yaxes=True)
    figure.update_layout(meta={router: f"{tau.get(router, np.nan):.3f}" for router in ("global", "local")})
    figure.update_annotations(font_size=13)
    colours = accent_colours(data.accent.unique())
    for column, router in enumerate(("global", "local"), start=1):
        rows = data[data.router == router].sort_values("expert")
        on = rows.weight > rows.threshold if dynamic else rows.share_on >= 0.5
        figure.add_bar(
            row=1, col=column, x=rows.weight, y=rows.accent, orientation="h", showlegend=False,
            marker=dict(
                color=[colours[accent] for accent in rows.accent], opacity=[1.0 if o else 0.45 for o in on],
                pattern=dict(shape=["" if o else "/" for o in on], solidity=0.35),
            ),
            error_x=dict(
                symmetric=False, array=rows.highest - rows.weight, arrayminus=rows.weight - rows.lowest, thickness=1, width=3,
                color="#8A8A8A", visible=bool((rows.highest > rows.lowest).any()),
            ),
            customdata=np.stack([rows.threshold, 100 * rows.share_on], -1),
            hovertemplate="%{y}: weight %{x:.3f}<br>threshold %{customdata[0]:.3f}<br>on in %{customdata[1]:.0f} % of the "
            "frames<extra></extra>",
        )  # fmt: skip
        if len(rows) and dynamic:
            for line in ON_ANY_COLOUR:
                figure.add_vline(x=tau[router], row=1, col=column, line=line)
    figure.update_xaxes(title="accent share π / m", row=1, col=1, rangemode="tozero")
    figure.update_xaxes(title="probability p", row=1, col=2, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(data.accent.unique()))
    return figure.update_layout(**LAYOUT, height=360).update_layout(margin_t=56)


def layer_overview(data: pd.DataFrame, which: str = "gate") -> go.Figure:
    """Layer x expert of `overview_data`: the mean gate. Cells can be clicked to choose a layer."""
    grid = data.assign(label=data.layer.map(layer_label)).sort_values(["layer_index", "expert"])
    layers, accents = list(grid.label.unique()), list(grid.accent.unique())
    values = grid[which].to_numpy(np.float32).reshape(len(layers), len(accents))
    figure = go.Figure(
        go.Heatmap(
            x=accents, y=layers, z=values, colorscale=GATE_SCALE, zmin=0, hoverinfo="skip",
            zmax=max(0.05, float(values.max(initial=0))),
            colorbar=dict(title=dict(text="mean gate", side="right"), thickness=10),
        )
    )  # fmt: skip
    _clickable(figure, accents, layers, values, "%{y}, expert %{x}<br>mean gate %{customdata:.3f}<extra></extra>")
    figure.update_xaxes(
        type="category", tickangle=-35, automargin=True, range=[-0.5, len(accents) - 0.5], **accent_ticks(accents)
    )
    return figure.update_layout(**LAYOUT, height=max(360, 122 + 17 * len(layers)))


def change_data(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Mean experts at work per layer of two runs (`layers` of two transcripts): `layer`, `run` (as trained, changed), `experts`."""
    rows = [
        {"layer": layer_label(entry["name"]), "run": run, "experts": entry["active_experts"]}
        for run, layers in (("as trained", before), ("changed", after))
        for entry in layers
    ]
    return pd.DataFrame(rows, columns=["layer", "run", "experts"])


def change_dots(data: pd.DataFrame, experts: int) -> go.Figure:
    """`change_data`: a row is a layer, a ring its experts at work as trained, a disc after the change, of so many `experts`."""
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
            marker=dict(symbol=symbol, size=11, color=METHOD_COLOURS["hdmole"], line_width=2),
        )  # fmt: skip
    figure.update_xaxes(title="experts at work (mean)", range=[-0.2, experts + 0.2])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(
        **LAYOUT,
        height=160 + 17 * len(wide),
        legend=dict(orientation="h", yref="container", yanchor="bottom", y=0, x=0),
    ).update_layout(margin_b=80)


# -- parts ---------------------------------------------------------------------------------------------------------------


def _of_layer(table: pd.DataFrame, layer: str) -> pd.DataFrame:
    rows = table[table.layer == layer]
    if rows.empty:
        names = ", ".join(table.layer.unique()) or "none at all"
        raise ValueError(f"The trace has no layer {layer!r}; its layers are {names}.")
    return rows


def _grid(data: pd.DataFrame, row: str, row_order: str, value: str) -> tuple[np.ndarray, list[str], np.ndarray, str]:
    """Middles of the columns (T,), row labels, values (rows, T), and the axis' title; columns averaged to `MAX_COLUMNS`.

    Where some layers have times, those without are left out.
    """
    timed = bool(data.time.notna().any())
    data, column = (data[data.time.notna()], "time") if timed else (data, "frame")
    labels = list(data.sort_values(row_order)[row].unique())
    wide = data.pivot_table(index=row, columns=column, values=value, aggfunc="mean", sort=True).reindex(labels)
    columns = wide.columns.to_numpy(float)
    step = float(np.median(np.diff(columns))) if len(columns) > 1 else (0.08 if timed else 1.0)
    middles = columns + step / 2 if timed else columns
    values = wide.to_numpy(np.float32)
    width = -(-len(columns) // MAX_COLUMNS) if len(columns) else 1
    if width > 1:
        starts = np.arange(0, len(columns), width)
        sizes = np.diff(np.append(starts, len(columns)))
        values = (np.add.reduceat(values, starts, axis=1) / sizes).astype(np.float32)
        middles = np.add.reduceat(middles, starts) / sizes
    return middles, labels, values, "time (s)" if timed else "position"


def _clickable(figure: go.Figure, x: Sequence[Any] | np.ndarray, y: Sequence[str], values: np.ndarray, hover: str) -> None:
    """Lay an invisible mark on every cell of a heatmap (len(y), len(x)), first row on top; a chosen one shows as a frame."""
    figure.add_scatter(
        x=np.tile(np.asarray(x), len(y)), y=np.repeat(np.asarray(y, dtype=object), len(x)), mode="markers",
        customdata=values.astype(np.float32).reshape(-1), showlegend=False, hovertemplate=hover,
        marker=dict(symbol="square", size=12, opacity=0, color="#FFFFFF", line=dict(width=1, color="#000000")),
        selected=dict(marker=dict(opacity=0.9)), unselected=dict(marker=dict(opacity=0)),
    )  # fmt: skip
    figure.update_yaxes(type="category", range=[len(y) - 0.5, -0.5], automargin=True)
    figure.update_layout(hovermode="closest", hoverdistance=-1)  # a cell answers to its corners too, however wide it is


def accent_ticks(accents: Iterable[str]) -> dict[str, Any]:
    """Settings of an axis of accents, so that it shows their names."""
    names = list(accents)
    return dict(tickmode="array", tickvals=names, ticktext=[accent_label(name) for name in names])


def _over_time(
    figure: go.Figure, times: np.ndarray, words: Sequence[TimedWord], title: str, span: tuple[float, float] | None
) -> go.Figure:
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.08
    if len(times):
        figure.update_xaxes(range=[float(times[0]) - step / 2, float(times[-1]) + step / 2])
    figure.update_xaxes(title=title, showgrid=False)
    figure.update_layout(**LAYOUT)
    if title == "time (s)":
        _mark_words(figure, words)
        if span:
            for line in ON_ANY_COLOUR:
                figure.add_shape(type="rect", x0=span[0], x1=span[1], y0=0, y1=1, xref="x", yref="paper", line=line)
    return figure


def _mark_words(figure: go.Figure, words: Sequence[TimedWord]) -> None:
    """Name the words on a second time axis above the plot, each at its middle, with a thin line where it starts.

    They are an axis' ticks, so that they turn where there is no room for them side by side; those of short words
    move apart, by a word's height on a narrow screen, or by what many words leave each.
    """
    words = [word for word in words if word.end > word.start]
    if not words or len(words) > WORD_LABELS:
        return
    middles = _apart([(word.start + word.end) / 2 for word in words], words[-1].end - words[0].start)
    figure.add_scatter(x=middles, y=[None] * len(words), xaxis="x9", yaxis="y", hoverinfo="skip", showlegend=False)
    figure.update_layout(
        xaxis9=dict(
            overlaying="x", matches="x", anchor="y", side="top", title=dict(text="words", standoff=10, font_size=12), automargin=True,
            tickmode="array", tickvals=middles, ticktext=[escape(word.word, quote=False) for word in words],
            autotickangles=[0, -90], ticklen=0, showgrid=False, zeroline=False,
        )
    )  # fmt: skip
    for word in words:
        figure.add_shape(
            type="line", x0=word.start, x1=word.start, y0=0, y1=1, xref="x", yref="paper", line=dict(width=0.6, color="#9A9A9A")
        )  # fmt: skip


def _apart(places: Sequence[float], span: float) -> list[float]:
    """Rising `places` moved as little as it takes to stand 6 % of `span` apart, or closer where there are too many."""
    gap = span * min(0.06, 0.8 / len(places))
    shift = gap * np.arange(len(places))  # with the gaps taken out, what stands too close is out of order
    return list(isotonic_regression(np.asarray(places) - shift).x + shift)


def _mel(frequency: Any) -> Any:
    """Hertz on the mel scale, as librosa has it."""
    import librosa

    return librosa.hz_to_mel(frequency)
