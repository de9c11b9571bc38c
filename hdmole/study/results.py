"""The record of a study's results: its types, and the folder that it is written to and read from.

A results folder holds two files, which `save` writes:

- `summary.json`: a `Results` record. Every table and figure of the project is made from it.
- `utterances.parquet`: one row per utterance, method and training seed, with the columns `COLUMNS`.

All word error rates (WER) and their intervals are in percent. In Chinese each character counts as a
word, and `rate_name` says so. Differences are in percentage points of WER. They are below zero if
the first method makes fewer errors. All intervals are 95 % bootstrap intervals over speakers.

`VERSION` is the version of the layout of `summary.json`. Files of version 1, which hold no version,
and of version 2 can be read too. Their claims are left out, because they took an interval that
includes zero for equality; `hdmole.study.claims.judge` judges them anew.
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, field_validator

from hdmole.errors import UserError
from hdmole.files import write_text, written
from hdmole.names import DOMAIN_LABELS, GENERAL_OF, METHOD_NAMES
from hdmole.study.machine import commit, processor

VERSION = 3
SUMMARY, UTTERANCES = "summary.json", "utterances.parquet"
COLUMNS = ["method", "seed", "domain", "accent", "speaker", "utterance", "reference", "hypothesis", "errors", "words"]
FEW_SPEAKERS = 5  # with fewer, an interval over speakers says nothing about others

Interval = tuple[float, float]  # lower and upper bound
Verdict = Literal["established", "not established", "refuted"]
ClaimName = Literal[
    "accents_full", "general_base", "general_full", "true_accent_full", "accents_lora_r", "thresholds", "local_routing",
    "global_routing", "accents_lora", "accents_gated_lora",
]  # fmt: skip


class ResultsError(UserError):
    """A results folder that cannot be read."""


class Record(BaseModel):
    """A part of the results. Unknown fields are refused. Assigned values are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, ready for JSON."""
        return self.model_dump(exclude_none=True)


class Rate(Record):
    """A word error rate and what it was counted on."""

    wer: float  # %, of all words together
    interval: Interval  # of wer, %
    errors: int
    words: int
    utterances: int
    speakers: int

    @property
    def has_interval(self) -> bool:
        """Whether there are enough speakers for an interval."""
        return self.speakers >= FEW_SPEAKERS

    def text(self) -> str:
        """The rate with its interval, such as "11.1 [9.7, 12.7]"; "11.1" for few speakers."""
        return self._text(self.wer, self.interval)

    def _text(self, value: float, interval: Interval) -> str:
        return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]" if self.has_interval else f"{value:.1f}"


class DomainRate(Rate):
    """The word error rate of a domain, of each of its accents, and their mean."""

    accents: dict[str, Rate]
    mean_over_accents: float  # %, all accents weigh the same
    mean_interval: Interval  # of mean_over_accents, %
    per_seed: dict[int, float] | None = None  # training seed -> WER of all words in %

    def mean_text(self) -> str:
        """The mean over accents with its interval, in the form of `text`."""
        return self._text(self.mean_over_accents, self.mean_interval)


class MethodResult(Record):
    """The word error rates of one method, and how it was trained."""

    domains: dict[str, DomainRate]
    label: str | None = None  # the name that people read
    trainable: int | None = None  # parameters
    seeds: list[int] | None = None  # training seeds
    learning_rate: float | None = None
    place: str | None = None  # the part of the model that is adapted
    dev: dict[str, float] | None = None  # domain -> WER in % on dev speech, first seed only


class Relative(Record):
    """A difference in percent of the other method's word error rate: -25 is a quarter fewer."""

    percent: float
    interval: Interval  # of percent


class Difference(Record):
    """`method` minus `against` in one domain. Below zero, `method` makes fewer errors."""

    domain: str
    method: str
    against: str
    points: float  # of WER
    interval: Interval  # of points
    relative: Relative | None = None  # None where `against` may make no errors, and in versions 1 and 2


class Claim(Record):
    """A claim about HDMoLE and its two verdicts. `hdmole.study.claims` has the claims by name.

    The difference is that of two methods. Below zero, HDMoLE makes fewer errors.
    """

    name: ClaimName
    difference: float
    interval: Interval | None = None  # of the difference; None if there are too few speakers for one
    unit: Literal["points", "percent"]  # of WER, or of the other method's errors
    verdict: Verdict  # against zero
    paper_difference: float | None = None  # the paper's own, in the same unit; None if it has none
    paper_verdict: Verdict | None = None  # against the paper's difference
    share: float | None = None  # of full fine-tuning's trained parameters, in %; "accents_full" only


class RecogniserResult(Record):
    """How well the accent recogniser knows the accents of test speech."""

    balanced_accuracy: float  # 0 to 1, mean over accents
    mean_confidence: float | None = None  # mean of the largest posterior
    labels: list[str]
    confusion: list[list[int]]  # utterances; a row per spoken accent, a column per recognised one


class InDomain(Record):
    """How well the in-domain score separates speech of the model's domain from other audio."""

    auroc: float
    auroc_by_domain: dict[str, float]  # against each kind of sound from outside
    accepted: dict[str, float]  # share of each domain's utterances above the threshold
    utterances: dict[str, int]
    method: str = "base"  # whose transcripts it judges


class Measure(Record):
    """A measure of correspondence between experts and accents, from 0 to 1."""

    value: float
    interval: Interval
    chance: float | None = None  # its mean under random assignments of accents


class Correspondence(Record):
    """Purity and normalised mutual information of experts and accents."""

    purity: Measure
    nmi: Measure


class RouterResult(Record):
    """How one router's preferred experts correspond to accents, over all layers and for each."""

    all: Correspondence
    layers: dict[str, Correspondence]


class Routing(Record):
    """How experts correspond to accents, and how many of them are active."""

    method: str | None = None  # the HDMoLE adapter whose routing it is; None for hdmole
    utterances: int  # with an accent
    routers: dict[str, RouterResult]  # by the names in `routing_table.ROUTERS`
    active: dict[str, dict[str, float]]  # domain -> layer -> mean number of active experts
    # accent, the general one among them -> the same; without accents that have no expert
    active_by_accent: dict[str, dict[str, float]] = {}

    @field_validator("routers", mode="before")
    @classmethod
    def _by_column(cls, routers: dict[str, object]) -> dict[str, object]:
        """Give routers their present names. Results of version 1 have other names."""
        former = {"combined": "gate", "global": "global_gate", "local": "local_probability"}
        return {former.get(name, name): found for name, found in routers.items()}


class FrontierPoint(Record):
    """Word error rates under one way of choosing experts, and how many experts are active then."""

    choice: Literal["thresholds", "top_k", "top_p"]
    value: float  # a factor of the thresholds, or k, or p
    active: float  # mean number of active experts
    accent: float | None = None  # WER in %, mean over accents
    general: float | None = None  # WER in %


class Attribution(Record):
    """How leaving one expert out changes the log-likelihood of the reference, in nats per word.

    A value below zero means that the expert helped.
    """

    accents: list[str]
    experts: list[str]
    values: list[list[float]]  # (accents, experts)
    intervals: list[list[Interval]]  # (accents, experts)
    utterances: int


class Trial(Record):
    """Word error rates in % on dev speech after training with one learning rate."""

    method: str
    learning_rate: float
    place: str | None = None  # the part of the model, where several were tried
    accent: float | None = None  # mean over accents
    general: float | None = None


class Failure(Record):
    """A recording that could not be read."""

    audio: str
    error: str


class Provenance(Record):
    """Where a result comes from."""

    command: str
    commit: str  # of this repository, or "unknown"
    seed: int
    date: str
    machine: str
    device: str
    torch: str
    transformers: str
    base_sha256: str | None = None  # `base_digest` of the frozen base
    model: str | None = None
    manifest: str | None = None
    recordings: int | None = None  # that were judged
    of: int | None = None  # recordings in the manifest
    data: str | None = None
    hours: dict[str, float] | None = None  # of speech, by split and domain
    data_sha256: str | None = None
    seeds: list[int] | None = None
    epochs: float | None = None
    run_seconds: float | None = None
    last_session_seconds: float | None = None
    config: str | None = None

    @property
    def short_commit(self) -> str:
        """The commit's first twelve digits, and the mark of local changes if there are any."""
        digits, space, mark = self.commit.partition(" ")
        return digits[:12] + space + mark


class Results(Record):
    """Everything that a study found. What it did not measure is None or empty."""

    methods: dict[str, MethodResult]
    differences: list[Difference]
    # by `hdmole.speech.words.rate_name` where characters are counted; None for WER
    rate_name: Literal["CER", "MER"] | None = None
    decoding_time: dict[str, float] = {}  # method -> multiple of the frozen base's
    claims: list[Claim] = []
    trials: list[Trial] = []
    # method -> training step -> domain -> WER on dev speech in %
    curves: dict[str, dict[int, dict[str, float]]] = {}
    accent_recogniser: RecogniserResult | None = None
    other_recognisers: dict[str, RecogniserResult] = {}  # those that methods name, such as "early"
    in_domain: InDomain | None = None
    samples: dict[str, dict[str, int]] = {}  # clip -> method -> word errors
    routing: Routing | None = None
    frontier: list[FrontierPoint] = []
    attribution: Attribution | None = None
    failed: list[Failure] = []
    planned: dict[str, list[int]] = {}  # method -> training seeds whose runs are still to come
    provenance: Provenance

    @property
    def labels(self) -> dict[str, str]:
        """What people call each method."""
        return {name: entry.label or METHOD_NAMES.get(name, name) for name, entry in self.methods.items()}

    @property
    def domains(self) -> list[str]:
        """The domains that were judged, in the order of `DOMAIN_LABELS`, then others."""
        found = {domain: None for entry in self.methods.values() for domain in entry.domains}
        return sorted(found, key=lambda domain: [*DOMAIN_LABELS, domain].index(domain))

    @property
    def target(self) -> str:
        """The domain of speech that the methods were adapted to: "accent", or real adults."""
        found = self.domains
        return next((domain for domain in (*GENERAL_OF, *found) if domain in found), "accent")

    def few_speakers(self, domain: str) -> int:
        """The number of speakers in a domain if it is below `FEW_SPEAKERS`, else 0."""
        counts = [entry.domains[domain].speakers for entry in self.methods.values() if domain in entry.domains]
        return min((count for count in counts if count < FEW_SPEAKERS), default=0)

    def established(self, method: str, against: str, domain: str) -> bool:
        """Whether two methods differ in a domain: the interval of their difference leaves out zero.

        It is false if there is no such difference, or if it has too few speakers.
        """
        found = [d for d in self.differences if (d.method, d.against, d.domain) == (method, against, domain)]
        return bool(found) and not self.few_speakers(domain) and (found[0].interval[0] > 0 or found[0].interval[1] < 0)

    def to_json(self) -> str:
        """The content of `summary.json`, with each list of numbers on one line."""
        text = json.dumps({"version": VERSION, **self.to_dict()}, indent=1, ensure_ascii=False)
        return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", text)


# -- reading and writing ---------------------------------------------------------------------------


def load(folder: Path) -> Results:
    """Read the results in a folder.

    Raises:
        ResultsError: the folder has no `summary.json`, or one that is damaged or of a later
            version.
    """
    file = folder / SUMMARY
    damaged = ResultsError(
        "results.damaged", "{file} is not a summary of results; `hdmole evaluate --out DIR` writes one.", file=file
    )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ResultsError(
            "results.missing",
            "{folder} has no summary.json; name a folder that `hdmole compare` or `hdmole evaluate` wrote.",
            folder=folder,
        ) from None
    except (OSError, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(values, dict):
        raise damaged
    version = values.pop("version", 1)
    if version not in range(1, VERSION + 1):
        raise ResultsError(
            "results.version",
            "{file} has layout {version}, which this version of HDMoLE does not know; update HDMoLE to read it.",
            file=file, version=version,
        )  # fmt: skip
    try:
        if version < VERSION:
            values.pop("claims", None)
        return Results.model_validate(_from_version_1(values) if version == 1 else values)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise damaged from None


def save(folder: Path, results: Results, rows: pd.DataFrame) -> None:
    """Write `summary.json`, and `utterances.parquet` with the columns `COLUMNS` of `rows`.

    Each file is whole at any time. The summary is written last.

    Raises:
        OutputError: the disk is full.
        OSError: the folder cannot be written to.
    """
    with written(folder / UTTERANCES) as part:
        rows[COLUMNS].to_parquet(part, index=False)
    write_text(folder / SUMMARY, results.to_json() + "\n")


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Values in the layout of version 1, changed to that of version 2."""
    for entry in values["methods"].values():
        if "rate" in entry:
            entry["learning_rate"] = entry.pop("rate")
        for domain in entry["domains"].values():
            domain.pop("change_against_base", None)  # `differences` says the same
    for trial in values.get("trials", []):
        trial["learning_rate"] = trial.pop("rate")
    return values


# -- where results come from -----------------------------------------------------------------------


def provenance(seed: int, device: str, **more: object) -> Provenance:
    """The `Provenance` of what this process measures. `more` are further fields of it."""
    import torch
    import transformers

    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    return Provenance.model_validate(
        {
            "command": " ".join([Path(sys.argv[0]).name, *arguments]),
            "commit": commit(Path(__file__).resolve().parent.parent.parent),
            "seed": seed,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "device": f"{device}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **more,
        }
    )


def base_digest(folder: Path) -> str | None:
    """A digest of a base model's weights, which identifies it; None without safetensors files.

    It is computed in half precision, so that a base and its release in half precision have the same
    digest. Where a folder holds adapters on a pretrained base, it is that of the pretrained
    weights.
    """
    import torch
    from safetensors import safe_open

    from hdmole.models import pretrained
    from hdmole.speech.loading import read_config, weights_folder

    if (folder / "config.json").is_file() and "pretrained" in read_config(folder):
        return pretrained.digest(weights_folder(folder))
    digest, found = sha256(), False
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name).to(torch.float16).contiguous()
                digest.update(f"{name} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
                found = True
    return digest.hexdigest()[:16] if found else None
