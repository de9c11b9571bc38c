"""Gates of HDMoLE adapters on the pages: the choice of an adapter, its gate in words, its scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from streamlit.delta_generator import DeltaGenerator

from app import links, texts
from app.access import plain
from app.texts import Text, t

if TYPE_CHECKING:
    from hdmole.method.tuner import HDMoLEConfig
    from hdmole.speech.asr import ASR

ROUTING_IN_WORDS = {
    "hierarchical": Text(
        "Each layer has one expert per accent. A global router weighs them by the accent heard, a local one by each moment of sound."
    ),
    "global": Text("Each layer has one expert per accent. A global router weighs them by the accent heard."),
    "local": Text("Each layer has one expert per accent. A local router weighs them by each moment of sound."),
}
CHOICE_IN_WORDS = {
    "dynamic": Text(
        "An expert works where its weight reaches the router's threshold τ. Those that work share a weight of τ, as in the paper."
    ),
    "relu": Text(
        "An expert works where its weight exceeds the router's threshold τ. Those that work share a weight of 1, the more the "
        "further they exceed it."
    ),
    "sparsegen": Text("Each moment has as few experts as its threshold asks for; their weights sum to 1."),
    "top_k": Text("The {k} experts of the largest weight work, and share a weight of 1."),
    "top_p": Text("The fewest experts whose weights reach {p} in all work, and share a weight of 1."),
    "dense": Text("All experts work; their weights sum to 1."),
}


def choose_adapter(asr: ASR, *place: DeltaGenerator) -> str:
    """The HDMoLE adapter that a page shows. If the model has several, `place` gets a list of them.

    The address of the page may name one (`?adapter=`).
    """
    links.set_once("adapter", asr.routed)
    if len(asr.routed) == 1:
        return asr.routed[0]
    return str(
        place[0].selectbox(t("HDMoLE adapter"), asr.routed, key="adapter", format_func=texts.method, persist_state="session")
    )


def linked_adapter(asr: ASR, method: str) -> str:
    """The adapter as the address names it; empty if it is the model's first."""
    return "" if method == asr.routed[0] else method


def in_words(gate: HDMoLEConfig) -> str:
    """What the gate of an adapter does, in a few sentences."""
    said = [t(ROUTING_IN_WORDS[gate.routing]), t(CHOICE_IN_WORDS[gate.thresholds], k=gate.top_k, p=f"{gate.top_p:g}")]
    if gate.general_class:
        said.append(t("All weights are multiplied by the probability that the speech is accented at all."))
    if gate.shared_expert_rank:
        said.append(t("A shared expert works beside them in every frame, for all accents."))
    return " ".join(said)


def largest_weight(gate: HDMoLEConfig, table: pd.DataFrame, which: str) -> float:
    """Where the scale of a gate's figures ends: the weight of an expert that works alone.

    It is the same for all layers, frames and utterances of an adapter, so that their figures can be
    compared, and even weights look even.

    Args:
        gate: the adapter's configuration.
        table: a routing table of the adapter (`Trace.to_frame`) with all its layers.
        which: one of `hdmole.figures.utterance.GATES`.
    """
    tau_global, tau_local = (
        (table.tau_global, table.tau_local) if gate.thresholds == "dynamic" else (pd.Series([1.0]), pd.Series([1.0]))
    )
    routing = {"global_gate": "global", "local_gate": "local"}.get(which, gate.routing)
    if routing != "hierarchical":
        sums = tau_global if routing == "global" else tau_local
    elif gate.combination == "product":
        sums = pd.Series([1.0])
    else:
        sums = tau_global + tau_local if gate.combination == "sum" else pd.concat([tau_global, tau_local])
    return max(0.01, float(sums.max()))


def even_weight(gate: HDMoLEConfig, layer: pd.DataFrame, which: str) -> float:
    """The weight of each expert if all experts of a layer shared its gate evenly.

    Args:
        gate: the adapter's configuration.
        layer: the rows of one layer in a routing table of the adapter.
        which: one of `hdmole.figures.utterance.GATES`.
    """
    mass = float(layer.mass.mean()) if gate.general_class and which == "gate" else 1.0
    return mass * largest_weight(gate, layer, which) / gate.experts


def carriers(carried: pd.DataFrame) -> str:
    """The two experts that carry most of the change, with their shares in percent (`carried_data`)."""
    most = carried.sort_values("carried", ascending=False, kind="stable").head(2)
    return t(", then ").join(
        t("{expert} ({share} %)", expert=plain(texts.accent(accent)), share=f"{share:.0f}")
        for accent, share in zip(most.accent, most.carried, strict=True)
    )
