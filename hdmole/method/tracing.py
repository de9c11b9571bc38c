"""The trace: what every HDMoLE layer decided, frame by frame, while the model ran.

* Without a trace there is no cost: the layer loops over an empty tuple.
* A trace copies what the layer computes anyway, and computes what each expert carries from it. The
  output stays the same to the bit.
* It holds only what was asked for: some layers, some frames, or means over frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hdmole.method.gate import Gates, effective
from hdmole.method.routing import adapter_of, current, layers_of, use

if TYPE_CHECKING:
    import pandas as pd

_PLACE = ("utterance", "row", "frame")
_PER_EXPERT = ("posterior", "local_probability", "global_gate", "local_gate", "gate", "active", "share")
_PER_FRAME = (
    "tau_global", "tau_local", "lambda_", "mass", "n_active", "n_active_global", "n_active_local",
    "n_effective", "n_effective_global", "n_effective_local", "shared_share", "change",
)  # fmt: skip
_BRANCHES = {"": "gate", "_global": "global_gate", "_local": "local_gate"}  # end of a count's name -> what is counted


@dataclass(frozen=True)
class Record:
    """What one layer decided in one call, as arrays (F,) and (F, N); `Trace` explains the names."""

    layer: str
    layer_index: int
    call: int
    arrays: dict[str, np.ndarray]
    segment: int = 0


@dataclass
class Trace:
    """What was recorded while a model ran: one `Record` for each layer and call.

    `experts` are the names of the N experts. The arrays of a record are over its F frames:

    | name | shape | meaning |
    |---|---|---|
    | `segment` | () | segment of a long recording, from 0 |
    | `call` | () | number of the layer's call in this trace, from 0 |
    | `layer`, `layer_index` | () | name, and place among the model's HDMoLE layers |
    | `utterance` | (F,) | utterance of the batch, from 0 |
    | `row` | (F,) | an utterance of the batch, or one of its beams, from 0 |
    | `frame` | (F,) | frame of audio, or position of the token in an LLM layer, from 0 |
    | `time` | (F,) | start of the frame in seconds; NaN if the layer sees no frames of audio |
    | `posterior` | (F, N) | accent posterior pi_1..N of the utterance |
    | `local_probability` | (F, N) | local router, p |
    | `global_gate`, `local_gate`, `gate` | (F, N) | g, l and G |
    | `active` | (F, N) | 0 where G is 0, else 1 |
    | `tau_global`, `tau_local` | (F,) | thresholds of the two routers |
    | `lambda_` | (F,) | weight of the global gate in the convex combination |
    | `mass` | (F,) | accent mass m |
    | `n_active`, `n_active_global`, `n_active_local` | (F,) | experts whose G, g or l is not 0 |
    | `n_effective`, `n_effective_global`, `n_effective_local` | (F,) | `effective` of G, g or l |
    | `change` | (F,) | length of D, the sum of what all experts add to the layer's output |
    | `share` | (F, N) | share of D that an expert carries: (what it adds) . D / D . D; 0 if D is 0
    | | `shared_share` | (F,) | that of the shared expert; 0 if there is none |

    With `shared_share`, the shares of a frame sum to 1. A negative one works against the others.

    The table that `to_frame` gives has these columns, with one row for each frame and expert, and
    two more: `expert`, the number of the expert from 0, and `accent`, its name. The symbols are
    those of `hdmole.method.gate`.
    """

    experts: list[str]
    records: list[Record] = field(default_factory=list)

    @classmethod
    def join(cls, traces: Sequence[Trace]) -> Trace:
        """One trace of several, such as those of the segments of a recording, in this order.

        Segments and calls are numbered consecutively through all traces. If each trace has one
        segment, they become segments 0, 1 and so on, and `of_segment` gives each of them back.
        Raises ValueError if there is no trace, or if the traces are of different experts.
        """
        if not traces or any(other.experts != traces[0].experts for other in traces):
            raise ValueError("Only traces of the same experts can be joined, and at least one is needed.")
        joined = cls(traces[0].experts)
        segment = call = 0
        for other in traces:
            joined.records += [replace(r, segment=r.segment + segment, call=r.call + call) for r in other.records]
            segment += 1 + max((r.segment for r in other.records), default=0)
            call += 1 + max((r.call for r in other.records), default=-1)
        return joined

    def shifted(self, seconds: float) -> Trace:
        """The same trace with `seconds` added to the time of every frame."""
        return Trace(self.experts, [replace(r, arrays={**r.arrays, "time": r.arrays["time"] + seconds}) for r in self.records])

    def of_segment(self, segment: int) -> Trace:
        """The part of the trace of one segment. `ASR.transcribe` numbers segments from 0."""
        return Trace(self.experts, [r for r in self.records if r.segment == segment])

    @property
    def layer_names(self) -> list[str]:
        """Recorded layers in the model's order."""
        return [name for name, _ in sorted({(r.layer, r.layer_index) for r in self.records}, key=lambda x: x[1])]

    def arrays(self, layer: str, utterance: int = 0) -> dict[str, np.ndarray]:
        """Arrays (F,) and (F, N) of one layer and utterance, from all calls in their order.

        Raises ValueError if nothing was recorded of such a layer.
        """
        records = [r for r in self.records if r.layer == layer]
        if not records:
            raise ValueError(f"The trace has no layer {layer!r}; it has {', '.join(self.layer_names) or 'none'}.")
        joined = {k: np.concatenate([r.arrays[k] for r in records]) for k in records[0].arrays}
        keep = joined["utterance"] == utterance
        return {k: v[keep] for k, v in joined.items()}

    def to_frame(self) -> pd.DataFrame:
        """A tidy table with one row for each segment, call, layer, frame and expert.

        `Trace` lists its columns. It needs pandas. If that is missing, it raises
        ModuleNotFoundError and names the extra to install.
        """
        with _for_tables():
            import pandas as pd
        n = len(self.experts)
        tables = [
            pd.DataFrame(
                {
                    "segment": r.segment, "call": r.call, "layer": r.layer, "layer_index": r.layer_index,
                    **{k: np.repeat(r.arrays[k], n) for k in (*_PLACE, "time")},
                    "expert": np.tile(np.arange(n), len(r.arrays["frame"])),
                    "accent": np.tile(np.array(self.experts, dtype=object), len(r.arrays["frame"])),
                    **{k: r.arrays[k].reshape(-1) for k in _PER_EXPERT},
                    **{k: np.repeat(r.arrays[k], n) for k in _PER_FRAME},
                }
            )
            for r in self.records
        ]  # fmt: skip
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def save(self, path: str | Path | IO[bytes]) -> None:
        """Write the tidy table as parquet, with the experts' names in its metadata.

        Needs pandas and pyarrow.
        """
        with _for_tables():
            import pyarrow as pa
            import pyarrow.parquet as pq
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"hdmole_experts": json.dumps(self.experts).encode()}
        )
        pq.write_table(table, path)

    @classmethod
    def load(cls, path: str | Path | IO[bytes]) -> Trace:
        """Read what `save` wrote.

        Needs pandas and pyarrow; raises ValueError for a file that is not a trace.
        """
        with _for_tables():
            import pandas  # noqa: F401  (pyarrow needs it)
            import pyarrow.parquet as pq
        file = pq.read_table(path)
        experts = (file.schema.metadata or {}).get(b"hdmole_experts")
        if experts is None:
            raise ValueError(f"{path} is not a trace; give a file written by Trace.save or 'hdmole trace'.")
        trace = cls(json.loads(experts))
        if not file.num_rows:
            return trace
        table, n = file.to_pandas(), len(trace.experts)
        if "segment" not in table:  # written before version 0.2
            table["segment"] = 0
        for name in {*_PER_EXPERT, *_PER_FRAME} - set(table):  # likewise
            table[name] = np.nan
        for (segment, call, layer, order), part in table.groupby(["segment", "call", "layer", "layer_index"], sort=False):
            arrays = {k: part[k].to_numpy().reshape(-1, n) for k in _PER_EXPERT}
            arrays |= {k: part[k].to_numpy()[::n] for k in (*_PLACE, "time", *_PER_FRAME)}
            trace.records.append(Record(str(layer), int(order), int(call), arrays, int(segment)))
        return trace


@contextmanager
def _for_tables() -> Iterator[None]:
    """Wraps imports that only tables need. If one is missing, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A trace becomes a table with pandas and pyarrow, and {error.name} is not installed; "
            "install both with: pip install 'hdmole[study]'",
            name=error.name,
        ) from error


class Recorder:
    """Fills a trace: the layers call `record` while the model runs.

    Made by `trace`, whose parameters it has.
    """

    def __init__(
        self,
        adapter: str,
        layers: dict[int, tuple[str, int]],
        experts: Iterable[str],
        frames: slice | None,
        aggregate: str | None,
        lengths: Mapping[str, np.ndarray] | None,
        seconds_per_frame: float | Mapping[str, float] | None,
    ) -> None:
        self.adapter, self.layers, self.trace = adapter, layers, Trace(list(experts))
        self.frames, self.aggregate, self.lengths, self.seconds_per_frame = frames, aggregate, lengths, seconds_per_frame
        self._calls: dict[str, int] = {}
        # by layer and utterance: frames in earlier calls, which is its position with a KV cache
        self._seen: dict[tuple[str, int], int] = {}
        self._first: Mapping[str, int] = {}

    def begin(self, first: Mapping[str, int] | None = None) -> None:
        """Called when a new `forward` or `generate` starts. Frames then count from 0 again.

        `first` gives the first frame by a part of the layer's name, where a window of a long sound
        begins.
        """
        self._seen.clear()
        self._first = first or {}

    def record(self, layer: int, gates: Gates, rows: Tensor, x: Tensor, carried: Tensor, beams: int = 1) -> None:
        """Called by a layer with its `id` and gates, and the utterance of each row of its input.

        The input `x` is (B, ..., d). `carried` (..., N + 1) is what each expert carries of the
        change of the output, the shared one last; its sum is the square of the change's length. An
        utterance has `beams` copies in the input, one after the other. Frames of the same copy
        follow each other: those of several windows are counted on.
        """
        name, order = self.layers[layer]
        call = self._calls[name] = self._calls.get(name, -1) + 1
        shape = x.shape[:-1]
        n = gates.gate.shape[-1]

        def flat(value: Tensor, *tail: int) -> np.ndarray:
            return value.detach().float().expand(*shape, *tail).reshape(-1, *tail).cpu().numpy()

        utterance = rows.reshape(*rows.shape, *[1] * (len(shape) - rows.dim())).expand(shape).reshape(-1).cpu().numpy()
        copy = np.repeat(np.arange(shape[0]) % beams, len(utterance) // shape[0])
        row = utterance * beams + copy
        frame = _count_within(row)
        first = self._of(self._first, name) or 0
        for u, count in zip(*np.unique(utterance, return_counts=True), strict=True):
            seen = self._seen.get((name, u), first)
            frame[utterance == u] += seen
            self._seen[name, u] = seen + count // beams
        arrays = dict(
            utterance=utterance, row=row, frame=frame, posterior=flat(gates.posterior[..., 1:], n),
            local_probability=flat(gates.probabilities, n), global_gate=flat(gates.global_gate, n),
            local_gate=flat(gates.local_gate, n), gate=flat(gates.gate, n), tau_global=flat(gates.tau_global),
            tau_local=flat(gates.tau_local), lambda_=flat(gates.mixing), mass=flat(gates.mass),
        )  # fmt: skip
        parts = flat(carried, n + 1)
        whole = parts.sum(-1).clip(0)
        shares = np.divide(parts, whole[:, None], out=np.zeros_like(parts), where=whole[:, None] > 0)
        arrays |= dict(change=np.sqrt(whole), share=shares[:, :n], shared_share=shares[:, n])
        keep = np.ones(len(frame), bool)
        lengths = self._of(self.lengths, name)
        if lengths is not None:
            keep &= frame < lengths[utterance]
        if self.frames is not None:
            wanted = np.zeros(int(frame.max(initial=-1)) + 1, bool)
            wanted[self.frames] = True
            keep &= wanted[frame]
        if not keep.any():
            return
        arrays = {k: v[keep] for k, v in arrays.items()}
        arrays["time"] = arrays["frame"] * self._seconds(name)
        # a free threshold, and with it the weights of a branch, may be negative
        arrays["active"] = (arrays["gate"] != 0).astype(np.float32)
        weights = np.stack([arrays[branch] for branch in _BRANCHES.values()])
        active, sizes = (weights != 0).sum(-1).astype(np.float32), effective(torch.from_numpy(weights)).numpy()
        for end, on, size in zip(_BRANCHES, active, sizes, strict=True):
            arrays |= {f"n_active{end}": on, f"n_effective{end}": size}
        if self.aggregate == "mean":
            arrays = _mean(arrays)
        self.trace.records.append(Record(name, order, call, arrays))

    def _seconds(self, layer: str) -> float:
        if not isinstance(self.seconds_per_frame, Mapping):
            return np.nan if self.seconds_per_frame is None else self.seconds_per_frame
        found = self._of(self.seconds_per_frame, layer)
        return np.nan if found is None else float(found)

    @staticmethod
    def _of(values: Mapping[str, Any] | None, layer: str) -> Any:
        """The value under the first part of a layer's name that is among the keys; None if none is."""
        return next((value for part, value in (values or {}).items() if part in layer), None)


def _count_within(utterance: np.ndarray) -> np.ndarray:
    """For each element (F,), how many earlier elements are the same."""
    if not utterance.size or (utterance == utterance[0]).all():
        return np.arange(len(utterance))
    order = np.argsort(utterance, kind="stable")
    _, first, counts = np.unique(utterance[order], return_index=True, return_counts=True)
    frame = np.empty(len(utterance), np.int64)
    frame[order] = np.arange(len(utterance)) - np.repeat(first, counts)
    return frame


def _mean(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the frames of each row. They get the place of the row's first frame."""
    groups = [np.flatnonzero(arrays["row"] == r) for r in np.unique(arrays["row"])]
    return {k: np.stack([v[g[0]] if k in _PLACE else v[g].mean(0) for g in groups]) for k, v in arrays.items()}


@contextmanager
def trace(
    model: nn.Module,
    layers: str | list[str] | None = None,
    *,
    frames: slice | None = None,
    aggregate: str | None = None,
    lengths: Tensor | Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    seconds_per_frame: float | Mapping[str, float] | None = None,
) -> Iterator[Trace]:
    """Record the HDMoLE layers of `model`'s active adapter that run in the block.

    `frame` counts from 0 in every call of the model. In LLM layers it is the token's position,
    padding and prompt included, and goes on from step to step of `generate`. With beams, `row` is
    the beam that held the token at that step.

    Parameters
    ----------
    model : a model with an active HDMoLE adapter
    layers : a regular expression searched in the names of layers, a list of names, None for all
    frames : only these frames (or tokens) of each row
    aggregate : "mean" keeps one mean per row, layer and call in place of every frame
    lengths : (U,) valid frames of each utterance; later ones are padding and left out. A mapping
        gives them by a part of the layer's name, where layers have frames of different lengths.
    seconds_per_frame : length of a frame in seconds, for the `time` column: one number for all
        recorded layers, or a mapping from a part of the layer's name, such as {"projector": 0.08},
        which leaves the time of other layers NaN

    Raises
    ------
    ValueError : no active HDMoLE adapter, no such layer, or an unknown aggregate
    """
    if aggregate not in (None, "mean"):
        raise ValueError(f"aggregate is 'mean' or None; not {aggregate!r}.")
    adapter, config = adapter_of(model)
    parts = lengths if isinstance(lengths, Mapping) else {} if lengths is None else {"": lengths}
    valid = {part: torch.as_tensor(of).cpu().numpy() for part, of in parts.items()}
    recorder = Recorder(adapter, layers_of(model, layers), config.accents, frames, aggregate, valid, seconds_per_frame)
    context = current()
    with use(replace(context, recorders=(*context.recorders, recorder))):
        yield recorder.trace
