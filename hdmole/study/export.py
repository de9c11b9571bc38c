"""Write an HDMoLE adapter for one accent as a plain LoRA, and measure the difference.

A LoRA is the same for all frames. An HDMoLE adapter with routing="global" is as well once the
posterior is fixed, so the LoRA is equal to it. The paper's local router reads every frame. The LoRA
then gets the mean of each layer's gate over recordings, and is an approximation.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdmole.errors import UserError
from hdmole.files import write_json
from hdmole.method.tracing import Trace
from hdmole.method.tuner import export_lora
from hdmole.method.tuner.lora import one_gate
from hdmole.speech.asr import ASR
from hdmole.speech.loading import adapted
from hdmole.speech.manifest import Line
from hdmole.speech.words import count_errors, score
from hdmole.study.results import provenance

MEASURED = "export.json"  # beside the LoRA: what it was made of, and how it differs from the adapter


class ExportError(UserError):
    """An adapter that cannot be exported as asked. The codes begin with `export.`."""


def one_hot(asr: ASR, accent: str) -> Tensor:
    """The posterior (N + 1,) in which an accent has probability 1.

    Raises ModelError if the model has no such accent.
    """
    asr.check_accent(accent)
    if accent == "auto":
        raise ExportError("export.auto", "A LoRA is for one accent; give its name, or a posterior.")
    return torch.eye(len(asr.accents))[asr.accents.index(accent)]


def read_posterior(file: Path, accents: Sequence[str]) -> Tensor:
    """The posterior (N + 1,) in a JSON file that gives the probability of accents by their names.

    Accents that are not in the file have probability 0.

    Raises:
        ExportError: the file is not there, is no such JSON, or names other accents.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sentence = "The posterior {file} cannot be read ({reason}); give a JSON file such as {{{example}}}."
        example = f'"{accents[-1]}": 1.0'
        raise ExportError("export.no_posterior", sentence, file=file, reason=error, example=example) from None
    right = isinstance(given, dict) and all(isinstance(p, int | float) and not isinstance(p, bool) for p in given.values())
    total = sum(given.values()) if right else 0.0
    if not right or not set(given) <= set(accents) or min(given.values(), default=-1.0) < 0 or not abs(total - 1) < 0.01:
        raise ExportError(
            "export.bad_posterior",
            "The posterior {file} must give probabilities that sum to 1, by the names of accents; these are {accents}.",
            file=file,
            accents=", ".join(accents),
        )
    return torch.tensor([float(given.get(accent, 0.0)) / total for accent in accents])


def export(
    asr: ASR, method: str, posterior: Tensor, out: Path, lines: Sequence[Line], report: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write a method of a model under a fixed posterior as a plain LoRA into a folder.

    Args:
        asr: the model.
        method: an HDMoLE adapter.
        posterior: (N + 1,), the general domain first.
        out: the folder, which gets the LoRA and `MEASURED`.
        lines: recordings over which gates are averaged, and on which the difference is measured.
            They are needed where the gate changes from frame to frame.
        report: called with the number of recordings that were heard, twice each.

    Returns:
        What `MEASURED` holds. `exact` says whether the LoRA is equal to the adapter. On the
        recordings, `wer` is the word error rate in % of the frozen base, of the adapter and of the
        LoRA, `words_differ` the words in which the last two differ in % of those that the adapter
        hears, and `gate_missed` the sum of |G - its mean| in % of the sum of |G|, over all layers
        and frames.

    Raises:
        ModelError: the model has no such HDMoLE adapter.
        AudioError: a recording cannot be read.
        ExportError: recordings are needed and not given, or the adapter cannot be a LoRA.
    """
    exact = one_gate(asr.gate(method))
    if not exact and not lines:
        raise ExportError(
            "export.no_speech",
            "The gate of {method} changes from frame to frame, so a LoRA can only have its mean over speech; give --speech, a manifest "
            "of recordings.",
            method=method,
        )
    judge = copy.copy(asr)
    judge.domain = {}  # nobody asks for the in-domain score
    judge.models = dict(asr.models)
    encoded, traces = [], []
    texts: dict[str, list[str]] = {"base": [], "adapter": [], "lora": []}
    for done, line in enumerate(lines, 1):
        audio = line.decode()
        encoded.append((audio, judge.segment(audio)))
        heard = judge.transcribe(audio, method, intervention={"accent": posterior}, want_trace=True, encoded=encoded[-1][1])
        texts["adapter"].append(heard.text)
        traces.append(heard.trace)
        report(done)
    held, missed = mean_gates([trace for trace in traces if trace is not None])
    try:
        export_lora(judge.models[method], posterior, out, gates=None if exact else held)
    except ValueError as error:
        raise ExportError("export.not_possible", "{reason}", reason=error) from None
    judge.models["exported"] = adapted(judge.models["base"], out)
    if method in asr.own_encoder:
        judge.own_encoder = asr.own_encoder | {"exported"}
    for done, (audio, segments) in enumerate(encoded, len(lines) + 1):
        for name, heard_by in (("base", "base"), ("lora", "exported")):
            texts[name].append(judge.transcribe(audio, heard_by, encoded=segments).text)
        report(done)
    found: dict[str, Any] = {
        "method": method,
        "posterior": {a: round(float(p), 4) for a, p in zip(asr.accents, posterior, strict=True)},
        "rank": int(judge.models["exported"].peft_config["default"].r),
        "exact": exact,
    }
    if lines:
        scores = {name: score([line.text for line in lines], heard) for name, heard in texts.items()}
        pairs = zip(scores["adapter"]["hypothesis"], scores["lora"]["hypothesis"], strict=True)
        apart, heard_words = np.sum([count_errors(adapter, lora) for adapter, lora in pairs], 0).tolist()
        words = sum(scores["base"]["words"])
        found |= {
            "recordings": len(lines),
            "words": words,
            "wer": {name: round(100 * sum(of["errors"]) / max(1, words), 2) for name, of in scores.items()},
            "words_differ": round(100 * apart / max(1, heard_words), 2),
            "gate_missed": 0.0 if exact else round(100 * missed, 2),
        }
    found["provenance"] = provenance(0, str(asr.device)).to_dict()
    write_json(out / MEASURED, found)
    return found


def mean_gates(traces: Sequence[Trace]) -> tuple[dict[str, Tensor], float]:
    """The mean gate (N,) of each layer over all frames of traces, and what it misses of the gate.

    The latter is the sum of |G - its mean| over the sum of |G|, of all layers, frames and experts.
    """
    means, apart, whole = {}, 0.0, 0.0
    for layer in traces[0].layer_names if traces else ():
        gates = np.concatenate([record.arrays["gate"] for trace in traces for record in trace.records if record.layer == layer])
        means[layer] = torch.from_numpy(gates.mean(0))
        apart += float(np.abs(gates - gates.mean(0)).sum())
        whole += float(np.abs(gates).sum())
    return means, apart / max(whole, 1e-30)
