"""The trace: what every HDMoLE layer decided, frame by frame, while the model ran.

* off, it costs nothing: the layer iterates over an empty tuple
* on, it copies what the layer computed anyway, so no output changes by a bit
* it holds only what was asked for: some layers, some frames, or means over frames
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from hdmole.method.gate import Gates
from hdmole.method.routing import adapter_of, current, layers_of, use

_PER_EXPERT = ("posterior", "local_probability", "global_gate", "local_gate", "gate")
_PER_FRAME = ("tau_global", "tau_local", "mass", "mixing")


class Trace:
    """What was recorded: one record per layer and call, each a dict of numpy arrays.

    Arrays of a record: `utterance`, `row`, `frame` (F,), `time` (F,) seconds or NaN, `posterior`, `local_probability`,
    `global_gate`, `local_gate`, `gate` (F, N), `tau_global`, `tau_local`, `mass`, `mixing` (F,).
    """

    def __init__(
        self,
        layers: dict[int, tuple[str, int]],
        experts: list[str],
        frames: slice | None = None,
        aggregate: str | None = None,
        lengths: Tensor | None = None,
        seconds_per_frame: float | Mapping[str, float] | None = None,
        adapter: str = "",
    ) -> None:
        self.layers, self.experts, self.adapter = layers, experts, adapter
        self.frames, self.aggregate, self.lengths, self.seconds_per_frame = frames, aggregate, lengths, seconds_per_frame
        self.records: list[dict[str, Any]] = []
        self._calls: dict[str, int] = {}
        self._seen: dict[str, int] = {}  # frames of a layer in earlier calls: the position under a KV cache

    def begin(self) -> None:
        """Called where a new `forward` or `generate` starts: frames count from 0 again."""
        self._seen.clear()

    def _seconds(self, layer: str) -> float:
        if not isinstance(self.seconds_per_frame, Mapping):
            return np.nan if self.seconds_per_frame is None else self.seconds_per_frame
        return next((seconds for part, seconds in self.seconds_per_frame.items() if part in layer), np.nan)

    def record(self, layer: int, gates: Gates, rows: Tensor, x: Tensor) -> None:
        """Called by a layer with its gates and the utterance of each row of its input `x` (B, ..., d)."""
        name, order = self.layers[layer]
        call = self._calls[name] = self._calls.get(name, -1) + 1
        shape = x.shape[:-1]
        n = gates.gate.shape[-1]

        def flat(value: Tensor, *tail: int) -> np.ndarray:
            return value.detach().float().expand(*shape, *tail).reshape(-1, *tail).cpu().numpy()

        utterance = rows.reshape(*rows.shape, *[1] * (len(shape) - rows.dim())).expand(shape).reshape(-1).cpu().numpy()
        width = shape[-1] if len(shape) > 1 else 1
        start = self._seen.get(name, 0) if len(shape) > 1 else 0
        self._seen[name] = start + width
        if len(shape) > 1:
            frame = np.tile(np.arange(start, start + width), int(np.prod(shape[:-1])))
            row = np.repeat(np.arange(int(np.prod(shape[:-1]))), width)
        else:  # packed frames: count within each utterance
            row = utterance
            frame = pd.Series(utterance).groupby(utterance).cumcount().to_numpy(np.int64)  # type: ignore[assignment]
        record = dict(
            posterior=flat(gates.posterior[..., 1:], n), local_probability=flat(gates.probabilities, n),
            global_gate=flat(gates.global_gate, n), local_gate=flat(gates.local_gate, n), gate=flat(gates.gate, n),
            tau_global=flat(gates.tau_global), tau_local=flat(gates.tau_local), mass=flat(gates.mass), mixing=flat(gates.mixing),
        )  # fmt: skip
        record.update(utterance=utterance, row=row, frame=frame)
        keep = np.ones(len(frame), bool)
        if self.lengths is not None:
            keep &= frame < self.lengths.cpu().numpy()[utterance]
        if self.frames is not None:
            keep &= np.isin(frame, range(*self.frames.indices(int(frame.max(initial=-1)) + 1)))
        record = {k: v[keep] for k, v in record.items()}
        record["time"] = record["frame"] * self._seconds(name)
        record["active"] = (record["gate"] > 0).astype(np.float32)
        for kind in ("global", "local"):
            record[f"n_active_{kind}"] = (record[f"{kind}_gate"] > 0).sum(-1).astype(np.float32)
        record["n_active"] = record["active"].sum(-1)
        if self.aggregate == "mean":
            record = _mean(record)
        self.records.append({"call": call, "layer": name, "layer_index": order, **record})

    def of_segment(self, segment: int) -> Trace:
        """What was recorded of one segment of a long recording (`ASR.transcribe` numbers them from 0)."""
        part = Trace(self.layers, self.experts, self.frames, self.aggregate, self.lengths, self.seconds_per_frame, self.adapter)
        part.records = [record for record in self.records if record.get("segment", 0) == segment]
        return part

    @property
    def layer_names(self) -> list[str]:
        """Recorded layers in the model's order."""
        return [name for name, _ in sorted({(r["layer"], r["layer_index"]) for r in self.records}, key=lambda x: x[1])]

    def arrays(self, layer: str, utterance: int = 0) -> dict[str, np.ndarray]:
        """Arrays of one layer and utterance over all calls, in the order of frames: (F, N) and (F,)."""
        records = [r for r in self.records if r["layer"] == layer]
        if not records:
            raise ValueError(f"The trace has no layer {layer!r}; it has {', '.join(self.layer_names) or 'none'}.")
        names = [k for k, v in records[0].items() if isinstance(v, np.ndarray)]
        joined = {k: np.concatenate([r[k] for r in records]) for k in names}
        keep = joined["utterance"] == utterance
        return {k: v[keep] for k, v in joined.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row per call, layer, frame and expert.

        Columns: call, layer, layer_index, utterance, row, frame, time (s), expert, accent, posterior, local_probability,
        global_gate, local_gate, gate, active, tau_global, tau_local, lambda_, mass, n_active, n_active_global, n_active_local.
        """
        tables = []
        n = len(self.experts)
        for r in self.records:
            frames = len(r["frame"])
            tables.append(
                pd.DataFrame(
                    {
                        "call": r["call"], "layer": r["layer"], "layer_index": r["layer_index"],
                        **{k: np.repeat(r[k], n) for k in ("utterance", "row", "frame", "time")},
                        "expert": np.tile(np.arange(n), frames),
                        "accent": np.tile(np.array(self.experts, dtype=object), frames),
                        **{k: r[k].reshape(-1) for k in _PER_EXPERT},
                        "active": r["active"].reshape(-1),
                        **{("lambda_" if k == "mixing" else k): np.repeat(r[k], n) for k in _PER_FRAME},
                        **{k: np.repeat(r[k], n) for k in ("n_active", "n_active_global", "n_active_local")},
                    }
                )
            )  # fmt: skip
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def save(self, path: str | Path | IO[bytes]) -> None:
        """Write the tidy table as parquet, with the experts' names in its metadata."""
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"hdmole_experts": json.dumps(self.experts).encode()}
        )
        pq.write_table(table, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote. Raises ValueError for a file that is not a trace."""
        table = pq.read_table(path)
        experts = (table.schema.metadata or {}).get(b"hdmole_experts")
        if experts is None:
            raise ValueError(f"{path} is not a trace; give a file written by Trace.save or 'hdmole trace'.")
        trace = cls({}, json.loads(experts))
        n = len(trace.experts)
        if not table.num_rows:
            return trace
        for (layer, order, call), part in table.to_pandas().groupby(["layer", "layer_index", "call"], sort=False):
            record: dict[str, Any] = {k: part[k].to_numpy().reshape(-1, n) for k in (*_PER_EXPERT, "active")}
            for k in ("utterance", "row", "frame", "time", "n_active", "n_active_global", "n_active_local", *_PER_FRAME):
                record[k] = part["lambda_" if k == "mixing" else k].to_numpy().reshape(-1, n)[:, 0]
            trace.records.append({"call": call, "layer": layer, "layer_index": order, **record})
        return trace


def _mean(record: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the frames of each row."""
    groups = [np.flatnonzero(record["row"] == r) for r in np.unique(record["row"])]
    same = ("utterance", "row", "frame")
    return (
        {k: np.stack([v[g[0]] if k in same else v[g].mean(0) for g in groups]) for k, v in record.items()} if groups else record
    )


@contextmanager
def trace(
    model: nn.Module,
    layers: str | list[str] | None = None,
    *,
    frames: slice | None = None,
    aggregate: str | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    seconds_per_frame: float | Mapping[str, float] | None = None,
) -> Iterator[Trace]:
    """Record the HDMoLE layers of `model`'s active adapter that run in the block.

    `frame` counts from 0 in every call of the model; in LLM layers it is the token's position, padding and prompt included,
    and goes on from step to step of `generate`. With beams, `row` is the beam that held the token at that step.

    Parameters
    ----------
    layers : which layers; a regular expression searched in their names, a list of names, None for all
    frames : only these frames (or tokens) of each row
    aggregate : "mean" keeps one mean per row, layer and call in place of every frame
    lengths : (U,) valid frames of each utterance; later ones are padding and left out
    seconds_per_frame : length of a frame, for the `time` column: of all recorded layers, or by a part of the layer's name,
        such as {"projector": 0.08}, which leaves the time of LLM layers NaN

    Raises
    ------
    ValueError : no such layer, or an unknown aggregate
    """
    if aggregate not in (None, "mean"):
        raise ValueError(f"aggregate is 'mean' or None; not {aggregate!r}.")
    adapter, config = adapter_of(model)
    kept = None if lengths is None else torch.as_tensor(lengths)
    recorded = Trace(layers_of(model, layers), list(config.accents), frames, aggregate, kept, seconds_per_frame, adapter)
    context = current()
    with use(replace(context, traces=(*context.traces, recorded))):
        yield recorded
