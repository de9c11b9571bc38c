"""Thresholds: change the routing, transcribe the utterance again, and see what changed."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import changes, gates, links, plots, texts, watch
from app.access import plain
from app.cards import LEGEND_CHANGE, LEGEND_DIFFERENCE, WER, method_card, warn_if_outside
from app.changes import CHOICES
from app.jobs import LONG
from app.model import load_model
from app.session import session
from app.texts import Text, t
from app.utterance import address, choose_linked, reference_of, routed_utterance, sample_select, samples
from hdmole.figures import effect
from hdmole.names import SHARED, layer_label
from hdmole.speech.words import count_errors, normalise

MEANING = {  # of a threshold, by whether the gate is the paper's
    True: Text(
        "As trained: {trained} on average. An expert works where its weight reaches it, and those that work share a weight of as much. "
        "A higher threshold leaves fewer experts, with more weight: at 0.5 one at most. At 0 the router adds nothing."
    ),
    False: Text(
        "As trained: {trained} on average. An expert works where its weight exceeds it: 0 lets all work, 0.5 one at most."
    ),
}
EFFECTS = {  # by `effect.effect_size`
    "none": Text("**No effect:** every word is as sure as before."),
    "small": Text("**A small effect:** “{word}” changed most, from {before} to {after} % sure."),
    "large": Text(
        "**“{word}” changed most:** from {before} to {after} % sure. On average each word as trained became {times} times as likely."
    ),
}

_TO_WORDS = """<script>
document.querySelector(".to-words").onclick = () => document.querySelector(".st-key-words_heard").scrollIntoView({ behavior: "smooth" });
</script>"""

asr = load_model()
clips = samples(asr.folder)
choose_linked(clips)

st.title(t("What if the routing were different?"))
st.caption(
    t("Change how experts are chosen; the utterance is decoded again, next to the untouched run. The model stays as it is.")
)
chosen = routed_utterance(asr)
explained = st.container()
controls, outcome = st.columns([1, 1.9], gap="medium")
outcome = outcome.container(key="words_heard")
with controls:
    sample_select(clips, t("Utterance"))
    method = gates.choose_adapter(asr, st.container())
    buttons = st.container(horizontal=True)
config = asr.gate(method)
explained.caption(f"**{plain(texts.method(method))}**{t(': ')}{gates.in_words(config)}")
with outcome:
    job = watch.heard_job(asr, chosen)
if method not in job.transcripts:
    st.stop()

untouched = job.transcripts[method]
layers = {layer_label(entry["name"]): entry for entry in untouched.layers}
experts = asr.accents[1:]
switchable = [*experts, SHARED] if config.shared_expert_rank else experts
kept = session()


def set_names(key: str, name: str, options: list[str]) -> None:
    """Set the list `key` to the options that the opened address has under `name`."""
    if (linked := links.take(name)) is not None or key not in st.session_state:
        st.session_state[key] = [value for value in links.names_in(linked or "") if value in options]


def set_number(key: str, name: str, default: float, low: float, high: float, before: float | None = None) -> None:
    """Set the slider `key` to the number that the opened address has under `name`.

    A new slider gets the value `before`.
    """
    linked = links.take(name)
    if linked is not None or key not in st.session_state:
        value = default if linked is not None or before is None else before
        st.session_state[key] = type(default)(links.number_in(linked or None, value, low, high))


with controls:
    links.set_widget("choose", "choose", list(CHOICES), "dynamic")
    how = st.segmented_control(
        t("Experts chosen by"), list(CHOICES), required=True, format_func=lambda choice: t(CHOICES[choice]), key="choose",
        persist_state="session",
    )  # fmt: skip
    set_names("change_layers", "layers", list(layers))
    change: dict[str, Any] = {}
    link: dict[str, str | list[str]] = {}
    where = st.session_state.get("change_layers") or list(layers)
    if how == "dynamic":
        for name, label in (("tau_global", t("Global threshold τ")), ("tau_local", t("Local threshold τ"))):
            trained: float = round(2 * sum(layers[layer][name] for layer in where if layer in layers) / max(1, len(where)), 2) / 2
            # a value that was set stays when other layers are chosen
            most, place = max(0.5, trained), (chosen.key, method, name)
            key = f"{name}-{chosen.key}-{method}-{'-'.join(where)}"
            set_number(key, name, trained, 0, most, kept.thresholds.get(place))
            value = st.slider(
                label, 0.0, most, step=0.005, format="%.3f", key=key, persist_state="session",
                help=t(MEANING[config.thresholds == "dynamic"], trained=f"{trained:.3f}"),
            )  # fmt: skip
            kept.thresholds.pop(place, None)
            if value != trained:
                kept.thresholds[place] = value
                change |= {name: value} if config.learned else {name: value, "thresholds": "relu"}
                link[name] = f"{value:g}"
    else:
        change["thresholds"], link["choose"] = how, str(how)
        if how == "top_k":
            set_number("k", "k", 2, 1, len(experts))
            change["top_k"] = 1 if len(experts) == 1 else st.slider(
                t("Experts kept"), 1, len(experts), key="k", persist_state="session"
            )  # fmt: skip
            link["k"] = str(change["top_k"])
        elif how == "top_p":
            set_number("p", "p", 0.9, 0.05, 1)
            change["top_p"] = st.slider(t("Weight kept"), 0.05, 1.0, step=0.05, key="p", persist_state="session")
            link["p"] = f"{change['top_p']:g}"
    links.set_widget("change_accent", "accent", asr.accents, None)
    accent = st.selectbox(
        t("Route as if the accent were"), asr.accents, index=None, placeholder=t("as it is heard"), format_func={name: texts.accent(name) for name in asr.accents}.__getitem__,
        key="change_accent", persist_state="session",
    )  # fmt: skip
    picked: dict[str, list[str]] = {}
    for name, label in (("mask", t("Switch off")), ("force", t("Use only"))):
        set_names(f"change_{name}-{method}", name, switchable)
        picked[name] = st.multiselect(
            label, switchable, format_func=texts.accent, placeholder=t("no expert"),
            key=f"change_{name}-{method}", persist_state="session",
            help=t("The shared expert works in every frame, whatever the accent.") if SHARED in switchable else None,
        )  # fmt: skip
    only = st.multiselect(
        t("At layers"), list(layers), placeholder=t("all"), key="change_layers", format_func=texts.layer, persist_state="session",
    )  # fmt: skip

change |= {name: value for name, value in (("accent", accent), *picked.items()) if value}
link |= {name: value for name, value in picked.items() if value} | ({"accent": accent} if accent else {})
if only and change:
    change["layers"] = [layers[layer]["name"] for layer in only]
    link["layers"] = only
shown = {**address(chosen), "adapter": gates.linked_adapter(asr, method)}
changes.remember(links.whole(**shown, **link), (chosen.key, method))
with buttons:
    st.button(t("Undo"), icon=":material/undo:", disabled=len(kept.changes) < 2, on_click=changes.undo, key="undo_change")
    st.button(
        t("Reset"), icon=":material/restart_alt:", disabled=not link, on_click=changes.apply, args=(links.whole(**shown),),
        key="reset_change",
    )  # fmt: skip
links.write(**shown, **link)

st.html(f"<button type='button' class='to-words'>{t('To the words')}</button>{_TO_WORDS}", unsafe_allow_javascript=True)
with outcome:
    links.show_notes()
    warn_if_outside(job)
    after, reference, sure = untouched, reference_of(chosen), effect.word_effect_data([])
    if change:
        trial = watch.trial_of(asr, job, method, change)
        watch.ended(trial, 1.0)
        if trial.error:
            st.error(t(trial.error))
        if trial.transcript is None:
            if st.button(t("Hear it again")):
                session().stopped = ""
                session().trials.clear()
                st.rerun()
            st.stop()
        after = trial.transcript
        sure = effect.word_effect_data(trial.words or [])
    times = effect.times_as_likely(sure)
    st.html(
        "<div class='cards'>"
        + method_card(method, untouched, reference, title=t("As trained"))
        + method_card(method, after, reference, title=t("Changed" if change else "Changed: nothing yet"), before=untouched.text)
        + "</div>"
    )
    if reference.strip():
        st.html(f"<div class='legend'><div>{t(LEGEND_DIFFERENCE)}</div><div>{t(WER)}</div></div>")
    elif after.text != untouched.text:
        st.html(f"<div class='legend'>{t(LEGEND_CHANGE)}</div>")
    if set(switchable) <= set(picked["mask"]) and not only:
        st.caption(t("Every expert is off, so this is what the frozen base hears."))
    differing, _ = count_errors(normalise(untouched.text), normalise(after.text))
    working = [sum(entry["effective_experts"] for entry in t.layers) / max(1, len(t.layers)) for t in (untouched, after)]
    seconds = [t.rtf * t.seconds for t in (untouched, after)]
    if len(sure):
        strongest = sure.sort_values("change", key=abs).iloc[-1]
        said = {
            "word": plain(str(strongest.word)), "before": f"{100 * strongest.before:.0f}", "after": f"{100 * strongest.after:.0f}", "times": f"{times:.2f}",
        }  # fmt: skip
        st.markdown(t(EFFECTS[effect.effect_size(sure)], **said))
        plots.show(
            effect.word_effect(sure, method), f"{chosen.stem}-words", sure,
            t("how sure the model is of each word that it heard as trained: the ring as trained, the disc after your change."), "words",
        )  # fmt: skip
        kept_now = changes.Pin(links.address(link), after, times)
        st.button(t("Pin this change"), icon=":material/keep:", on_click=changes.pin, args=(kept_now,), key="pin_change")
    elif change and job.audio is not None and job.audio.seconds > LONG:
        st.caption(t("How sure the model is of each word is shown for recordings of up to {seconds} s.", seconds=f"{LONG:.0f}"))
    if kept.pins:
        st.subheader(t("Pinned"))
        titles = [t("{change}: × {times}", change=changes.described(p.change), times=f"{p.times:.2f}") for p in kept.pins]
        pinned = zip(kept.pins, titles, strict=True)
        st.html(
            "<div class='cards'>"
            + "".join(method_card(method, p.transcript, reference, title=title, before=untouched.text) for p, title in pinned)
            + "</div>"
        )
        st.caption(t("The number says how many times as likely each word as trained became on average."))
    words, work, time = st.columns(3)
    words.metric(t("Words that changed"), differing)
    work.metric(
        t("Experts at work, weighed"), f"{working[1]:.2f}", f"{working[1] - working[0]:+.2f}", delta_color="off",
        help=t("Two experts of even weight count as 2; one with nearly all the weight counts as little more than 1."),
    )  # fmt: skip
    time.metric(t("Time to decode"), f"{seconds[1]:.2f} s", f"{seconds[1] - seconds[0]:+.2f} s", delta_color="off")
    st.header(t("Experts at work, layer by layer"))
    data = effect.change_data(untouched.layers, after.layers)
    plots.show(
        effect.change_dots(data, len(experts), method), f"{chosen.stem}-change", data,
        t("each row is a layer; the ring is the model as trained, the disc is your change."), "change",
    )  # fmt: skip
