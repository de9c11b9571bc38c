"""The work of a session: starting it, watching it on a page, cancelling it and going on with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import streamlit as st

from app.cards import show_cards
from app.corpus import Evaluation
from app.jobs import Job, Trial, Utterance, Worth
from app.session import session
from app.texts import t

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

_KEPT = 4  # utterances whose results a session keeps


def job_of(asr: ASR, chosen: Utterance) -> Job:
    """The transcription of this utterance, started if there is none.

    One that was cancelled because another utterance was chosen goes on; one that the visitor cancelled does not.
    """
    kept = session()
    job = kept.jobs.pop(chosen.key, None)
    if job is None:
        job = Job(asr, chosen)
    elif job.cancelled and not job.running and chosen.key != kept.stopped:
        job = job.again()
    kept.jobs[chosen.key] = job  # the one used last stands last
    for key in list(kept.jobs)[:-_KEPT]:
        kept.jobs.pop(key).cancel()
    return job


def trial_of(asr: ASR, job: Job, change: dict[str, Any]) -> Trial:
    """The job's utterance under changed routing, started if it is not among the last ones; any other trial is cancelled."""
    kept = session()
    key = job.utterance.key + json.dumps(change, sort_keys=True)
    for other, trial in kept.trials.items():
        if other != key:
            trial.cancel()
    found = kept.trials.pop(key, None)
    if found is None or (found.cancelled and found.transcript is None and job.utterance.key != kept.stopped):
        found = Trial(asr, job, change)
    kept.trials[key] = found
    for old in list(kept.trials)[:-_KEPT]:
        del kept.trials[old]
    return found


def worth_of(asr: ASR, job: Job, stretch: int) -> Worth:
    """What each expert was worth in a stretch of the job's utterance, started if it was not asked before."""
    kept = session()
    key = (job.utterance.key, stretch)
    found = kept.worth.get(key)
    stopped = job.utterance.key == kept.stopped
    if found is None or (found.cancelled and found.words is None and not found.running and not stopped):
        found = kept.worth[key] = Worth(asr, job, stretch)
    for old in list(kept.worth)[:-_KEPT]:
        kept.worth.pop(old).cancel()
    return found


def heard_job(asr: ASR, chosen: Utterance) -> Job:
    """The utterance's transcription once it has ended; until then the page shows its progress and ends there."""
    job = job_of(asr, chosen)
    ended(job)
    show_trouble(job)
    return job


def ended(task: Job | Trial | Worth | Evaluation, seconds: float = 0.3) -> None:
    """Go on if the work ends within so many seconds, which saves a flicker; else show its progress and end the page."""
    task.wait(seconds)
    if task.running:
        watch(task, None)
        st.stop()


@st.fragment(run_every=0.4)
def watch(task: Job | Trial | Worth | Evaluation, reference: str | None) -> None:
    """Progress of running work, with a way to stop it, and the transcripts so far where a reference is given."""
    if not task.running:
        st.rerun()
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.progress(task.progress, text=t("Stopping after this step …") if task.cancelled else f"{t(task.step)} …")
    if right.button(t("Cancel"), key="cancel", disabled=task.cancelled):
        task.cancel()
        if not isinstance(task, Evaluation):
            session().stopped = task.utterance.key
    if reference is not None and isinstance(task, Job):
        show_cards(task, reference)


def show_trouble(job: Job) -> None:
    """What went wrong or was left undone, with a way to try again."""
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
