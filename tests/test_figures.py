"""Figures: axes carry their units, and what is drawn is what was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from hdmole.figures import effect
from hdmole.figures import results as result_figures
from hdmole.figures import utterance as figures
from hdmole.method.gate import dynamic, relu
from hdmole.names import accent_label, layer_words
from hdmole.study.results import (
    Attribution,
    Difference,
    DomainRate,
    FrontierPoint,
    MethodResult,
    Rate,
    RecogniserResult,
    Results,
    provenance,
)

ACCENTS = ["british", "scottish", "caribbean", "indian", "german", "spanish", "french", "mandarin"]
LAYERS = ["multi_modal_projector.linear_1", "multi_modal_projector.layers.0.q_proj"]
STEP = 0.08  # s


@dataclass(frozen=True)
class Word:
    word: str
    start: float
    end: float


def table(frames: int = 10, seed: int = 0, timed: bool = True) -> pd.DataFrame:
    """A routing table as `Trace.to_frame` gives it, with random but consistent numbers."""
    rng = np.random.default_rng(seed)
    rows = []
    posterior = rng.dirichlet(np.ones(len(ACCENTS) + 1))[1:]
    for index, layer in enumerate(LAYERS):
        for frame in range(frames):
            local = rng.dirichlet(np.ones(len(ACCENTS)))
            gate = np.where(local > 0.1, local, 0).astype(np.float32)
            for expert, accent in enumerate(ACCENTS):
                rows.append(
                    dict(
                        call=0, layer=layer, layer_index=index, utterance=0, frame=frame, time=frame * STEP if timed else np.nan,
                        expert=expert, accent=accent, posterior=posterior[expert], local_probability=local[expert],
                        global_gate=float(posterior[expert] > 0.1), local_gate=gate[expert], gate=gate[expert],
                        tau_global=0.05, tau_local=0.1, n_active=float((gate > 0).sum()), n_active_global=3.0,
                        n_active_local=float((gate > 0).sum()), n_effective=1.5, n_effective_global=2.0, n_effective_local=1.5,
                        share=gate[expert] / max(gate.sum(), 1e-9), shared_share=0.0, change=1.0 + frame,
                    )
                )  # fmt: skip
    return pd.DataFrame(rows)


def without_green(colour: str) -> np.ndarray:
    """What of a colour someone with deuteranopia sees: linear RGB (Machado, Oliveira and Fernandes 2009)."""
    linear = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255) ** 2.2
    matrix = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    return np.clip(matrix @ linear, 0, 1)


def heatmap(figure: go.Figure) -> go.Heatmap:
    return next(trace for trace in figure.data if trace.type == "heatmap")


def test_colours_stay_with_their_accent_and_differ() -> None:
    colours = figures.accent_colours(["general", *ACCENTS])
    assert len(set(colours.values())) == 9
    assert figures.accent_colours(ACCENTS) == colours  # with or without the general domain in the list


@pytest.mark.parametrize("colours", [figures.METHOD_COLOURS, figures.accent_colours(ACCENTS)], ids=["methods", "accents"])
def test_colours_differ_for_those_who_do_not_see_green(colours: dict[str, str]) -> None:
    seen = [without_green(colour) ** (1 / 2.2) for colour in dict.fromkeys(colours.values())]
    assert min(np.abs(a - b).max() for a, b in combinations(seen, 2)) > 0.07  # of 1


def test_gate_heatmap_shows_the_gates_and_leaves_experts_that_are_off_empty() -> None:
    data = figures.gate_data(table(), LAYERS[1])
    figure = figures.gate_heatmap(data, 2.0)
    shown = heatmap(figure)
    values = data.pivot(index="expert", columns="time", values="gate").to_numpy()
    assert list(shown.y) == ACCENTS
    np.testing.assert_allclose(np.nan_to_num(shown.z), values, rtol=1e-6)
    assert np.array_equal(np.isnan(shown.z), values == 0)
    np.testing.assert_allclose(shown.x, (np.arange(10) + 0.5) * STEP)  # middles of the frames
    assert "(s)" in figure.layout.xaxis.title.text
    assert shown.colorbar.title.text == "gate"
    assert heatmap(figures.gate_heatmap(data, 2.0, tau=0.08)).meta == {"tau": "0.080"}


def test_a_gates_scale_is_that_of_the_gate_and_not_of_its_values() -> None:
    """Weights that hardly differ look alike, and figures of two utterances can be compared."""
    rows = table()
    even = rows.assign(gate=np.where(rows.expert == 3, 0.14, 0.12))
    words = [Word("set", 0.0, 0.4)]
    for figure in (
        figures.gate_heatmap(figures.gate_data(even, LAYERS[0]), 2.0),
        figures.gate_heatmap(figures.gate_data(rows, LAYERS[0]), 2.0),
        figures.word_heatmap(figures.word_data(even, words), 2.0),
        figures.layer_overview(figures.overview_data(even), 2.0),
    ):
        shown = heatmap(figure)
        assert (shown.zmin, shown.zmax) == (0, 2) and shown.colorscale == heatmap(
            figures.layer_overview(figures.overview_data(rows), 2.0)
        ).colorscale
    worth = pd.DataFrame([dict(position=0, word="set", start=0.0, end=0.4, expert=0, accent="indian", value=-0.01)])
    shown = heatmap(figures.worth_heatmap(worth))
    assert (shown.zmin, shown.zmax) == pytest.approx((-0.693147, 0.693147))  # half and twice as likely
    assert list(shown.colorbar.ticktext) == ["half as likely", "as likely", "twice as likely"]
    np.testing.assert_allclose(shown.text, [[0.99005]], rtol=1e-5)  # exp(-0.01)


def test_experts_of_negative_weight_are_drawn() -> None:
    rows = table()
    rows["gate"] = np.where(rows.expert == 0, -0.1, 0.0)
    shown = heatmap(figures.gate_heatmap(figures.gate_data(rows, LAYERS[0]), 2.0))
    assert not np.isnan(shown.z[0]).any() and np.isnan(shown.z[1:]).all()
    assert set(figures.threshold_data(rows.assign(global_gate=rows.gate), LAYERS[0]).query("router == 'global'").share_on) == {
        0,
        1,
    }


def test_gate_heatmap_has_a_mark_that_can_be_clicked_on_every_cell() -> None:
    marks = figures.gate_heatmap(figures.gate_data(table(), LAYERS[0]), 2.0).data[1]
    assert marks.type == "scatter" and marks.marker.opacity == 0
    assert len(marks.x) == len(marks.y) == 10 * len(ACCENTS)
    assert marks.hoverinfo != "skip"  # which would take the clicks away


def test_words_stand_over_their_own_time() -> None:
    words = [Word("set", 0.0, 0.2), Word("<alarm>", 0.3, 0.7)]
    figure = figures.gate_heatmap(figures.gate_data(table(), LAYERS[0]), 2.0, "gate", words)
    axis = figure.layout.xaxis9
    assert axis.side == "top" and axis.matches == "x"
    assert list(axis.ticktext) == ["set", "&lt;alarm&gt;"]
    assert list(axis.tickvals) == pytest.approx([0.1, 0.5])
    assert axis.tickangle is None and -90 in axis.autotickangles  # so that they turn where there is no room


def test_a_saved_gate_has_the_words_and_the_layer() -> None:
    data = pd.DataFrame({"time": [0.0, 0.19, 0.2, 0.5, float("nan")], "gate": 0.1})
    saved = figures.with_words(data, "encoder.0.fc1", [Word("set", 0.0, 0.2), Word("alarm", 0.3, 0.7)])
    assert list(saved.word) == ["set", "set", "", "alarm", ""] and set(saved.layer) == {"encoder.0.fc1"}


def test_names_of_short_words_do_not_stand_on_each_other() -> None:
    words = [Word("a", 0.0, 1.0), Word("to", 1.0, 1.02), Word("the", 1.02, 1.04), Word("b", 1.04, 2.0)]
    places = figures.sound(np.zeros(32_000, np.float32), 16_000, words).layout.xaxis9.tickvals
    assert min(np.diff(places)) >= 0.06 * 2 - 1e-9 and places[0] == 0.5 and places[3] == pytest.approx(1.52)
    assert np.mean(places[1:3]) == pytest.approx(1.02)  # in the middle of where they were said


def test_a_moment_is_framed_on_any_colour() -> None:
    data = figures.gate_data(table(), LAYERS[0])
    frames = figures.gate_heatmap(data, 2.0, span=(0.2, 0.4)).layout.shapes
    assert {(frame.x0, frame.x1) for frame in frames} == {(0.2, 0.4)}
    assert len({frame.line.color for frame in frames}) == 2
    assert not figures.gate_heatmap(data, 2.0).layout.shapes


def test_long_audio_is_averaged_and_short_audio_is_not() -> None:
    data = figures.gate_data(table(frames=2 * figures.MAX_COLUMNS), LAYERS[0], "local_probability")
    shown = heatmap(figures.gate_heatmap(data, 1.0, "local_probability"))
    assert shown.z.shape == (len(ACCENTS), figures.MAX_COLUMNS) and shown.z.dtype == np.float32
    exact = data.pivot(index="expert", columns="time", values="local_probability").to_numpy()
    np.testing.assert_allclose(shown.z[:, 0], exact[:, :2].mean(1), rtol=1e-5)
    np.testing.assert_allclose(shown.x[0], STEP)  # middle of two frames


def test_without_times_the_axis_counts_positions() -> None:
    figure = figures.gate_heatmap(figures.gate_data(table(timed=False), LAYERS[0]), 2.0, words=[Word("set", 0.0, 0.2)])
    assert figure.layout.xaxis.title.text == "position"
    assert "xaxis9" not in figure.to_dict()["layout"]


def test_layers_without_times_are_left_out_beside_others() -> None:
    data = figures.effective_data(table())
    untimed = data.assign(
        layer="base_model.model.audio_tower.encoder.layers.0.self_attn.relative_k_proj", layer_index=9, time=np.nan
    )
    shown = heatmap(figures.effective_heatmap(pd.concat([data, untimed]), len(ACCENTS)))
    assert list(shown.y) == ["linear_1", "layers.0.q_proj"] and shown.z.shape == (2, 10)


def test_layers_have_short_names() -> None:
    names = [
        "multi_modal_projector.linear_1",
        "audio_tower.encoder.layers.1.feed_forward2.linear1",
        "language_model.model.layers.0.mlp.up_proj",
        "model.encoder.layers.3.self_attn.q_proj",
    ]
    labels = ["linear_1", "encoder.1.ff2.linear1", "llm.0.up_proj", "encoder.3.q_proj"]
    assert [figures.layer_label(f"base_model.model.{n}") for n in names] == labels


def test_general_speech_of_one_kind_has_its_own_name_beside_accents() -> None:
    names = ("real_general", "general", "new_york", "shared")
    assert [accent_label(name) for name in names] == ["Real general speech", "General", "New York", "Shared expert"]


def test_layers_have_plain_names() -> None:
    """Numbers are from 1, as people count."""
    said = {
        "layers.0.fc1": "Layer 1: feed-forward, in", "encoder.5.q_proj": "Encoder 6: query", "llm.0.up_proj": "LLM 1: feed-forward, in",
        "encoder.1.ff2.linear1": "Encoder 2: feed-forward, in 2", "linear_1": "first layer", "decoder.0.encoder_attn.k_proj": "Decoder 1: key",
        "layers.1.unknown": "Layer 2: unknown", "other": "other",
    }  # fmt: skip
    assert {label: layer_words(label) for label in said} == said


def test_the_effective_number_of_experts_is_drawn_per_layer_and_frame() -> None:
    data = figures.effective_data(table())
    assert len(data) == 10 * len(LAYERS)
    shown = heatmap(figures.effective_heatmap(data, len(ACCENTS)))
    assert list(shown.y) == ["linear_1", "layers.0.q_proj"]
    np.testing.assert_allclose(shown.z[1], data[data.layer_index == 1].n_effective)
    assert (shown.zmin, shown.zmax) == (0, len(ACCENTS))


def test_what_an_expert_carries_counts_frames_by_their_change_and_layers_alike() -> None:
    """Two layers of two frames and two experts, and a shared one.

    In the first layer the changes are 1 and 3, so that their squares weigh 1 to 9: expert a carries
    (1 * 1.0 + 9 * 0.2) / 10 = 28 %, b (1 * 0.0 + 9 * 0.5) / 10 = 45 %, the shared one the rest, 27 %.
    In the second, with equal changes, a carries 50 %, b -10 %, the shared one 60 %.
    """
    rows = pd.DataFrame(
        [
            dict(layer_index=layer, frame=frame, expert=expert, accent="ab"[expert], gate=gate, share=share, shared_share=rest, change=change)
            for layer, frame, change, gates, shares, rest in (
                (0, 0, 1.0, (0.3, 0.1), (1.0, 0.0), 0.0), (0, 1, 3.0, (0.3, 0.1), (0.2, 0.5), 0.3),
                (1, 0, 2.0, (0.0, 0.2), (0.4, 0.0), 0.6), (1, 1, 2.0, (0.2, 0.0), (0.6, -0.2), 0.6),
            )
            for expert, (gate, share) in enumerate(zip(gates, shares, strict=True))
        ]
    )  # fmt: skip
    data = effect.carried_data(rows)
    assert list(data.accent) == ["a", "b", "shared"]
    np.testing.assert_allclose(data.carried, [39, 17.5, 43.5])  # means over the two layers
    np.testing.assert_allclose(data.weight, [62.5, 37.5, np.nan])  # 75 and 25 %, 50 and 50 %
    bars = effect.carried_bars(data)
    assert [bar.name for bar in bars.data] == ["share of the weights", "share of the change"]
    assert bars.layout.xaxis.range[0] == -1 and effect.carried_bars(data.assign(carried=-5.0)).layout.xaxis.range[0] == -6
    alone = effect.carried_data(rows.assign(shared_share=0.0))
    assert list(alone.accent) == ["a", "b"]
    still = effect.carried_data(rows.assign(change=0.0, gate=0.0, share=0.0, shared_share=0.0))
    assert not still.carried.any() and not still.weight.any()


def test_the_effect_on_words_shows_before_another_word_is_heard() -> None:
    """From 0.8 to 0.4 is half as likely, from 0.5 to 0.55 is 1.1 times; on average 0.55 ** 0.5 = 0.7416 times."""
    probabilities = (("turn", 0.8, 0.4), ("on", 0.5, 0.55))
    words = [{"word": word, "before": np.log(before), "after": [np.log(after)]} for word, before, after in probabilities]
    data = effect.word_effect_data(words)
    np.testing.assert_allclose(data.times, [0.5, 1.1])
    assert effect.times_as_likely(data) == pytest.approx(0.74162, abs=1e-5)
    assert [effect.effect_size(of) for of in (data, data[1:], data.assign(change=-0.004))] == [
        "large",
        "small",
        "none",
    ]
    rings, discs = effect.word_effect(data).data[-2:]
    assert (rings.name, list(rings.y), discs.name, list(discs.y)) == ("as trained", [80, 50], "changed", pytest.approx([40, 55]))
    nothing = effect.word_effect_data([])
    assert effect.times_as_likely(nothing) == 1 and effect.effect_size(nothing) == "none"


def test_thresholds_are_compared_with_the_numbers_the_routers_compare() -> None:
    rows = table()
    data = figures.threshold_data(rows, LAYERS[0])
    mine = rows[rows.layer == LAYERS[0]]
    of_global = data[data.router == "global"].sort_values("expert")
    of_local = data[data.router == "local"].sort_values("expert")
    first = mine[mine.frame == 0]
    np.testing.assert_allclose(of_global.weight, first.posterior / first.posterior.sum())
    np.testing.assert_allclose(of_local.weight, mine.groupby("expert").local_probability.mean())
    np.testing.assert_allclose(of_local.share_on, (mine.local_probability > 0.1).groupby(mine.expert).mean())
    assert set(of_global.threshold.round(6)) == {0.05} and set(of_local.threshold.round(6)) == {0.1}


def test_thresholds_at_one_moment_are_that_frames() -> None:
    rows = table()
    data = figures.threshold_data(rows, LAYERS[1], time=0.39)
    frame = rows[(rows.layer == LAYERS[1]) & (rows.frame == 4)]
    np.testing.assert_allclose(data[data.router == "local"].sort_values("expert").weight, frame.local_probability)
    assert (data.lowest == data.highest).all()


def test_the_middle_of_a_cell_lies_in_its_own_frame_only() -> None:
    rows = table()
    middles = heatmap(figures.gate_heatmap(figures.gate_data(rows, LAYERS[0]), 2.0)).x  # where a click says it was
    for frame, middle in enumerate(middles):
        assert set(figures.frame_at(rows, float(middle)).frame) == {frame}
    assert set(figures.frame_at(rows, -1.0).frame) == {0} and set(figures.frame_at(rows, 99.0).frame) == {9}


def test_an_adapter_without_thresholds_shows_none() -> None:
    rows = table()
    rows["global_gate"] = (rows.expert == 1).astype(float)  # top-1, which neither weights nor thresholds tell
    figure = figures.threshold_bars(figures.threshold_data(rows, LAYERS[0]), learned=False)
    assert list(figure.data[0].marker.pattern.shape) == ["" if k == 1 else "/" for k in range(len(figure.data[0].y))]
    assert not figure.layout.shapes and [note.text for note in figure.layout.annotations] == ["Global", "Local"]


@pytest.mark.parametrize(("select", "ties"), [(dynamic, True), (relu, False)], ids=["the paper's", "ours"])
def test_bars_of_experts_that_are_off_are_hatched(select: Callable[[Tensor, float], Tensor], ties: bool) -> None:
    """An expert exactly at the threshold is on in the paper's gate, and off in ours."""
    weights = torch.tensor([0.25, 0.125, 0.125, 0.125, 0.125, 0.125, 0.0625, 0.0625])
    rows = table()
    rows["local_probability"] = weights.numpy()[rows.expert]
    rows["posterior"] = 0.5 * rows.local_probability  # half of the utterance is accented
    gate = select(weights, 0.125).numpy()[rows.expert]
    rows = rows.assign(global_gate=gate, local_gate=gate, tau_global=0.125, tau_local=0.125)
    data = figures.threshold_data(rows, LAYERS[0])
    figure = figures.threshold_bars(data)
    for bar, router in zip(figure.data, ("global", "local"), strict=True):
        np.testing.assert_allclose(bar.x, weights)
        full = [shape == "" for shape in bar.marker.pattern.shape]
        assert full == [True, *[ties] * 5, False, False], router
    assert {line.x0 for line in figure.layout.shapes} == {0.125}
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range == (0, 1)


def test_an_expert_that_is_on_half_of_the_time_is_drawn_full() -> None:
    rows = table()
    on = (rows.expert == 0) & (rows.frame < 5) | (rows.expert == 1) & (rows.frame < 4)
    data = figures.threshold_data(rows.assign(local_gate=np.where(on, 0.3, 0.0)), LAYERS[0])
    local = figures.threshold_bars(data).data[1]
    assert [shape == "" for shape in local.marker.pattern.shape] == [True] + [False] * 7


def test_an_utterance_of_the_general_domain_has_no_accent_shares() -> None:
    rows = table().assign(posterior=0.0)
    assert (figures.threshold_data(rows, LAYERS[0]).query("router == 'global'").weight == 0).all()


def test_layer_overview_shows_mean_gates() -> None:
    rows = table()
    shown = heatmap(figures.layer_overview(figures.overview_data(rows), 2.0))
    expected = rows.groupby(["layer_index", "expert"]).gate.mean().unstack().to_numpy()
    np.testing.assert_allclose(shown.z, expected, rtol=1e-5)
    assert list(shown.x) == ACCENTS


def test_a_layer_that_is_not_in_the_trace_is_named() -> None:
    with pytest.raises(ValueError, match="no layer 'nowhere'"):
        figures.gate_data(table(), "nowhere")


def test_spectrogram_finds_a_tone_where_it_is() -> None:
    time = np.arange(16_000) / 16_000
    wave = (0.5 * np.sin(2 * np.pi * 1_000 * time)).astype(np.float32)
    times, frequencies, levels = figures.mel_spectrogram(wave, 16_000)
    assert levels.dtype == np.int8 and levels.max() == 0
    assert abs(frequencies[levels[:, 50].argmax()] - 1_000) < 40  # Hz, about one mel bin
    assert times[-1] == pytest.approx(1.0, abs=0.02)


def test_sound_has_seconds_and_hertz_on_its_axes() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    figure = figures.sound(wave, 16_000, [Word("noise", 0.1, 0.9)])
    assert figure.layout.xaxis2.title.text == "time (s)" and figure.layout.yaxis2.title.text == "frequency (Hz)"
    assert figure.layout.xaxis2.range == pytest.approx((0, 1.5))
    assert list(figure.layout.xaxis9.ticktext) == ["noise"]


def test_the_spectrogram_has_a_mel_axis_in_hertz_and_its_own_table() -> None:
    wave = np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000).astype(np.float32)
    figure, data = figures.sound(wave, 16_000), figures.spectrogram_data(wave, 16_000)
    shown = heatmap(figure)
    ticks = dict(zip(figure.layout.yaxis2.ticktext, figure.layout.yaxis2.tickvals, strict=True))
    loudest = shown.z[:, 50].argmax()
    assert abs(shown.y[loudest] - ticks[1_000]) < 2 * np.diff(shown.y).max()
    np.testing.assert_allclose(np.diff(shown.y), np.diff(shown.y)[0], rtol=1e-3)  # bins are evenly spaced in mel
    assert len(data) == shown.z.size and data.level.max() == 0
    assert abs(data.frequency[data.level.argmax()] - 1_000) < 40


def test_the_envelope_keeps_the_peaks() -> None:
    wave = np.zeros(100_000, np.float32)
    wave[54_321], wave[99_999] = 0.75, -0.5
    outline = figures.envelope(wave, 16_000)
    assert len(outline) <= 1_200
    assert outline.high.max() == pytest.approx(0.75) and outline.low.min() == pytest.approx(-0.5)
    assert outline.time[outline.high.argmax()] == pytest.approx(54_321 / 16_000, abs=0.01)


def test_posterior_bars_are_percent_in_the_models_order() -> None:
    bar = figures.accent_posterior({"general": 0.25, "indian": 0.7, "german": 0.05}).data[0]
    assert list(bar.y) == ["general", "indian", "german"]
    assert list(bar.x) == pytest.approx([25, 70, 5])


def rate(wer: float, speakers: int = 5) -> Rate:
    return Rate(wer=wer, interval=(wer - 1, wer + 2), errors=0, words=0, utterances=0, speakers=speakers)


def domain(wer: float, speakers: int, **accents: Rate) -> DomainRate:
    mean = {"mean_over_accents": wer + 10, "mean_interval": (wer + 8, wer + 13)}
    return DomainRate(**rate(wer, speakers).to_dict(), **mean, accents=accents)


def results_of(methods: dict[str, MethodResult], differences: Sequence[Difference] = ()) -> Results:
    return Results(methods=methods, differences=list(differences), provenance=provenance(0, "cpu"))


def test_error_rates_are_read_from_the_results_with_their_intervals() -> None:
    base = MethodResult(domains={"accent": domain(20, 5, indian=rate(30), german=rate(10)), "general": domain(4, 5)})
    hdmole = MethodResult(domains={"accent": domain(12, 5, indian=rate(18), german=rate(6)), "general": domain(5, 5)})
    data = result_figures.error_rate_data(results_of({"base": base, "hdmole": hdmole, "rank4": base}))
    assert list(data.accent) == ["indian", "german", "general"] * 2  # rank4 is a variant
    assert list(data.wer) == [30, 10, 4, 18, 6, 5] and list(data.low) == [29, 9, 3, 17, 5, 4] and set(data.speakers) == {5}
    assert list(data.label) == ["Frozen base"] * 3 + ["HDMoLE"] * 3
    first = result_figures.error_rates(data).data[0]
    assert list(first.y) == [30, 10, 4]
    assert list(first.error_y.array) == [2, 2, 2] and list(first.error_y.arrayminus) == [1, 1, 1]
    only = result_figures.error_rate_data(results_of({"rank4": base}), "real_digits")
    assert list(only.columns) == list(data.columns) and only.empty


def test_the_cost_on_general_speech_is_read_from_the_results() -> None:
    methods = {
        name: MethodResult(domains={"accent": domain(wer, 5), "general": domain(general, 5)}, trainable=size)
        for name, wer, general, size in (("base", 20, 4, 0), ("hdmole", 12, 5, 300))
    }
    data = result_figures.forgetting_data(results_of(methods)).set_index("method")
    assert data.loc["hdmole"].to_dict() == {
        "label": "HDMoLE", "accents": 22, "accents_low": 20, "accents_high": 25, "general": 5, "general_low": 4, "general_high": 7,
        "trainable": 300,
    }  # fmt: skip
    del methods["base"].domains["general"]
    assert list(result_figures.forgetting_data(results_of(methods)).method) == ["hdmole"]


def test_speech_of_people_and_of_a_synthesiser_stay_apart() -> None:
    rates = {"real_adults": 20, "real_general": 6, "synthetic_accents": 40, "synthetic_general": 9, "real_digits": 30}
    results = results_of({"base": MethodResult(domains={name: domain(wer, 5, german=rate(wer)) for name, wer in rates.items()})})
    assert results.domains == ["real_adults", "real_digits", "real_general", "synthetic_accents", "synthetic_general"]
    assert results.target == "real_adults" and results_of({}).target == "accent"
    for name, accents, general in (("real_adults", 20, 6), ("synthetic_accents", 40, 9)):
        cost = result_figures.forgetting_data(results, name)
        assert (cost.accents.item(), cost.general.item(), cost.accents_low.item()) == (accents, general, accents - 1)
        assert list(result_figures.error_rate_data(results, name).wer) == [accents, general]
        titles = [result_figures.forgetting(cost, name).layout[axis].title.text for axis in ("xaxis", "yaxis")]
        assert [title.split(",")[1].split()[0] for title in titles] == [name.split("_")[0]] * 2
    assert list(result_figures.error_rate_data(results, "real_digits").wer) == [30]
    assert result_figures.forgetting_data(results).empty


def test_differences_to_a_method_are_sorted_and_keep_their_sign() -> None:
    methods = {
        name: MethodResult(domains={"accent": domain(9, 5)}, trainable=size) for name, size in (("lora", 7), ("hdmole", 9))
    }
    found = [
        Difference(domain="accent", method="lora", against="hdmole", points=1.5, interval=(0.5, 2.5)),
        Difference(domain="general", method="lora", against="hdmole", points=-2.0, interval=(-3.0, -1.0)),
        Difference(domain="accent", method="hdmole", against="lora", points=-1.5, interval=(-2.5, -0.5)),
        Difference(domain="unseen", method="lora", against="hdmole", points=9.0, interval=(8.0, 10.0)),
    ]
    data = result_figures.variant_data(results_of(methods, found))
    assert data.to_dict("records") == [
        {"method": "lora", "label": "LoRA", "domain": "general", "points": -2.0, "low": -3.0, "high": -1.0, "trainable": 7},
        {"method": "lora", "label": "LoRA", "domain": "accent", "points": 1.5, "low": 0.5, "high": 2.5, "trainable": 7},
    ]
    assert list(result_figures.variant_data(results_of(methods, found), "lora").points) == [-1.5]


def test_curves_frontier_and_attribution_are_read_from_the_results() -> None:
    results = results_of({"lora": MethodResult(domains={}, label="LoRA, rank 4")})
    empty = (result_figures.curve_data(results), result_figures.frontier_data(results), result_figures.attribution_data(results))
    assert [len(table) for table in empty] == [0, 0, 0]
    results.curves = {"lora": {20: {"accent": 9.0, "general": 3.0}, 10: {"accent": 12.0, "general": 2.5}}}
    results.frontier = [FrontierPoint(choice="top_k", value=2, active=2.0, accent=8.5, general=3.5)]
    results.attribution = Attribution(
        accents=["indian"],
        experts=["indian", "german"],
        values=[[-0.5, 0.25]],
        intervals=[[(-0.75, -0.125), (0.0, 0.5)]],
        utterances=9,
    )
    assert result_figures.curve_data(results).to_numpy().tolist() == [
        ["lora", "LoRA, rank 4", 10, 12.0, 2.5], ["lora", "LoRA, rank 4", 20, 9.0, 3.0],
    ]  # fmt: skip
    assert result_figures.frontier_data(results).to_numpy().tolist() == [["top_k", 2.0, 2.0, 8.5, 3.5]]
    assert result_figures.attribution_data(results).to_numpy().tolist() == [
        ["indian", "indian", -0.5, -0.75, -0.125], ["indian", "german", 0.25, 0.0, 0.5],
    ]  # fmt: skip


def test_the_confusion_matrix_is_in_percent_of_what_was_spoken() -> None:
    recogniser = RecogniserResult(balanced_accuracy=0.75, labels=["indian", "german"], confusion=[[3, 1], [0, 0]])
    data = result_figures.confusion_data(recogniser)
    assert list(data.percent) == [75, 25, 0, 0] and list(data.utterances) == [3, 1, 0, 0]
    shown = heatmap(result_figures.confusion_matrix(data))
    np.testing.assert_allclose(shown.z, [[75, 25], [0, 0]])
    assert list(shown.x) == list(shown.y) == ["indian", "german"]


def test_intervals_of_few_speakers_are_not_drawn() -> None:
    methods = {
        name: MethodResult(
            domains={"accent": domain(wer, 4, indian=rate(wer, 5), german=rate(wer, 1)), "general": domain(wer, 5)}
        )
        for name, wer in (("base", 20), ("hdmole", 12))
    }
    found = [Difference(domain=d, method="base", against="hdmole", points=8, interval=(7, 9)) for d in ("accent", "general")]
    results = results_of(methods, found)
    data = result_figures.error_rate_data(results)
    assert list(data.low.isna()) == list(data.high.isna()) == [False, True, False] * 2 and list(data.speakers) == [5, 1, 5] * 2
    bar = result_figures.error_rates(data).data[0]
    assert np.isnan(bar.error_y.array[1]) and [list(c) for c in bar.customdata][:2] == [[" [19.0, 22.0]", 5], ["", 1]]
    cost = result_figures.forgetting_data(results)
    assert cost.accents_low.isna().all() and cost.general_low.notna().all()
    accents, general = result_figures.variants(result_figures.variant_data(results)).data
    assert accents.marker.symbol == ("circle-open",) and general.marker.symbol == ("circle",)


def test_intervals_and_accents_without_an_expert_show_on_light_and_on_dark() -> None:
    rates = pd.DataFrame([dict(accent="indian", method="hdmole", label="HDMoLE", wer=12.0, low=11.0, high=13.0, speakers=12)])
    values = dict.fromkeys(("accents", "accents_low", "accents_high", "general", "general_low", "general_high", "trainable"), 5.0)
    cost = pd.DataFrame([dict(method="hdmole", label="HDMoLE", **values)])
    for figure in (result_figures.error_rates(rates), result_figures.forgetting(cost), result_figures.parameters(cost)):
        assert figure.data[0].error_y.color == result_figures.GREY
    assert result_figures.forgetting(cost).data[0].error_x.color == result_figures.GREY
    spoken = ["indian", "general", "lancaster", "midlands", "new_york"]
    points = pd.DataFrame(dict(utterance=spoken, domain="unseen", spoken=spoken, speaker="s", x=0.0, y=0.0))
    marks = [trace.marker for trace in result_figures.utterance_map(points, ["indian"]).data]
    assert len({mark.symbol for mark in marks[2:]} | {"circle"}) == 4 and {mark.color for mark in marks[2:]} == {"#8A8A8A"}
    assert [mark.symbol for mark in marks[:2]] == ["circle", "circle"]
    many = [f"accent_{i:02d}" for i in range(12)]  # more than there are colours
    points = pd.DataFrame(dict(utterance=many, domain="accent", spoken=many, speaker="s", x=0.0, y=0.0))
    marks = [trace.marker for trace in result_figures.utterance_map(points, many).data]
    assert len({(mark.color, mark.symbol) for mark in marks}) == 12


def test_a_matrix_of_even_weights_looks_even() -> None:
    """Its scale ends where one expert would have all the weight of a row, whatever the gate."""
    even = pd.DataFrame(
        [dict(spoken=s, accent=a, weight=w) for s in "ab" for a, w in zip("abcd", (0.13, 0.12, 0.12, 0.12), strict=True)]
    )
    shown = heatmap(result_figures.correspondence(even))
    assert (shown.zmin, shown.zmax) == (0, pytest.approx(0.49)) and [list(line) for line in shown.text] == [
        [".130", ".120", ".120", ".120"]
    ] * 2
    unheard = pd.concat([even, even[:4].assign(spoken="c", weight=0.01)])
    assert heatmap(result_figures.correspondence(unheard)).zmax == pytest.approx(0.49)  # one scale for all rows


def test_the_diagonal_is_counted_where_an_accent_has_an_expert() -> None:
    rows = [("a", (0.5, 0.4)), ("b", (0.3, 0.2)), ("unseen", (0.1, 0.9))]
    data = pd.DataFrame([dict(spoken=s, accent=a, weight=w) for s, weights in rows for a, w in zip("ab", weights, strict=True)])
    assert result_figures.on_the_diagonal(data) == {"count": 1, "all": 2}  # b's words go to expert a; unseen has none


def test_changes_that_are_not_established_have_no_colour() -> None:
    cells = [("a", -0.2, -0.3, -0.1), ("b", -0.2, -0.5, 0.1), ("c", 0.05, 0.01, 0.09), ("d", 0.05, 0.0, 0.1)]
    data = pd.DataFrame([dict(spoken="a", accent=accent, change=c, low=low, high=high) for accent, c, low, high in cells])
    shown = heatmap(result_figures.attribution(data))
    less, more = -18.1269, 5.1271  # percent: exp(-0.2) and exp(0.05)
    np.testing.assert_allclose(shown.z, [[less, 0, more, 0]], rtol=1e-5)
    np.testing.assert_allclose(shown.customdata, [[less, less, more, more]], rtol=1e-5)
    assert [list(line) for line in shown.text] == [
        ["-18.1", "-18.1", "5.1", "5.1"]
    ] and "%{customdata:+.1f} %" in shown.hovertemplate


def test_numbers_in_matrices_can_be_read_in_narrow_cells() -> None:
    weights = pd.DataFrame(dict(spoken=["a", "a"], accent=["x", "y"], weight=[0.123, 1.031]))
    shown = heatmap(result_figures.correspondence(weights))
    assert [list(line) for line in shown.text] == [[".12", "1.0"]] and shown.textfont.size >= 9
    changes = pd.DataFrame(dict(spoken=["a", "a"], accent=["x", "y"], change=[-0.241, -0.001], low=-0.3, high=0.1))
    shown = heatmap(result_figures.attribution(changes))
    assert [list(line) for line in shown.text] == [["-21.4", "-.1"]] and shown.textfont.size >= 9


def test_a_figure_of_its_own_makes_room_for_its_axes() -> None:
    figure = go.Figure(go.Bar(x=["a"], y=[1]))
    shown = figures.exported(figure)
    assert shown.layout.xaxis.automargin and shown.layout.yaxis.automargin and figure.layout.xaxis.automargin is None
