"""Evaluating methods on a manifest of recordings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hdmole.files import alone, write_text, written
from hdmole.names import GENERAL, accent_named
from hdmole.processes import team
from hdmole.speech.asr import ASR
from hdmole.speech.audio import AudioError
from hdmole.speech.loading import ModelError
from hdmole.speech.manifest import Line, ManifestError, fingerprint, read_manifest
from hdmole.speech.stopping import Cancelled as Cancelled
from hdmole.speech.transcript import together
from hdmole.speech.words import score
from hdmole.study.bootstrap import summarise
from hdmole.study.results import Failure, Results, base_digest, provenance, save
from hdmole.study.routing_table import NUMBERS, in_llm, routing_summary, routing_table, routing_trace

BATCH = 16  # recordings decoded at once
ROUTED = 500  # recordings of each accent whose routing is kept


def evaluate(
    asr: ASR,
    manifest: Path,
    methods: list[str],
    out: Path,
    *,
    accent: str = "auto",
    seed: int = 0,
    within: Sequence[Path] | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Results | None:
    """Transcribe every recording of a manifest with every method, and write the results to `out`.

    Words are compared without case and punctuation. Recordings whose accent is "general" belong to
    the domain "general", all others to the domain "accent". The folder `out` gets these files:

    - `summary.json` and `utterances.parquet`: see `hdmole.study.results`.
    - `recordings.parquet`: length (s), level (dBFS), share of clipped samples and in-domain score
      of each recording.
    - `routing.parquet`: routing of the first `ROUTED` recordings of each accent, by the first of
      the methods that is an HDMoLE adapter.

    Unfinished work is kept in `out`/unfinished. After an interruption the same call continues from
    there.

    Processes that `torchrun` or `accelerate launch` started share the recordings, and must all see
    `out`. The files are those of a single process, and their number may be another after an
    interruption.

    Args:
        asr: the model.
        manifest: JSON lines, see `hdmole.speech.manifest.read_manifest`.
        methods: names of the model's methods.
        out: folder of the results; it is made.
        accent: "auto", or the accent to route all recordings by.
        seed: training seed of the model, written into each row. It influences no result.
        within: the folders in which recordings must lie; see `read_manifest`.
        progress: called with the number of recordings that are done and the number of all. While
            several are heard together, the former is a fraction. What other processes still have to
            do is not counted. It may raise Cancelled.

    Returns:
        The results; None in all processes but the first. Recordings that could not be read are left
        out for all methods and listed under `failed`.

    Raises:
        ManifestError: the manifest cannot be used, or none of its recordings can be read.
        ModelError: the model has no such method or accent.
        OutputError: another evaluation is writing to `out`, or the disk is full.
        OSError: `out` cannot be made.
        Cancelled: `progress` raised it before anything was done.
    """
    methods = list(dict.fromkeys(methods))
    if not methods:
        sentence = "No method is given; this model has {methods}."
        raise ModelError("model.no_method_given", sentence, methods=", ".join(asr.methods))
    for method in methods:
        asr.check_method(method)
    asr.check_accent(accent)
    lines = [replace(line, accent=accent_named(line.accent, asr.accents)) for line in read_manifest(manifest, within)]
    with nullcontext() if team().process_index else alone(out):
        return _judge(asr, lines, methods, out, accent, seed, manifest.name, progress)


def _judge(
    asr: ASR, lines: list[Line], methods: list[str], out: Path, accent: str, seed: int, name: str, progress: Callable[[float, int], None]
) -> Results | None:  # fmt: skip
    """`evaluate` of lines that are read, from the manifest `name`."""
    processes = team()
    unfinished = out / "unfinished"
    if processes.is_main_process:
        _open_unfinished(unfinished, asr, lines, methods, accent, seed)
    processes.wait_for_everyone()
    traced = next((method for method in methods if method in asr.routed), "")
    routed = _routed(lines) if traced else set()
    batches = {f"{start:07d}.parquet": lines[start : start + BATCH] for start in range(0, len(lines), BATCH)}
    missing = [number for number in batches if not (unfinished / f"recordings-{number}").is_file()]
    processes.wait_for_everyone()  # each has seen the same batches missing, before the first is done
    mine = missing[processes.process_index :: processes.num_processes]
    done = len(lines) - sum(len(batches[number]) for number in missing)
    total = done + sum(len(batches[number]) for number in mine)
    try:
        progress(done, total)
        for number in mine:
            batch = batches[number]

            def breathe(share: float, done: int = done, size: int = len(batch)) -> None:
                progress(done + share * size, total)

            for kind, table in _hear(asr, batch, methods, accent, seed, traced, routed, breathe).items():
                with written(unfinished / f"{kind}-{number}") as part:
                    table.to_parquet(part, index=False)
            done += len(batch)
            progress(done, total)
    except Cancelled:
        if not done:
            raise
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    done = sum(len(batch) for number, batch in batches.items() if (unfinished / f"recordings-{number}").is_file())
    recordings = _gather(unfinished, "recordings")
    failed = recordings[recordings.error != ""]
    if len(failed) == len(recordings):
        shutil.rmtree(unfinished)
        raise ManifestError(
            "manifest.nothing_read",
            "None of the {count} recordings of {name} could be read; the first says: {reason}",
            count=len(lines),
            name=name,
            reason=_why(lines[0], failed.error.iloc[0]),
        )
    table = _gather(unfinished, "utterances")
    origin = provenance(
        seed, str(asr.device), base_sha256=base_digest(asr.folder), model=asr.folder.name, manifest=name,
        recordings=done, of=len(lines),
    )  # fmt: skip
    results = summarise(table, origin)
    for method, entry in results.methods.items():
        entry.trainable = asr.trainable(method)
    results.failed = [
        Failure(audio=str(audio), error=str(why)) for audio, why in zip(failed.utterance, failed.error, strict=True)
    ]
    with written(out / "recordings.parquet") as part:
        recordings[recordings.error == ""].drop(columns="error").to_parquet(part, index=False)
    (out / "routing.parquet").unlink(missing_ok=True)
    if len(routing := _gather(unfinished, "routing")):
        with written(out / "routing.parquet") as part:
            routing.to_parquet(part, index=False)
        if (routing.domain == "accent").any():
            results.routing = routing_summary(routing, traced if traced != "hdmole" else None)
    save(out, results, table)
    if done == len(lines):
        shutil.rmtree(unfinished)
    return results


def _why(line: Line, said: str) -> AudioError | str:
    """Why a recording cannot be read, as an error that can be translated.

    If it can be read by now, this is the sentence `said` before.
    """
    try:
        line.decode()
    except AudioError as error:
        return error
    return said


def _open_unfinished(unfinished: Path, asr: ASR, lines: list[Line], methods: list[str], accent: str, seed: int) -> None:
    """Make the folder of unfinished work, and empty it if that was a different evaluation."""
    files = [f for f in sorted(asr.folder.rglob("*")) if f.is_file()]
    question = {
        "lines": fingerprint(lines),
        "model": [[str(f.relative_to(asr.folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "methods": methods, "accent": accent, "seed": seed, "batch": BATCH,
    }  # fmt: skip
    asked, earlier = sha256(json.dumps(question).encode()).hexdigest(), unfinished.with_name("parts")
    if (earlier / "of.txt").is_file() and not unfinished.exists():
        earlier.rename(unfinished)  # its name until version 0.1
    known = unfinished / "of.txt"
    if not known.is_file() or known.read_text() != asked:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_text(known, asked)


def _routed(lines: list[Line]) -> set[int]:
    """The numbers of the first `ROUTED` lines of each accent."""
    of = pd.DataFrame({"number": [line.number for line in lines], "accent": [line.accent for line in lines]})
    return set(of.groupby("accent").head(ROUTED).number)


def _gather(unfinished: Path, name: str) -> pd.DataFrame:
    """The tables of all batches as one."""
    tables = [pd.read_parquet(file) for file in sorted(unfinished.glob(f"{name}-*.parquet"))]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _hear(
    asr: ASR,
    lines: list[Line],
    methods: list[str],
    accent: str,
    seed: int,
    traced: str,
    routed: set[int],
    breathe: Callable[[float], None],
) -> dict[str, pd.DataFrame]:
    """The tables of one batch: `recordings`, and `utterances` and `routing` if they have rows.

    `recordings` comes last. The routing is that of the lines with numbers in `routed`, by the
    method `traced`. `breathe` is called between steps with the share that is done, and may raise
    Cancelled.
    """
    rows: list[dict[str, Any]] = []
    recordings: list[dict[str, Any]] = []
    routing: list[pd.DataFrame] = []
    segments, owners = [], []
    for k, line in enumerate(lines):
        breathe(k / len(lines) / (1 + len(methods)))
        about = {"utterance": line.name, "audio": str(line.audio.resolve()), "accent": line.accent, "speaker": line.speaker}
        try:
            audio = line.decode()
        except AudioError as error:
            nothing = {"seconds": np.nan, "level": np.nan, "clipped": np.nan, "in_domain": np.nan}
            recordings.append({**about, **nothing, "error": str(error)})
            continue
        encoded = asr.segment(audio)
        segments += encoded
        owners += [line] * len(encoded)
        recordings.append(
            {
                **about, "seconds": round(audio.seconds, 2), "level": _level(audio.samples), "clipped": audio.clipped,
                "in_domain": np.nan, "error": "",
            }
        )  # fmt: skip
    judge = asr.judge(asr.default if asr.default in methods else "base")
    if judge == "base":
        for part in together(segments, BATCH):
            breathe(1 / (1 + len(methods)))
            for k, asked in zip(part, asr.ask_base([segments[k] for k in part]), strict=True):
                segments[k] = asked
    judged = {k: segment.base for k, segment in enumerate(segments) if segment.base}
    for number, method in enumerate(methods, 1):
        heard: dict[int, str] = {}
        size = 1 if method == traced and in_llm(asr.models[method]) else BATCH
        parts = together(segments, size)
        for k, part in enumerate(parts):
            breathe((number + k / len(parts)) / (1 + len(methods)))
            lengths = [asr.frames(segments[i]) for i in part]
            wanted = method == traced and any(owners[i].number in routed for i in part)
            with routing_trace(asr.models[method], lengths) if wanted else nullcontext() as recorded:
                known = [segments[i].base for i in part] if method == "base" else []
                found = [base for base in known if base] or asr.decode_batch([segments[i] for i in part], method, accent)
            heard.update({i: result.text for i, result in zip(part, found, strict=True)})
            if method == judge:
                judged.update(zip(part, found, strict=True))
            if recorded is not None:
                table = routing_table(recorded, pd.DataFrame([_about(owners[i]) for i in part]))
                routing.append(table[table.utterance.isin({owners[i].name for i in part if owners[i].number in routed})])
        spoken = list(dict.fromkeys(owners))
        texts = [" ".join(heard[i] for i, owner in enumerate(owners) if owner is line) for line in spoken]
        scored = score([line.text for line in spoken], texts)
        for k, line in enumerate(spoken):
            about = {k: v for k, v in _about(line).items() if k != "spoken"}
            rows.append(
                {**about, "accent": line.accent, "method": method, "seed": seed, "reference": line.text,
                 **{name: values[k] for name, values in scored.items()}}
            )  # fmt: skip
    for recording in recordings:
        own = [i for i, owner in enumerate(owners) if owner.name == recording["utterance"]]
        if own and judge:
            recording["in_domain"] = asr.in_domain([segments[i] for i in own], judge, [judged[i] for i in own])["score"]
    tables = {"utterances": pd.DataFrame(rows)} if rows else {}
    if routing:
        table = pd.concat(routing)
        keys = [c for c in table.columns if c not in NUMBERS]
        # over the segments of a recording
        tables["routing"] = table.groupby(keys, as_index=False, sort=False)[NUMBERS].mean()
    return tables | {"recordings": pd.DataFrame(recordings)}


def _about(line: Line) -> dict[str, str]:
    domain = GENERAL if line.accent == GENERAL else "accent"
    return {"utterance": line.name, "domain": domain, "spoken": line.accent, "speaker": line.speaker}


def _level(samples: np.ndarray) -> float:
    """Root mean square of the samples in dB relative to full scale (dBFS)."""
    return round(float(20 * np.log10(max(1e-6, float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))))), 1)
