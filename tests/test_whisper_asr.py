"""Whisper under the ASR object: a plain folder, and adapters on a pretrained base in the user's cache."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from tiny import speech_like, tones
from tiny_whisper import ACCENTS, END, LAYERS, WIDTH, tiny_adapters, tiny_whisper

from hdmole.models import pretrained
from hdmole.models.whisper import Whisper
from hdmole.speech.asr import ASR
from hdmole.speech.domain import DomainScorer, decoder_features
from hdmole.speech.loading import ModelError, fetch_base
from hdmole.speech.stopping import Cancelled, asking
from hdmole.study.evaluate import evaluate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and accent recogniser, without the base."""
    return tiny_adapters(base, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cached(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny Whisper as Whisper base in the user's cache."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "whisper-base").symlink_to(base)
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def asr(folder: Path, cached: None) -> ASR:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return ASR.load(folder)


def test_whoever_wants_no_more_is_asked_at_each_layer_and_token(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, tokens, decoder = asr.segment(tones(2.5))[0], [], Whisper._decoder
    monkeypatch.setattr(Whisper, "_decoder", lambda *given: tokens.append(1) or decoder(*given))
    for method in asr.methods:
        tokens.clear()
        asked: list[int] = []
        with asking(lambda found=asked: found.append(1)):
            heard = asr.decode_batch([segment], method)[0]
        own = asr.models["base"].config.encoder_layers if method in asr.own_encoder else 0
        assert len(asked) == own + len(tokens) > 2  # the layers of its own encoder, and every token

        def stop(found: list[int] = asked) -> None:
            found.pop()
            if len(found) == 1:
                raise Cancelled

        with asking(stop), pytest.raises(Cancelled):
            asr.decode_batch([segment], method)
        assert asr.decode_batch([segment], method)[0] == heard and len(asked) == 1  # outside nobody asks


def test_every_method_transcribes(asr: ASR) -> None:
    assert asr.methods == ["base", "lora", "full", "hdmole"] and asr.own_encoder == {"lora", "full", "hdmole"}
    assert asr.accents == ["general", *ACCENTS]
    texts, scores = {}, []
    for method in asr.methods:
        heard = asr.transcribe(tones(2.5), method)
        values = json.loads(json.dumps(heard.to_dict()))
        texts[method] = values["text"]
        assert values["timing"] == "attention" and values["ctc_text"] == "" and values["in_domain"]["verdict"] is None
        assert sum(values["accent"].values()) == pytest.approx(1, abs=1e-3) and len(values["accent"]) == 3
        assert " ".join(w["word"] for w in values["words"]) == " ".join(values["text"].split())
        starts = [w["start"] for w in values["words"]]
        assert starts and starts == sorted(starts) and all(0 <= w["start"] <= w["end"] <= 2.5 for w in values["words"])
        assert all(0 < w["confidence"] <= 1 for w in values["words"])
        assert bool(values["layers"]) == (method == "hdmole")
        scores.append(tuple(asr.decode_batch(heard.encoded, method)[0].log_probs[:3]))
    assert len(set(scores)) == 4
    assert asr.transcribe(tones(2.5), "base").text == texts["base"]


def test_recordings_together_give_what_each_gives_alone(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    """All segments are decoded at once; the routing of each is that of itself."""
    recordings = [tones(2.5), speech_like(1.2), np.zeros(8_000, np.float32), tones(4.0), speech_like(3.1, 3)]
    sizes: list[int] = []
    decode = Whisper.decode

    def counted(self: Whisper, states: torch.Tensor, mask: torch.Tensor) -> Any:
        sizes.append(len(states))
        return decode(self, states, mask)

    monkeypatch.setattr(Whisper, "decode", counted)
    for method in asr.methods:
        alone = [asr.transcribe(recording, method).to_dict() for recording in recordings]
        assert set(sizes) == {1}
        sizes.clear()
        together = [heard.to_dict() for heard in asr.transcribe_all(recordings, method)]
        assert sizes == [len(recordings)]
        sizes.clear()
        assert all(heard.pop("rtf") > 0 for heard in together)
        for one, other in zip(together, alone, strict=True):
            del other["rtf"]
            for word, as_alone in zip(one.pop("words"), other.pop("words"), strict=True):
                assert word.pop("confidence") == pytest.approx(as_alone.pop("confidence"), abs=1e-3)
                assert word == as_alone
            assert one == other
    assert asr.transcribe_all([]) == []


def test_the_real_time_factor_counts_encoding_unless_it_was_done_before(asr: ASR, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ASR.encode

    def slowly(self: ASR, *args: Any) -> Any:
        time.sleep(2)
        return encode(self, *args)

    monkeypatch.setattr(ASR, "encode", slowly)
    alone = asr.transcribe(tones(2.0), "base")
    assert alone.rtf >= 1 and all(heard.rtf >= 1 for heard in asr.transcribe_all([tones(2.0)] * 2, "base"))
    assert asr.transcribe(tones(2.0), "base", encoded=alone.encoded).rtf < alone.rtf - 0.5


def test_general_gives_the_base_and_the_decoder_is_shared(asr: ASR) -> None:
    assert asr.transcribe(speech_like(2.0), "hdmole", "general").text == asr.transcribe(speech_like(2.0), "base").text
    base = asr.models["base"]
    for method in ("lora", "full", "hdmole"):
        own = asr.models[method].get_base_model() if method != "full" else asr.models[method]
        assert own.model.decoder is base.model.decoder and own.proj_out is base.proj_out
        assert own.model.encoder is not base.model.encoder and own.model.encoder.conv1 is base.model.encoder.conv1
    assert asr.trainable("lora") == 2 * LAYERS * (4 * 2 * WIDTH + 2 * 3 * WIDTH)


def test_a_batch_gives_what_each_gives_alone(asr: ASR) -> None:
    segments = [asr.segment(speech_like(seconds, k))[0] for k, seconds in enumerate((1.0, 2.2, 3.1))]
    for method in asr.methods:
        for segment, result in zip(segments, asr.decode_batch(segments, method), strict=True):
            alone = asr.decode_batch([segment], method)[0]
            assert alone.ids == result.ids and alone.times == result.times
            np.testing.assert_allclose(alone.log_probs, result.log_probs, atol=1e-3)


def test_threads_get_what_each_gets_alone(asr: ASR) -> None:
    jobs = [(m, a) for m in asr.methods for a in ("auto", *ACCENTS)]

    def run(job: tuple[str, str]) -> str:
        return asr.transcribe(speech_like(1.5), *job).text

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == alone


def test_long_audio_is_heard_in_long_segments(asr: ASR) -> None:
    segments = asr.segment(speech_like(61.0))
    assert len(segments) == 3 and all(s.seconds <= 28.2 for s in segments)
    heard = asr.transcribe(speech_like(61.0), want_trace=True)
    starts = [w.start for w in heard.words]
    assert starts == sorted(starts) and starts[-1] > 30 and heard.trace is not None
    table = heard.trace.to_frame()
    assert 55 < table.time.max() < 61.1 and not table.duplicated(["layer", "call", "utterance", "frame", "expert"]).any()


def test_attribution_adds_up_to_words(asr: ASR) -> None:
    (segment,) = asr.segment(speech_like(2.0))
    found = asr.attribution(segment)
    assert [f["word"] for f in found] == asr.decode_batch([segment], "hdmole")[0].text.split()
    assert any(abs(v) > 1e-4 for f in found for v in f["change"].values())


def test_a_plain_folder_is_a_base_alone(base: Path) -> None:
    asr = ASR.load(base)
    assert asr.methods == ["base"] and asr.transcribe(speech_like(1.0), "base").text
    with pytest.raises(ModelError, match="no method 'hdmole'"):
        asr.check_method("hdmole")


def test_a_missing_or_another_base_is_said(folder: Path, cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    fetch_base(folder, told.append)
    assert told == []
    other: Any = Whisper.from_pretrained(tmp_path / "cache" / "whisper-base", dtype=torch.float32)
    other.model.encoder.conv1.bias.data += 1
    other.save_pretrained(tmp_path / "other" / "whisper-base")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "other" / "whisper-base" / name).write_bytes((tmp_path / "cache" / "whisper-base" / name).read_bytes())
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="trained on other weights"):
        ASR.load(folder)
    monkeypatch.setenv("HDMOLE_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(pretrained, "_from_hub", lambda local: None)
    with pytest.raises(ModelError, match="hdmole models get whisper-base") as raised:
        ASR.load(folder)
    assert raised.value.code == "model.no_pretrained"


def test_it_is_evaluated_with_its_routing(asr: ASR, tmp_path: Path) -> None:
    lines = []
    for k, accent in enumerate(["general", "indian"]):
        soundfile.write(tmp_path / f"{k}.wav", speech_like(1.5 + k, k), 16_000)
        lines.append({"audio": f"{k}.wav", "text": "we call it bear", "accent": accent, "speaker": f"s{k}"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = evaluate(asr, tmp_path / "manifest.jsonl", ["base", "hdmole"], tmp_path / "out")
    assert set(results.methods) == {"base", "hdmole"} and results.methods["base"].domains["accent"].words == 4
    routing = pd.read_parquet(tmp_path / "out" / "routing.parquet")
    assert routing.layer.nunique() == 6 * LAYERS and set(routing.accent) == set(ACCENTS)
    (segment,) = asr.segment(speech_like(2.5, 1))
    heard = asr.transcribe(speech_like(2.5, 1), want_trace=True).trace
    assert heard is not None and heard.arrays(heard.layer_names[0])["frame"].max() == len(segment.states) - 51


def test_the_probability_of_english_is_among_languages_and_its_score_is_taken(asr: ASR) -> None:
    (segment,) = asr.segment(tones(2.5))
    base, (heard,) = asr.models["base"], asr.decode_batch([segment], "base")
    with torch.no_grad():
        hidden, _ = base._decoder(torch.tensor([[END + 1]]), segment.states[None], None)
        odds = base.proj_out(hidden[0, 0]).softmax(-1)
    english, languages = odds[END + 2], odds[END + 2 : END + 101]  # of the 99 languages English is the first
    assert heard.english == pytest.approx(float(english / languages.sum()), rel=1e-4)
    assert asr.domain_features(segment, heard)["english"] == pytest.approx(np.log(heard.english), abs=1e-4)


def test_each_method_is_judged_by_its_own_score_or_that_of_the_base(
    folder: Path, cached: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a method has a score of its own, the base is not asked."""
    model = shutil.copytree(folder, tmp_path / "model")
    names = [*decoder_features(tones(1.0), "one", [-1.0], np.ones(2) / 2, 1.0)]
    for at, intercept in ((model, -3.0), (model / "adapters" / "hdmole", 3.0)):
        DomainScorer(names, [0.0] * 8, [1.0] * 8, [0.0] * 16, intercept, 0.5).save(at / "domain.json")
    asr = ASR.load(model)
    assert [asr.judge(method) for method in ("base", "lora", "hdmole")] == ["base", "base", "hdmole"]
    calls: list[str] = []
    decoded = ASR._decoded

    def counted(self: ASR, segments: Any, method: str, *rest: Any) -> Any:
        calls.append(method)
        return decoded(self, segments, method, *rest)

    monkeypatch.setattr(ASR, "_decoded", counted)
    expected = {"base": 1 / (1 + np.exp(3)), "lora": 1 / (1 + np.exp(3)), "hdmole": 1 / (1 + np.exp(-3))}
    for method, score in expected.items():
        for heard in (asr.transcribe(tones(2.5), method), *asr.transcribe_all([tones(2.5)] * 2, method)):
            assert heard.in_domain["score"] == pytest.approx(score, abs=1e-4)
            assert heard.in_domain["verdict"] is (method == "hdmole")
        assert set(calls) == {method, "base"} if method == "lora" else {method}
        calls.clear()


def test_where_nobody_speaks_it_is_said(asr: ASR) -> None:
    heard = asr.transcribe(np.zeros(16_000, np.float32), "hdmole")
    assert heard.text == "" and heard.in_domain == {"score": None, "verdict": False, "reasons": ["nobody speaks in it"]}
