"""Results as markdown, for the README and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hdmole.files import write_between
from hdmole.names import DOMAIN_LABELS, GENERAL
from hdmole.study.claims import claim_line
from hdmole.study.results import Claim, Results, load


def markdown_table(results: Results, labels: Mapping[str, str] | None = None) -> str:
    """A table with one row per method.

    It shows trained parameters, WER in % with its 95 % interval for each domain, and decoding time
    as a multiple of the base's. For the domain "accent" the WER is the mean over accents. `labels`
    are the names of the methods; by default those of the results. If characters are counted, the
    first head says CER or MER.
    """
    labels = labels or results.labels
    domains = results.domains
    full = results.methods["full"].trainable if "full" in results.methods else None
    times = results.decoding_time
    heads = [*(DOMAIN_LABELS.get(d, d) for d in domains), *(["Decoding time"] if times else [])]
    first = f"Method ({results.rate_name} in %)" if results.rate_name else "Method"
    lines = [f"| {first} | Trainable | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for method, entry in results.methods.items():
        share = f" ({100 * entry.trainable / full:.1f} %)" if entry.trainable and full else ""
        count = f"{entry.trainable:,}{share}" if entry.trainable is not None else ""
        rates = {d: entry.domains.get(d) for d in domains}
        cells = [(rate.mean_text() if d == "accent" else rate.text()) if rate else "" for d, rate in rates.items()]
        if times:
            cells.append(f"{times[method]:.2f} ×" if method in times else "")
        lines.append(f"| {labels.get(method, method)} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accent_table(results: Results) -> str:
    """A table of WER in % with its 95 % interval, one row per accent and one column per method.

    The last row is the general domain.
    """
    methods = results.methods
    head = f"Accent ({results.rate_name} in %)" if results.rate_name else "Accent"
    lines = [f"| {head} | " + " | ".join(results.labels.values()) + " |", "|---|" + "---:|" * len(methods)]
    first = next(iter(methods.values())).domains
    for domain in ("accent", GENERAL):
        for accent in first[domain].accents if domain in first else ():
            cells = [entry.domains[domain].accents[accent].text() for entry in methods.values()]
            lines.append(f"| {accent} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claim_lines(claims: Sequence[Claim]) -> str:
    """The claims as a list, each with its verdicts and numbers."""
    return "\n".join(f"- {claim_line(claim)}" for claim in claims)


def update_readme(readme: Path, folder: Path, place: str = "results") -> None:
    """Write the table and claims of a results folder into a README.

    They replace what stands between `<!-- PLACE -->` and `<!-- /PLACE -->`, with `place` for PLACE.

    Raises:
        UserError: the README has no such place, or the folder no results that can be read.
        OSError: the README cannot be read or written.
    """
    results = load(folder)
    origin = results.provenance
    seeds = ", ".join(map(str, origin.seeds or [origin.seed]))
    made = f"Measured {origin.date} by `{origin.command}` (seed {seeds}) on {origin.machine}, {origin.device}."
    body = "\n\n".join(filter(None, [markdown_table(results), claim_lines(results.claims), made]))
    write_between(readme, place, body)
