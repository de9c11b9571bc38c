"""The work of a session: starting, watching, cancelling and continuing it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import links
from app.cards import show_cards
from app.corpus import Evaluation
from app.jobs import Job, Trial, Utterance, Worth
from app.session import session
from app.texts import t
from hdmole.study.results import Results

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

_samples: dict[Path, Evaluation] = {}  # folder of a model -> the evaluation of its samples, for all visitors
_KEPT = 4  # utterances whose results a session keeps


def job_of(asr: ASR, chosen: Utterance) -> Job:
    """The transcription of this utterance, started if there is none.

    If it was cancelled because another utterance was chosen, it continues. If the visitor cancelled
    it, it does not.
    """
    kept = session()
    job = kept.jobs.pop(chosen.key, None)
    if job is None:
        job = Job(asr, chosen)
    elif job.cancelled and not job.running and chosen.key != kept.stopped:
        job = job.again()
    kept.jobs[chosen.key] = job  # the one used last comes last
    for key in list(kept.jobs)[:-_KEPT]:
        kept.jobs.pop(key).cancel()
    return job


def trial_of(asr: ASR, job: Job, method: str, change: dict[str, Any]) -> Trial:
    """The job's utterance by an HDMoLE adapter under changed routing, started unless it is among
    the last ones.

    All other trials are cancelled.
    """
    kept = session()
    key = job.utterance.key + json.dumps([method, change], sort_keys=True)
    for other, trial in kept.trials.items():
        if other != key:
            trial.cancel()
    found = kept.trials.pop(key, None)
    if found is None or (found.cancelled and found.transcript is None and job.utterance.key != kept.stopped):
        found = Trial(asr, job, method, change)
    kept.trials[key] = found
    for old in list(kept.trials)[:-_KEPT]:
        del kept.trials[old]
    return found


def worth_of(asr: ASR, job: Job, method: str, stretch: int) -> Worth:
    """What each expert of an adapter was worth in a stretch of the job's utterance.

    The work is started if that is not yet known.
    """
    kept = session()
    key = (job.utterance.key, method, stretch)
    found = kept.worth.get(key)
    stopped = job.utterance.key == kept.stopped
    if found is None or (found.cancelled and found.words is None and not found.running and not stopped):
        found = kept.worth[key] = Worth(asr, job, method, stretch)
    for old in list(kept.worth)[:-_KEPT]:
        kept.worth.pop(old).cancel()
    return found


def heard_job(asr: ASR, chosen: Utterance) -> Job:
    """The utterance's finished transcription. Until then, the page shows progress and ends."""
    job = job_of(asr, chosen)
    ended(job)
    show_trouble(job)
    return job


def routed_samples(asr: ASR, manifest: Path) -> tuple[Path, Results]:
    """Folder and results of the model's samples, with their routing, for results that hold none.

    It is measured once for all visitors, when one of them asks for it. Until then, the page ends.
    """
    task = _samples.get(asr.folder)
    if not asr.routed or not manifest.is_file():
        links.write()
        st.info(t("These results hold no routing; `hdmole compare --config FILE --out DIR` writes results that do."))
        st.stop()
    if task is None or (task.summary is None and not task.running):
        links.write()
        if task is not None and task.error:
            st.error(t(task.error))
        st.info(
            t(
                "The published results of this model hold no routing. It can be measured here, on the samples that come with the "
                "model; or judge recordings of your own on the page Corpus."
            )
        )
        if not st.button(t("Measure it on the samples"), type="primary", icon=":material/play_arrow:", key="route_samples"):
            st.page_link("../pages/corpus.py", label=t("To the page Corpus"), icon=":material/library_music:")
            st.stop()
        if task is not None:
            task.forget()
        folder = Path(tempfile.mkdtemp(prefix="hdmole-samples-"))
        task = _samples[asr.folder] = Evaluation(asr, manifest, asr.routed[:1], folder)
    ended(task)
    if task.summary is None:
        st.rerun()
    st.caption(t("Measured here on {count} samples; a whole test set says more.", count=task.summary.provenance.recordings or 0))
    return task.out, task.summary


def ended(task: Job | Trial | Worth | Evaluation, seconds: float = 0.3) -> None:
    """Return if the work ends within so many seconds, else show its progress and end the page.

    The short wait keeps the page from flickering.
    """
    task.wait(seconds)
    if task.running:
        watch(task, None)
        st.stop()


@st.fragment(run_every=0.4)
def watch(task: Job | Trial | Worth | Evaluation, reference: str | None) -> None:
    """Show the progress of running work with a button to stop it.

    If a reference is given, show the transcripts so far too.
    """
    if not task.running:
        st.rerun()
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.progress(task.progress, text=t("Stopping …") if task.cancelled else f"{t(task.step)} …")
    if right.button(t("Cancel"), key="cancel", disabled=task.cancelled):
        task.cancel()
        if not isinstance(task, Evaluation):
            session().stopped = task.utterance.key
    if reference is not None and isinstance(task, Job):
        show_cards(task, reference)


def show_trouble(job: Job) -> None:
    """Show what went wrong or was not finished, with a button to try again."""
    if job.error:
        st.error(t(job.error))
    elif job.cancelled and len(job.transcripts) < len(job.methods):
        st.info(t("Cancelled before every method was done; what was finished is kept."))
    else:
        return
    if st.button(t("Try again") if job.error else t("Go on"), key="again"):
        session().stopped = ""
        session().jobs[job.utterance.key] = job.again()
        st.rerun()
