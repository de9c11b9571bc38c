"""Figures on pages, with a line on how to read them and downloads; downloads of transcripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app.jobs import Job
from app.texts import Text, drawn, t
from hdmole.figures import utterance as figures

if TYPE_CHECKING:
    from streamlit.elements.plotly_chart import PlotlyState


def show(
    plot: go.Figure,
    name: str,
    data: pd.DataFrame | dict[str, Callable[[], pd.DataFrame]],
    reading: str,
    key: str,
    on_select: Callable[[], None] | Literal["ignore", "rerun"] = "ignore",
) -> PlotlyState:
    """Show a figure.

    Args:
        plot: the figure, in English; its titles and names are translated here.
        name: name of the downloaded files, without extension.
        data: the table that is drawn, or several tables by title.
        reading: how to read it, in the visitor's language.
        key: names the figure on the page.
        on_select: what a click does, as in `st.plotly_chart`.

    Returns:
        What is selected in the figure. It is of use only if `on_select` is not "ignore".
    """
    bar = {
        "toImageButtonOptions": {"filename": name, "scale": 2, "format": str(st.session_state.get(f"{key}-as") or "PNG").lower()},
        "displaylogo": False,
        "displayModeBar": True,  # by default it shows only under a mouse
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    }
    tables: dict[str, Callable[[], pd.DataFrame]] = data if isinstance(data, dict) else {Text("Data"): data.copy}
    shown = drawn(plot)
    event = st.plotly_chart(shown, key=key, on_select=on_select, selection_mode="points", config=bar, alt=reading)
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
                lambda: figures.exported(shown).to_html(),
                f"{name}.html",
                "text/html",
                key=f"{key}-html",
                on_click="ignore",
            )
            st.segmented_control(
                t("The camera over the figure saves"), ["PNG", "SVG"], default="PNG", required=True, key=f"{key}-as"
            )
    return cast("PlotlyState", event)


def _csv(table: Callable[[], pd.DataFrame]) -> str:
    return str(table().to_csv(index=False, float_format="%.6g"))  # more digits would be noise


def transcript_downloads(job: Job) -> None:
    """Downloads of everything that was heard, as JSON and as a table of words."""
    stem = job.utterance.stem
    found = [{"file": job.utterance.name, **transcript.to_dict()} for transcript in job.transcripts.values()]
    words = pd.DataFrame(
        [{"method": heard["method"], **word} for heard in found for word in heard["words"]],
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
