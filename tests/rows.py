"""Tables of results for tests, small enough to compute what comes out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from hdmole.study.results import Provenance

ORIGIN = Provenance(
    command="hdmole compare", commit="0" * 40, seed=0, date="2026-11-27 12:00 UTC", machine="CPU, 2 cores", device="cpu",
    torch="2.13.0", transformers="5.23.0",
)  # fmt: skip


def row(
    method: str, speaker: str, errors: int, words: int = 10, accent: str = "indian", domain: str = "accent"
) -> dict[str, Any]:
    return dict(
        method=method, seed=0, domain=domain, accent=accent, speaker=speaker, utterance=f"{accent}-{speaker}", reference="",
        hypothesis="", errors=errors, words=words,
    )  # fmt: skip


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows)


def of_speakers(method: str, errors: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    """One row of ten words per speaker."""
    return [row(method, f"s{k}", count, **more) for k, count in enumerate(errors)]
