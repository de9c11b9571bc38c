"""Routing: which expert worked when, at which layer, and under which threshold."""

from __future__ import annotations

import streamlit as st

from app import gates, links, plots, texts, watch
from app.access import plain
from app.cards import warn_if_outside
from app.model import load_model
from app.moment import choose_word, clicked_moment, remember_click, show_moment
from app.session import session
from app.texts import Text, t
from app.utterance import address, choose_linked, choose_stretch, routed_utterance, sample_select, samples
from hdmole.figures import effect
from hdmole.figures import utterance as figures
from hdmole.names import layer_label

SHORT = {"gate": Text("Combined"), "global_gate": Text("Global"), "local_gate": Text("Local")}

asr = load_model()
clips = samples(asr.folder)
choose_linked(clips)

st.title(t("Which expert worked when"))
chosen = routed_utterance(asr)
explained = st.container()

sample, *adapter_box, layer_box, gate_box = st.columns([2.2, 1.2, 1.6] if len(asr.routed) == 1 else [1.7, 1.1, 1.0, 1.8])
with sample:
    sample_select(clips, t("Utterance"))
method = gates.choose_adapter(asr, *adapter_box)
config = asr.gate(method)
explained.caption(f"**{plain(texts.method(method))}**{t(': ')}{gates.in_words(config)}")
job = watch.heard_job(asr, chosen)
if method not in job.transcripts or job.audio is None:
    st.stop()

heard = job.transcripts[method]
stretch = choose_stretch(job, heard)
table, words = job.routing(method, stretch.number), stretch.words
assert table is not None
layers = figures.layer_names(table)
links.set_once("layer", layers)
links.set_once("gate", list(figures.GATES))
with layer_box:
    layer = st.selectbox(
        t("Layer"),
        layers,
        key="layer",
        format_func=lambda name: f"{texts.layer(layer_label(name))} ({layer_label(name)})",
        persist_state="session",
    )
with gate_box:
    picked = st.segmented_control(
        t("Gate"),
        list(figures.GATES),
        key="gate",
        required=True,
        format_func=lambda g: t(SHORT[g]),
        persist_state="session",
    )
which = picked or "gate"
links.write(**address(chosen), adapter=gates.linked_adapter(asr, method), layer=layer_label(layer), gate=which)
links.show_notes()
warn_if_outside(job)

key = f"{chosen.key}-{method}-{stretch.number}-{layer}-{which}"
choose_word(chosen.key, words)
timed = bool(table[table.layer == layer].time.notna().all())
moment = clicked_moment(chosen.key, words, stretch.start, stretch.end) if timed else None
show_moment(moment, job.audio, table, layer, which)
span = (moment.start, moment.end) if moment else None
label, gate = layer_label(layer), t(figures.GATES[which])
carried = effect.carried_data(table)
if carried.carried.any():
    mean = table.drop_duplicates(["layer_index", "call", "frame"]).n_effective.mean()
    st.markdown(
        t(
            "**{count} of {all} experts are at work here**, each weighed by its share of the weights. Most of what they change is "
            "carried by {carriers}.",
            count=f"{mean:.1f}", all=table.expert.nunique(), carriers=gates.carriers(carried),
        )
    )  # fmt: skip
else:
    st.markdown(t("**No expert is at work here:** this is what the frozen base hears."))
st.header(t("{gate} over time: {layer}", gate=gate, layer=plain(texts.layer(label))))
if not timed:
    st.caption(
        t("This layer sees the distances between frames, not the frames.")
        if "relative" in layer
        else t("This layer lies in the decoder: it counts the tokens of the text, not seconds.")
        if "model.decoder." in layer
        else t("This layer lies in the LLM: it counts tokens, those of the audio and the prompt among them, not seconds.")
    )
data = figures.gate_data(table, layer, which)
router = {"global_gate": "tau_global", "local_gate": "tau_local"}.get(which) if config.learned else None
tau = float(table[table.layer == layer][router].mean()) if router else None
most = gates.largest_weight(config, table, which)
plots.show(
    figures.gate_heatmap(data, most, which, words, span, tau), f"{chosen.stem}-{label}-{which}",
    figures.with_words(data, label, words),
    t(
        "each row is an accent's expert; the brighter a cell, the more weight it has; empty cells are off; click one to hear it. All "
        "layers have one scale, which ends at {most}, the most that one expert could weigh alone; shared evenly, each weighs {even} in "
        "this layer. The global router follows the accent that was heard; only the local router can find a pattern of its own.",
        most=f"{most:.2f}", even=f"{gates.even_weight(config, table[table.layer == layer], which):.3f}",
    ),
    f"gates-{key}", on_select=remember_click(f"gates-{key}", chosen.key, words) if timed else "ignore",
)  # fmt: skip

with st.expander(t("What each expert carries, in all layers")):
    plots.show(
        effect.carried_bars(carried), f"{chosen.stem}-carried", carried,
        t(
            "hatched, an expert's share of the weights; full, its share of what all experts together change in the layers' outputs. The two "
            "can differ: an expert with much weight may change little. Below zero an expert works against the others."
        )
        + (t(" The shared expert has no weight to compare: it works in every frame.") if config.shared_expert_rank else ""),
        f"carried-{chosen.key}-{method}-{stretch.number}",
    )  # fmt: skip

with st.expander(t("Thresholds and what they cut, in this layer")):
    at = moment.time if moment else None
    cut = figures.threshold_data(table, layer, at)
    when = t("at {time} s", time=f"{at:.2f}") if at is not None else t("averaged over the utterance, with its range")
    plots.show(
        figures.threshold_bars(cut, config.learned), f"{chosen.stem}-{label}-thresholds", cut,
        t("each bar is what a router makes of an expert {when}; hatched experts are off in most moments.", when=when)
        + (t(" The dashed line is the threshold τ.") if config.learned else "")
        + (t(" The experts that reach it share a weight of τ: it selects, and it scales.") if config.thresholds == "dynamic" else ""),
        f"thresholds-{key}",
    )  # fmt: skip
with st.expander(t("All layers, mean over time")):
    overview = figures.overview_data(table, which)

    def choose_layer() -> None:
        points = st.session_state[f"overview-{key}"].selection.points
        names = {layer_label(name): name for name in layers}
        if points and points[0]["y"] in names:
            st.session_state.layer = names[points[0]["y"]]

    plots.show(
        figures.layer_overview(overview, most, which), f"{chosen.stem}-layers", overview,
        t("a row is a layer, the encoder's side on top; bright experts had most weight there. Click a cell to see its layer above."),
        f"overview-{key}", on_select=choose_layer,
    )  # fmt: skip

with st.expander(t("All layers: experts at work, over time")):
    working = figures.effective_data(table)
    count = figures.EFFECTIVE[which]
    plots.show(
        figures.effective_heatmap(working, table.expert.nunique(), words, count, span), f"{chosen.stem}-effective", working,
        t(
            "how many experts work at each layer and moment ({gate}), weighed: two of even weight count as 2, one with nearly all the "
            "weight as little more than 1, however many others have some; dark is none. Click a cell to hear it.",
            gate=gate.lower(),
        ),
        f"effective-{key}",
        on_select=remember_click(f"effective-{key}", chosen.key, words) if table.time.notna().any() else "ignore",
    )  # fmt: skip
    if table.time.notna().any() and table.time.isna().any():
        st.caption(t("Layers that see no frames of audio are left out here."))

with st.expander(t("Word by word")):
    view = st.segmented_control(
        t("What is shown"), ["gate", "worth"], default="gate", required=True, key="word_view",
        format_func={"gate": t("{gate}, mean over layers", gate=gate), "worth": t("What each expert was worth")}.__getitem__,
    )  # fmt: skip
    if not words:
        st.caption(t("No words were heard here."))
    elif view == "gate" and table.time.isna().all():
        st.caption(t("Layers in the LLM have no times, so they cannot be told apart by word."))
    elif view == "gate":
        carried = figures.word_data(table, words, which)
        plots.show(
            figures.word_heatmap(carried, most), f"{chosen.stem}-words", carried,
            t(
                "a column is a word, a row an expert; the brighter, the more weight it had. Weight is not use: what an expert was worth to "
                "a word is the other view."
            ),
            f"words-{key}",
        )  # fmt: skip
    else:
        asked = watch.worth_of(asr, job, method, stretch.number)
        watch.ended(asked, 1.0)
        if asked.error:
            st.error(t(asked.error))
        elif asked.words is None and st.button(t("Go on"), key="worth_again"):
            session().stopped = ""
            st.rerun()
        if asked.words:
            worth = figures.worth_data(asked.words)
            plots.show(
                figures.worth_heatmap(worth), f"{chosen.stem}-worth", worth,
                t(
                    "one expert is left out at a time and the same words are scored again: brown, the word became less likely without "
                    "the expert, which so helped; purple, it became likelier. The full colour is half or twice as likely; pale is little."
                ),
                f"worth-{key}",
            )  # fmt: skip

with st.expander(t("Beside another utterance")):
    others = [clip for clip in clips if clip.name != chosen.sample]
    same = [clip for clip in others if chosen.reference and clip.text == chosen.reference]
    beside = st.selectbox(
        t("Another sample, for instance the same sentence in another accent"), [*same, *[c for c in others if c not in same]],
        index=None, format_func=lambda clip: f"{texts.accent(clip.accent)}: {clip.text}", key=f"beside-{chosen.key}",
        placeholder=t("none"),
    )  # fmt: skip
    if beside is not None:
        other = watch.heard_job(asr, beside.utterance())
        second = other.routing(method, 0)
        if second is not None:
            for column, name, rows, text in zip(
                st.columns(2), (chosen.name, beside.path.name), (table, second), (heard, other.transcripts[method]), strict=True
            ):
                with column:
                    st.markdown(f"**{plain(name)}**: {plain(text.text)}")
                    shown = figures.gate_data(rows, layer, which)
                    plots.show(
                        figures.gate_heatmap(shown, most, which, words if rows is table else text.words), f"{name}-{label}-{which}", shown,
                        t("the same layer, gate and scale of both; rows are experts."), f"beside-{name}-{key}",
                    )  # fmt: skip
