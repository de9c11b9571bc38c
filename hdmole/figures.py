"""Figures of the app: pure functions from tidy data to plotly figures.

* `*_data` functions select and average, and return the tidy table that is plotted (and offered as CSV)
* figure functions only draw what they are given; they know nothing of models, pages or files
* a colour means one thing everywhere: `METHOD_COLOURS` for methods, `accent_colours` for accents and their experts
* times are seconds, frequencies hertz, levels decibels under the loudest cell
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

GENERAL = "general"
METHOD_NAMES = {"base": "Frozen base", "lora": "LoRA", "full": "Full fine-tuning", "hdmole": "HDMoLE"}
MAIN_METHODS = ("base", "lora", "gated_lora", "full", "hdmole")  # the others are variants of these
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
_GATE_SCALE = sample_colorscale("Viridis", np.linspace(0.2, 1, 12))
_WAVE_COLOUR = "#71839A"  # no method's and no accent's
_MEL_TICKS = (250, 500, 1_000, 2_000, 4_000, 8_000)  # Hz
# One line drawn as two, which shows on every colour and page.
_ON_ANY_COLOUR: tuple[dict[str, Any], ...] = (
    dict(width=4, color="rgba(255,255,255,0.7)"),
    dict(width=2, color="#000000", dash="dash"),
)
# A font that an exported image has too: with a web font of the page, its labels would be measured in one and drawn in another.
_LAYOUT: dict[str, Any] = dict(
    margin=dict(l=8, r=8, t=36, b=8), hoverlabel=dict(namelength=-1), dragmode=False, font_family="Arial, Helvetica, sans-serif"
)


class TimedWord(Protocol):
    """A word with its start and end in seconds, as `hdmole.asr` gives it."""

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


def layer_label(name: str) -> str:
    """A layer's name without the wrappers' prefixes: `layers.0.q_proj` of the projector, say."""
    for prefix in ("base_model.model.", "multi_modal_projector."):
        name = name.removeprefix(prefix)
    return name


def accent_label(name: str) -> str:
    """An accent's name as it is shown: with a capital letter, and without underscores."""
    return name[:1].upper() + name[1:].replace("_", " ")


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
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.28, 0.72], vertical_spacing=0.03)
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
    figure.update_layout(**_LAYOUT, height=360)
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
    figure.update_yaxes(autorange="reversed", automargin=True, **_accent_ticks(names))
    return figure.update_layout(**_LAYOUT, height=360)


# -- the routing: data ---------------------------------------------------------------------------------------------------


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
        grouped = rows.assign(on=rows[weight] > rows[f"tau_{router}"]).groupby(["expert", "accent"], as_index=False)
        part = grouped.agg(
            weight=(weight, "mean"), lowest=(weight, "min"), highest=(weight, "max"),
            threshold=(f"tau_{router}", "mean"), share_on=("on", "mean"),
        )  # fmt: skip
        parts.append(part.assign(router=router))
    return pd.concat(parts, ignore_index=True)


def frame_at(rows: pd.DataFrame, time: float) -> pd.DataFrame:
    """Those of a routing table's rows whose frame lasts over `time` (s): the last frame that has begun by then."""
    begun = rows.time[rows.time <= time + 1e-6]
    return rows[rows.time == (rows.time.min() if begun.empty else begun.max())]


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
    data: pd.DataFrame, which: str = "gate", words: Sequence[TimedWord] = (), span: tuple[float, float] | None = None
) -> go.Figure:
    """Expert x time of one layer's `gate_data`; cells where an expert is off stay empty. Cells can be clicked.

    A frame is drawn around `span`, start and end in seconds.
    """
    times, accents, values, axis = _grid(data, "accent", "expert", which)
    figure = go.Figure(
        go.Heatmap(
            x=times, y=accents, z=np.where(values > 0, values, np.nan).astype(np.float32), colorscale=_GATE_SCALE, zmin=0,
            zmax=max(0.05, float(np.nanmax(values, initial=0))), hoverongaps=False, hoverinfo="skip",
            colorbar=dict(title=dict(text="gate", side="right"), thickness=10),
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
            colorscale="PuOr" if worth else _GATE_SCALE, customdata=np.tile(words.to_numpy(), (len(accents), 1)),
            colorbar=dict(title=dict(text="nats" if worth else "gate", side="right"), thickness=10),
            hovertemplate="“%{customdata}”, expert %{y}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        tickmode="array", tickvals=np.arange(len(words)), ticktext=[escape(word, quote=False) for word in words], side="top",
        autotickangles=[0, -90], automargin=True, showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, **_accent_ticks(accents))
    return figure.update_layout(**_LAYOUT, height=360).update_layout(margin_t=72)  # the tools over it cover no word


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


def threshold_bars(data: pd.DataFrame) -> go.Figure:
    """Both routers of one layer's `threshold_data`: a bar an expert, full where it exceeds the dashed threshold."""
    tau = data.groupby("router").threshold.mean()
    titles = [f"{router.capitalize()}, τ = {tau.get(router, np.nan):.3f}" for router in ("global", "local")]
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, shared_yaxes=True)
    figure.update_annotations(font_size=13)
    colours = accent_colours(data.accent.unique())
    for column, router in enumerate(("global", "local"), start=1):
        rows = data[data.router == router].sort_values("expert")
        on = rows.weight > rows.threshold
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
        if len(rows):
            for line in _ON_ANY_COLOUR:
                figure.add_vline(x=tau[router], row=1, col=column, line=line)
    figure.update_xaxes(title="accent share π / m", row=1, col=1, rangemode="tozero")
    figure.update_xaxes(title="probability p", row=1, col=2, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, **_accent_ticks(data.accent.unique()))
    return figure.update_layout(**_LAYOUT, height=360).update_layout(margin_t=56)


def layer_overview(data: pd.DataFrame, which: str = "gate") -> go.Figure:
    """Layer x expert of `overview_data`: the mean gate. Cells can be clicked to choose a layer."""
    grid = data.assign(label=data.layer.map(layer_label)).sort_values(["layer_index", "expert"])
    layers, accents = list(grid.label.unique()), list(grid.accent.unique())
    values = grid[which].to_numpy(np.float32).reshape(len(layers), len(accents))
    figure = go.Figure(
        go.Heatmap(
            x=accents, y=layers, z=values, colorscale=_GATE_SCALE, zmin=0, hoverinfo="skip",
            zmax=max(0.05, float(values.max(initial=0))),
            colorbar=dict(title=dict(text="mean gate", side="right"), thickness=10),
        )
    )  # fmt: skip
    _clickable(figure, accents, layers, values, "%{y}, expert %{x}<br>mean gate %{customdata:.3f}<extra></extra>")
    figure.update_xaxes(
        type="category", tickangle=-35, automargin=True, range=[-0.5, len(accents) - 0.5], **_accent_ticks(accents)
    )
    return figure.update_layout(**_LAYOUT, height=max(360, 122 + 17 * len(layers)))


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
            x=wide[run], y=wide.index, mode="markers", name=run, hovertemplate=f"%{{y}}, {run}: %{{x:.2f}} experts<extra></extra>",
            marker=dict(symbol=symbol, size=11, color=METHOD_COLOURS["hdmole"], line_width=2),
        )  # fmt: skip
    figure.update_xaxes(title="experts at work (mean)", range=[-0.2, experts + 0.2])
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(
        **_LAYOUT,
        height=130 + 17 * len(wide),
        legend=dict(orientation="h", yanchor="bottom", y=1.0, xanchor="right", x=0.7),
    )


def method_labels(summary: Mapping[str, Any]) -> dict[str, str]:
    """What each method of a results summary is called."""
    return {name: entry.get("label") or METHOD_NAMES.get(name, name) for name, entry in summary["methods"].items()}


def error_rate_data(summary: Mapping[str, Any], domain: str = "accent") -> pd.DataFrame:
    """Word error rates of a results summary (`hdmole.results`): `accent`, `method`, `label`, `wer`, `low`, `high` in percent.

    The accents of `domain` are followed by the general domain, where the summary has it. Variants of the main methods are
    left out.
    """
    rows, labels = [], method_labels(summary)
    for method in _main(summary):
        entry = summary["methods"][method]
        domains = entry["domains"]
        accents = dict(domains.get(domain, {}).get("accents", {}))
        if GENERAL in domains and domain == "accent":
            accents[GENERAL] = domains[GENERAL]
        for accent, rate in accents.items():
            low, high = rate["interval"]
            rows.append(
                {"accent": accent, "method": method, "label": labels[method], "wer": rate["wer"], "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["accent", "method", "label", "wer", "low", "high"])


def _main(summary: Mapping[str, Any]) -> list[str]:
    """The main methods of a results summary; all it has, where it has none of them."""
    return [m for m in summary["methods"] if m in MAIN_METHODS] or list(summary["methods"])


def error_rates(data: pd.DataFrame) -> go.Figure:
    """Bars of `error_rate_data` with their intervals."""
    figure = go.Figure()
    for method in data.method.unique():
        rows = data[data.method == method]
        figure.add_bar(
            x=rows.accent, y=rows.wer, name=rows.label.iloc[0], marker_color=METHOD_COLOURS.get(method),
            error_y=dict(symmetric=False, array=rows.high - rows.wer, arrayminus=rows.wer - rows.low, thickness=1, width=2),
            customdata=np.stack([rows.low, rows.high], -1),
            hovertemplate="%{x}: %{y:.1f} % [%{customdata[0]:.1f}, %{customdata[1]:.1f}]",
        )  # fmt: skip
    figure.update_yaxes(title="word error rate (%)", rangemode="tozero")
    figure.update_xaxes(tickangle=-35, automargin=True, **_accent_ticks(data.accent.unique()))
    return figure.update_layout(
        **_LAYOUT,
        height=340,
        barmode="group",
        legend=dict(orientation="h", yanchor="top", y=-0.3, xanchor="left", x=0),  # clear of the tools over the figure
    )


def forgetting_data(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Word error rates (%) of each method on accents (mean) and on the general domain, with intervals; one row a method.

    Columns `method`, `label`, `accents`, `accents_low`, `accents_high`, `general`, `general_low`, `general_high`, `trainable`; no rows
    where a domain is missing.
    """
    rows, labels = [], method_labels(summary)
    for method in _main(summary):
        entry = summary["methods"][method]
        accent, general = entry["domains"].get("accent"), entry["domains"].get(GENERAL)
        if accent and general:
            rows.append(
                {
                    "method": method, "label": labels[method], "accents": accent["mean_over_accents"], "accents_low": accent["mean_interval"][0],
                    "accents_high": accent["mean_interval"][1], "general": general["wer"], "general_low": general["interval"][0],
                    "general_high": general["interval"][1], "trainable": entry.get("trainable"),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def forgetting(data: pd.DataFrame) -> go.Figure:
    """`forgetting_data`: what adapting to accents cost on general speech; the base's rate there is the dotted line."""
    figure = go.Figure()
    for row in data.to_dict("records"):
        name = row["label"]
        figure.add_scatter(
            x=[row["general"]], y=[row["accents"]], mode="markers+text", text=name, textposition="top right", name=name,
            marker=dict(size=13, color=METHOD_COLOURS.get(row["method"])), showlegend=False,
            error_x=dict(symmetric=False, array=[row["general_high"] - row["general"]], arrayminus=[row["general"] - row["general_low"]]),
            error_y=dict(symmetric=False, array=[row["accents_high"] - row["accents"]], arrayminus=[row["accents"] - row["accents_low"]]),
            hovertemplate=f"{name}<br>general %{{x:.1f}} %<br>accents %{{y:.1f}} %<extra></extra>",
        )  # fmt: skip
    figure.update_traces(error_x=dict(thickness=1, width=3), error_y=dict(thickness=1, width=3))
    base = data[data.method == "base"]
    if len(base):
        figure.add_vline(x=float(base.general.iloc[0]), line=dict(color=METHOD_COLOURS["base"], dash="dot", width=1))
    figure.update_xaxes(title="WER on general speech (%)")
    figure.update_yaxes(title="WER on accents, mean (%)")
    return figure.update_layout(**_LAYOUT, height=340)


def parameters(data: pd.DataFrame) -> go.Figure:
    """`forgetting_data`: word error rate on accents against the parameters a method trains."""
    figure = go.Figure()
    for row in data[data.trainable > 0].to_dict("records"):
        figure.add_scatter(
            x=[row["trainable"]], y=[row["accents"]], mode="markers+text", text=row["label"], textposition="top center",
            name=row["label"], marker=dict(size=13, color=METHOD_COLOURS.get(row["method"])), showlegend=False,
            error_y=dict(symmetric=False, array=[row["accents_high"] - row["accents"]], arrayminus=[row["accents"] - row["accents_low"]],
                         thickness=1, width=3),
            hovertemplate="%{x:,} parameters<br>accents %{y:.1f} %",
        )  # fmt: skip
    base = data[data.method == "base"]
    if len(base):
        figure.add_hline(y=float(base.accents.iloc[0]), line=dict(color=METHOD_COLOURS["base"], dash="dot", width=1))
    trained = data.trainable[data.trainable > 0]
    figure.update_xaxes(title="trained parameters", type="log")
    if len(trained):
        figure.update_xaxes(range=[np.log10(trained.min()) - 0.6, np.log10(trained.max()) + 0.6])
    figure.update_yaxes(title="WER on accents, mean (%)")
    return figure.update_layout(**_LAYOUT, height=340)


def variant_data(summary: Mapping[str, Any], against: str = "hdmole") -> pd.DataFrame:
    """Every method's difference to `against` on accents and on general speech, in points of WER with its 95 % interval.

    Columns `method`, `label`, `domain`, `points`, `low`, `high`, `trainable`; below zero the method is better.
    """
    labels = method_labels(summary)
    rows = [
        {
            "method": d["method"], "label": labels[d["method"]], "domain": d["domain"], "points": d["points"],
            "low": d["interval"][0], "high": d["interval"][1], "trainable": summary["methods"][d["method"]].get("trainable"),
        }
        for d in summary.get("differences", [])
        if d["against"] == against and d["domain"] in ("accent", GENERAL)
    ]  # fmt: skip
    columns = ["method", "label", "domain", "points", "low", "high", "trainable"]
    return pd.DataFrame(rows, columns=columns).sort_values("points", ignore_index=True)


def variants(data: pd.DataFrame, against: str) -> go.Figure:
    """`variant_data` as dots with intervals, one row a method, accents and general speech side by side; zero is `against`."""
    domains = {"accent": "Accents", GENERAL: "General speech"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(domains.values()), shared_yaxes=True, horizontal_spacing=0.03)
    order = list(data[data.domain == "accent"].label)
    for column, domain in enumerate(domains, start=1):
        rows = data[data.domain == domain].set_index("label").reindex(order).reset_index()
        sure = (rows.high < 0) | (rows.low > 0)
        figure.add_scatter(
            row=1, col=column, x=rows.points, y=rows.label, mode="markers", showlegend=False,
            error_x=dict(
                symmetric=False, array=rows.high - rows.points, arrayminus=rows.points - rows.low, thickness=1.5, width=3,
                color="#8A8A8A",
            ),
            marker=dict(
                size=10, color=[METHOD_COLOURS.get(m, METHOD_COLOURS["hdmole"]) for m in rows.method], line_width=2,
                symbol=["circle" if s else "circle-open" for s in sure],
            ),
            customdata=np.stack([rows.low, rows.high], -1),
            hovertemplate="%{y}<br>%{x:+.1f} points [%{customdata[0]:+.1f}, %{customdata[1]:+.1f}]<extra></extra>",
        )  # fmt: skip
        figure.add_vline(x=0, row=1, col=column, line=dict(color="#8A8A8A", dash="dot", width=1))
    figure.update_xaxes(title=f"points of WER against {against}")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return figure.update_layout(**_LAYOUT, height=150 + 20 * len(order))


def curve_data(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Word error rates (%) on dev speech while the methods were trained: `method`, `label`, `step`, `accent`, `general`."""
    labels = method_labels(summary)
    rows = [
        {"method": method, "label": labels[method], "step": int(step), **rates}
        for method, points in summary.get("curves", {}).items()
        for step, rates in points.items()
    ]
    return pd.DataFrame(rows, columns=["method", "label", "step", "accent", GENERAL]).sort_values(["method", "step"])


def curves(data: pd.DataFrame) -> go.Figure:
    """`curve_data`: what each method gains on accents and loses on general speech, step by step."""
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
    figure.update_yaxes(title="WER on dev speech (%)", col=1)
    return figure.update_layout(**_LAYOUT, height=340, legend=dict(orientation="h", yanchor="top", y=-0.25, x=0))


def frontier_data(summary: Mapping[str, Any]) -> pd.DataFrame:
    """Word error rate (%) against mean experts at work: `choice` (thresholds, top_k, top_p), `value`, `active`, `accent`, `general`."""
    return pd.DataFrame(summary.get("frontier", []), columns=["choice", "value", "active", "accent", GENERAL])


def frontier(data: pd.DataFrame, active: float | None = None) -> go.Figure:
    """`frontier_data` as one line a way of choosing experts; `active` marks how many work now."""
    figure = go.Figure()
    ways = (
        ("thresholds", "thresholds scaled", "#E0672F", "circle"),
        ("top_k", "top-k", "#14507A", "square"),
        ("top_p", "top-p", "#7350B5", "diamond"),
    )
    for choice, name, colour, symbol in ways:
        rows = data[data.choice == choice].sort_values("active")
        figure.add_scatter(
            x=rows.active, y=rows.accent, mode="lines+markers", name=name, line_color=colour,
            marker=dict(size=9, symbol=symbol), customdata=np.stack([rows.value, rows[GENERAL]], -1),
            hovertemplate="%{customdata[0]:g}: %{x:.2f} experts<br>accents %{y:.1f} %, general %{customdata[1]:.1f} %",
        )  # fmt: skip
    if active is not None:
        for line in _ON_ANY_COLOUR:
            figure.add_vline(x=active, line=line)
    figure.update_xaxes(title="experts at work (mean)", rangemode="tozero")
    figure.update_yaxes(title="WER on accents, mean (%)")
    return figure.update_layout(**_LAYOUT, height=320, legend=dict(orientation="h", yanchor="top", y=-0.25, x=0))


# -- a corpus' routing ---------------------------------------------------------------------------------------------------

ROUTERS = {"gate": "Combined gate", "global_gate": "Global router", "local_probability": "Local router"}


def correspondence_data(routing: pd.DataFrame, router: str = "gate", layer: str | None = None) -> pd.DataFrame:
    """Mean weight of each expert for each accent, of one of `ROUTERS`: `spoken`, `accent` (the expert's), `weight`, `utterances`.

    `routing` is the table `hdmole compare` writes; one layer, or the mean over all.
    """
    rows = routing if layer is None else routing[routing.layer == layer]
    found = rows.groupby(["domain", "spoken", "expert", "accent"], sort=False).agg(
        weight=(router, "mean"), utterances=("utterance", "nunique")
    ).reset_index()  # fmt: skip
    order = {name: k for k, name in enumerate([*routing.sort_values("expert").accent.unique(), GENERAL])}
    found["order"] = found.spoken.map(lambda name: order.get(name, len(order)))
    return found.sort_values(["order", "spoken", "expert"], ignore_index=True).drop(columns="order")


def correspondence(data: pd.DataFrame) -> go.Figure:
    """`correspondence_data`: a row is an accent as spoken, a column an expert."""
    spoken, experts = list(data.spoken.unique()), list(data.accent.unique())
    values = data.pivot(index="spoken", columns="accent", values="weight").loc[spoken, experts].to_numpy(np.float32)
    figure = go.Figure(
        go.Heatmap(
            x=experts, y=spoken, z=values, zmin=0, colorscale=_GATE_SCALE, text=values, texttemplate="%{text:.2f}",
            colorbar=dict(title=dict(text="mean weight", side="right"), thickness=10),
            hovertemplate="spoken %{y}, expert %{x}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="expert", tickangle=-35, automargin=True, **_accent_ticks(experts))
    figure.update_yaxes(title="spoken", autorange="reversed", automargin=True, **_accent_ticks(spoken))
    return figure.update_layout(**_LAYOUT, height=420)


def map_data(routing: pd.DataFrame, router: str = "gate") -> pd.DataFrame:
    """Utterances in the plane: the two principal components of their routing vectors (layers x experts).

    Columns `utterance`, `domain`, `spoken`, `speaker`, `x`, `y`.
    """
    from sklearn.decomposition import PCA

    about = ["utterance", "domain", "spoken", "speaker"]
    vectors = routing.pivot_table(index=about, columns=["layer", "expert"], values=router, sort=False)
    points = PCA(2, random_state=0).fit_transform(vectors.to_numpy(float))
    return vectors.index.to_frame(index=False).assign(x=points[:, 0], y=points[:, 1])


def utterance_map(data: pd.DataFrame, experts: Sequence[str]) -> go.Figure:
    """`map_data`: one mark an utterance, in the colour of its accent's expert; accents without an expert as crosses."""
    known = list(data[data.domain != "unseen"].spoken.unique())
    colours = accent_colours(experts)
    figure = go.Figure()
    for spoken in sorted(
        data.spoken.unique(), key=lambda name: ([*colours].index(name) if name in colours else len(colours), name)
    ):
        rows = data[data.spoken == spoken]
        figure.add_scatter(
            x=rows.x, y=rows.y, mode="markers", name=accent_label(spoken), customdata=rows[["utterance", "speaker"]],
            marker=dict(size=7, color=colours.get(spoken, "#000000"), symbol="circle" if spoken in known else "x-thin-open"),
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}",
        )  # fmt: skip
    figure.update_xaxes(title="first principal component", showticklabels=False)
    figure.update_yaxes(title="second", showticklabels=False)
    return figure.update_layout(**_LAYOUT, height=420)


def attribution_data(summary: Mapping[str, Any]) -> pd.DataFrame:
    """What leaving an expert out changes, in nats per word: `spoken`, `accent` (the expert's), `change`, `low`, `high`."""
    found = summary.get("attribution", {"accents": [], "experts": [], "values": [], "intervals": []})
    rows = [
        {"spoken": spoken, "accent": expert, "change": value, "low": interval[0], "high": interval[1]}
        for spoken, values, intervals in zip(found["accents"], found["values"], found["intervals"], strict=True)
        for expert, value, interval in zip(found["experts"], values, intervals, strict=True)
    ]
    return pd.DataFrame(rows, columns=["spoken", "accent", "change", "low", "high"])


def attribution(data: pd.DataFrame) -> go.Figure:
    """`attribution_data`: dark where an expert helps the accent, that is where leaving it out makes the words less likely."""
    spoken, experts = list(data.spoken.unique()), list(data.accent.unique())
    values = data.pivot(index="spoken", columns="accent", values="change").loc[spoken, experts].to_numpy(np.float32)
    most = max(1e-6, float(np.abs(values).max(initial=0)))
    figure = go.Figure(
        go.Heatmap(
            x=experts, y=spoken, z=values, zmin=-most, zmax=most, colorscale="PuOr", text=values, texttemplate="%{text:.2f}",
            colorbar=dict(title=dict(text="log-likelihood per word (nats)", side="right"), thickness=10),
            hovertemplate="spoken %{y}, without expert %{x}: %{z:+.3f} nats per word<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="expert left out", tickangle=-35, automargin=True, **_accent_ticks(experts))
    figure.update_yaxes(title="spoken", autorange="reversed", automargin=True, **_accent_ticks(spoken))
    return figure.update_layout(**_LAYOUT, height=420)


def pair_data(utterances: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Two methods utterance by utterance: who said what, what each heard, `errors` of both, and how many fewer `method` made."""
    keys = ["utterance", "seed", "domain", "accent", "speaker", "reference", "words"]
    mine, theirs = (
        utterances[utterances.method == name].set_index(keys)[["hypothesis", "errors"]].add_suffix(f" {name}")
        for name in (method, against)
    )
    table = mine.join(theirs, how="inner").reset_index()
    table.insert(len(keys), "fewer errors", table[f"errors {against}"] - table[f"errors {method}"])
    return table.sort_values("fewer errors", ascending=False, ignore_index=True, kind="stable")


def pair_counts(table: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """How many utterances of `pair_data` have so many errors by one method and so many by the other: `mine`, `theirs`, `utterances`."""
    columns = {f"errors {method}": "mine", f"errors {against}": "theirs"}
    return table.rename(columns=columns).groupby(["mine", "theirs"]).size().rename("utterances").reset_index()


def pair_scatter(data: pd.DataFrame, mine: str, theirs: str) -> go.Figure:
    """`pair_counts` as discs: below the diagonal are utterances that the first method hears better."""
    better = data.mine < data.theirs
    colours = np.where(
        better, METHOD_COLOURS["hdmole"], np.where(data.mine > data.theirs, METHOD_COLOURS["gated_lora"], "#8A8A8A")
    )
    figure = go.Figure(
        go.Scatter(
            x=data.theirs, y=data.mine, mode="markers", customdata=data.utterances, showlegend=False,
            marker=dict(size=np.sqrt(data.utterances), sizemin=3, sizeref=np.sqrt(data.utterances.max()) / 40, color=colours),
            hovertemplate="%{customdata} utterances: %{y} errors against %{x}<extra></extra>",
        )
    )  # fmt: skip
    most = int(max(data.mine.max(), data.theirs.max(), 1))
    figure.add_shape(type="line", x0=0, y0=0, x1=most, y1=most, line=dict(color="#8A8A8A", dash="dot", width=1))
    figure.update_xaxes(title=f"word errors, {theirs}", range=[-0.7, most + 0.7])
    figure.update_yaxes(title=f"word errors, {mine}", range=[-0.7, most + 0.7])
    return figure.update_layout(**_LAYOUT, height=340)


def confusion_data(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> pd.DataFrame:
    """Confusion matrix (true, recognised) as one row a pair: `spoken`, `recognised`, `utterances`, `percent` of the spoken."""
    rows = []
    for spoken, row in zip(labels, counts, strict=True):
        total = max(1, sum(row))
        rows += [
            {"spoken": spoken, "recognised": label, "utterances": n, "percent": 100 * n / total}
            for label, n in zip(labels, row, strict=True)
        ]
    return pd.DataFrame(rows, columns=["spoken", "recognised", "utterances", "percent"])


def confusion_matrix(data: pd.DataFrame) -> go.Figure:
    """Heatmap of `confusion_data`: a row is an accent as spoken, a column as recognised, in percent of the row."""
    labels = list(data.spoken.unique())
    values = data.percent.to_numpy(np.float32).reshape(len(labels), len(labels))
    figure = go.Figure(
        go.Heatmap(
            x=labels, y=labels, z=values, zmin=0, zmax=100, colorscale=_GATE_SCALE, text=values, texttemplate="%{text:.0f}",
            colorbar=dict(title="%", thickness=10), hovertemplate="%{y} taken for %{x}: %{z:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="recognised as", tickangle=-35, automargin=True, **_accent_ticks(labels))
    figure.update_yaxes(title="spoken", autorange="reversed", automargin=True, **_accent_ticks(labels))
    return figure.update_layout(**_LAYOUT, height=380)


# -- parts ---------------------------------------------------------------------------------------------------------------


def _of_layer(table: pd.DataFrame, layer: str) -> pd.DataFrame:
    rows = table[table.layer == layer]
    if rows.empty:
        names = ", ".join(table.layer.unique()) or "none at all"
        raise ValueError(f"The trace has no layer {layer!r}; its layers are {names}.")
    return rows


def _grid(data: pd.DataFrame, row: str, row_order: str, value: str) -> tuple[np.ndarray, list[str], np.ndarray, str]:
    """Middles of the columns (T,), row labels, values (rows, T), and the axis' title; columns averaged to `MAX_COLUMNS`."""
    timed = bool(data.time.notna().all())
    column = "time" if timed else "frame"
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
    return middles, labels, values, "time (s)" if timed else "token"


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


def _accent_ticks(accents: Iterable[str]) -> dict[str, Any]:
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
    figure.update_layout(**_LAYOUT)
    if title == "time (s)":
        _mark_words(figure, words)
        if span:
            for line in _ON_ANY_COLOUR:
                figure.add_shape(type="rect", x0=span[0], x1=span[1], y0=0, y1=1, xref="x", yref="paper", line=line)
    return figure


def _mark_words(figure: go.Figure, words: Sequence[TimedWord]) -> None:
    """Name the words on a second time axis above the plot, each at its middle, with a thin line where it starts.

    They are an axis' ticks, so that they turn where there is no room for them side by side.
    """
    words = [word for word in words if word.end > word.start]
    if not words or len(words) > WORD_LABELS:
        return
    middles = [(word.start + word.end) / 2 for word in words]
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


def _mel(frequency: Any) -> Any:
    """Hertz on the mel scale, as librosa has it."""
    import librosa

    return librosa.hz_to_mel(frequency)
