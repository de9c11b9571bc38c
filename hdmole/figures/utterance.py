"""Figures of one utterance: pure functions from tidy data to plotly figures.

* Functions named `*_data` select and average, and return the tidy table that is plotted and offered
  as CSV.
* The other functions only draw what they are given. They know nothing of models, pages or files.
* A colour has the same meaning everywhere: `METHOD_COLOURS` for methods, `accent_colours` for
  accents and experts.
* Times are in seconds, frequencies in hertz, levels in decibels relative to the loudest cell.
* Texts are constants, so that they can be translated. Plotly puts numbers (`meta`) and names
  (`fullData.name`) into them.
* Heatmaps are float32 or int8 arrays. Long audio is averaged down to `MAX_COLUMNS` or `MEL_COLUMNS`
  columns.
* Plotly reports no clicks on a heatmap. An invisible scatter plot therefore lies over each heatmap
  that can be clicked.
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

from hdmole.names import GENERAL, accent_label, layer_label, layer_words

# LoRA and full fine-tuning also differ in lightness, because people who do not see green cannot
# tell their hues apart.
METHOD_COLOURS = {
    "base": "#8A8A8A",
    "lora": "#3A9AD0",
    "gated_lora": "#14507A",
    "full": "#7350B5",
    "hdmole": "#E0672F",
    "hdmole-extended": "#9E4416",
    "extended": "#9E4416",  # its name in comparisons
}
GATES = {"gate": "Combined gate", "global_gate": "Global router", "local_gate": "Local router"}
# gate -> column with the effective number of its experts
EFFECTIVE = {"gate": "n_effective", "global_gate": "n_effective_global", "local_gate": "n_effective_local"}
DOUBLE = float(np.log(2))  # nats; a word that is half or twice as likely
MAX_COLUMNS = 600  # of a heatmap that can be clicked; each cell has a mark
MEL_COLUMNS = 1_000  # of a spectrogram
WORD_LABELS = 60  # with more words on one axis they cannot be read

# The colours of Okabe and Ito (2008). Brown and dark purple replace black and yellow, which cannot
# be seen on dark or white pages.
_EXPERT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#A0522D", "#7F3C8D")
_GENERAL_COLOUR = "#8A8A8A"
# Viridis without its darkest end, so that a small gate looks different from an expert that is off
# on dark pages too.
GATE_SCALE = sample_colorscale("Viridis", np.linspace(0.2, 1, 12))
_WAVE_COLOUR = "#71839A"  # the colour of no method and no accent
_MEL_TICKS = (250, 1_000, 2_000, 4_000)  # Hz
# One line drawn as two, which can be seen on every colour and page.
ON_ANY_COLOUR: tuple[dict[str, Any], ...] = (
    dict(width=4, color="rgba(255,255,255,0.7)"),
    dict(width=2, color="#000000", dash="dash"),
)
# A font that exported images have too. With a web font of the page, labels would be measured in one
# font and drawn in another.
LAYOUT: dict[str, Any] = dict(
    margin=dict(l=8, r=8, t=36, b=8), hoverlabel=dict(namelength=-1), dragmode=False, font_family="Arial, Helvetica, sans-serif"
)


def exported(figure: go.Figure) -> go.Figure:
    """The figure for a file of its own, with room for the labels of its axes.

    On a page Streamlit makes this room.
    """
    return go.Figure(figure).update_xaxes(automargin=True).update_yaxes(automargin=True)


class TimedWord(Protocol):
    """A word with its start and end in seconds, such as `hdmole.speech.decoding.Word`."""

    @property
    def word(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


def accent_colours(accents: Iterable[str]) -> dict[str, str]:
    """Colour of each accent, in the model's order. The general domain is grey.

    Colours repeat after eight experts.
    """
    names = [name for name in accents if name != GENERAL]
    colours = {name: _EXPERT_COLOURS[i % len(_EXPERT_COLOURS)] for i, name in enumerate(names)}
    return {GENERAL: _GENERAL_COLOUR, **colours}


# -- the sound -------------------------------------------------------------------------------------


def envelope(samples: np.ndarray, rate: int, points: int = 1_200) -> pd.DataFrame:
    """Lowest and highest sample in at most `points` stretches of a waveform.

    The columns are `time` (s, middle of the stretch), `low` and `high`.
    """
    width = max(1, -(-len(samples) // points))
    padded = np.pad(samples, (0, -len(samples) % width), mode="edge") if len(samples) else np.zeros(0, np.float32)
    stretches = padded.reshape(-1, width)
    time = (np.arange(len(stretches)) + 0.5) * width / rate
    return pd.DataFrame({"time": time, "low": stretches.min(1, initial=0), "high": stretches.max(1, initial=0)})


def mel_spectrogram(samples: np.ndarray, rate: int, bins: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (T,) in s, frequencies (bins,) in Hz, and levels (bins, T) in dB as int8.

    The loudest cell has level 0. Levels below -80 are set to -80.
    """
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
    """The mel spectrogram with one row per cell: `time` (s), `frequency` (Hz), `level` (dB)."""
    times, frequencies, levels = mel_spectrogram(samples, rate)
    columns = dict(
        time=np.repeat(times, len(frequencies)), frequency=np.tile(frequencies, len(times)), level=levels.T.reshape(-1)
    )
    return pd.DataFrame(columns).round({"time": 4, "frequency": 1})


def sound(samples: np.ndarray, rate: int, words: Sequence[TimedWord] = (), start: float = 0.0) -> go.Figure:
    """Waveform above mel spectrogram on one time axis, with the words if there are any.

    `samples` (S,) begin at `start` seconds of the recording; `rate` is in Hz.
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
    """The accent posterior in percent, one bar per accent in the model's order (general first)."""
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


# -- the routing: data -----------------------------------------------------------------------------


def layer_names(table: pd.DataFrame) -> list[str]:
    """Names of the layers in a routing table (`Trace.to_frame`), in the model's order."""
    return list(table.drop_duplicates("layer").sort_values("layer_index").layer)


def gate_data(table: pd.DataFrame, layer: str, which: str = "gate") -> pd.DataFrame:
    """Rows of one layer: `time`, `frame`, `expert`, `accent` and `which`, one of `GATES`."""
    return _of_layer(table, layer)[["call", "time", "frame", "expert", "accent", which]].reset_index(drop=True)


def effective_data(table: pd.DataFrame) -> pd.DataFrame:
    """The effective number of experts, one row per layer and frame, in the columns of `EFFECTIVE`."""
    columns = ["layer_index", "layer", "call", "time", "frame", *EFFECTIVE.values()]
    return table.drop_duplicates(["layer_index", "call", "time", "frame"])[columns].reset_index(drop=True)


def with_words(data: pd.DataFrame, layer: str, words: Sequence[TimedWord]) -> pd.DataFrame:
    """The data of a gate as a table to save: with the layer's name, and the word that is spoken at
    each time.
    """
    said = np.full(len(data), "", object)
    for word in words:
        said[((data.time >= word.start) & (data.time < word.end)).to_numpy()] = word.word
    return data.assign(layer=layer, word=said)


def threshold_data(table: pd.DataFrame, layer: str, time: float | None = None) -> pd.DataFrame:
    """What both routers of one layer weigh, and their thresholds; one row per router and expert.

    `weight` is what is compared with `threshold`: P_g of the global router, P_l of the local one.
    It is the mean over frames, or the value in the frame at `time` (s). `lowest` and `highest` are
    its range over these frames. `share_on` is the share of them in which the expert is on.
    """
    rows = _of_layer(table, layer)
    rows = rows if time is None else frame_at(rows, time)
    mass = rows.groupby(["call", "time", "frame"], dropna=False).posterior.transform("sum")
    rows = rows.assign(accent_share=(rows.posterior / mass.where(mass > 0)).fillna(0.0))
    parts = []
    for router, weight in (("global", "accent_share"), ("local", "local_probability")):
        grouped = rows.assign(on=rows[f"{router}_gate"] != 0).groupby(["expert", "accent"], as_index=False)
        part = grouped.agg(
            weight=(weight, "mean"), lowest=(weight, "min"), highest=(weight, "max"),
            threshold=(f"tau_{router}", "mean"), share_on=("on", "mean"),
        )  # fmt: skip
        parts.append(part.assign(router=router))
    return pd.concat(parts, ignore_index=True)


def frame_at(rows: pd.DataFrame, time: float) -> pd.DataFrame:
    """The rows of a routing table of the frame at `time` (s): the last that has begun by then."""
    begun = rows.time[rows.time <= time + 1e-6]
    frame: pd.DataFrame = rows[rows.time == (rows.time.min() if begun.empty else begun.max())]
    return frame


def overview_data(table: pd.DataFrame, which: str = "gate") -> pd.DataFrame:
    """Mean of `which` over the frames of the utterance, one row per layer and expert."""
    return table.groupby(["layer_index", "layer", "expert", "accent"], as_index=False).agg({which: "mean"})


def word_data(table: pd.DataFrame, words: Sequence[TimedWord], which: str = "gate") -> pd.DataFrame:
    """Mean of `which` over all layers and the frames of each word.

    The columns are `position` (number of the word), `word`, `start`, `end`, `expert`, `accent` and
    `value`.
    """
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
    """`ASR.attribution` in the columns of `word_data`.

    `value` is how much the log-probability (nats) changes without the expert.
    """
    rows = [
        {"position": position, "word": entry["word"], "start": entry["start"], "end": entry["end"], "expert": expert,
         "accent": accent, "value": value}
        for position, entry in enumerate(attribution)
        for expert, (accent, value) in enumerate(entry["change"].items())
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["position", "word", "start", "end", "expert", "accent", "value"])


# -- the routing: figures --------------------------------------------------------------------------


def gate_heatmap(
    data: pd.DataFrame, most: float, which: str = "gate", words: Sequence[TimedWord] = (), span: tuple[float, float] | None = None,
    tau: float | None = None,
) -> go.Figure:  # fmt: skip
    """`gate_data` of one layer, experts over time. Cells where an expert is off are empty.

    Cells can be clicked. The colour scale ends at `most`, the weight of an expert that works alone.
    A box is drawn around `span` (start and end in seconds). `tau` is the router's threshold, named
    at the colour bar.
    """
    times, accents, values, axis = _grid(data, "accent", "expert", which)
    figure = go.Figure(
        go.Heatmap(
            x=times, y=accents, z=np.where(values != 0, values, np.nan).astype(np.float32), colorscale=GATE_SCALE, zmin=0,
            zmax=most, hoverongaps=False, hoverinfo="skip",
            colorbar=dict(title=dict(text="gate" if tau is None else "gate over τ = %{meta.tau}", side="right"), thickness=10),
            meta=None if tau is None else {"tau": f"{tau:.3f}"},
        )
    )  # fmt: skip
    _clickable(figure, times, accents, values, "expert %{y}<br>%{x:.2f} s<br>gate %{customdata:.3f}<extra></extra>")
    colours = accent_colours(accents)
    text = [f"{escape(accent_label(name), quote=False)} <span style='color:{colours[name]}'>■</span>" for name in accents]
    figure.update_yaxes(tickmode="array", tickvals=list(accents), ticktext=text)
    return _over_time(figure, times, words, axis, span).update_layout(height=335)


def word_heatmap(data: pd.DataFrame, most: float) -> go.Figure:
    """`word_data` as a heatmap of experts over words. `most` is as in `gate_heatmap`."""
    hover = "“%{customdata}”, expert %{y}: %{z:.3f}<extra></extra>"
    return _over_words(data, "gate", hovertemplate=hover, zmin=0, zmax=most, colorscale=GATE_SCALE)


def worth_heatmap(data: pd.DataFrame) -> go.Figure:
    """`worth_data` as a heatmap of experts over words. Brown means that the expert helps.

    The full colour stands for a word that is half or twice as likely without the expert.
    """
    hover = "“%{customdata}”, without expert %{y}: %{text:.2f} times as likely<extra></extra>"
    figure = _over_words(data, "without the expert", hovertemplate=hover, zmin=-DOUBLE, zmax=DOUBLE, colorscale="PuOr")
    (cells,) = figure.data
    cells.update(text=np.exp(cells.z))
    cells.colorbar.update(tickvals=[-DOUBLE, 0, DOUBLE], ticktext=["half as likely", "as likely", "twice as likely"])
    return figure


def _over_words(data: pd.DataFrame, title: str, **heat: Any) -> go.Figure:
    """Rows of `word_data` or `worth_data` as a heatmap. `heat` are arguments of it."""
    accents = list(data.sort_values("expert").accent.unique())
    values = data.pivot(index="accent", columns="position", values="value").loc[accents].to_numpy(np.float32)
    words = data.drop_duplicates("position").word
    figure = go.Figure(
        go.Heatmap(
            x=np.arange(values.shape[1]), y=accents, z=values, customdata=np.tile(words.to_numpy(), (len(accents), 1)),
            colorbar=dict(title=dict(text=title, side="right"), thickness=10), **heat,
        )
    )  # fmt: skip
    figure.update_xaxes(
        tickmode="array", tickvals=np.arange(len(words)), ticktext=[escape(word, quote=False) for word in words], side="top",
        autotickangles=[0, -90], automargin=True, showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(accents))
    # so that the tools above it cover no word
    return figure.update_layout(**LAYOUT, height=360).update_layout(margin_t=72)


def effective_heatmap(
    data: pd.DataFrame,
    experts: int,
    words: Sequence[TimedWord] = (),
    which: str = "n_effective",
    span: tuple[float, float] | None = None,
) -> go.Figure:
    """`effective_data` as a heatmap of layers over time, on a scale from 0 to all `experts`.

    Cells can be clicked. `span` is as in `gate_heatmap`.
    """
    data = data.assign(label=data.layer.map(layer_label))
    times, layers, values, axis = _grid(data, "label", "layer_index", which)
    figure = go.Figure(
        go.Heatmap(
            x=times, y=layers, z=values.astype(np.float32), colorscale="Cividis", zmin=0, zmax=experts, hoverinfo="skip",
            colorbar=dict(title=dict(text="experts at work", side="right"), thickness=10, dtick=max(1, experts // 4)),
        )
    )  # fmt: skip
    _clickable(figure, times, layers, values, "%{y}<br>%{x:.2f} s<br>%{customdata:.1f} experts at work<extra></extra>")
    figure.update_yaxes(**layer_ticks(layers))
    return _over_time(figure, times, words, axis, span).update_layout(height=160 + 17 * len(layers))


def threshold_bars(data: pd.DataFrame, learned: bool = True) -> go.Figure:
    """`threshold_data` as one bar per expert, for both routers of a layer.

    Full bars are experts that are on in at least half of the frames, the others are hatched. A
    dashed line is the threshold, if experts are chosen by one that is `learned`.
    """
    tau = data.groupby("router").threshold.mean()
    titles = ["Global, τ = %{meta.global}", "Local, τ = %{meta.local}"] if learned else ["Global", "Local"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, shared_yaxes=True)
    figure.update_layout(meta={router: f"{tau.get(router, np.nan):.3f}" for router in ("global", "local")})
    figure.update_annotations(font_size=13)
    colours = accent_colours(data.accent.unique())
    for column, router in enumerate(("global", "local"), start=1):
        rows = data[data.router == router].sort_values("expert")
        on = rows.share_on >= 0.5
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
        if len(rows) and learned:
            for line in ON_ANY_COLOUR:
                figure.add_vline(x=tau[router], row=1, col=column, line=line)
    # one scale for both, on which even weights look even
    figure.update_xaxes(range=[0, 1], nticks=4)
    figure.update_xaxes(title="accent's probability", row=1, col=1)
    figure.update_xaxes(title="router's probability", row=1, col=2)
    figure.update_yaxes(autorange="reversed", automargin=True, **accent_ticks(data.accent.unique()))
    return figure.update_layout(**LAYOUT, height=360).update_layout(margin_t=56)


def layer_overview(data: pd.DataFrame, most: float, which: str = "gate") -> go.Figure:
    """`overview_data` as a heatmap of layers and experts. A click chooses a layer.

    `most` is as in `gate_heatmap`.
    """
    grid = data.assign(label=data.layer.map(layer_label)).sort_values(["layer_index", "expert"])
    layers, accents = list(grid.label.unique()), list(grid.accent.unique())
    values = grid[which].to_numpy(np.float32).reshape(len(layers), len(accents))
    figure = go.Figure(
        go.Heatmap(
            x=accents, y=layers, z=values, colorscale=GATE_SCALE, zmin=0, zmax=most, hoverinfo="skip",
            colorbar=dict(title=dict(text="mean gate", side="right"), thickness=10),
        )
    )  # fmt: skip
    _clickable(figure, accents, layers, values, "%{y}, expert %{x}<br>mean gate %{customdata:.3f}<extra></extra>")
    figure.update_yaxes(**layer_ticks(layers))
    figure.update_xaxes(
        type="category", tickangle=-35, automargin=True, range=[-0.5, len(accents) - 0.5], **accent_ticks(accents)
    )
    return figure.update_layout(**LAYOUT, height=max(360, 122 + 17 * len(layers)))


# -- parts -----------------------------------------------------------------------------------------


def _of_layer(table: pd.DataFrame, layer: str) -> pd.DataFrame:
    rows = table[table.layer == layer]
    if rows.empty:
        names = ", ".join(table.layer.unique()) or "none at all"
        raise ValueError(f"The trace has no layer {layer!r}; its layers are {names}.")
    return rows


def _grid(data: pd.DataFrame, row: str, row_order: str, value: str) -> tuple[np.ndarray, list[str], np.ndarray, str]:
    """Centres of the columns (T,), row labels, values (rows, T), and the title of the axis.

    Columns are averaged so that there are at most `MAX_COLUMNS`. If some layers have times, those
    without are left out.
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
    """Lay an invisible mark over every cell of a heatmap (len(y), len(x)), first row on top.

    The mark of a chosen cell is shown as a box.
    """
    figure.add_scatter(
        x=np.tile(np.asarray(x), len(y)), y=np.repeat(np.asarray(y, dtype=object), len(x)), mode="markers",
        customdata=values.astype(np.float32).reshape(-1), showlegend=False, hovertemplate=hover,
        marker=dict(symbol="square", size=12, opacity=0, color="#FFFFFF", line=dict(width=1, color="#000000")),
        selected=dict(marker=dict(opacity=0.9)), unselected=dict(marker=dict(opacity=0)),
    )  # fmt: skip
    figure.update_yaxes(type="category", range=[len(y) - 0.5, -0.5], automargin=True)
    # the whole cell reacts, however wide it is
    figure.update_layout(hovermode="closest", hoverdistance=-1)


def accent_ticks(accents: Iterable[str]) -> dict[str, Any]:
    """Settings of an axis that shows the names of accents."""
    names = list(accents)
    return dict(tickmode="array", tickvals=names, ticktext=[escape(accent_label(name), quote=False) for name in names])


def layer_ticks(labels: Iterable[str]) -> dict[str, Any]:
    """Settings of an axis that shows layers (`layer_label`) by their plain names."""
    shown = list(labels)
    return dict(tickmode="array", tickvals=shown, ticktext=[escape(layer_words(label), quote=False) for label in shown])


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
    """Write the words above the plot, each at its middle, with a thin line at its start.

    They are the ticks of a second time axis, so that plotly turns them if there is no room for them
    side by side. The names of short words are moved apart.
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
    """Rising `places`, moved as little as possible to stand 6 % of `span` apart.

    If there are too many of them, they stand closer.
    """
    gap = span * min(0.06, 0.8 / len(places))
    # without the gaps, places that are too close are out of order
    shift = gap * np.arange(len(places))
    return list(isotonic_regression(np.asarray(places) - shift).x + shift)


def _mel(frequency: Any) -> Any:
    """Hertz on the mel scale of librosa."""
    import librosa

    return librosa.hz_to_mel(frequency)
