"""Results folders: choosing one, reading it, and what pages say of it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import soundfile
import streamlit as st

from app import links, plots, texts
from app.model import ROOT
from app.session import session
from app.texts import t
from hdmole.figures import results as result_figures
from hdmole.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR


# -- reading -------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
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


def folders(asr: ASR) -> dict[str, Path]:
    """Name -> folder of the results that come with the model and the repository, the headline comparison last."""
    own = asr.folder / "results"
    found = {"this model's own": own} if (own / "summary.json").is_file() else {}
    if asr.folder == ROOT / "assets" / "demo":  # the comparisons in the repository are of the demo model
        compared = [f.parent for f in (ROOT / "assets" / "results").glob("*/summary.json")]
        found |= {f.name: f for f in sorted(compared, key=lambda f: (f.name == "main", f.name))}
    return found


def read_table(file: Path, utterance: str | None = None) -> pd.DataFrame:
    """A parquet file of results, or its rows of one utterance; read once as long as it stays the same."""
    return _read_table(file, utterance, file.stat().st_mtime_ns)


@st.cache_data(show_spinner=False, max_entries=8)
def _read_table(file: Path, utterance: str | None, changed: int) -> pd.DataFrame:
    return pd.read_parquet(file, filters=[("utterance", "==", utterance)] if utterance else None)


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of a results folder; empty where there is none or it is damaged."""
    try:
        return read(folder)
    except ValueError:
        return {}


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


# -- choosing -----------------------------------------------------------------------------------------------------------


def choose(asr: ASR, needs: str, required: bool = True) -> tuple[Path, dict[str, Any]]:
    """The results folder the visitor chose, in the sidebar or by `?results=`, and its summary.

    Without a choice the last that has something under `needs`. Where there is none, ends the page with a sentence, or gives an
    empty summary where none is `required`.
    """
    known, link = folders(asr), st.query_params.get("results", "")
    widgets = st.session_state
    if link and link != session().results:  # an address that was opened, not one that this page wrote
        widgets.results_given = "" if link in known else link
        widgets.results_name = link if link in known else None
    if not widgets.get("results_given") and widgets.get("results_name") not in known:
        fitting = [name for name, folder in known.items() if needs in summary_of(folder)]
        widgets.results_name = next(reversed(fitting), None)
    with st.sidebar:
        name = st.selectbox(
            t("Results"), list(known), index=None, key="results_name", format_func=t, persist_state="session",
            on_change=lambda: widgets.update(results_given=""),
        ) if known else None  # fmt: skip
        given = st.text_input(
            t("or a folder of your own"), key="results_given", placeholder="results/mine", persist_state="session",
            on_change=lambda: widgets.update(results_name=None),
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
    folder = Path(given) if given else known[str(name)]
    session().results = given or str(name)
    if link != session().results:
        links.write(results=session().results)
    try:
        summary = read(folder)
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


def earlier_base(asr: ASR, summary: dict[str, Any]) -> str:
    """Of results that come with the model: that they are of an earlier release's base, where they are; else nothing."""
    own = summary_of(asr.folder / "results")
    if not own or summary["provenance"]["date"] >= own["provenance"]["date"]:
        return ""
    earlier, now = (f"{s['methods']['base']['domains']['general']['wer']:.1f}" for s in (summary, own))
    return t(
        "These results are of an earlier release's base: it gets {earlier} % of the words in general speech wrong, this model's base "
        "{now} %.",
        earlier=earlier, now=now,
    )  # fmt: skip


# -- showing ------------------------------------------------------------------------------------------------------------


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


def confusion(recogniser: Mapping[str, Any]) -> None:
    """The confusion matrix of the accent recogniser."""
    st.header(t("What the accent recogniser hears"))
    table = result_figures.confusion_data(recogniser["confusion"], recogniser["labels"])
    plots.show(
        result_figures.confusion_matrix(table), "accent-confusion", table,
        t("a row is an accent as spoken by unseen speakers, a column what it was taken for, in percent of the row."), "confusion",
    )  # fmt: skip


def origin(summary: dict[str, Any]) -> None:
    """Where the numbers of a results file come from."""
    if known := texts.origin(summary):
        said = " · ".join(f"{name} `{value}`" for name, value in known.items())
        st.caption(t("Where these numbers come from: {origin}", origin=said))
