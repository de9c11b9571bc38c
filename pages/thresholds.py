"""Thresholds: change what routes, hear the utterance again, and see what changed."""

from __future__ import annotations

import math
import re
from typing import Any

import streamlit as st

from app import parts, state, texts
from app.texts import Text, t
from app.words import LEGEND_CHANGE, LEGEND_DIFFERENCE, method_card
from hdmole.figures import results as result_figures
from hdmole.figures import utterance as figures
from hdmole.speech.words import count_errors, normalise
from hdmole.training.adapt import PLACES

CHOICES = {"dynamic": Text("Thresholds"), "top_k": "Top-k", "top_p": "Top-p", "dense": Text("All")}

asr = state.load_model()
clips = state.samples(state.model_folder(asr))
state.read_deep_link(clips, state.model_folder(asr))

st.title(t("What if the routing were different?"))
st.caption(
    t("Change how experts are chosen; the utterance is decoded again, next to the untouched run. The model stays as it is.")
)
chosen = parts.routed_utterance(asr)
job = parts.heard_job(asr, chosen)
if "hdmole" not in job.transcripts:
    st.stop()

untouched = job.transcripts["hdmole"]
layers = {figures.layer_label(entry["name"]): entry for entry in untouched.layers}
experts = asr.accents[1:]
controls, outcome = st.columns([1, 1.9], gap="medium")
linked = st.session_state.setdefault("what_if", {k: st.query_params[k] for k in st.query_params if k not in ("sample", "gate")})
if st.session_state.setdefault("what_if_of", chosen.key) != chosen.key:  # the address was of another utterance
    linked = {}


def from_link(name: str, options: list[str]) -> list[str]:
    """What the address names for a choice, as far as it is among the options."""
    return [value for value in linked.get(name, "").split(",") if value in options]


def number_from_link(name: str, default: float, low: float, high: float) -> float:
    try:
        value = float(linked.get(name, default))
    except ValueError:
        return default
    return float(min(max(value, low), high)) if math.isfinite(value) else default


with controls:
    parts.sample_select(clips, t("Utterance"))
    how = st.segmented_control(
        t("Experts chosen by"), list(CHOICES), default=(from_link("choose", list(CHOICES)) or ["dynamic"])[0], required=True,
        format_func=lambda choice: t(CHOICES[choice]), key="choose", persist_state="session",
    )  # fmt: skip
    change: dict[str, Any] = {}
    link: dict[str, str] = {}
    where = st.session_state.get("change_layers") or list(layers)
    if how == "dynamic":
        for name, label in (("tau_global", t("Global threshold τ")), ("tau_local", t("Local threshold τ"))):
            trained = round(2 * sum(layers[layer][name] for layer in where if layer in layers) / max(1, len(where)), 2) / 2
            most, kept = max(0.5, trained), f"{name}-set-{chosen.key}"  # what was set stays when other layers are chosen
            value = st.slider(
                label, 0.0, most, min(most, st.session_state.get(kept, number_from_link(name, trained, 0, most))), 0.005, format="%.3f", key=f"{name}-{chosen.key}-{'-'.join(where)}",
                persist_state="session", help=t(
                    "As trained: {trained} on average. An expert works where its weight exceeds it: 0 lets all work, 0.5 one at most.",
                    trained=f"{trained:.3f}",
                ),
            )  # fmt: skip
            st.session_state.pop(kept, None)
            if value != trained:
                st.session_state[kept] = value
                change |= {name: value, "thresholds": how}
                link[name] = f"{value:g}"
    else:
        change["thresholds"], link["choose"] = how, str(how)
        if how == "top_k":
            change["top_k"] = 1 if len(experts) == 1 else st.slider(
                t("Experts kept"), 1, len(experts), int(number_from_link("k", 2, 1, len(experts))), key="k", persist_state="session"
            )  # fmt: skip
            link["k"] = str(change["top_k"])
        elif how == "top_p":
            change["top_p"] = st.slider(
                t("Weight kept"), 0.05, 1.0, number_from_link("p", 0.9, 0.05, 1), 0.05, key="p", persist_state="session"
            )
            link["p"] = f"{change['top_p']:g}"
    heard = next(iter(from_link("accent", asr.accents)), None)
    accent = st.selectbox(
        t("Route as if the accent were"), asr.accents, index=asr.accents.index(heard) if heard else None,
        placeholder=t("as it is heard"), format_func={name: texts.accent(name) for name in asr.accents}.__getitem__,
        key="change_accent", persist_state="session",
    )  # fmt: skip
    picked: dict[str, list[str]] = {}
    for name, label in (("mask", t("Switch off")), ("force", t("Use only"))):
        picked[name] = st.multiselect(
            label, experts, from_link(name, experts), format_func=texts.accent, placeholder=t("no expert"),
            key=f"change_{name}", persist_state="session",
        )  # fmt: skip
    only = st.multiselect(
        t("At layers"), list(layers), from_link("layers", list(layers)), placeholder=t("all"), key="change_layers",
        persist_state="session",
    )  # fmt: skip

change |= {name: value for name, value in (("accent", accent), *picked.items()) if value}
link |= {name: ",".join(value) for name, value in picked.items() if value} | ({"accent": accent} if accent else {})
if only and change:
    change["layers"] = [layers[layer]["name"] for layer in only]
    link["layers"] = ",".join(only)
state.write_deep_link(sample=chosen.sample, **link)

with outcome:
    state.show_notes()
    parts.warn_if_outside(job)
    after, reference = untouched, st.session_state.get(f"reference-{chosen.key}", chosen.reference)
    if change:
        trial = state.trial_of(asr, job, change)
        parts.ended(trial, 1.0)
        if trial.error:
            st.error(t(trial.error))
        if trial.transcript is None:
            if st.button(t("Hear it again")):
                st.session_state.pop("stopped", None)
                st.session_state.trials.clear()
                st.rerun()
            st.stop()
        after = trial.transcript
    st.html(
        "<div class='cards'>"
        + method_card("hdmole", untouched, reference, title=t("As trained"))
        + method_card("hdmole", after, reference, title=t("Changed" if change else "Changed: nothing yet"), before=untouched.text)
        + "</div>"
    )
    if reference.strip():
        st.html(f"<div class='legend'>{t(LEGEND_DIFFERENCE)}</div>")
    elif after.text != untouched.text:
        st.html(f"<div class='legend'>{t(LEGEND_CHANGE)}</div>")
    differing, _ = count_errors(normalise(untouched.text), normalise(after.text))
    active = [sum(entry["active_experts"] for entry in t.layers) / max(1, len(t.layers)) for t in (untouched, after)]
    seconds = [t.rtf * t.seconds for t in (untouched, after)]
    words, work, time = st.columns(3)
    words.metric(t("Words that changed"), differing)
    work.metric(t("Experts at work, mean"), f"{active[1]:.2f}", f"{active[1] - active[0]:+.2f}", delta_color="off")
    time.metric(t("Time to decode"), f"{seconds[1]:.2f} s", f"{seconds[1] - seconds[0]:+.2f} s", delta_color="off")
    adapted = next((place for place, names in PLACES.items() if re.search(names, untouched.layers[0]["name"])), "")
    found = {name: parts.summary_of(folder) for name, folder in state.results_folders(asr).items()}
    alike = [n for n, s in found.items() if s.get("frontier") and s["methods"]["hdmole"].get("place", "projector") == adapted]
    if alike:  # results of layers in the same place, those of most seeds
        name = max(alike, key=lambda n: len(found[n]["methods"]["hdmole"].get("seeds", [])))
        st.header(t("More experts or fewer: what it does over a corpus"))
        points = result_figures.frontier_data(found[name])
        parts.figure(
            result_figures.frontier(points, active[1]), "threshold-frontier", points,
            t(
                "word error rate on accents when thresholds are scaled, or replaced, in the results “{name}”; the dashed line is where "
                "this utterance stands now.",
                name=name,
            ),
            "frontier",
        )  # fmt: skip
        if note := parts.earlier_base(asr, found[name]):
            st.caption(note)
    st.header(t("Experts at work, layer by layer"))
    data = figures.change_data(untouched.layers, after.layers)
    parts.figure(
        figures.change_dots(data, len(experts)), f"{chosen.stem}-change", data,
        t("each row is a layer; the ring is the model as trained, the disc is your change."), "change",
    )  # fmt: skip
