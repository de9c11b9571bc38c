"""What a method heard in a recording, with its words, accent and routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hdmole.method.tracing import Trace
from hdmole.names import SHARED
from hdmole.speech.decoding import Decoded, Encoded, Word
from hdmole.speech.domain import flags

AT_ONCE = 8  # recordings, and segments of them, that are decoded at once


@dataclass
class Transcript:
    """What one method heard in a recording, with its words, accent and routing.

    `seconds` is the length of the audio. `rtf` is the time of encoding and decoding divided by it,
    without encoding where that was done before, and without the in-domain score.
    """

    text: str
    words: list[Word]
    accent: dict[str, float]
    in_domain: dict[str, Any]
    seconds: float
    rtf: float
    method: str
    ctc_text: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    # where the words' times come from: ctc, attention, or "none" if nothing aligns words; "uniform"
    # if a segment's tokens do not fit into the frames of the CTC head
    timing: str = "ctc"
    # what looks wrong with the text: loops, echoes, invention
    flags: list[str] = field(default_factory=list)
    trace: Trace | None = field(default=None, repr=False)
    # the segments, with what the frozen base hears
    encoded: list[Encoded] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON. Words without times have None there."""
        kept = {k: v for k, v in vars(self).items() if k not in ("trace", "encoded")}
        words = [{k: None if v != v else v for k, v in asdict(word).items()} for word in self.words]
        return {**kept, "words": words}


@dataclass(frozen=True)
class Heard:
    """What one method heard in a segment.

    `timing` says where the words' times come from, as in `Transcript`. `ctc_text` is what the CTC
    head alone hears. `seconds` is how long it took.
    """

    segment: Encoded
    result: Decoded
    words: list[Word]
    timing: str
    ctc_text: str
    trace: Trace | None
    seconds: float


def joined(
    parts: Sequence[Heard], method: str, accents: Sequence[str], in_domain: dict[str, Any], seconds: float, *,
    encoding: float = 0.0, want_trace: bool = False,
) -> Transcript:  # fmt: skip
    """The transcript of a recording from what a method heard in its segments.

    Args:
        parts: the segments, in their order.
        method: name of the method.
        accents: the N + 1 classes of the accent recogniser.
        in_domain: what `ASR.in_domain` says of the segments.
        seconds: length of the recording.
        encoding: seconds that were spent beside those of the segments.
        want_trace: keep the full trace of the routing.
    """
    # times are negative in silence added before the recording
    layers = [part.trace.shifted(part.segment.offset) for part in parts if part.trace is not None]
    trace = Trace.join(layers) if layers else None
    segments, timings = [part.segment for part in parts], [part.timing for part in parts]
    signs = [
        sign for part in parts
        for sign in flags(part.result.text, None if part.segment.ctc is None else part.ctc_text, part.segment.seconds)
    ]  # fmt: skip
    return Transcript(
        text=" ".join(filter(None, (part.result.text for part in parts))),
        words=[word for part in parts for word in part.words],
        accent=dict(zip(accents, mean_posterior(segments, method), strict=False)),
        in_domain=in_domain,
        seconds=round(seconds, 3),
        rtf=round((encoding + sum(part.seconds for part in parts)) / max(seconds, 1e-9), 4),
        method=method,
        ctc_text=" ".join(filter(None, (part.ctc_text for part in parts))),
        flags=list(dict.fromkeys(signs)),
        layers=layer_summary(trace) if trace is not None else [],
        timing="uniform" if "uniform" in timings else timings[-1],
        trace=trace if want_trace else None,
        encoded=segments,
    )


def together(segments: Sequence[Encoded], most: int = AT_ONCE) -> list[list[int]]:
    """Groups of segments of similar length, as indices, at most `most` in each."""
    order = sorted(range(len(segments)), key=lambda k: len(segments[k].states))
    return [order[k : k + most] for k in range(0, len(order), most)]


def mean_posterior(segments: list[Encoded], method: str) -> list[float]:
    """The posterior (N + 1,) of a recording: the mean over its segments, weighted by their length."""
    weights = np.array([s.seconds for s in segments])
    stacked = np.stack([s.posterior_of(method).cpu().numpy() for s in segments])
    return [round(float(p), 4) for p in (weights[:, None] * stacked).sum(0) / weights.sum()]


def layer_summary(recorded: Trace) -> list[dict[str, Any]]:
    """Means over frames for each layer.

    `effective_experts` is the effective number of experts (`hdmole.method.gate.effective`), and
    `active_experts` how many have any weight. `share` is what each expert carries of the change of
    the layer's output, over all frames together, the shared expert last if there is one.
    """
    summary = []
    for name in recorded.layer_names:
        a = recorded.arrays(name)
        shares = np.concatenate([a["share"], a["shared_share"][:, None]], 1)
        energy = a["change"][:, None].astype(float) ** 2
        share = (shares * energy).sum(0) / max(float(energy.sum()), 1e-30)
        carriers = [*recorded.experts, *([SHARED] if a["shared_share"].any() else [])]
        summary.append(
            {
                "name": name,
                "effective_experts": round(float(a["n_effective"].mean()), 3),
                "active_experts": round(float(a["n_active"].mean()), 3),
                "gate": {e: round(float(v), 4) for e, v in zip(recorded.experts, a["gate"].mean(0), strict=True)},
                "share": {e: round(float(v), 4) for e, v in zip(carriers, share, strict=False)},
                "tau_global": round(float(a["tau_global"].mean()), 5),
                "tau_local": round(float(a["tau_local"].mean()), 5),
            }
        )
    return summary
