"""Report: the utterance and the results as one file to download."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import gates, links, report, results, texts
from app.model import device_name, load_model
from app.session import session
from app.texts import t
from app.utterance import address, choose_linked, chosen_utterance, reference_input, sample_select, samples
from app.watch import heard_job
from hdmole.figures import utterance as figures
from hdmole.names import layer_label

asr = load_model()
clips = samples(asr.folder)
choose_linked(clips)

st.title(t("Take it away"))
st.caption(
    t("One HTML file with the audio, the transcripts, the figures (interactive) and the results; it opens without a network.")
)
chosen = chosen_utterance()
sample_box, *adapter_box, layer_box = st.columns([2, 1] if len(asr.routed) < 2 else [2, 1, 1])
with sample_box:
    sample_select(clips, t("Utterance"))
job = heard_job(asr, chosen)
if not job.transcripts or job.audio is None:
    st.stop()
reference = reference_input(chosen)
method = gates.choose_adapter(asr, *adapter_box) if asr.routed else ""
layer = ""
table = job.routing(method)
if table is not None:
    layers = figures.layer_names(table)
    links.set_once("layer", layers)
    layer = str(
        layer_box.selectbox(
            t("Layer whose routing is shown"),
            layers,
            key="layer",
            format_func=lambda name: f"{texts.layer(layer_label(name))} ({layer_label(name)})",
            persist_state="session",
        )
    )
folder, summary = results.chosen(asr) or (Path(), None)
linked = gates.linked_adapter(asr, method) if method else ""
links.write(**address(chosen), adapter=linked, layer=layer_label(layer), results=session().results if summary else "")
about = {"model": asr.folder.name, "device": device_name(asr), "methods": ", ".join(job.methods)}
note = results.other_base(asr, folder, summary) if summary else ""
written = report.html(job, reference, method, layer, summary, about, note)
links.show_notes()
with st.container(horizontal=True):
    st.download_button(
        t("Report (HTML)"), written, f"{chosen.stem}-report.html", "text/html", type="primary", icon=":material/download:",
        on_click="ignore",
    )  # fmt: skip
    st.download_button(
        t("Data (ZIP)"), lambda: report.data(job, method, layer, folder), f"{chosen.stem}-data.zip", "application/zip",
        icon=":material/folder_zip:", on_click="ignore",
    )  # fmt: skip
st.iframe(written, height=480, alt=t("The report"))
