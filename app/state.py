"""What a session holds: the model (shared), the chosen utterance, the jobs done, and the deep link."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app.texts import language, t
from app.worker import Job, Trial, Utterance, Worth
from hdmole.figures.utterance import mel_spectrogram
from hdmole.names import layer_label

ROOT = Path(__file__).resolve().parent.parent
_KEPT = 4  # utterances whose results a session keeps


@dataclass(frozen=True)
class Sample:
    """A clip that comes with the model."""

    name: str
    path: Path
    text: str
    accent: str
    speaker: str


@st.cache_resource(show_spinner=False)
def _load(model: str) -> Any:
    from hdmole.speech.asr import ASR

    asr = ASR.load(model)
    noise = np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32)
    for method in asr.methods:  # first calls compile and cache; without this the first visitor would see their time
        asr.transcribe(noise, method=method)
    mel_spectrogram(noise, 16_000)
    return asr


def load_model() -> Any:
    """The `hdmole.speech.asr.ASR` all sessions share; ends the page with a plain sentence where there is none."""
    model = os.environ.get("HDMOLE_MODEL", "demo")
    try:
        return _load(model)
    except (ValueError, OSError) as error:
        st.error(str(error))
        if model == "demo":
            st.info(
                t(
                    "The demo model comes with the repository, in assets/demo. Where it is missing, train it with "
                    "`hdmole demo build`, or start the app with another model: `HDMOLE_MODEL=FOLDER make app`."
                )
            )
        st.stop()


def model_folder(asr: Any) -> Path:
    return Path(asr.folder)


@st.cache_data(show_spinner=False)
def samples(folder: Path) -> list[Sample]:
    """The clips in `samples/manifest.jsonl` of a model's folder, ordered by accent, those of the general accent last."""
    manifest = folder / "samples" / "manifest.jsonl"
    if not manifest.is_file():
        return []
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    clips = [
        Sample(
            Path(row["audio"]).stem,
            manifest.parent / row["audio"],
            row["text"],
            row.get("accent", ""),
            row.get("speaker", ""),
        )
        for row in rows
    ]
    return sorted(clips, key=lambda clip: (clip.accent == "general", clip.accent, clip.name))


def results(folder: Path) -> dict[str, Any]:
    """The summary in a results folder, as `hdmole.study.results` wrote it; empty where there is none.

    Raises ValueError where it is not such a summary.
    """
    file = folder / "summary.json"
    try:
        if not file.is_file():
            return {}
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        summary["methods"].items()
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ValueError(f"{file} is not a summary of results; `hdmole evaluate --out DIR` writes one.") from None
    return summary


def results_folders(asr: Any) -> dict[str, Path]:
    """Name -> folder of the results that come with the model and the repository, the headline comparison last."""
    own = model_folder(asr) / "results"
    found = {"this model's own": own} if (own / "summary.json").is_file() else {}
    if model_folder(asr) == ROOT / "assets" / "demo":  # the comparisons in the repository are of the demo model
        compared = [f.parent for f in (ROOT / "assets" / "results").glob("*/summary.json")]
        found |= {f.name: f for f in sorted(compared, key=lambda f: (f.name == "main", f.name))}
    return found


def read_table(file: Path, utterance: str | None = None) -> pd.DataFrame:
    """A parquet file of results, or its rows of one utterance; read once as long as it stays the same."""
    return _read_table(file, utterance, file.stat().st_mtime_ns)


@st.cache_data(show_spinner=False, max_entries=8)
def _read_table(file: Path, utterance: str | None, changed: int) -> pd.DataFrame:
    return pd.read_parquet(file, filters=[("utterance", "==", utterance)] if utterance else None)


def opening_sample(clips: list[Sample], summary: dict[str, Any]) -> Sample:
    """The clip in which HDMoLE hears most words that the base does not, by the model's own results; else the first."""
    errors = {clip.name: summary.get("samples", {}).get(clip.name, {}) for clip in clips}
    return max(clips, key=lambda clip: errors[clip.name].get("base", 0) - errors[clip.name].get("hdmole", 0))


def utterance() -> Utterance | None:
    """The utterance the pages show."""
    return st.session_state.get("utterance")


def choose(chosen: Utterance) -> None:
    """Make it the utterance the pages show; a job for another one that still runs is cancelled."""
    old = utterance()
    if old is not None and old.key == chosen.key:
        st.session_state.utterance = chosen
        return
    st.session_state.utterance = chosen
    st.session_state.pop("notes", None)
    for job in _jobs().values():
        if job.utterance.key != chosen.key:
            job.cancel()


def choose_sample(sample: Sample) -> None:
    if not sample.path.is_file():
        st.error(t("The sample {name} is missing from the model's folder; choose another one.", name=sample.name))
        return
    choose(utterance_of(sample))


def utterance_of(sample: Sample) -> Utterance:
    """A sample as something to transcribe."""
    return Utterance(sample.path.name, sample.path.read_bytes(), sample.text, sample.accent, sample.name)


def job_of(asr: Any, chosen: Utterance) -> Job:
    """The job of this utterance, started if there is none; one that was cancelled half-way starts again."""
    jobs = _jobs()
    job = jobs.pop(chosen.key, None)
    if job is None or (job.cancelled and not job.running and chosen.key != st.session_state.get("stopped")):
        job = job.again() if job else Job(asr, chosen)
    jobs[chosen.key] = job  # the most recent stands last
    for key in list(jobs)[:-_KEPT]:
        jobs.pop(key).cancel()
    return job


def trial_of(asr: Any, job: Job, change: dict[str, Any]) -> Trial:
    """The job's utterance under changed routing, started if it was not heard so lately; any other trial is cancelled."""
    trials: dict[str, Trial] = st.session_state.setdefault("trials", {})
    key = job.utterance.key + json.dumps(change, sort_keys=True)
    for other, trial in trials.items():
        if other != key:
            trial.cancel()
    found = trials.pop(key, None)
    if found is None or (found.cancelled and found.transcript is None and job.utterance.key != st.session_state.get("stopped")):
        found = Trial(asr, job, change)
    trials[key] = found
    for old in list(trials)[:-_KEPT]:
        del trials[old]
    return found


def worth_of(asr: Any, job: Job, segment: int) -> Worth:
    """What each expert was worth in a stretch of the job's utterance, started if it was not asked before."""
    asked: dict[tuple[str, int], Worth] = st.session_state.setdefault("worth", {})
    key = (job.utterance.key, segment)
    stopped = job.utterance.key == st.session_state.get("stopped")
    if key not in asked or (asked[key].cancelled and asked[key].words is None and not asked[key].running and not stopped):
        asked[key] = Worth(asr, job, segment)
    for old in list(asked)[:-_KEPT]:
        asked.pop(old).cancel()
    return asked[key]


def _jobs() -> dict[str, Job]:
    return st.session_state.setdefault("jobs", {})


def read_deep_link(clips: list[Sample], folder: Path) -> None:
    """Once a session: take the utterance, layer and gate from the address, `?sample=NAME&layer=NAME&gate=NAME`."""
    if "linked" in st.session_state:
        return
    st.session_state.linked = True
    names = {clip.name: clip for clip in clips}
    wanted = st.query_params.get("sample", "")
    if clips and utterance() is None:
        try:
            measured = results(folder / "results")
        except ValueError:
            measured = {}
        choose_sample(names.get(wanted) or opening_sample(clips, measured))
    if wanted and wanted not in names:
        note(t("This link names the sample {name}, which this model does not have; here is another one.", name=repr(wanted)))
    for name in ("layer", "gate"):
        if name in st.query_params:
            st.session_state[f"linked_{name}"] = st.query_params[name]


def note(text: str) -> None:
    """Something to say until another utterance is chosen."""
    st.session_state.setdefault("notes", []).append(text)


def show_notes() -> None:
    for text in st.session_state.get("notes", []):
        st.warning(text)


def write_deep_link(**values: str) -> None:
    """Make the address lead back to what is shown, in the language shown; names without a value leave it."""
    wanted = {name: value for name, value in values.items() if value}
    if language() != "en":
        wanted["lang"] = language()
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def device_name(asr: Any) -> str:
    """CPU, or the GPU's name."""
    if asr.device.type != "cuda":
        return str(asr.device.type).upper()
    import torch

    return torch.cuda.get_device_name(asr.device)


def layers_of(table: pd.DataFrame) -> list[str]:
    """Layer names of a routing table, in the model's order."""
    return list(table.drop_duplicates("layer").sort_values("layer_index").layer)


def prepare_choice(name: str, options: list[str]) -> None:
    """Set the widget `name` from the deep link, once; a link to something that is not there is said, not followed."""
    linked = st.session_state.pop(f"linked_{name}", None)
    found = next((option for option in options if linked in (option, layer_label(option))), None)
    if linked and found is None:
        st.warning(
            t(
                "This link names the {choice} {name}, which is not there; the choices are {choices}.",
                choice=t(name),
                name=repr(linked),
                choices=t(", ").join(map(layer_label, options)),
            )
        )
    if found is not None or st.session_state.get(name) not in options:
        st.session_state[name] = found or options[0]


def model_card(path: Path) -> str:
    """A model card's text without the metadata block that hubs put before it."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].split("\n---\n", 1)[1]
    return text
