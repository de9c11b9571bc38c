"""The claims of the paper and their verdicts.

Each claim is about a difference of word error rates in percentage points: HDMoLE minus another
method. If it is below zero, HDMoLE makes fewer errors. There are three kinds of claim, where [low,
high] is the 95 % interval of the difference:

- "better" holds if the whole interval lies below zero: high < 0.
- "as good" holds if HDMoLE is not established to be worse: low <= 0.
- "at most 0.3 points worse" holds if the difference itself, not its interval, is at most `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Mapping

from hdmole.names import GENERAL
from hdmole.study.results import Claim, Difference, Results
from hdmole.texts import Text

MARGIN = 0.3  # points of WER by which HDMoLE may be worse than the frozen base on general speech


def claims(results: Results) -> list[Claim]:
    """The paper's claims about HDMoLE that the results can judge, each with its verdict."""
    return [Claim(text=text, holds=holds, points=d.points, interval=d.interval) for text, d, holds in _judged(results)]


def claim_texts(results: Results) -> dict[str, Text]:
    """The claims' English sentences -> the same as texts that can be translated."""
    return {str(text): text for text, _, _ in _judged(results)}


def _judged(results: Results) -> list[tuple[Text, Difference, bool]]:
    """Each claim with the difference that decides it, and its verdict."""
    methods, made = results.methods, []
    found = {(d.domain, d.against): d for d in results.differences if d.method == "hdmole"}
    if difference := found.get(("accent", "full")):
        mine, full = methods["hdmole"].trainable, methods["full"].trainable
        text = Text("Accents as well as full fine-tuning")
        if mine is not None and full:
            share = f"{100 * mine / full:.1f}"
            text = Text("Accents as well as full fine-tuning with {share} % of its trainable parameters", share=share)
        made.append((text, difference, difference.interval[0] <= 0))
    for domain, speech in (("accent", "the accents"), (GENERAL, "general speech")):
        if difference := found.get((domain, "gated_lora")):
            text = Text("Better than LoRA of equal parameters and accent mass on {speech}", speech=Text(speech))
            made.append((text, difference, difference.interval[1] < 0))
    if difference := found.get((GENERAL, "base")):
        text = Text("At most 0.3 points worse than the frozen base on general speech (by the estimate)")
        made.append((text, difference, difference.points <= MARGIN))
    return made


def verdict(difference: Difference, labels: Mapping[str, str]) -> Text:
    """A difference as a sentence.

    For example "HDMoLE against LoRA: no difference established, +0.2 points [-0.4, +0.9]".
    Points are percentage points of WER. The method is better if the whole interval lies below zero,
    and worse if it lies above. `labels` are the names of the methods.
    """
    low, high = difference.interval
    said = "better" if high < 0 else "worse" if low > 0 else "no difference established"
    method, against = labels.get(difference.method, difference.method), labels.get(difference.against, difference.against)
    return Text(
        "{method} against {against}: {said}, {points} points [{interval}]", method=method, against=against, said=Text(said),
        points=f"{difference.points:+z.1f}", interval=f"{low:+z.1f}, {high:+z.1f}",
    )  # fmt: skip
