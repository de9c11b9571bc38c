"""Report: the utterance and the results as one file to take away."""

from __future__ import annotations

import streamlit as st

from app import parts, report, state
from app.texts import t
from hdmole.figures import utterance as figures

asr = state.load_model()
clips = state.samples(state.model_folder(asr))
state.read_deep_link(clips, state.model_folder(asr))

st.title(t("Take it away"))
st.caption(
    t("One HTML file with the audio, the transcripts, the figures (interactive) and the results; it opens without a network.")
)
chosen = parts.chosen_utterance()
sample_box, layer_box = st.columns([2, 1])
with sample_box:
    parts.sample_select(clips, t("Utterance"))
job = parts.heard_job(asr, chosen)
if not job.transcripts or job.audio is None:
    st.stop()
reference = parts.reference_input(chosen)
layer = ""
table = job.routing()
if table is not None:
    layers = state.layers_of(table)
    state.prepare_choice("layer", layers)
    layer = str(
        layer_box.selectbox(
            t("Layer whose routing is shown"), layers, key="layer", format_func=figures.layer_label, persist_state="session"
        )
    )
folder, summary = parts.choose_results(asr, "methods", required=False)
state.write_deep_link(
    sample=chosen.sample, layer=figures.layer_label(layer), results=st.session_state.get("results_shown", "") if summary else ""
)
about = {"model": state.model_folder(asr).name, "device": state.device_name(asr), "methods": ", ".join(job.methods)}
written = report.html(job, reference, layer, summary, about)
with st.container(horizontal=True):
    st.download_button(
        t("Report (HTML)"), written, f"{chosen.stem}-report.html", "text/html", type="primary", icon=":material/download:",
        on_click="ignore",
    )  # fmt: skip
    st.download_button(
        t("Data (ZIP)"), lambda: report.data(job, layer, folder), f"{chosen.stem}-data.zip", "application/zip",
        icon=":material/folder_zip:", on_click="ignore",
    )  # fmt: skip
st.iframe(written, height=480, alt=t("The report"))
