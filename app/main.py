"""The frame of the app: its pages, the model that they share, and the sidebar.

`make app` and `hdmole app` run this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import streamlit as st

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import hdmole  # noqa: E402
from app import door, links, tour  # noqa: E402
from app.access import plain  # noqa: E402
from app.model import choose_model, device_name, load_model, show_model  # noqa: E402
from app.texts import choose_language, t, translate_streamlit  # noqa: E402

ASSETS = ROOT / "assets" / "ui"
# A page opened from the sidebar has an address without choices, which the page then completes. For
# the browser's Back and Forward the two are one step.
ONE_STEP = """<script>
if (!window.oneStep) {
  window.oneStep = history.pushState.bind(history);
  history.pushState = (state, title, url) => {
    const next = new URL(url, location);
    (next.pathname === location.pathname && !location.search ? history.replaceState.bind(history) : window.oneStep)(state, title, url);
  };
}
</script>"""

st.set_page_config(page_title="HDMoLE", page_icon=str(ASSETS / "icon.svg"), layout="wide")
st.logo(str(ASSETS / "logo.svg"), icon_image=str(ASSETS / "icon.svg"), size="large")
st.html(ASSETS / "style.css")
with st.container(key="step"):  # takes no room
    st.html(ONE_STEP, unsafe_allow_javascript=True)
presenting = bool(st.session_state.get("present"))
# Corpus and Report are about files, whose buttons a presentation hides
working: Literal["visible", "hidden"] = "hidden" if presenting else "visible"
page = st.navigation(
    [
        st.Page("../pages/home.py", title=t("Home"), icon=":material/home:", default=True),
        st.Page("../pages/transcribe.py", title=t("Transcribe"), icon=":material/graphic_eq:"),
        st.Page("../pages/routing.py", title=t("Routing"), icon=":material/account_tree:"),
        st.Page("../pages/thresholds.py", title=t("Thresholds"), icon=":material/tune:"),
        st.Page("../pages/correspondence.py", title=t("Correspondence"), icon=":material/grid_on:"),
        st.Page("../pages/compare.py", title=t("Compare"), icon=":material/bar_chart:"),
        st.Page("../pages/paper.py", title=t("Paper"), icon=":material/article:"),
        st.Page("../pages/corpus.py", title=t("Corpus"), icon=":material/library_music:", visibility=working),
        st.Page("../pages/report.py", title=t("Report"), icon=":material/description:", visibility=working),
        st.Page("../pages/about.py", title=t("Model"), icon=":material/info:"),
    ],
    position="top" if presenting else "sidebar",
)
door.ask()
links.read()
with st.sidebar:
    choose_language()
    translate_streamlit()
    choose_model()
    with st.spinner(t("Loading the model …")):
        asr = load_model()
    st.caption(
        t(
            "Model **{model}** on **{device}**, HDMoLE {version}",
            model=plain(asr.folder.name),
            device=device_name(asr),
            version=hdmole.__version__,
        )
    )
tour.presentation()
show_model()
tour.bar()
page.run()
