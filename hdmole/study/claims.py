"""Claims and their verdicts, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hdmole.names import GENERAL

# The claim that is judged by its estimate, whose interval may reach beyond; summaries written before say it shorter.
_BY_ESTIMATE = {
    "At most 0.3 points worse than the frozen base on general speech": (
        "At most 0.3 points worse than the frozen base on general speech (by the estimate)"
    )
}


def verdict(difference: dict[str, Any], labels: dict[str, str]) -> str:
    """One of `differences` in a sentence: "HDMoLE against LoRA: no difference established, +0.2 points [-0.4, 0.9]"."""
    low, high = difference["interval"]
    said = "better" if high < 0 else "worse" if low > 0 else "no difference established"
    method, against = (labels.get(difference[k], difference[k]) for k in ("method", "against"))
    return f"{method} against {against}: {said}, {difference['points']:+z.1f} points [{low:+z.1f}, {high:+z.1f}]"


def claim_text(claim: Mapping[str, Any]) -> str:
    """The sentence of a claim that a comparison judged."""
    return _BY_ESTIMATE.get(claim["claim"], claim["claim"])


def claim_lines(summary: dict[str, Any]) -> str:
    """The claims that a comparison judged, as a markdown list with verdict, difference and 95 % interval."""
    return "\n".join(
        f"- {claim_text(c)}: **{'yes' if c['holds'] else 'no'}**, {c['points']:+z.1f} points "
        f"[{c['interval'][0]:+z.1f}, {c['interval'][1]:+z.1f}]"
        for c in summary.get("claims", [])
    )


def claims(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's claims about HDMoLE, each with a verdict, the difference in points of WER and its 95 % interval."""
    methods = summary["methods"]
    found = {(d["domain"], d["method"], d["against"]): d for d in summary["differences"]}

    def claim(text: str, key: tuple[str, str, str], holds: Callable[[float, float, float], bool]) -> None:
        if key in found:
            points, (low, high) = found[key]["points"], found[key]["interval"]
            made.append({"claim": text, "holds": holds(points, low, high), "points": points, "interval": [low, high]})

    made: list[dict[str, Any]] = []
    if "hdmole" not in methods:
        return made
    full = methods.get("full", {}).get("trainable")
    share = f" with {100 * methods['hdmole']['trainable'] / full:.1f} % of its trainable parameters" if full else ""
    claim(f"Accents as well as full fine-tuning{share}", ("accent", "hdmole", "full"), lambda points, low, high: low <= 0)
    for domain, name in (("accent", "the accents"), (GENERAL, "general speech")):
        claim(
            f"Better than LoRA of equal parameters and accent mass on {name}", (domain, "hdmole", "gated_lora"),
            lambda points, low, high: high < 0,
        )  # fmt: skip
    claim(
        "At most 0.3 points worse than the frozen base on general speech (by the estimate)", (GENERAL, "hdmole", "base"),
        lambda points, low, high: points <= 0.3,
    )  # fmt: skip
    return made
