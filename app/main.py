"""The app's frame: pages, the model they share, and what the sidebar says. Run by `make app` or `hdmole app`."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app import state, tour  # noqa: E402

ASSETS = ROOT / "assets" / "ui"

st.set_page_config(page_title="HDMoLE", page_icon=str(ASSETS / "icon.svg"), layout="wide")
st.logo(str(ASSETS / "logo.svg"), icon_image=str(ASSETS / "icon.svg"), size="large")
st.html(ASSETS / "style.css")
page = st.navigation(
    [
        st.Page("../pages/home.py", title="Home", icon=":material/home:", default=True),
        st.Page("../pages/transcribe.py", title="Transcribe", icon=":material/graphic_eq:"),
        st.Page("../pages/routing.py", title="Routing", icon=":material/account_tree:"),
        st.Page("../pages/thresholds.py", title="Thresholds", icon=":material/tune:"),
        st.Page("../pages/correspondence.py", title="Correspondence", icon=":material/grid_on:"),
        st.Page("../pages/compare.py", title="Compare", icon=":material/bar_chart:"),
        st.Page("../pages/corpus.py", title="Corpus", icon=":material/library_music:"),
        st.Page("../pages/report.py", title="Report", icon=":material/description:"),
        st.Page("../pages/about.py", title="Model", icon=":material/info:"),
    ]
)
with st.sidebar:
    asr = state.load_model()
    st.caption(f"Model **{state.model_folder(asr).name}** on **{state.device_name(asr)}**")
tour.presentation()
tour.bar()
page.run()
