"""Results: errors per utterance, their summary with intervals, and where a figure comes from.

Every table and figure the project shows is read from what `write` puts into a folder: `utterances.parquet` (one row per
utterance and method) and `summary.json`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hdmole.names import DOMAIN_LABELS
from hdmole.study.claims import claim_lines

COLUMNS = ["method", "seed", "domain", "accent", "speaker", "utterance", "reference", "hypothesis", "errors", "words"]
RESAMPLES = 1000
FEW_SPEAKERS = 5  # with fewer, a bootstrap over speakers says nothing about other speakers


def bootstrap(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """Word error rates (RESAMPLES,) in % when speakers are drawn with replacement; the same draws for the same speakers.

    Source: Bisani and Ney 2004, with the speaker as the unit. With the same seed, two methods evaluated on the same
    speakers are resampled alike, so differences of two results are paired.
    """
    sums = rows.groupby("speaker")[["errors", "words"]].sum().sort_index().to_numpy(float)
    totals = _drawn(len(sums), seed) @ sums
    return 100 * totals[:, 0] / np.maximum(totals[:, 1], 1)


def bootstrap_mean(rows: pd.DataFrame, seed: int = 0) -> np.ndarray:
    """The same for the mean over accents of their word error rates; an accent whose speakers were not drawn is left out."""
    table = rows.pivot_table(index="speaker", columns="accent", values=["errors", "words"], aggfunc="sum", fill_value=0)
    drawn = _drawn(len(table), seed)
    errors, words = drawn @ table["errors"].to_numpy(float), drawn @ table["words"].to_numpy(float)
    return 100 * np.ma.masked_array(errors / np.maximum(words, 1), words == 0).mean(1).filled(0.0)


def _drawn(speakers: int, seed: int) -> np.ndarray:
    """How often each speaker is drawn (RESAMPLES, speakers)."""
    draws = np.random.default_rng(seed).integers(0, speakers, (RESAMPLES, speakers))
    return np.stack([np.bincount(draw, minlength=speakers) for draw in draws])


def _rate(rows: pd.DataFrame) -> dict[str, Any]:
    errors, words = int(rows.errors.sum()), int(rows.words.sum())
    low, high = np.percentile(bootstrap(rows), [2.5, 97.5])
    return {
        "wer": round(100 * errors / max(1, words), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
        "errors": errors,
        "words": words,
        "utterances": len(rows),
        "speakers": int(rows.speaker.nunique()),
    }


def summarise(rows: pd.DataFrame) -> dict[str, Any]:
    """Per method: WER (%) per domain and accent with 95 % intervals, the mean over accents; and `differences`.

    `rows` has the columns `COLUMNS`; domains are any names.
    """
    methods: dict[str, Any] = {}
    for method, of_method in rows.groupby("method", sort=False):
        domains: dict[str, Any] = {}
        for domain, of_domain in of_method.groupby("domain", sort=False):
            per_accent = {str(a): _rate(r) for a, r in of_domain.groupby("accent", sort=False)}
            entry = _rate(of_domain)
            entry["mean_over_accents"] = round(float(np.mean([a["wer"] for a in per_accent.values()])), 2)
            low, high = np.percentile(bootstrap_mean(of_domain), [2.5, 97.5])
            entry["mean_interval"] = [round(float(low), 2), round(float(high), 2)]
            entry["accents"] = per_accent
            domains[str(domain)] = entry
        methods[str(method)] = {"domains": domains}
    return {"methods": methods, "differences": differences(rows)}


def differences(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Every method against every other per domain: `points` of WER and their 95 % `interval`, paired over speakers.

    Of the domain "accent" it is the mean over accents that is compared, of all others the rate of all words. Below zero
    `method` is better than `against`; where the interval holds zero, no difference is established.
    """
    found = []
    for domain, of_domain in rows.groupby("domain", sort=False):
        resampled = bootstrap_mean if domain == "accent" else bootstrap
        by_method = {str(m): r for m, r in of_domain.groupby("method", sort=False)}
        drawn = {m: resampled(r) for m, r in by_method.items()}
        rates = {m: _mean_rate(r, domain == "accent") for m, r in by_method.items()}
        for method, against in permutations(by_method, 2):
            low, high = np.percentile(drawn[method] - drawn[against], [2.5, 97.5])
            found.append(
                {
                    "domain": str(domain), "method": method, "against": against,
                    "points": round(rates[method] - rates[against], 2), "interval": [round(float(low), 2), round(float(high), 2)],
                }
            )  # fmt: skip
    return found


def accent_differences(rows: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """The difference of two methods accent by accent: `domain`, `accent`, `points` of WER, `low`, `high`, `speakers`.

    Paired over speakers as in `differences`; an accent with fewer than `FEW_SPEAKERS` has no interval.
    """
    found = []
    for (domain, accent), of in rows[rows.method.isin([method, against])].groupby(["domain", "accent"], sort=False):
        mine, theirs = of[of.method == method], of[of.method == against]
        if not len(mine) or not len(theirs):
            continue
        points = 100 * (mine.errors.sum() / max(1, mine.words.sum()) - theirs.errors.sum() / max(1, theirs.words.sum()))
        speakers = of.speaker.nunique()
        low, high = np.nan, np.nan
        if speakers >= FEW_SPEAKERS:
            low, high = np.percentile(bootstrap(mine) - bootstrap(theirs), [2.5, 97.5])
        found.append((domain, accent, points, low, high, speakers))
    return pd.DataFrame(found, columns=["domain", "accent", "points", "low", "high", "speakers"])


def few_speakers(summary: Mapping[str, Any], domain: str) -> int:
    """How many speakers a domain of a results summary has, where they are too few for an interval; else 0."""
    of = [m["domains"][domain].get("speakers", FEW_SPEAKERS) for m in summary["methods"].values() if domain in m["domains"]]
    return min((count for count in of if count < FEW_SPEAKERS), default=0)


def _mean_rate(rows: pd.DataFrame, over_accents: bool) -> float:
    sums = rows.groupby("accent" if over_accents else "domain")[["errors", "words"]].sum()
    return float((100 * sums.errors / sums.words.clip(lower=1)).mean())


def provenance(seed: int, device: str, **more: Any) -> dict[str, Any]:
    """Command, commit, seed, machine, versions and date of a result."""
    import torch
    import transformers

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    command = " ".join([Path(sys.argv[0]).name, *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])])
    return {
        "command": command,
        "commit": commit,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "device": f"{device}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **more,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(folder: Path, rows: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Write `utterances.parquet` and `summary.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows[COLUMNS].to_parquet(folder / "utterances.parquet", index=False)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def markdown_table(summary: dict[str, Any], labels: dict[str, str]) -> str:
    """The results as a markdown table: one row a method, WER in % with its 95 % interval, decoding time against the base."""
    domains = [d for d in ("accent", "general", "real_digits") if any(d in m["domains"] for m in summary["methods"].values())]
    domains += sorted({d for m in summary["methods"].values() for d in m["domains"]} - set(domains))
    full = summary["methods"].get("full", {}).get("trainable")
    times = summary.get("decoding_time", {})
    heads = [*(DOMAIN_LABELS.get(d, d) for d in domains), *(["Decoding time"] if times else [])]
    lines = ["| Method | Trainable | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for method, entry in summary["methods"].items():
        trained = entry.get("trainable")
        share = f" ({100 * trained / full:.1f} %)" if trained and full else ""
        cells = []
        for domain in domains:
            d = entry["domains"].get(domain)
            value, interval = ("mean_over_accents", "mean_interval") if domain == "accent" else ("wer", "interval")
            cells.append(rate_text(d, value, interval) if d else "")
        if times:
            cells.append(f"{times[method]:.2f} ×" if method in times else "")
        count = f"{trained:,}{share}" if trained is not None else ""
        lines.append(f"| {labels.get(method, method)} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_text(rate: Mapping[str, Any], value: str = "wer", interval: str = "interval") -> str:
    """A rate with its interval; without one where speakers are few."""
    if rate.get("speakers", FEW_SPEAKERS) < FEW_SPEAKERS:
        return f"{rate[value]:.1f}"
    return f"{rate[value]:.1f} [{rate[interval][0]:.1f}, {rate[interval][1]:.1f}]"


def accent_table(summary: dict[str, Any], labels: dict[str, str]) -> str:
    """WER in % with its 95 % interval as a markdown table: one row an accent and the general domain, one column a method."""
    methods = summary["methods"]
    lines = ["| Accent | " + " | ".join(labels.get(m, m) for m in methods) + " |", "|---|" + "---:|" * len(methods)]
    first = next(iter(methods.values()))["domains"]
    for domain in ("accent", "general"):
        for accent in first.get(domain, {}).get("accents", {}):
            rates = [entry["domains"][domain]["accents"][accent] for entry in methods.values()]
            cells = [rate_text(rate) for rate in rates]
            lines.append(f"| {accent} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def update_readme(readme: Path, summary: Path, labels: dict[str, str], place: str = "results") -> None:
    """Put the table and the claims of a results file between the README's `<!-- PLACE -->` and `<!-- /PLACE -->`.

    Raises ValueError where the README has no such place, and OSError where a file cannot be read or written.
    """
    text, start, end = readme.read_text(), f"<!-- {place} -->", f"<!-- /{place} -->"
    if not 0 <= text.find(start) < text.find(end):
        raise ValueError(f"{readme} has no place for the table; mark it with {start} and {end}.")
    values = json.loads(summary.read_text())
    origin = values["provenance"]
    seeds = ", ".join(map(str, origin.get("seeds", [origin["seed"]])))
    made = f"Measured {origin['date']} by `{origin['command']}` (seed {seeds}) on {origin['machine']}, {origin['device']}."
    parts = [markdown_table(values, labels), claim_lines(values), made]
    head, rest = text.split(start)
    body = "\n\n".join(filter(None, parts))
    readme.write_text(f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}")
