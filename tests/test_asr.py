"""The ASR object on a tiny random model: methods, words, long audio, threads."""

from __future__ import annotations

import copy
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from tiny import ACCENTS, METHODS, speech_like

from hdmole.demo.synth import Synthesiser, speakers
from hdmole.method.intervention import intervene
from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.routing import route
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models.speech_llm import SpeechLLM
from hdmole.speech.asr import ASR
from hdmole.speech.audio import AudioError, decode
from hdmole.speech.decoding import Decoded, Encoded, Word
from hdmole.speech.loading import ModelError, find_model
from hdmole.speech.manifest import read_manifest
from hdmole.speech.words import count_errors, score
from hdmole.study.evaluate import evaluate


@pytest.fixture(scope="module")
def asr(tiny_model: Path) -> ASR:
    return ASR.load(tiny_model)


def test_every_method_transcribes_and_the_json_has_every_key(asr: ASR) -> None:
    assert asr.methods == METHODS and asr.routed == ["hdmole", "hdmole-extended"]
    for method in asr.methods:
        values = json.loads(json.dumps(asr.transcribe(speech_like(2.5), method).to_dict()))
        assert {"text", "words", "accent", "in_domain", "seconds", "rtf", "layers"} <= set(values)
        assert values["seconds"] == 2.5
        assert sum(values["accent"].values()) == pytest.approx(1, abs=1e-3)
        assert " ".join(w["word"] for w in values["words"]) == values["text"]
        starts = [w["start"] for w in values["words"]]
        assert starts == sorted(starts) and all(0 <= w["start"] <= w["end"] <= 2.5 for w in values["words"])
        assert all(0 <= w["confidence"] <= 1 for w in values["words"])
        assert bool(values["layers"]) == (method in asr.routed)


def test_layers_of_the_json_agree_with_the_trace(asr: ASR) -> None:
    heard = asr.transcribe(speech_like(2.0), want_trace=True)
    assert heard.trace is not None
    table = heard.trace.to_frame()
    for layer in heard.layers:
        mine = table[table.layer == layer["name"]]
        assert layer["active_experts"] == pytest.approx(mine.active.mean() * 3, abs=1e-3)
        assert layer["effective_experts"] == pytest.approx(mine.n_effective.mean(), abs=1e-3)
        assert layer["effective_experts"] <= layer["active_experts"]
        for accent, share in layer["share"].items():  # frames of a large change count more
            of = mine[mine.accent == accent]
            assert share == pytest.approx((of.share * of.change**2).sum() / (of.change**2).sum(), abs=1e-3)
        assert sum(layer["share"].values()) == pytest.approx(1, abs=1e-3)
        for accent, gate in layer["gate"].items():
            assert gate == pytest.approx(mine[mine.accent == accent].gate.mean(), abs=1e-3)
        assert layer["tau_local"] == pytest.approx(mine.tau_local.mean(), abs=1e-4)


def test_methods_do_not_touch_each_other(asr: ASR) -> None:
    before = asr.transcribe(speech_like(2.0), "base").text
    texts = {m: asr.transcribe(speech_like(2.0), m).text for m in asr.methods}
    assert asr.transcribe(speech_like(2.0), "base").text == before == texts["base"]
    base, own = asr.models["base"], asr.models["hdmole"].get_base_model()
    assert own.language_model is base.language_model and own.audio_tower is base.audio_tower
    assert own.multi_modal_projector is not base.multi_modal_projector


def test_accent_general_gives_the_base(asr: ASR) -> None:
    """With a general class. The paper's gate has none: its local router works for general speech, too."""
    base = asr.transcribe(speech_like(2.0), "base").text
    assert asr.transcribe(speech_like(2.0), "hdmole-extended", "general").text == base
    assert asr.transcribe(speech_like(2.0), "hdmole", "general").text != base


def test_each_adapter_is_routed_by_its_own_recogniser_and_gate(asr: ASR) -> None:
    segment = asr.segment(speech_like(2.0))[0]
    paper, ours = (asr.transcribe(speech_like(2.0), method, want_trace=True) for method in asr.routed)
    for method, heard in zip(asr.routed, (paper, ours), strict=True):
        assert list(heard.accent.values()) == pytest.approx(segment.posterior_of(method).tolist(), abs=1e-4)
    assert paper.accent != ours.accent and segment.posterior is segment.posteriors["hdmole"]
    assert paper.trace is not None and ours.trace is not None
    table = paper.trace.to_frame()
    sums = table.groupby(["layer", "frame"]).agg(
        {"global_gate": "sum", "local_gate": "sum", "tau_global": "first", "tau_local": "first"}
    )
    np.testing.assert_allclose(sums.global_gate, sums.tau_global.where(sums.global_gate != 0, 0), rtol=1e-5)
    np.testing.assert_allclose(sums.local_gate, sums.tau_local.where(sums.local_gate != 0, 0), rtol=1e-5)
    frames = ours.trace.to_frame().groupby(["layer", "frame"]).global_gate.sum()
    assert set(frames.round(4)) == {1.0}  # ours share a weight of 1
    assert asr.gate("hdmole").thresholds == "dynamic" and asr.gate("hdmole-extended").thresholds == "relu"
    with pytest.raises(ModelError, match="'lora' is no HDMoLE adapter"):
        asr.gate("lora")


@pytest.mark.parametrize("method", ["hdmole", "hdmole-extended"])
def test_without_its_experts_an_adapter_hears_what_the_base_hears(asr: ASR, method: str) -> None:
    """To the last bit of the log-probabilities; and of ours, not before the shared expert is off as well."""
    segments = asr.segment(speech_like(2.0))
    base = asr.decode_batch(segments, "base")[0]
    shared = ["shared"] if asr.gate(method).shared_expert_rank else []
    assert bool(shared) == (method == "hdmole-extended")
    with intervene(asr.models[method], mask=[*ACCENTS, *shared]):
        assert asr.decode_batch(segments, method)[0] == base
    if shared:
        with intervene(asr.models[method], mask=ACCENTS):
            assert asr.decode_batch(segments, method)[0].log_probs != base.log_probs
    worth = asr.attribution(segments[0], method=method)
    assert worth and all(list(word["change"]) == [*ACCENTS, *shared] for word in worth)


def test_any_adapter_in_the_folder_is_a_method(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copytree(folder / "adapters" / "lora", folder / "adapters" / "a_lora_of_mine")
    (folder / "adapters" / ".cache").mkdir()
    asr = ASR.load(folder)
    assert asr.methods == [*METHODS, "a_lora_of_mine"] and asr.routed == ["hdmole", "hdmole-extended"]
    assert asr.transcribe(speech_like(2.0), "a_lora_of_mine").text == asr.transcribe(speech_like(2.0), "lora").text
    described = folder / "adapters" / "hdmole" / "adapter_config.json"
    other = json.loads(described.read_text().replace("scottish", "welsh"))
    described.write_text(json.dumps(other))
    with pytest.raises(ModelError, match="experts of different accents"):
        ASR.load(folder)


def test_a_batch_gives_what_each_gives_alone(asr: ASR) -> None:
    segments = [asr.segment(speech_like(seconds, k))[0] for k, seconds in enumerate((1.0, 2.2, 3.1))]
    for method in asr.methods:
        together = asr.decode_batch(segments, method)
        for segment, result in zip(segments, together, strict=True):
            alone = asr.decode_batch([segment], method)[0]
            length = min(len(alone.ids), len(result.ids), 6)
            assert alone.ids[:length] == result.ids[:length]
            np.testing.assert_allclose(alone.log_probs[:length], result.log_probs[:length], atol=1e-3)


def test_recordings_together_give_what_each_gives_alone(asr: ASR) -> None:
    """Here the projector and the LLM are routed too."""
    recordings = [speech_like(seconds, k) for k, seconds in enumerate((1.0, 2.2, 3.1))]
    for method in asr.methods:
        together = asr.transcribe_all(recordings, method, "indian")
        for heard, recording in zip(together, recordings, strict=True):
            alone = asr.transcribe(recording, method, "indian")
            assert heard.layers == alone.layers and heard.accent == alone.accent
            assert heard.in_domain["score"] == pytest.approx(alone.in_domain["score"], abs=0.01)
            assert heard.text[:12] == alone.text[:12]


def test_threads_get_what_each_gets_alone(asr: ASR) -> None:
    jobs = [(m, a) for m in asr.methods for a in ("auto", "indian", "german")]

    def run(job: tuple[str, str]) -> str:
        return asr.transcribe(speech_like(1.5), *job).text

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == alone


@pytest.mark.usefixtures("few_tokens")
def test_long_audio_is_cut_and_its_words_keep_their_times(asr: ASR) -> None:
    sound = speech_like(47.0)
    heard, segments = asr.transcribe(sound, want_trace=True), asr.segment(sound)
    assert heard.seconds == 47.0 and segments[-1].until == 47.0 and heard.trace is not None
    alone = [asr.transcribe(sound, encoded=[segment]).words for segment in segments]
    assert heard.words == [word for words in alone for word in words]
    for segment, words in zip(segments, alone, strict=True):
        assert all(max(0, segment.offset) <= word.start <= word.end <= segment.until for word in words)
    table = heard.trace.to_frame()
    assert table.time.max() == pytest.approx(47.0, abs=0.1)
    assert not table.duplicated(["layer", "call", "utterance", "frame", "expert"]).any()


@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_silence_around_speech_changes_neither_text_nor_verdict(noise: float) -> None:
    demo, folder = ASR.load("demo"), find_model("demo") / "samples"
    rng = np.random.default_rng(0)
    right = []
    for line in read_manifest(folder / "manifest.jsonl"):
        clip = decode(line.audio).samples
        found = demo.transcribe(clip)
        # a score near the threshold may fall on its other side
        if found.text == line.text and found.in_domain["score"] > demo.domain["base"].threshold + 0.1:
            right.append(clip)
        if len(right) == 4:
            break
    assert len(right) == 4
    for clip in right:
        around = np.zeros(len(clip) + 3 * 16_000, np.float32)
        around[16_000 : 16_000 + len(clip)] = clip
        alone, heard = (
            demo.transcribe(x, want_trace=True) for x in (clip, around + rng.normal(0, noise, len(around)).astype(np.float32))
        )
        assert heard.in_domain["verdict"] and heard.seconds == pytest.approx(len(around) / 16_000, abs=1e-3)
        assert heard.text == alone.text or noise
        for one, other in zip(alone.words, heard.words, strict=False):
            assert one.word != other.word or 0.8 < other.start - one.start < 1.2
        assert alone.trace is not None and heard.trace is not None
        begins = [h.trace.to_frame().time.min() for h in (alone, heard)]
        assert -0.081 < begins[0] < 0.1 and 0.8 < begins[1] < 1.2
        one_frame = alone.trace.to_frame().query("layer_index == 0")
        assert len(one_frame) == one_frame.time.nunique() * 8  # no two frames at one time
        assert all(0 <= w.start <= w.end <= alone.seconds for w in alone.words)


def test_what_an_adapter_changes_is_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """An adapter in the LLM or in the encoder leaves base and other methods alone."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plain = ASR.load(tiny_model).transcribe(speech_like(2.0), "base").text
    base = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
    for place, targets in (("llm", r"language_model.*q_proj"), ("encoder", r"audio_tower.*q_proj")):
        adapter: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        shutil.rmtree(folder / "adapters" / "lora")
        adapter.save_pretrained(folder / "adapters" / "lora")
        asr = ASR.load(folder)
        assert asr.own_encoder == ({"lora"} if place == "encoder" else set())
        assert asr.transcribe(speech_like(2.0), "base").text == plain
        assert not any(isinstance(m, BaseTunerLayer) for m in asr.models["base"].modules())
        one, other = (asr.decode_batch(asr.segment(speech_like(2.0)), method)[0].log_probs for method in ("base", "lora"))
        assert one != other


def test_every_method_in_the_encoder(tiny_model: Path, tmp_path: Path) -> None:
    """Each encodes for itself: routed, traced, changed by an intervention, and alone as in a batch."""
    torch.manual_seed(0)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    base: Any = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
    place = r"audio_tower\.encoder\.layers\..*(linear1|q_proj|k_proj)"
    recogniser = AccentRecogniser(["general", *ACCENTS], channels=16)
    config = HDMoLEConfig.extended(ACCENTS, target_modules=place, recogniser=recogniser.arguments)
    adapter: Any = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in adapter.named_parameters():
        if "_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(folder / "adapters" / "hdmole")
    full = {f"{n}.weight": m.weight + 0.1 * torch.randn_like(m.weight) for n, m in base.named_modules() if re.fullmatch(place, n)}
    save_file(full, folder / "adapters" / "full" / "model.safetensors")
    asr = ASR.load(folder)
    assert asr.own_encoder == {"full", "hdmole"} and asr.trainable("full") == sum(w.numel() for w in full.values())
    segments = [asr.segment(speech_like(seconds, k))[0] for k, seconds in enumerate((1.0, 2.2, 3.1))]
    for method in ("full", "hdmole"):
        posterior = torch.stack([s.posterior for s in segments]) if method == "hdmole" else None
        together = asr._states(segments, method, posterior)
        for k, segment in enumerate(segments):
            alone = asr._states([segment], method, None if posterior is None else posterior[k : k + 1])[0]
            torch.testing.assert_close(together[k], alone, atol=1e-4, rtol=1e-4)
            assert alone.shape == segment.states.shape and not torch.allclose(alone, segment.states, atol=1e-2)
    heard = asr.transcribe(speech_like(2.0), want_trace=True)
    assert heard.trace is not None and {entry["name"].split(".")[0] for entry in heard.layers} == {"audio_tower"}
    table = heard.trace.to_frame()
    positions = table.layer.str.contains("relative_k_proj")
    assert table[positions].time.isna().all() and table[~positions].time.max() == pytest.approx(2.0, abs=0.2)
    masked = asr.transcribe(speech_like(2.0), intervention={"mask": ACCENTS})
    assert masked.text == asr.transcribe(speech_like(2.0), "base").text
    assert all(entry["active_experts"] == 0 for entry in masked.layers)
    attribution_is_the_change(asr, asr.segment(speech_like(2.0))[0], "hdmole")


def test_an_hdmole_adapter_without_recogniser_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    base = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
    adapter: Any = get_peft_model(base, HDMoLEConfig.extended(["indian"], target_modules=r"multi_modal_projector\..*fc1"))
    shutil.rmtree(folder / "adapters" / "hdmole")
    adapter.save_pretrained(folder / "adapters" / "hdmole")
    with pytest.raises(ModelError, match="no accent recogniser"):
        ASR.load(folder)


def test_the_routing_of_an_adapter_in_the_llm_is_that_of_the_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """What `evaluate` says of a recording does not depend on the recordings judged with it, nor on padding."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    known = ASR.load(tiny_model).models["hdmole"].base_model.hdmole_recogniser["default"]
    base = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
    config = HDMoLEConfig.extended(known.labels[1:], target_modules=r"language_model.*[qv]_proj", recogniser=known.arguments)
    adapter: Any = get_peft_model(base, config)
    adapter.base_model.set_recogniser(known)
    shutil.rmtree(folder / "adapters" / "hdmole")
    adapter.save_pretrained(folder / "adapters" / "hdmole")
    for k, seconds in enumerate((0.7, 2.5)):
        soundfile.write(tmp_path / f"{k}.wav", speech_like(seconds, k), 16_000)
    lines = [json.dumps({"audio": f"{k}.wav", "text": "one", "accent": known.labels[1]}) + "\n" for k in range(2)]
    found = []
    for name, part in (("alone", lines[:1]), ("both", lines)):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        evaluate(ASR.load(folder), tmp_path / f"{name}.jsonl", ["hdmole"], tmp_path / name)
        table = pd.read_parquet(tmp_path / name / "routing.parquet")
        found.append(table[table.utterance == "0.wav"].reset_index(drop=True))
    assert len(found[0]) and set(found[0].layer_index) == {0, 1}
    pd.testing.assert_frame_equal(*found, rtol=1e-4)


def test_the_demo_hears_sentences_in_a_row_as_it_hears_each_alone() -> None:
    """Its training knows one sentence at a time; several at once end in invention."""
    demo, folder = ASR.load("demo"), find_model("demo") / "samples"
    # the first clip of each accent is one sentence in all of them
    lines = read_manifest(folder / "manifest.jsonl")[1::2][:8]
    quiet = np.zeros(8_000, np.float32)
    clips = [decode(line.audio).samples for line in lines]
    whole = np.concatenate([part for clip in clips for part in (clip, quiet)])
    heard = demo.transcribe(whole)
    found = score([" ".join(demo.transcribe(clip).text for clip in clips)], [heard.text])
    assert len(whole) > 15 * 16_000 and found["errors"][0] / found["words"][0] < 0.15


def test_slow_digits_are_heard_as_one_string() -> None:
    """Ten digits with long pauses are one utterance: cut at the pauses, each stands alone and is heard less well."""
    demo, digits = ASR.load("demo"), ["four", "one", "seven", "three", "nine", "two", "eight", "five", "six"]
    quiet = np.zeros(12_000, np.float32)
    with Synthesiser() as synthesiser:
        said = [synthesiser.say(digit, "general", speakers("test", 1, 0)[0]) for digit in digits]
    slow = np.concatenate([part for word in said for part in (word, quiet)])
    assert 8.5 * 16_000 < len(slow) < 14 * 16_000 and len(demo.segment(slow)) == 1
    heard = demo.transcribe(slow)
    assert count_errors(" ".join(digits), heard.text)[0] <= 2 and heard.words[-1].end <= len(slow) / 16_000


def test_the_base_decodes_an_utterance_once(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The in-domain score of a method without one of its own looks at what the base hears."""
    calls: list[str] = []
    decode_batch = ASR.decode_batch

    def counted(self: ASR, segments: list[Encoded], method: str, accent: str = "auto") -> list[Decoded]:
        calls.append(method)
        return decode_batch(self, segments, method, accent)

    monkeypatch.setattr(ASR, "decode_batch", counted)
    encoded = asr.segment(speech_like(1.5))
    assert calls == [] and encoded[0].base is None  # encoding does not decode
    heard = []
    for method in asr.methods:
        heard.append(asr.transcribe(speech_like(1.5), method, encoded=heard[-1].encoded if heard else encoded))
    assert calls == asr.methods and all(h.in_domain == heard[0].in_domain for h in heard)
    assert encoded[0].base is None and heard[0].encoded[0].base == asr.decode_batch(encoded, "base")[0]  # nothing is written to
    calls.clear()
    alone = asr.transcribe(speech_like(1.5), "hdmole")
    assert alone.in_domain == heard[0].in_domain and calls == ["hdmole", "base"]


def test_a_recording_is_heard_whole_only_where_both_heads_agree(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asr.models["base"].config
    sound = speech_like(config.longest_segment + 2.0)
    assert len(sound) < config.longest_utterance * 16_000
    asked: list[tuple[str, str]] = []
    for agree in (True, False):

        def decided(ctc: str, text: str, agree: bool = agree) -> bool:
            asked.append((ctc, text))
            return agree

        monkeypatch.setattr("hdmole.speech.asr.heard_whole", decided)
        segments = asr.segment(sound)
        assert (len(segments) == 1) == agree
        if agree:  # what was decoded for the choice is kept
            assert segments[0].base is not None and segments[0].base.text == asked[-1][1]
            assert asr.ctc_text(segments[0]) == asked[-1][0]
    asr.segment(speech_like(1.5))
    assert len(asked) == 2 and asked[0] == asked[1]  # a short one is not asked about


def test_nothing_is_written_where_nobody_speaks(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, 20 * 16_000).astype(np.float32)
    for method in asr.methods:
        heard = asr.transcribe(noise, method)
        assert heard.text == "" and heard.words == [] and heard.flags == [] and heard.seconds == 20
        assert heard.in_domain == {"score": 0.0, "verdict": False, "reasons": ["nobody speaks in it"]}
    monkeypatch.setattr("hdmole.speech.asr.heard_whole", lambda ctc, text: False)
    pause = noise[: 4 * 16_000]
    segments = asr.segment(np.concatenate([speech_like(2.0), pause, speech_like(2.0, 1)]))
    assert [s.offset for s in segments] == pytest.approx([-0.08, 5.92], abs=0.6) and all(s.seconds < 3 for s in segments)
    shares: list[float] = []
    so_far: list[list[Word]] = []
    sound = np.concatenate([speech_like(2.0), pause, speech_like(2.0, 1)])
    heard = asr.transcribe(sound, "base", encoded=asr.segments(sound), progress=shares.append, heard=so_far.append)
    assert len(so_far) == len(shares) == 2 and so_far[-1] == heard.words and so_far[0] == heard.words[: len(so_far[0])]
    assert 0.2 < shares[0] < 0.5 < shares[1] <= 1 and len(heard.encoded) == 2  # of 8 s, the first stretch ends at 2


def test_an_utterance_without_words_is_out_of_domain(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = type("Scorer", (), {"score": lambda self, features: {"score": 0.9, "verdict": True}})()
    monkeypatch.setattr(asr, "domain", {"base": scorer})
    (segment,) = asr.segment(speech_like(1.5))
    assert asr.in_domain([replace(segment, base=Decoded("one", [], []))])["verdict"] is True
    said = asr.in_domain([replace(segment, base=Decoded("", [], []))])
    assert said == {"score": 0.0, "verdict": False, "reasons": ["no words were heard"]}


@pytest.mark.parametrize(
    ("samples", "code"),
    [
        (np.zeros((2, 16_000), np.float32), "audio.not_mono"),
        (np.zeros((16_000, 2), np.float32), "audio.not_mono"),
        (np.zeros(16_000, complex), "audio.not_mono"),
        (np.zeros(16_000, bool), "audio.not_mono"),
        (np.float32(0.5), "audio.not_mono"),
        (np.zeros(1_599, np.float32), "audio.too_short"),
        (np.full(16_000, np.nan, np.float32), "audio.not_numbers"),
        (np.array([0.0] * 16_000 + [np.inf]), "audio.not_numbers"),
    ],
)
def test_samples_that_are_no_sound_are_refused(asr: ASR, samples: np.ndarray, code: str) -> None:
    with pytest.raises(AudioError) as caught:
        asr.transcribe(samples)
    assert caught.value.code == code


def test_samples_of_integers_count_from_full_scale(asr: ASR) -> None:
    sound = (speech_like(1.5) * 32768).astype(np.int16)
    (one,), (other,) = asr.segment(sound), asr.segment(sound / np.float32(32768))
    np.testing.assert_array_equal(one.samples, other.samples)


def test_a_model_that_computes_no_numbers_says_so(tiny_model: Path) -> None:
    asr = ASR.load(tiny_model)
    next(asr.models["base"].language_model.parameters()).data[:] = torch.nan
    with pytest.raises(ModelError, match="values that are no numbers"):
        asr.transcribe(speech_like(1.5), "base")


def test_interventions_reach_the_model_for_one_call(asr: ASR) -> None:
    free = asr.transcribe(speech_like(2.0))
    off = asr.transcribe(speech_like(2.0), intervention={"mask": ["indian", "german", "scottish"]})
    assert all(layer["active_experts"] == 0 for layer in off.layers)
    assert asr.transcribe(speech_like(2.0)).to_dict()["layers"] == free.to_dict()["layers"]


def test_wrong_names_are_plain_sentences(asr: ASR, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has base, lora, full, hdmole, hdmole-extended"):
        asr.transcribe(speech_like(1.0), "magic")
    with pytest.raises(ModelError, match="give auto or one of general, indian"):
        asr.transcribe(speech_like(1.0), "hdmole", "martian")
    with pytest.raises(ModelError, match="holds no config"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="'llama' model"):
        ASR.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ASR.load(tmp_path)


def test_a_damaged_model_is_a_plain_sentence(tiny_model: Path, tmp_path: Path) -> None:
    for part in ("model.safetensors", "adapters/hdmole/adapter_model.safetensors", "domain.json"):
        folder = tmp_path / part.replace("/", "-")
        shutil.copytree(tiny_model, folder)
        (folder / part).write_bytes((tiny_model / part).read_bytes()[:200])
        with pytest.raises(ModelError, match=r"cannot be loaded .* check that the folder is complete") as caught:
            ASR.load(folder)
        assert "\n" not in str(caught.value)


def attribution_is_the_change(asr: ASR, segment: Encoded, method: str) -> None:
    """Against the log-probabilities that greedy decoding gave and those of the same tokens with an expert masked."""
    result, model = asr.decode_batch([segment], method)[0], asr.models[method]
    worth, posterior = asr.attribution(segment, method=method), segment.posterior_of(method)[None]
    labels, special = torch.tensor([result.ids]), set(asr.tokenizer.all_special_ids)
    text = [k for k, token in enumerate(result.ids) if token not in special]
    whole, largest = sum(result.log_probs[k] for k in text), 0.0
    for expert in [*asr.accents[1:], *(["shared"] if asr.gate(method).shared_expert_rank else [])]:
        with torch.no_grad(), route(posterior), intervene(model, mask=[expert]):
            (states,) = asr._states([segment], method, posterior)
            out = model(encoder_states=states[None], encoder_mask=torch.ones(1, len(states), dtype=torch.bool), labels=labels)
        log_probs = out.logits[0, -len(result.ids) - 1 : -1].log_softmax(-1)
        without = sum(float(log_probs[k, result.ids[k]]) for k in text)
        assert sum(word["change"][expert] for word in worth) == pytest.approx(without - whole, abs=2e-3)
        largest = max(largest, abs(without - whole))
    assert largest > 0.02  # far enough from zero for its sign to count
    assert [word["word"] for word in worth] == [
        word.word for word in asr.transcribe(segment.samples, method, encoded=[segment]).words
    ]


def test_attribution_in_words_is_the_change_of_their_log_probability(asr: ASR) -> None:
    segment = asr.segment(speech_like(3.0, 2))[0]
    for method in asr.routed:
        attribution_is_the_change(asr, segment, method)
    general = asr.attribution(segment, "general", "hdmole-extended")
    assert all(c == 0 for w in general for c in w["change"].values())  # nothing works there, so nothing is missed


def test_the_words_as_trained_are_scored_under_a_change(asr: ASR) -> None:
    """With no change they are as likely as they were; one is as likely as its confidence says."""
    segment = asr.segment(speech_like(3.0, 2))[0]
    words = asr.likelihoods(segment, [{}, {"mask": asr.accents[1:]}])
    heard = asr.transcribe(segment.samples, encoded=[segment]).words
    assert [word["word"] for word in words] == [word.word for word in heard] and words
    for word, confidence in zip(words, (word.confidence for word in heard), strict=True):
        same, off = word["after"]
        assert same == pytest.approx(word["before"], abs=1e-5) and np.exp(word["before"]) == pytest.approx(confidence, abs=2e-3)
        assert off != word["before"]
    with pytest.raises(ModelError, match="is no HDMoLE adapter"):
        asr.likelihoods(segment, [], method="lora")


def test_a_ctc_head_of_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["audio_config"]["vocab_size"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="one vocabulary"):
        ASR.load(tmp_path)


def test_a_long_recording_is_not_judged_by_its_worst_stretch(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.zeros(0)
    segments = [
        Encoded(np.zeros(16_000 * n, np.float32), start, nothing, nothing, nothing, Decoded("one", [], []))
        for n, start in ((2, -0.1), (5, 2), (1, 7))
    ]

    def judged(*inside: bool) -> dict[str, Any]:
        found = iter({"score": 0.9 * i, "verdict": i, "reasons": [] if i else ["noise"]} for i in inside)
        monkeypatch.setattr(asr, "domain", {"base": type("Scorer", (), {"score": lambda self, features: next(found)})()})
        monkeypatch.setattr(asr, "domain_features", lambda segment, base: {})
        return asr.in_domain(segments[: len(inside)])

    assert judged(True, True, False) == {"score": 0.7875, "verdict": True, "reasons": [], "outside": [[7, 8]]}
    most = judged(True, False, True)
    assert most["verdict"] is False and most["reasons"] == ["noise"] and most["outside"] == [[2, 7]]
    assert judged(False) == {"score": 0.0, "verdict": False, "reasons": ["noise"]}
