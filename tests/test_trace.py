"""The trace: that it changes nothing, says what happened, and keeps it through shifting, joining,
saving and loading.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_layers import ACCENTS, Two, adapted, posteriors

from hdmole import Trace, route, trace
from hdmole.method.tracing import Record


def assert_equal(one: Trace, other: Trace) -> None:
    """Both hold the same records in the same order, number for number and type for type."""
    assert one.experts == other.experts and len(one.records) == len(other.records)
    for a, b in zip(one.records, other.records, strict=True):
        assert (a.segment, a.call, a.layer, a.layer_index) == (b.segment, b.call, b.layer, b.layer_index)
        assert set(a.arrays) == set(b.arrays)
        for name, values in a.arrays.items():
            assert values.dtype == b.arrays[name].dtype and np.array_equal(values, b.arrays[name], equal_nan=True), name


def saved_and_loaded(recorded: Trace) -> Trace:
    file = io.BytesIO()
    recorded.save(file)
    return Trace.load(io.BytesIO(file.getvalue()))


def some_trace(experts: int, layers: list[int], calls: int, seed: int) -> Trace:
    """Random numbers of these layers in these calls; up to three frames in each, the time of odd
    layers unknown.
    """
    rng = np.random.default_rng(seed)
    made = Trace([f"accent {i}" for i in range(experts)])
    for call in range(calls):
        for index in layers:
            frames = int(rng.integers(1, 4))
            arrays: dict[str, np.ndarray] = {k: rng.integers(0, 3, frames) for k in ("utterance", "row", "frame")}
            arrays["time"] = arrays["frame"] * (math.nan if index % 2 else 0.08)
            for name in ("posterior", "local_probability", "global_gate", "local_gate", "gate", "active", "share"):
                arrays[name] = rng.random((frames, experts), np.float32)
            counts = ("n_active", "n_active_global", "n_active_local", "n_effective", "n_effective_global", "n_effective_local")
            for name in ("tau_global", "tau_local", "lambda_", "mass", *counts, "shared_share", "change"):
                arrays[name] = rng.random(frames, np.float32)
            made.records.append(Record(f"layer {index}", index, call, arrays))
    return made


traces = st.builds(
    some_trace, st.just(3), st.sets(st.integers(0, 4), max_size=3).map(list), st.integers(0, 3), st.integers(0, 10_000)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(traces, min_size=1, max_size=4), st.floats(-5, 5))
def test_segments_survive_joining_saving_and_loading(parts: list[Trace], seconds: float) -> None:
    joined = Trace.join([part.shifted(seconds) for part in parts])
    assert len({(r.segment, r.call, r.layer) for r in joined.records}) == len(joined.records)
    loaded = saved_and_loaded(joined)
    assert_equal(loaded, joined)
    assert loaded.to_frame().equals(joined.to_frame())
    for number, part in enumerate(parts):
        again = loaded.of_segment(number)
        assert [(r.layer, r.layer_index) for r in again.records] == [(r.layer, r.layer_index) for r in part.records]
        for a, b in zip(again.records, part.records, strict=True):
            assert np.array_equal(a.arrays["gate"], b.arrays["gate"])
            assert np.array_equal(a.arrays["time"], b.arrays["time"] + seconds, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_table_holds_every_number_once(experts: int, seed: int) -> None:
    made = some_trace(experts, [0, 1], 2, seed)
    table = made.to_frame()
    assert len(table) == experts * sum(len(r.arrays["frame"]) for r in made.records)
    rows = table[(table.layer == "layer 1") & (table.call == 1) & (table.expert == experts - 1)]
    record = made.records[3]
    assert (rows.gate.to_numpy() == record.arrays["gate"][:, -1]).all() and set(rows.accent) == {f"accent {experts - 1}"}
    assert (rows.mass.to_numpy() == record.arrays["mass"]).all() and (rows.layer_index == 1).all()


def test_five_segments_stay_five(tmp_path: Path) -> None:
    model = adapted()
    parts = []
    for k in range(5):
        with trace(model, seconds_per_frame=0.5) as t:
            model(torch.randn(1, 2 + k, 6), accent_posterior=posteriors(1, seed=k))
        parts.append(t.shifted(10.0 * k - 1))
    joined = Trace.join(parts)
    joined.save(tmp_path / "t.parquet")
    for k in range(5):
        segment = Trace.load(tmp_path / "t.parquet").of_segment(k)
        assert list(segment.arrays("second")["time"]) == [10.0 * k - 1 + 0.5 * frame for frame in range(2 + k)]
        torch.testing.assert_close(torch.tensor(segment.arrays("first")["posterior"][0]), posteriors(1, seed=k)[0, 1:])
    assert [r.call for r in joined.records if r.layer == "first"] == [0, 1, 2, 3, 4]
    assert Trace.load(tmp_path / "t.parquet").of_segment(5).records == []


def test_joining_numbers_segments_and_calls_on() -> None:
    one, empty, two = some_trace(2, [0], 3, seed=1), Trace(["accent 0", "accent 1"]), some_trace(2, [0], 2, seed=2)
    joined = Trace.join([one, empty, Trace.join([two, one])])
    assert [r.segment for r in joined.records] == [0, 0, 0, 2, 2, 3, 3, 3]
    assert [r.call for r in joined.records] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [r.call for r in two.records] == [0, 1]  # what is joined stays as it was
    for wrong in ([], [one, Trace(["another"])]):
        with pytest.raises(ValueError, match="same experts"):
            Trace.join(wrong)


def test_files_of_old_without_segments_are_one_segment(tmp_path: Path) -> None:
    made = some_trace(2, [0, 1], 2, seed=3)
    table = pa.Table.from_pandas(made.to_frame().drop(columns="segment"), preserve_index=False)
    pq.write_table(table.replace_schema_metadata({b"hdmole_experts": b'["accent 0", "accent 1"]'}), tmp_path / "old.parquet")
    assert_equal(Trace.load(tmp_path / "old.parquet"), made)
    older = table.drop(["share", "n_effective"]).replace_schema_metadata({b"hdmole_experts": b'["accent 0", "accent 1"]'})
    pq.write_table(older, tmp_path / "older.parquet")
    loaded = Trace.load(tmp_path / "older.parquet").to_frame()
    assert loaded.share.isna().all() and loaded.n_effective.isna().all() and loaded.change.equals(made.to_frame().change)
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is not a trace"):
        Trace.load(tmp_path / "other.parquet")


def test_trace_changes_nothing_and_tells_what_happened(tmp_path: Path) -> None:
    model, x, pi = adapted(), torch.randn(2, 5, 6), posteriors(2)
    silent = model(x, accent_posterior=pi)
    with trace(model, lengths=[5, 3], seconds_per_frame=0.08) as t:
        assert torch.equal(model(x, accent_posterior=pi), silent)
    table = t.to_frame()
    assert set(table.layer) == {"first", "second"} and len(table) == 2 * 3 * (5 + 3)
    assert table.time.max() == pytest.approx(4 * 0.08) and (table.segment == 0).all()
    a = t.arrays("first", 1)
    assert a["gate"].shape == (3, 3)
    torch.testing.assert_close(torch.tensor(a["posterior"][0]), pi[1, 1:])
    g, l, m = (torch.tensor(a[k]) for k in ("global_gate", "local_gate", "mass"))  # noqa: E741
    torch.testing.assert_close(torch.tensor(a["gate"]), m[:, None] * (g + l))
    assert ((a["gate"] > 0).sum(1) == a["n_active"]).all() and ((a["gate"] > 0) == a["active"]).all()
    assert ((a["global_gate"] > 0).sum(1) == a["n_active_global"]).all()
    assert ((a["local_gate"] > 0).sum(1) == a["n_active_local"]).all()
    assert_equal(saved_and_loaded(t), t)
    with pytest.raises(ValueError, match="no layer 'third'; it has first, second"):
        t.arrays("third")
    with pytest.raises(ValueError, match="No HDMoLE layer matches"), trace(model, layers="none"):
        pass
    with pytest.raises(ValueError, match="aggregate is 'mean' or None"), trace(model, aggregate="median"):
        pass
    with pytest.raises(ValueError, match="no active HDMoLE adapter"), trace(Two()):
        pass


def test_only_what_was_asked_for_is_held() -> None:
    model, x, pi = adapted(), torch.randn(2, 5, 6), posteriors(2)
    with trace(model) as whole:
        model(x, accent_posterior=pi)
    with trace(model, layers="sec", frames=slice(1, 3), aggregate="mean") as small:
        model(x, accent_posterior=pi)
    assert small.layer_names == ["second"] and len(small.to_frame()) == 2 * 3
    for u in range(2):
        mean, frames = small.arrays("second", u), whole.arrays("second", u)
        np.testing.assert_allclose(mean["gate"], frames["gate"][1:3].mean(0, keepdims=True), rtol=1e-6)
        assert list(mean["frame"]) == [1] and list(mean["row"]) == [u]
    with trace(model, frames=slice(7, 9)) as nothing:
        model(x, accent_posterior=pi)
    assert nothing.records == [] and nothing.layer_names == []


def test_frames_count_from_0_in_every_call_and_have_their_time() -> None:
    model, x, pi = adapted(), torch.randn(2, 5, 6), posteriors(2)
    with trace(model, seconds_per_frame={"first": 0.5}) as t:
        for _ in range(2):
            model(x, accent_posterior=pi)
    assert list(t.arrays("first", 1)["time"]) == [0, 0.5, 1, 1.5, 2] * 2 and math.isnan(t.arrays("second")["time"][0])
    with trace(model) as t, route(pi, torch.tensor([1, 0, 1, 1, 0])):
        model.base_model.model.first(x[0])  # packed: frames of two utterances, mixed
    assert list(t.arrays("first", 0)["frame"]) == [0, 1] and list(t.arrays("first", 1)["frame"]) == [0, 1, 2]
    assert list(t.records[0].arrays["row"]) == [1, 0, 1, 1, 0]


def test_a_trace_of_nothing_is_saved_and_loaded(tmp_path: Path) -> None:
    with trace(adapted()) as nothing:
        pass
    nothing.save(tmp_path / "nothing.parquet")
    loaded = Trace.load(tmp_path / "nothing.parquet")
    assert loaded.to_frame().empty and loaded.experts == ACCENTS
