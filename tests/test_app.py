"""The pages, run by Streamlit's own test driver on a tiny random model."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from driver import assert_no_exception, cards, clicks, in_brackets, said, session, settle, wav
from streamlit.testing.v1 import AppTest
from tiny import ACCENTS, speech_like

from app import report, results, texts
from app.jobs import Job, Utterance
from app.moment import Moment, moment_of
from app.utterance import Sample, opening_sample
from hdmole import names
from hdmole.speech.asr import ASR
from hdmole.study.config import known_methods
from hdmole.study.results import Results, load, provenance

ROOT = Path(__file__).resolve().parent.parent


def test_a_first_visit_shows_a_sample_heard_by_every_method(open_app: Callable[..., AppTest]) -> None:
    at = open_app()
    assert_no_exception(at)
    shown = cards(at)
    for name in ("Frozen base", "LoRA", "Full fine-tuning", "HDMoLE", "HDMoLE, extended"):
        assert f">{name}<" in shown
    heard = session(at).jobs[session(at).utterance.key].transcripts.values()
    assert len(heard) == 5 and shown.count("<span class='word ") == sum(len(found.words) for found in heard)
    assert all(found.words for found in heard)
    assert shown.count("WER") == 5  # the sample's text is the reference
    assert any("adapted to accents in 4 ways" in caption.value for caption in at.caption)
    assert at.text_input[0].value == session(at).utterance.reference != ""
    assert any("CPU" in caption.value or "NVIDIA" in caption.value for caption in at.sidebar.caption)


def test_choosing_a_sample_transcribes_it_and_makes_a_link(open_app: Callable[..., AppTest]) -> None:
    at = open_app()
    settle(at.selectbox(key="sample_choice").set_value("scottish_1").run())
    assert_no_exception(at)
    assert session(at).utterance.sample == "scottish_1"
    assert at.query_params["sample"] == "scottish_1"
    assert at.text_input[0].value == "call anna at six"


def test_an_upload_is_transcribed_and_measured_against_a_reference(open_app: Callable[..., AppTest]) -> None:
    at = open_app()
    at.segmented_control(key="way").set_value("Upload").run()
    settle(at.file_uploader(key="upload").upload("mine.wav", wav(), "audio/wav").run())
    assert_no_exception(at)
    assert session(at).utterance.name == "mine.wav"
    assert "WER" not in cards(at)
    settle(at.text_input[0].set_value("Turn on the lights!").run())
    assert cards(at).count("WER") == 5
    assert "sample" not in at.query_params


def test_a_recording_is_transcribed(open_app: Callable[..., AppTest]) -> None:
    at = open_app()
    at.segmented_control(key="way").set_value("Microphone").run()
    settle(at.audio_input(key="recording").set_value(("recording.wav", wav(seed=3), "audio/wav")).run())
    assert_no_exception(at)
    assert session(at).utterance.name == "recording.wav"
    assert "HDMoLE" in cards(at)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"this is a text", "is not audio"), (b"", "is empty"), (wav(0.0), "short|nothing|empty|not audio")],
    ids=["text", "empty", "no samples"],
)
def test_a_bad_file_gives_a_sentence_and_what_was_there_stays(
    open_app: Callable[..., AppTest], content: bytes, sentence: str
) -> None:
    at = open_app()
    first = session(at).utterance.key
    at.segmented_control(key="way").set_value("Upload").run()
    settle(at.file_uploader(key="upload").upload("broken.wav", content, "audio/wav").run())
    assert_no_exception(at)
    assert any(re.search(sentence, error.value) for error in at.error), [error.value for error in at.error]
    assert session(at).jobs[first].transcripts  # nothing computed is lost
    at.segmented_control(key="way").set_value("Sample").run()
    settle(at.selectbox(key="sample_choice").set_value("indian_1").run())
    assert "HDMoLE" in cards(at) and not at.error


GATE_WORDS = {  # of the pages about routing, for each kind of gate
    "hdmole": ("**HDMoLE**: ", "reaches the router's threshold τ. Those that work share a weight of τ, as in the paper."),
    "hdmole-extended": (
        "**HDMoLE, extended**: ",
        "share a weight of 1",
        "probability that the speech is accented",
        "A shared expert",
    ),
}


@pytest.mark.parametrize("method", GATE_WORDS)
@pytest.mark.parametrize("page", ["routing", "thresholds"])
def test_a_page_about_routing_says_which_gate_it_shows(open_app: Callable[..., AppTest], page: str, method: str) -> None:
    at = open_app(page, sample="indian_1", adapter=method)
    assert_no_exception(at)
    assert at.selectbox(key="adapter").value == method
    assert at.selectbox(key="adapter").options == ["HDMoLE", "HDMoLE, extended"]
    said = " ".join(caption.value for caption in at.caption)
    for kind, words in GATE_WORDS.items():
        assert [part in said for part in words] == [kind == method] * len(words)
    assert at.query_params.get("adapter", ["hdmole"]) in (method, [method])
    other = next(kind for kind in GATE_WORDS if kind != method)
    settle(at.selectbox(key="adapter").set_value(other).run())
    assert_no_exception(at)
    assert GATE_WORDS[other][0] in " ".join(caption.value for caption in at.caption)
    settle(at.switch_page("../pages/report.py").run())
    assert_no_exception(at)
    assert at.selectbox(key="adapter").value == other  # the choice stays


def test_a_link_to_an_adapter_that_is_not_there_says_so(open_app: Callable[..., AppTest]) -> None:
    at = open_app("thresholds", sample="indian_1", adapter="top1")
    assert_no_exception(at)
    assert any("top1" in warning.value and "hdmole-extended" in warning.value for warning in at.warning)
    assert at.selectbox(key="adapter").value == "hdmole" and "adapter" not in at.query_params


def test_a_model_with_one_adapter_offers_no_choice_of_it(
    open_app: Callable[..., AppTest], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.rmtree(folder / "adapters" / "hdmole")
    monkeypatch.setenv("HDMOLE_MODEL", str(folder))
    for page in ("routing", "thresholds", "report"):
        at = open_app(page, sample="indian_1")
        assert_no_exception(at)
        assert "adapter" not in [box.key for box in at.selectbox]
        if page != "report":
            assert GATE_WORDS["hdmole-extended"][0] in " ".join(caption.value for caption in at.caption)


def test_routing_opens_from_a_deep_link(open_app: Callable[..., AppTest]) -> None:
    at = open_app("routing", sample="indian_1", layer="layers.0.fc1", gate="local_gate")
    assert_no_exception(at)
    assert session(at).utterance.sample == "indian_1"
    assert at.selectbox(key="layer").value.endswith("layers.0.fc1")
    assert at.segmented_control(key="gate").value == "local_gate"
    assert len(at.get("plotly_chart")) == 6
    assert "follows the accent that was heard" in " ".join(caption.value for caption in at.caption)
    assert (at.query_params["layer"], at.query_params["gate"]) == ("layers.0.fc1", "local_gate")


def test_a_link_to_what_is_not_there_says_so_and_shows_something(open_app: Callable[..., AppTest]) -> None:
    at = open_app("routing", sample="nobody", layer="nowhere")
    assert_no_exception(at)
    warnings = " ".join(warning.value for warning in at.warning)
    assert "nobody" in warnings and "nowhere" in warnings
    assert at.get("plotly_chart")


def test_a_word_can_be_chosen_and_heard(open_app: Callable[..., AppTest]) -> None:
    at = open_app("routing", sample="indian_1")
    assert not at.get("audio")
    words = session(at).jobs[session(at).utterance.key].transcripts["hdmole"].words
    at.pills[0].set_value(len(words) - 1).run()
    assert_no_exception(at)
    assert len(at.get("audio")) == 1
    assert any(f"“{words[-1].word}”" in markdown.value for markdown in at.markdown)


def test_both_pages_show_the_same_utterance(open_app: Callable[..., AppTest]) -> None:
    at = open_app(sample="general_1")
    settle(at.switch_page("../pages/routing.py").run())
    assert_no_exception(at)
    assert session(at).utterance.sample == "general_1"
    assert at.selectbox(key="sample_choice").value == "general_1"


def test_two_sessions_do_not_see_each_others_utterances(open_app: Callable[..., AppTest]) -> None:
    one, two = open_app(sample="indian_1"), open_app(sample="german_1")
    assert session(one).utterance.sample == "indian_1" and session(two).utterance.sample == "german_1"
    assert not set(session(one).jobs) & set(session(two).jobs)


@pytest.mark.parametrize(("method", "experts"), [("hdmole", ACCENTS), ("hdmole-extended", [*ACCENTS, "shared"])])
def test_a_change_of_routing_is_heard_next_to_the_untouched_run(
    open_app: Callable[..., AppTest], method: str, experts: list[str]
) -> None:
    at = open_app("thresholds", sample="indian_1", adapter=method)
    assert_no_exception(at)
    key = session(at).utterance.key
    untouched = session(at).jobs[key].transcripts[method]
    mask = f"change_mask-{method}"
    assert at.multiselect(key=mask).options == [names.accent_label(expert) for expert in experts]
    assert at.metric[0].value == "0"  # nothing changed, so nothing differs
    assert cards(at).count("HDMoLE") == 0 and "As trained" in cards(at)
    settle(at.multiselect(key=mask).set_value(experts).run())
    assert_no_exception(at)
    assert at.metric[1].value == "0.00"  # every expert is off
    assert at.query_params["mask"] == ",".join(experts)
    assert any("this is what the frozen base hears" in caption.value for caption in at.caption)
    again = next(reversed(session(at).trials.values())).transcript
    assert again.text == session(at).jobs[key].transcripts["base"].text != ""
    assert session(at).jobs[key].transcripts[method] is untouched
    settle(at.multiselect(key=mask).set_value([]).run())
    settle(at.slider[0].set_value(0.5).run())
    settle(at.slider[1].set_value(0.5).run())
    trained = sum(layer["effective_experts"] for layer in untouched.layers) / len(untouched.layers)
    assert float(at.metric[1].value) <= 1 < trained  # above a half there is one expert at most
    settle(at.segmented_control(key="choose").set_value("dense").run())
    assert_no_exception(at)
    dense = next(reversed(session(at).trials.values())).transcript.layers
    assert all(layer["active_experts"] == 3 for layer in dense)  # all have weight, some of them little
    assert at.metric[1].value == f"{sum(layer['effective_experts'] for layer in dense) / len(dense):.2f}" < "3.00"


def test_a_link_restores_a_change_of_routing(open_app: Callable[..., AppTest]) -> None:
    at = open_app("thresholds", sample="indian_1", choose="top_k", k="1", layers="linear_1", accent="german", mask="nobody")
    assert_no_exception(at)
    assert (at.slider(key="k").value, at.selectbox(key="change_accent").value) == (1, "german")
    job, trial = session(at).jobs[session(at).utterance.key], next(iter(session(at).trials.values()))
    changed = next(entry for entry in trial.transcript.layers if entry["name"].endswith("linear_1"))
    # each router chooses one expert, with the weight of its threshold, 1/3; the global one is told that it is the German one
    assert sum(changed["gate"].values()) == pytest.approx(2 / 3, abs=1e-3) and changed["gate"]["german"] >= 0.333
    change = {"thresholds": "top_k", "top_k": 1, "accent": "german", "layers": [changed["name"]]}
    asr = ASR.load(os.environ["HDMOLE_MODEL"])
    assert trial.transcript.layers == asr.transcribe(job.audio, intervention=change, encoded=job.encoded).layers
    assert "mask" not in at.query_params


def html(at: AppTest) -> str:
    """All HTML on a page, that of cards too."""
    return " ".join(part.proto.body for part in at.get("html"))


def test_changes_are_undone_reset_and_pinned(open_app: Callable[..., AppTest]) -> None:
    at = open_app("thresholds", sample="indian_1")
    assert at.button(key="undo_change").disabled and at.button(key="reset_change").disabled
    settle(at.multiselect(key="change_mask-hdmole").set_value(["indian", "german"]).run())
    words = session(at).trials[next(reversed(session(at).trials))].words
    assert [word["word"] for word in words] == [
        word.word for word in session(at).jobs[session(at).utterance.key].transcripts["hdmole"].words
    ]
    said = " ".join(markdown.value for markdown in at.markdown)
    assert "effect" in said or "changed most" in said
    settle(at.button(key="pin_change").click().run())
    assert "without Indian, German: ×" in html(at)
    settle(at.selectbox(key="change_accent").set_value("german").run())
    assert at.query_params["mask"] == "indian,german" and at.query_params["accent"] == "german"
    settle(at.button(key="undo_change").click().run())
    assert_no_exception(at)
    assert at.selectbox(key="change_accent").value is None and at.multiselect(key="change_mask-hdmole").value == [
        "indian",
        "german",
    ]
    assert "accent" not in at.query_params and at.query_params["mask"] == "indian,german"
    settle(at.slider[0].set_value(0.5).run())
    assert at.query_params["tau_global"] == "0.5"
    settle(at.button(key="reset_change").click().run())
    assert_no_exception(at)
    assert at.multiselect(key="change_mask-hdmole").value == [] and at.slider[0].value != 0.5
    assert "mask" not in at.query_params and "Changed: nothing yet" in cards(at) and "without Indian, German: ×" in html(at)
    settle(at.button(key="undo_change").click().run())
    assert at.slider[0].value == 0.5 and at.multiselect(key="change_mask-hdmole").value == ["indian", "german"]


def test_home_says_what_is_loaded_and_leads_to_a_sample(open_app: Callable[..., AppTest]) -> None:
    at = open_app("home")
    assert_no_exception(at)
    text = " ".join(markdown.value for markdown in at.markdown)
    assert "3 experts: Indian, German, Scottish" in text and "model **tiny** on **CPU**" in text
    settle(at.button(key="go-german").click().run())
    assert_no_exception(at)
    assert session(at).utterance.sample == "german_1" and len(session(at).jobs) == 1
    old_link = open_app("home", sample="indian_1")  # as the first page's address was before
    assert session(old_link).utterance.sample == "indian_1"


def test_words_experts_and_a_second_utterance_on_the_routing_page(open_app: Callable[..., AppTest]) -> None:
    at = open_app("routing", sample="indian_1")
    assert_no_exception(at)
    count = len(at.get("plotly_chart"))
    settle(at.segmented_control(key="word_view").set_value("worth").run())
    assert_no_exception(at)
    asked = next(iter(session(at).worth.values()))
    assert asked.words and not asked.error and len(at.get("plotly_chart")) == count
    box = next(b for b in at.selectbox if b.key and b.key.startswith("beside-"))
    settle(box.select_index(0).run())
    assert_no_exception(at)
    assert len(at.get("plotly_chart")) == count + 2


@pytest.mark.usefixtures("few_tokens")
def test_a_long_recording_is_looked_at_stretch_by_stretch(open_app: Callable[..., AppTest], tmp_path: Path) -> None:
    at = open_app("routing", sample="indian_1")
    asr = ASR.load(os.environ["HDMOLE_MODEL"])
    soundfile.write(tmp_path / "long.flac", speech_like(47.0), 16_000)
    job = Job(asr, Utterance("long.flac", (tmp_path / "long.flac").read_bytes()))
    job.wait(120)
    assert len(job.segments) > 5 and job.segments[-1][1] == pytest.approx(47.0)
    for number, (start, end) in enumerate(job.segments):
        table = job.routing("hdmole", number)
        assert table is not None and table.time.between(start - 0.081, end + 0.081).all()  # with the quiet put around it
    session(at).utterance = job.utterance
    session(at).jobs = {job.utterance.key: job}
    at.run()
    box = next(b for b in at.selectbox if b.key and b.key.startswith("stretch-"))
    assert len(box.options) == len(job.segments)
    box.set_value(2).run()
    assert_no_exception(at)
    assert len(at.get("plotly_chart")) == 6
    at.switch_page("../pages/transcribe.py").run()
    assert_no_exception(at)
    (overview,) = at.dataframe
    assert len(overview.value) == len(job.segments) and list(overview.value) == ["stretch", *asr.methods]
    assert " ".join(filter(None, overview.value["base"])) == " ".join(word.word for word in job.transcripts["base"].words)


@pytest.mark.parametrize(
    "link", [{"choose": "top_k", "k": "nan"}, {"choose": "top_p", "p": "5"}, {"tau_local": "-5"}, {"tau_global": "nan"}]
)
def test_nonsense_in_a_link_to_thresholds_is_ignored(open_app: Callable[..., AppTest], link: dict[str, str]) -> None:
    at = settle(open_app("thresholds", sample="indian_1", **link))
    assert_no_exception(at)
    assert not at.error


def test_the_report_holds_everything_and_needs_no_network(open_app: Callable[..., AppTest], tiny_model: Path) -> None:
    at = open_app("report", sample="indian_1")
    assert_no_exception(at)
    job = session(at).jobs[session(at).utterance.key]
    summary = load(tiny_model / "results")
    layer = job.routing("hdmole").layer.iloc[0]
    page = report.html(job, "play <b>some</b> jazz", "hdmole", layer, summary, {"model": "tiny"})
    body = page[page.index("<body>") :]
    assert "<b>some</b>" not in body and "data:audio" in body and summary.provenance.commit in body
    assert body.count('class="plotly-graph-div"') == 8
    assert "<b>Routing of HDMoLE.</b>" in body and "share a weight of τ" in body
    ours = report.html(job, "", "hdmole-extended", layer, None, {})
    assert "<b>Routing of HDMoLE, extended.</b>" in ours and "share a weight of 1" in ours
    assert not re.search(r"(src|href)=['\"]https?:", body)
    note = report.html(job, "", "hdmole", layer, summary, {}, "of <another> base")
    assert "<p class='warning'>of &lt;another&gt; base</p>" in note and "class='warning'>of" not in page
    variants = str(ROOT / "assets" / "results" / "archive" / "variants")
    linked = open_app("report", sample="indian_1", results=variants)  # any results folder, which the address keeps
    assert_no_exception(linked)
    assert linked.query_params["results"] == variants and linked.query_params["sample"] == "indian_1"
    packed = zipfile.ZipFile(io.BytesIO(report.data(job, "hdmole", layer, tiny_model / "results")))
    assert {
        *("transcripts.json", "routing/hdmole.parquet", "routing/hdmole-extended.parquet", "figures/gates.csv"),
        "results/summary.json",
    } <= set(packed.namelist())


def test_correspondence_says_where_results_without_routing_fall_short(open_app: Callable[..., AppTest]) -> None:
    at = open_app("correspondence")
    assert_no_exception(at)
    assert "hold no routing" in at.info[0].value or "no results of this kind" in at.info[0].value


def test_a_click_on_the_map_is_heard_and_opened(open_app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    main = ROOT / "assets" / "results" / "archive" / "main"
    at = open_app("correspondence", results=str(main), router="local_probability", layer="nowhere")
    assert_no_exception(at)
    assert at.segmented_control(key="router").value == "local_probability" and at.selectbox(key="corpus_layer").value is None
    assert at.query_params["router"] == "local_probability" and "layer" not in at.query_params
    at.selectbox(key="corpus_layer").set_value(in_brackets(at.selectbox(key="corpus_layer").options[1])).run()
    linked = open_app(
        "correspondence", **{name: value[0] if isinstance(value, list) else value for name, value in at.query_params.items()}
    )
    assert linked.selectbox(key="corpus_layer").value == at.selectbox(key="corpus_layer").value
    name = pd.read_parquet(main / "routing.parquet", columns=["utterance"]).utterance.iloc[0]
    said = pd.read_parquet(main / "utterances.parquet", filters=[("utterance", "==", name)]).iloc[0]
    clicks(monkeypatch, "map", {"customdata": [name]})
    at.run()
    assert_no_exception(at)
    assert at.get("audio") and any(said.reference in markdown.value for markdown in at.markdown)
    settle(at.button(key="open-routing").click().run())
    assert_no_exception(at)
    assert session(at).utterance.reference == said.reference and session(at).utterance.accent == said.accent


def test_the_accent_recogniser_is_shown_beside_the_experts(
    open_app: Callable[..., AppTest], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = ROOT / "assets" / "results" / "archive" / "projector"
    linked = open_app("correspondence", results=str(older))
    assert "What the accent recogniser hears" not in [box.label for box in linked.expander]
    monkeypatch.setattr(results, "folders", lambda asr: {"projector": older})
    at = open_app("correspondence")
    assert_no_exception(at)
    assert "What the accent recogniser hears" in [box.label for box in at.expander]
    # these results do not say what chance would give
    assert "by the global router in **88 of 100**; by the local router in **36 of 100**." in at.markdown[0].value


def test_correspondence_says_first_what_is_more_than_chance(open_app: Callable[..., AppTest]) -> None:
    """Match of the global router: 0.875 [0.840, 0.906] against 0.189 by chance; of the local one: 0.142 [0.135, 0.149]
    against 0.136."""
    at = open_app("correspondence", results=str(ROOT / "assets" / "results" / "paper"))
    assert_no_exception(at)
    assert at.markdown[0].value == (
        "The strongest expert tells the accent of an utterance: by the global router in **88 of 100**, more than the 19 of chance; "
        "by the local router in **14 of 100**, no more than by chance (14)."
    )


def test_the_model_card_is_read_from_the_models_folder(open_app: Callable[..., AppTest]) -> None:
    at = open_app("about")
    assert_no_exception(at)
    assert "It has learned nothing" in " ".join(markdown.value for markdown in at.markdown)
    assert len(at.get("plotly_chart")) == 1  # what the accent recogniser hears


def test_without_a_model_the_app_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDMOLE_MODEL", str(tmp_path))
    at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    assert_no_exception(at)
    assert "config.json" in at.error[0].value


def test_the_app_opens_where_adaptation_has_something_to_show() -> None:
    clips = [Sample(f"{accent}_1", Path(), "", accent, "") for accent in ("german", "indian", "general")]
    assert opening_sample(clips, None).accent == "german"
    measured = Results(methods={}, differences=[], provenance=provenance(0, "cpu"))
    measured.samples = {"german_1": {"base": 3, "hdmole": 3}, "indian_1": {"base": 2, "hdmole": 0}}
    assert opening_sample(clips, measured).accent == "indian"


def test_a_moment_is_the_word_spoken_then() -> None:
    words = said("turn", "on")
    moment = moment_of(0.6, words, 1.2)
    assert moment.word == "on" and moment.start <= 0.5 and moment.end >= 0.9
    between = moment_of(0.45, words, 0.5)
    assert between.word == "" and between.end == 0.5


def test_the_sound_of_a_moment_is_its_stretch_of_the_audio() -> None:
    """The word "on" lasts from 0.5 to 0.9 s, and 0.03 s on either side are played: samples 7,520 to 14,880."""
    samples = np.arange(16_000)
    np.testing.assert_array_equal(moment_of(0.6, said("turn", "on"), 1.0).sound(samples), np.arange(7_520, 14_880))
    np.testing.assert_array_equal(Moment(0.5, 0.5, 0.5, "").sound(samples), [8_000])  # a player needs a sample


def test_accents_and_methods_of_the_results_are_named_in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "language", lambda: "zh")
    rows = pd.read_parquet(ROOT / "assets" / "results" / "archive" / "main" / "utterances.parquet", columns=["accent"])
    assert [name for name in rows.accent.unique() if texts.accent_name(name).isascii()] == []
    labels = [texts.label(method.label) for method in known_methods({"r": 2}).values()]
    assert [label for label in labels if "," in label] == []
