"""Results folders: choosing one, reading it, and showing what it holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import soundfile
import streamlit as st

from app import access, links, plots, texts
from app.model import ROOT
from app.session import session
from app.texts import Text, t
from hdmole.figures import results as result_figures
from hdmole.names import GENERAL_OF
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.study.claims import answer, claim_line, plain_line
from hdmole.study.results import COLUMNS, Claim, RecogniserResult, Results, ResultsError, base_digest, load

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR


PUBLISHED = ROOT / "assets" / "results"
_COLUMNS = {  # that the pages need
    "utterances.parquet": set(COLUMNS),
    "recordings.parquet": {"utterance", "audio", "accent", "speaker", "seconds", "level", "clipped", "in_domain"},
    "routing.parquet": {"utterance", "domain", "spoken", "layer", "layer_index", "expert", "gate", "n_active"},
}


# -- reading ---------------------------------------------------------------------------------------


def folders(asr: ASR) -> dict[str, Path]:
    """Name -> folder of the results of this model's base.

    The comparison of the paper is the last.
    """
    own = asr.folder / "results"
    found = {"this model's own": own} if (own / "summary.json").is_file() else {}
    summary = summary_of(PUBLISHED / "paper")
    if summary and of_this_base(asr, summary):
        found["paper"] = PUBLISHED / "paper"
    return found


def archived(asr: ASR) -> dict[str, Path]:
    """Name -> folder of the demo model's former comparisons, which are of earlier bases."""
    former = (PUBLISHED / "archive").glob("*/summary.json") if asr.folder == ROOT / "assets" / "demo" else ()
    return {file.parent.name: file.parent for file in sorted(former)}


def of_this_base(asr: ASR, summary: Results) -> bool:
    """Whether results were measured on the model's base, by the digest of its weights."""
    return summary.provenance.base_sha256 == digest_of(asr.folder)


def read_table(file: Path, utterance: str | None = None) -> pd.DataFrame:
    """A parquet file of results, or its rows of one utterance, cached until the file changes.

    If it cannot be read, or lacks columns, the page ends with a sentence that says so.
    """
    try:
        table = _read_table(file, utterance, file.stat().st_mtime_ns)
    except (OSError, ValueError, RecursionError):  # pyarrow's errors are of these classes
        table = pd.DataFrame()
    if (table.empty and utterance is None) or not _COLUMNS.get(file.name, set()) <= set(table.columns):
        st.error(
            t(
                "{file} is damaged or empty; run `hdmole evaluate` or `hdmole compare` again to write it.",
                file=access.plain(file.name),
            )
        )
        st.stop()
    return table


@st.cache_data(show_spinner=False, max_entries=8)
def _read_table(file: Path, utterance: str | None, changed: int) -> pd.DataFrame:
    return pd.read_parquet(file, filters=[("utterance", "==", utterance)] if utterance else None)


def summary_of(folder: Path) -> Results | None:
    """The results in a folder; None if there are none that can be read."""
    try:
        return load(folder)
    except ResultsError:
        return None


def sound_of(asr: ASR, folder: Path, utterance: str, text: str, accent: str, speaker: str) -> tuple[str, bytes] | None:
    """Name and content of an utterance's audio: the recording, or synthetic speech made again.

    None if neither is to be had, or if the recording lies where visitors may not look.
    """
    listed = folder / "recordings.parquet"
    if listed.is_file():
        audio = read_table(listed).set_index("utterance").audio
        named = str(audio[audio.index == utterance].iloc[0]) if utterance in audio.index else ""
        content = access.audio_of(folder, named, asr.folder) if named else None
        return (Path(named).name, content) if content is not None else None
    return _synthetic(utterance, text, accent, speaker)


@st.cache_data(show_spinner=False, max_entries=8)
def _synthetic(utterance: str, text: str, accent: str, speaker: str) -> tuple[str, bytes] | None:
    from hdmole.demo.synth import say_again

    wave = say_again(text, accent, speaker)
    if wave is None:
        return None
    content = io.BytesIO()
    soundfile.write(content, wave, SAMPLE_RATE, format="WAV")
    return f"{utterance}.wav", content.getvalue()


# -- choosing --------------------------------------------------------------------------------------


def choose(asr: ASR) -> tuple[Path, Results]:
    """The results that the visitor chose, in the sidebar or by `?results=`, and their folder.

    By default this is the last folder that can be read. Without any results the page ends.
    """
    found = chosen(asr)
    if found is None:
        links.write()
    if found is None:
        st.info(
            t(
                "There are no results of this kind yet. `hdmole evaluate --manifest FILE --out DIR` judges this model on a test set "
                "of yours, `hdmole compare --config FILE --out DIR` trains and compares methods; name DIR in the sidebar."
            )
        )
        if archived(asr):
            st.caption(t("Former comparisons, on earlier bases, can be chosen under Results in the sidebar."))
        st.stop()
    return found


def chosen(asr: ASR, routing: bool = False) -> tuple[Path, Results] | None:
    """As `choose`, but None if there are no results.

    If `routing` is true, those that hold routing go first.
    """
    current, link = folders(asr), links.take("results")
    known = current | archived(asr)
    widgets = st.session_state
    if link:
        widgets.results_given = "" if link in known else link
        widgets.results_name = link if link in known else None
    readable = {name: summary for name, folder in current.items() if (summary := summary_of(folder))}
    routed = [name for name, summary in readable.items() if summary.routing]
    name = widgets.get("results_name")
    if not widgets.get("results_given") and (
        name not in known or (routing and name in current and name not in routed and routed)
    ):
        name = next(reversed(routed if routing and routed else list(readable)), None)
    # said in each run, since a page that is opened may else begin with an empty choice
    widgets.results_name = name
    with st.sidebar:
        name = st.selectbox(
            t("Results"), list(known), index=None, key="results_name", persist_state="session",
            format_func=lambda name: t(name) if name in current else t("{name} (archive, of an earlier base)", name=name),
            on_change=lambda: widgets.update(results_given=""),
        ) if known else None  # fmt: skip
        given = st.text_input(
            t("or a folder of your own"), key="results_given", placeholder="results/mine", persist_state="session",
            on_change=lambda: widgets.update(results_name=None),
            help=t(
                "A results folder that `hdmole compare` or `hdmole evaluate` wrote, in a folder that the app was started with: "
                "`hdmole app --data FOLDER`."
            ),
        ).strip()  # fmt: skip
    if not given and name is None:
        return None
    session().results = given or str(name)
    try:
        folder = access.results_folder(given, asr.folder) if given else known[str(name)]
        summary = load(folder)
    except (ResultsError, access.AccessError) as error:
        st.error(t(error))
        st.stop()
    if note := other_base(asr, folder, summary):
        st.warning(note)
    return folder, summary


def other_base(asr: ASR, folder: Path, summary: Results) -> str:
    """A note if results are, or may be, of another base than the model's; else an empty text."""
    measured = summary.provenance.base_sha256
    if of_this_base(asr, summary) or (measured is None and folder == asr.folder / "results"):
        return ""
    if measured is None:
        return t("These results do not record which base they were measured on; take them for those of an earlier base.")
    return t("These results are of another base than this model's.")


digest_of = st.cache_data(show_spinner=False, max_entries=2)(base_digest)


# -- showing ---------------------------------------------------------------------------------------


SPEECH = {
    "accent": Text("On accents"),
    "general": Text("On general speech"),
    "real_adults": Text("On real adults"),
    "real_general": Text("On real general speech"),
    "synthetic_accents": Text("On synthetic accents"),
    "synthetic_general": Text("On synthetic general speech"),
}
MESSAGES = {  # by whether the difference is established, and its sign
    "fewer": Text("{speech}, HDMoLE makes **{mine} errors in 100 words**, {points} fewer than the frozen base."),
    "more": Text("{speech}, HDMoLE makes **{mine} errors in 100 words**, {points} more than the frozen base."),
    "open": Text(
        "{speech}, HDMoLE makes **{mine} errors in 100 words**; that this differs from the frozen base is not established."
    ),
}


def message(summary: Results) -> str:
    """What the results say of HDMoLE in a few sentences, as far as they have it."""
    said = []
    domains = {method: entry.domains for method, entry in summary.methods.items()}
    for domain in filter(SPEECH.__contains__, (summary.target, GENERAL_OF.get(summary.target, ""))):
        rates = [domains.get(method, {}).get(domain) for method in ("hdmole", "base")]
        found = [rate.mean_over_accents if domain == "accent" else rate.wer for rate in rates if rate]
        if len(found) == 2:
            points = found[0] - found[1]
            sure = summary.established("hdmole", "base", domain)
            which = "open" if not sure else "fewer" if points < 0 else "more"
            said.append(t(MESSAGES[which], speech=SPEECH[domain], mine=f"{found[0]:.1f}", points=f"{abs(points):.1f}"))
    mine, full = (entry.trainable if (entry := summary.methods.get(name)) else None for name in ("hdmole", "full"))
    if mine and full:
        said.append(t("It trains {share} % of what full fine-tuning trains.", share=f"{100 * mine / full:.1f}"))
    return " ".join(said)


def trained_anew(asr: ASR, folder: Path, summary: Results) -> str:
    """A note if the HDMoLE of these results is not the one that the app lets hear, with the rate of
    that one.
    """
    own_folder = asr.folder / "results"
    own = summary_of(own_folder)
    mine = own.methods["hdmole"].domains.get(summary.target) if own and "hdmole" in own.methods else None
    if folder == own_folder or mine is None or "hdmole" not in summary.methods:
        return ""
    return t(
        "**Not the model that you hear:** HDMoLE was trained anew for these results. The one on the other pages makes {mine} errors "
        "in 100 words.",
        mine=f"{mine.mean_over_accents if summary.target == 'accent' else mine.wer:.1f}",
    )  # fmt: skip


# the marks differ in shape, not only in colour
MARKS = {"established": ":material/check_circle:", "not established": ":material/help:", "refuted": ":material/cancel:"}


def verdicts(claims: Sequence[Claim], first: int = 3) -> None:
    """Show the `first` claims in plain words; all of them, with their numbers and both verdicts,
    are folded.
    """
    for claim in claims[:first]:
        st.markdown(f"{MARKS[answer(claim)]} {t(plain_line(claim))}")
    if claims:
        with st.expander(t("All {count} claims with their numbers", count=len(claims))):
            st.markdown("\n\n".join(f"{MARKS[claim.verdict]} {t(claim_line(claim))}" for claim in claims))


def confusion(recogniser: RecogniserResult) -> None:
    """Show the confusion matrix of the accent recogniser."""
    table = result_figures.confusion_data(recogniser)
    plots.show(
        result_figures.confusion_matrix(table), "accent-confusion", table,
        t("a row is an accent as spoken by unseen speakers, a column what it was taken for, in percent of the row."), "confusion",
    )  # fmt: skip


def origin(summary: Results) -> None:
    """Show where the results come from."""
    said = " · ".join(f"{name} `{str(value).replace('`', chr(39))}`" for name, value in texts.origin(summary).items())
    st.caption(t("Where these numbers come from: {origin}", origin=said))
