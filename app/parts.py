"""What the pages are made of: choosing an utterance, watching its job, figures with their downloads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import soundfile
import streamlit as st

from app import state, texts
from app.texts import Text, drawn, t
from app.words import legend_html, method_card
from app.worker import Evaluation, Job, Trial, Utterance, Worth
from hdmole.figures import results as result_figures
from hdmole.figures import utterance as figures
from hdmole.speech.audio import SAMPLE_RATE

UPLOADS = ["wav", "flac", "mp3", "ogg", "opus", "m4a", "mp4", "webm"]
_MOST_SPANS = 8  # of a long recording, named one by one


def sample_label(clip: state.Sample) -> str:
    words = clip.text.split()
    text = " ".join(words[:9]) + (" …" if len(words) > 9 else "")
    return f"{texts.accent(clip.accent)} · {text}"


def sample_select(clips: list[state.Sample], label: str = "") -> None:
    """A list of the model's samples; the chosen one becomes the session's utterance."""
    by_name = {clip.name: clip for clip in clips}
    current = state.utterance()
    name = current.sample if current is not None and current.sample in by_name else None
    st.session_state.sample_choice = name

    def chosen() -> None:
        if st.session_state.sample_choice in by_name:  # just after a change of language it is the old label
            state.choose_sample(by_name[st.session_state.sample_choice])

    st.selectbox(
        label or t("Sample"), list(by_name), key="sample_choice", on_change=chosen, format_func=lambda n: sample_label(by_name[n]),
        placeholder=t("{name} (yours)", name=current.name) if current is not None else t("Choose a sample"),
        label_visibility="visible" if label else "collapsed",
    )  # fmt: skip


def choose_utterance(clips: list[state.Sample]) -> None:
    """The three ways in: a sample, a file, the microphone."""

    def take(key: str, name: str) -> None:
        file = st.session_state[key]
        if file is not None:
            state.choose(Utterance(name or file.name, file.getvalue()))

    ways = [*([Text("Sample")] if clips else []), Text("Upload"), Text("Microphone")]
    left, right = st.columns([1, 2], vertical_alignment="top")
    with left:
        way = st.segmented_control(
            t("Speech from"),
            ways,
            default=ways[0],
            required=True,
            key="way",
            format_func=t,
            persist_state="session",
            label_visibility="collapsed",
        )
    with right:
        if way == "Sample":
            sample_select(clips)
        elif way == "Upload":
            st.file_uploader(
                t("Audio file, up to half an hour"), type=UPLOADS, key="upload", on_change=take, args=("upload", ""),
                help=t("It stays in this computer's memory and is forgotten when you close the page."),
            )  # fmt: skip
        else:
            st.audio_input(t("Record a sentence"), key="recording", on_change=take, args=("recording", "recording.wav"))


def choose_results(asr: Any, needs: str, required: bool = True) -> tuple[Path, dict[str, Any]]:
    """The results folder the visitor chose, in the sidebar or by `?results=`, and its summary.

    Without a choice the last that has something under `needs`. Where there is none, ends the page with a sentence, or gives an
    empty summary where none is `required`.
    """
    folders, link = state.results_folders(asr), st.query_params.get("results", "")
    kept = st.session_state
    if link and link != kept.get("results_shown"):  # an address that was opened, not one that this page wrote
        kept.results_given = "" if link in folders else link
        kept.results_name = link if link in folders else None
    if not kept.get("results_given") and kept.get("results_name") not in folders:
        fitting = [name for name, folder in folders.items() if needs in summary_of(folder)]
        kept.results_name = next(reversed(fitting), None)
    with st.sidebar:
        name = st.selectbox(
            t("Results"), list(folders), index=None, key="results_name", format_func=t, persist_state="session",
            on_change=lambda: kept.update(results_given=""),
        ) if folders else None  # fmt: skip
        given = st.text_input(
            t("or a folder of your own"), key="results_given", placeholder="results/mine", persist_state="session",
            on_change=lambda: kept.update(results_name=None),
            help=t("A folder on the app's machine that `hdmole compare` or `hdmole evaluate` wrote."),
        ).strip()  # fmt: skip
    if not given and name is None:
        if not required:
            return Path(), {}
        st.info(
            t(
                "There are no results of this kind yet. `hdmole evaluate --manifest FILE --out DIR` judges this model on a test set "
                "of yours, `hdmole compare --config FILE --out DIR` trains and compares methods; name DIR in the sidebar."
            )
        )
        st.stop()
    folder = Path(given) if given else folders[str(name)]
    kept.results_shown = given or str(name)
    if link != kept.results_shown:
        state.write_deep_link(results=kept.results_shown)
    try:
        summary = state.results(folder)
    except ValueError as error:
        st.error(str(error))
        st.stop()
    if not summary:
        text = t("{folder} has no summary.json; name a folder that `hdmole compare` or `hdmole evaluate` wrote.", folder=folder)
        st.error(text)
        st.stop()
    if not given and (note := earlier_base(asr, summary)):
        st.caption(note)
    return folder, summary


def earlier_base(asr: Any, summary: dict[str, Any]) -> str:
    """Of results that come with the model: that they are of an earlier release's base, where they are; else nothing."""
    own = summary_of(state.model_folder(asr) / "results")
    if not own or summary["provenance"]["date"] >= own["provenance"]["date"]:
        return ""
    earlier, now = (f"{s['methods']['base']['domains']['general']['wer']:.1f}" for s in (summary, own))
    return t(
        "These results are of an earlier release's base: it gets {earlier} % of the words in general speech wrong, this model's base "
        "{now} %.",
        earlier=earlier, now=now,
    )  # fmt: skip


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of a results folder; empty where there is none or it is damaged."""
    try:
        return state.results(folder)
    except ValueError:
        return {}


def from_link(linked: Mapping[str, str], key: str, name: str, options: Collection[str], default: str | None) -> None:
    """Set the widget `key` when the page is opened: as its address `linked` says under `name`, or else to its default."""
    if key not in st.session_state or st.session_state[key] not in (*options, default):
        st.session_state[key] = linked[name] if linked.get(name) in options else default


def confusion(recogniser: Mapping[str, Any]) -> None:
    """The confusion matrix of the accent recogniser."""
    st.header(t("What the accent recogniser hears"))
    table = result_figures.confusion_data(recogniser["confusion"], recogniser["labels"])
    figure(
        result_figures.confusion_matrix(table), "accent-confusion", table,
        t("a row is an accent as spoken by unseen speakers, a column what it was taken for, in percent of the row."), "confusion",
    )  # fmt: skip


def origin(summary: dict[str, Any]) -> None:
    """Where the numbers of a results file come from."""
    if known := texts.origin(summary):
        said = " · ".join(f"{name} `{value}`" for name, value in known.items())
        st.caption(t("Where these numbers come from: {origin}", origin=said))


@st.cache_data(show_spinner=False, max_entries=8)
def sound_of(folder: Path, utterance: str, text: str, accent: str, speaker: str) -> tuple[str, bytes] | None:
    """Name and content of an utterance's audio: the recording that was judged, or a synthetic one made again; None where neither is."""
    listed = folder / "recordings.parquet"
    if listed.is_file():
        audio = pd.read_parquet(listed, columns=["utterance", "audio"]).set_index("utterance").audio
        found = Path(str(audio[audio.index == utterance].iloc[0])) if utterance in audio.index else Path()
        return (found.name, found.read_bytes()) if found.is_file() else None
    from hdmole.demo.synth import say_again

    wave = say_again(text, accent, speaker)
    if wave is None:
        return None
    content = io.BytesIO()
    soundfile.write(content, wave, SAMPLE_RATE, format="WAV")
    return f"{utterance}.wav", content.getvalue()


def chosen_utterance() -> Utterance:
    """The session's utterance; ends the page with a sentence where there is none."""
    chosen = state.utterance()
    if chosen is None:
        st.info(t("Choose, upload or record an utterance first."))
        st.page_link("../pages/transcribe.py", label=t("To the page Transcribe"), icon=":material/graphic_eq:")
        st.stop()
    return chosen


def routed_utterance(asr: Any) -> Utterance:
    """The same, on a page that needs routing; ends it where this model has none."""
    chosen = chosen_utterance()
    if "hdmole" not in asr.methods:
        st.info(t("This model has no HDMoLE adapter, so there is no routing to show or change."))
        st.stop()
    return chosen


def heard_job(asr: Any, chosen: Utterance) -> Job:
    """The utterance's job once it has ended; until then, the page shows its progress and ends there."""
    job = state.job_of(asr, chosen)
    ended(job)
    show_trouble(job)
    return job


def ended(task: Job | Trial | Worth | Evaluation, seconds: float = 0.3) -> None:
    """Go on if the work ends within so many seconds, which saves a flicker; else show its progress and end the page."""
    task.wait(seconds)
    if task.running:
        watch(task, None)
        st.stop()


@dataclass(frozen=True)
class Stretch:
    """One of the stretches a long recording was cut into: number, start and end in seconds, the words in it, its samples."""

    number: int
    start: float
    end: float
    words: list[Any]
    samples: np.ndarray


def choose_stretch(job: Job, transcript: Any) -> Stretch:
    """The stretch of a long recording to look at; all of a short one."""
    assert job.audio is not None
    spans = job.segments or [(0.0, job.audio.seconds)]
    words = transcript.words if transcript else []

    def said(k: int) -> str:
        inside = " ".join(w.word for w in words if spans[k][0] <= w.start < spans[k][1])
        text = f"{inside[:60]}{'…' if len(inside) > 60 else ''}"
        return t("{start} to {end}: {words}", start=_clock(spans[k][0]), end=_clock(spans[k][1]), words=text)

    number = 0
    if len(spans) > 1:
        number = st.selectbox(
            t("Stretch of {length}", length=_clock(job.audio.seconds)), range(len(spans)), format_func=said, key=f"stretch-{job.utterance.key}",
            persist_state="session",
        )  # fmt: skip
    start, end = spans[number]
    inside = [w for w in words if start <= w.start < end]
    return Stretch(number, start, end, inside, job.audio.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def reference_input(chosen: Utterance) -> str:
    """The text that was really said, as far as the user knows it."""
    key = f"reference-{chosen.key}"
    if key not in st.session_state:
        st.session_state[key] = chosen.reference
    return st.text_input(
        t("What was said (optional, for the word error rate)"),
        key=key,
        persist_state="session",
        placeholder=t("Type the words that were said"),
    )


def warn_if_outside(job: Job) -> None:
    """Say so where the audio is outside what the model was made for; before any transcript is shown."""
    for method, transcript in job.transcripts.items():
        if transcript.flags:
            flags = t("; ").join(map(t, transcript.flags))
            st.warning(t("**{method}:** {flags}.", method=texts.method(method), flags=flags), icon=":material/repeat:")
    for transcript in job.transcripts.values():
        if transcript.in_domain.get("verdict") is False:
            reasons = t("; ").join(map(t, transcript.in_domain.get("reasons") or []))
            st.warning(
                t("**This does not sound like what the model was made for.** What it writes is likely to be invented.")
                + (t(" Why: {reasons}.", reasons=reasons) if reasons else ""),
                icon=":material/hearing_disabled:",
            )
        elif outside := transcript.in_domain.get("outside"):
            spans = t(", ").join(f"{_clock(start)}–{_clock(end)}" for start, end in outside[:_MOST_SPANS])
            st.info(
                t(
                    "{count} of {all} stretches do not sound like what the model was made for: {spans}", count=len(outside),
                    all=len(job.segments), spans=spans + (" …" if len(outside) > _MOST_SPANS else ""),
                ),
                icon=":material/hearing_disabled:",
            )  # fmt: skip
        return


def show_cards(job: Job, reference: str) -> None:
    """What each method heard, side by side."""
    warn_if_outside(job)
    missing = "…" if job.running else t("not transcribed")
    cards = [method_card(method, job.transcripts.get(method), reference, missing) for method in job.methods]
    st.html(f"<div class='cards'>{''.join(cards)}</div>")


def show_legend(reference: str) -> None:
    st.html(legend_html(reference))


@st.fragment(run_every=0.4)
def watch(job: Job | Trial | Worth | Evaluation, reference: str | None) -> None:
    """Progress of running work, with a way to stop it, and the transcripts so far where a reference is given."""
    if not job.running:
        st.rerun()
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.progress(job.progress, text=t("Stopping after this step …") if job.cancelled else f"{t(job.step)} …")
    if right.button(t("Cancel"), key="cancel", disabled=job.cancelled):
        job.cancel()
        if not isinstance(job, Evaluation):
            st.session_state.stopped = job.utterance.key
    if reference is not None and isinstance(job, Job):
        show_cards(job, reference)


def show_trouble(job: Job) -> None:
    """What went wrong or was left undone, with a way to try again."""
    if job.error:
        st.error(t(job.error))
    elif job.cancelled and len(job.transcripts) < len(job.methods):
        st.info(t("Cancelled before every method was done; what was finished is kept."))
    else:
        return
    if st.button(t("Try again") if job.error else t("Go on"), key="again"):
        st.session_state.pop("stopped", None)
        st.session_state.jobs[job.utterance.key] = job.again()
        st.rerun()


def figure(
    plot: go.Figure,
    name: str,
    data: pd.DataFrame | dict[str, Callable[[], pd.DataFrame]],
    reading: str,
    key: str,
    on_select: Callable[[], None] | Literal["ignore", "rerun"] = "ignore",
) -> Any:
    """A figure with one line on how to read it and its downloads; returns the selection where one is asked for.

    `data` is the table that is drawn, or several by name.
    """
    bar = {
        "toImageButtonOptions": {"filename": name, "scale": 2, "format": str(st.session_state.get(f"{key}-as") or "PNG").lower()},
        "displaylogo": False,
        "displayModeBar": True,  # it would show only under a mouse
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    }
    tables: dict[str, Callable[[], pd.DataFrame]] = data if isinstance(data, dict) else {Text("Data"): data.copy}
    event = st.plotly_chart(drawn(plot), key=key, on_select=on_select, selection_mode="points", config=bar, alt=reading)
    with st.container(horizontal=True, vertical_alignment="top", wrap=False):
        st.caption(t("**How to read this:** {reading}", reading=reading))
        with st.popover(t("Save"), icon=":material/download:", width="content", key=f"{key}-save"):
            for title, table in tables.items():
                st.download_button(
                    t("{table} (CSV)", table=t(title)),
                    partial(_csv, table),
                    f"{name}.csv" if len(tables) == 1 else f"{name}-{title.lower().replace(' ', '-')}.csv",
                    "text/csv",
                    key=f"{key}-csv-{title}",
                    on_click="ignore",
                )
            st.download_button(
                t("Figure (HTML)"),
                lambda: figures.exported(drawn(plot)).to_html(),
                f"{name}.html",
                "text/html",
                key=f"{key}-html",
                on_click="ignore",
            )
            st.segmented_control(
                t("The camera over the figure saves"), ["PNG", "SVG"], default="PNG", required=True, key=f"{key}-as"
            )
    return event


def _csv(table: Callable[[], pd.DataFrame]) -> str:
    return str(table().to_csv(index=False))


def transcript_downloads(job: Job) -> None:
    """Everything that was heard, as JSON and as a table of words."""
    stem = job.utterance.stem
    found = [{"file": job.utterance.name, **t.to_dict()} for t in job.transcripts.values()]
    words = pd.DataFrame(
        [{"method": t["method"], **word} for t in found for word in t["words"]],
        columns=["method", "word", "start", "end", "confidence"],
    )
    with st.container(horizontal=True):
        st.download_button(
            t("Transcripts (JSON)"),
            json.dumps(found, indent=2),
            f"{stem}.json",
            "application/json",
            icon=":material/download:",
            on_click="ignore",
        )
        st.download_button(
            t("Words (CSV)"),
            words.to_csv(index=False),
            f"{stem}-words.csv",
            "text/csv",
            icon=":material/download:",
            on_click="ignore",
        )


def headline(summary: dict[str, Any]) -> None:
    """The numbers a visitor looks for first; those the results do not have are left out."""
    numbers: list[tuple[str, str, str | None]] = []
    domains = {method: entry["domains"] for method, entry in summary.get("methods", {}).items()}
    for domain, name, field in (
        ("accent", t("WER on accents, HDMoLE"), "mean_over_accents"),
        ("general", t("WER on general speech, HDMoLE"), "wer"),
    ):
        base, mine = domains.get("base", {}).get(domain), domains.get("hdmole", {}).get(domain)
        if base and mine:
            change = t("{points} points against the base", points=f"{mine[field] - base[field]:+z.1f}")
            numbers.append((name, f"{mine[field]:.1f} %", change))
    trained = {method: entry.get("trainable") for method, entry in summary.get("methods", {}).items()}
    share = f"{100 * trained['hdmole'] / trained['full']:.1f}" if trained.get("hdmole") and trained.get("full") else ""
    if trained.get("hdmole"):
        count = t("{share} % of full", share=share) if share else f"{trained['hdmole']:,}"
        numbers.append((t("Parameters HDMoLE trains"), count, None))
    if "accent_recogniser" in summary:
        numbers.append((t("Accent recogniser, right"), f"{100 * summary['accent_recogniser']['balanced_accuracy']:.0f} %", None))
    for column, (label, value, delta) in zip(st.columns(max(1, len(numbers))), numbers, strict=False):
        column.metric(label, value, delta, delta_color="inverse")
