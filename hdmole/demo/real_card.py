"""The model card of the released folder for real speakers."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from hdmole.names import METHOD_NAMES
from hdmole.study.results import Results
from hdmole.study.tables import markdown_table


def model_card(results: Results, people: pd.DataFrame, scales: Mapping[str, float], labels: list[str]) -> str:
    """The README.md of the model folder. Every figure comes from the results.

    Args:
        results: measured on test.
        people: the recordings, as `read_people` returns them.
        scales: method -> what its adapter was multiplied by.
        labels: classes of the accent recogniser.
    """
    origin = results.provenance
    sources = "\n".join(
        f"| {source} | {', '.join(sorted(set(group.licence)))} | {'judged only' if group.judged_only.all() else 'trained and judged'} |"
        for source, group in people.groupby("source")
    )
    hours = ", ".join(f"{k} {v:g}" for k, v in (origin.hours or {}).items())
    return f"""# Whisper base, adapted to real speakers

Adapters and an accent recogniser for OpenAI's Whisper base. The base itself is not in this folder: `hdmole models get whisper-base`
finds or downloads it. It is under the MIT licence, as released by OpenAI.

**It can hear** read English of adults, with an open vocabulary. **It was adapted to** adults from China who learn English, and to digits
of people with other first languages. Children below 12 were not trained on; the rates of all children are below. Accents of the
synthesiser (`synthetic_...`) are espeak-ng and not people.

**It cannot hear** other languages. On noise and music it may invent text. {_in_domain(results)}

## Results

Word error rate in %, with 95 % intervals from a bootstrap over speakers, on speakers that were never trained on. Digits in a text are
read as words. One seed. The adapters were multiplied by what was best on dev: {", ".join(f"{m} {s:g}" for m, s in scales.items())}.

{markdown_table(results)}

Routing needs the accent, which a network finds from the layers of the frozen encoder. Its classes are {", ".join(labels)}; real and
synthetic speech of one accent share a class.

## Speech

| Source | Licence | Use |
|---|---|---|
{sources}

Hours, with synthetic speech: {hours}.

## Made by

`{origin.command}` at commit {origin.short_commit}, seed {origin.seed}, {origin.date}, on {origin.machine} ({origin.device}), torch {origin.torch},
transformers {origin.transformers}.
"""


def _in_domain(results: Results) -> str:
    if results.in_domain is None:
        return "It has no in-domain score."
    return (
        "The in-domain score tells speech that it can hear from silence, noise, music and other languages (the latter synthetic): "
        f"AUROC {results.in_domain.auroc:.3f} on test, judged by what {METHOD_NAMES[results.in_domain.method]} hears."
    )
