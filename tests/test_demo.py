"""The demo's sentences, voices and training recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file
from tiny import speech_like, tiny_corpus

from hdmole.demo import build as recipe
from hdmole.demo import corpus as demo_corpus
from hdmole.demo import recognisers
from hdmole.demo import release as releasing
from hdmole.demo.corpus import Sizes, mel, read_real, render, split_speakers
from hdmole.demo.people import people
from hdmole.demo.synth import (
    ACCENTS,
    CONFLICTING,
    EVERY,
    Synthesiser,
    augment,
    other_language_sentences,
    out_of_domain_noise,
    say_again,
    speakers,
)
from hdmole.demo.text import DIGITS, is_digit_string, number, sentences, vocabulary
from hdmole.names import GENERAL
from hdmole.speech.asr import ASR
from hdmole.speech.loading import ModelError
from hdmole.speech.manifest import ManifestError, read_manifest
from hdmole.speech.words import count_errors
from hdmole.study import compare as comparing
from hdmole.study.compare import compare
from hdmole.training import preparation
from hdmole.training.preparation import speech_of

pytestmark = pytest.mark.timeout(900)  # the whole recipe takes minutes where many tests run at once


class _Pool:
    """Stands for ProcessPoolExecutor where nothing depends on the work being done in other processes."""

    map = staticmethod(map)

    @staticmethod
    def submit(work: Callable[..., object], *arguments: object) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(work(*arguments))
        return done

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_no_sentence_is_in_two_splits_but_single_digits() -> None:
    found = {split: set(sentences(3000, seed, split)) for seed, split in enumerate(("train", "dev", "test"))}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert found[a] & found[b] <= set(DIGITS)
    known = set(vocabulary())
    assert 900 <= len(known) <= 1300
    assert {word for texts in found.values() for text in texts for word in text.split()} <= known
    assert sentences(50, 3, "dev") == sentences(50, 3, "dev") != sentences(50, 4, "dev")
    assert 0.2 < np.mean([is_digit_string(t) for t in found["train"]]) < 0.35


def test_every_word_of_dev_and_test_is_in_training() -> None:
    train = {word for text in sentences(20_000, 0, "train") for word in text.split()}
    for split in ("dev", "test"):
        assert {word for text in sentences(4000, 1, split) for word in text.split()} <= train


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety nine"), (3205, "three thousand two hundred five")],
)
def test_numbers(value: int, words: str) -> None:
    assert number(value) == words


def test_speakers_are_disjoint() -> None:
    variants = {split: {p.variant for p in speakers(split, 60, 0)} for split in ("train", "dev", "test")}
    assert not variants["train"] & variants["dev"] and not variants["train"] & variants["test"]
    assert not variants["dev"] & variants["test"]


def test_every_accent_speaks_and_sounds_different() -> None:
    text, person = "the red house is very old", speakers("test", 1, 0)[0]
    with Synthesiser() as synthesiser:
        waves = {a: synthesiser.say(text, a, person) for a in ACCENTS}
        again = synthesiser.say(text, GENERAL, person)
        for language, sentence in other_language_sentences()[:10]:
            assert len(synthesiser.say_language(sentence, language, person)) > 8000
        with pytest.raises(ValueError, match="the accents are general"):
            synthesiser.say(text, "martian", person)
    for wave in waves.values():
        assert wave.dtype == np.float32 and 16_000 < len(wave) < 64_000 and np.abs(wave).max() == pytest.approx(0.5)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        x, y = mel(a).astype(float), mel(b).astype(float)
        frames = min(len(x), len(y))
        return float(np.abs(x[:frames] - y[:frames]).mean())

    # espeak-ng's flutter runs on from one utterance to the next: a repetition is nearly, not exactly, the same
    assert abs(len(again) - len(waves[GENERAL])) < 160 and distance(again, waves[GENERAL]) < 0.15
    assert all(distance(again, wave) > 0.4 for accent, wave in waves.items() if accent != GENERAL)


def test_accents_that_conflict(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each, sounds are exchanged; no two exchange all the same; a work folder of them can be compared on."""
    rules = [dict(rule.split(" as ") for rule in accent.rules.split(", ")) for accent in CONFLICTING.values()]
    assert len(rules) == 12 and all(said[said[one]] == one != said[one] for said in rules for one in said)
    heard = [{spoken: meant for meant, spoken in said.items()} for said in rules]
    assert all(len({of.get(sound, sound) for of in heard}) > 1 for sound in ("t", "s", "l", "I"))
    text, person = "the red house is very old", speakers("test", 1, 0)[0]
    with Synthesiser() as synthesiser:
        waves = [synthesiser.say_language(text, EVERY[name].voice, person) for name in (GENERAL, *CONFLICTING)]
    assert len({len(wave) for wave in waves}) > 10
    assert (again := say_again(text, "exchange_3", person.name)) is not None and abs(len(again) - len(waves[3])) < 800

    work = tmp_path / "work"
    shutil.copytree(tiny_model, work / "base", ignore=shutil.ignore_patterns("adapters", "samples", "results"))
    shutil.copytree(work / "base", work / "tokenizer")
    sizes = Sizes(general=2, per_accent=2, test_general=2, test_per_accent=1, dev_general=1, dev_per_accent=1)
    monkeypatch.setattr(Sizes, "scaled", lambda self, factor: sizes)
    monkeypatch.setattr(preparation, "RECOGNISER_EPOCHS", (1.0, 0.5))
    monkeypatch.setattr(demo_corpus, "ProcessPoolExecutor", _Pool)
    recipe.conflicts(work, tmp_path / "out", scale=0.005, report=lambda text: None)
    config = tmp_path / "config.toml"
    config.write_text(f'data = "{tmp_path / "out"}"\nmethods = ["full"]\nrates = {{full = [1e-3]}}\n')
    speech, extra = speech_of(tmp_path / "out", None, {}, tmp_path, lambda text: None)
    index = speech.corpus.index
    assert set(index.accent) == {GENERAL, *CONFLICTING} and set(index.split) == {"train", "dev", "test"} and not extra
    assert speech.recogniser is not None and speech.recogniser.labels == [GENERAL, *CONFLICTING]
    with pytest.raises(ModelError, match="has no base"):
        recipe.conflicts(tmp_path / "nowhere", tmp_path / "out")


def test_real_people_take_the_place_of_accents(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(tiny_model, work / "base", ignore=shutil.ignore_patterns("adapters", "samples", "results"))
    shutil.copytree(work / "base", work / "tokenizer")
    rows = [("train", GENERAL, GENERAL)] * 8 + [("train", "accent", "indian")] * 2
    with pytest.raises(ModelError, match="has no base"):
        people(tmp_path / "nowhere", out, 0, print)
    tiny_corpus(work / "corpus", rows)
    with pytest.raises(ModelError, match="no speech of real people"):
        people(work, out, 0, print)
    rows += [("train", "real_sentences", "Mandarin")] * 3 + [("train", "real_digits", "Hindi")]
    rows += [(split, domain, "x") for split in ("dev", "test") for domain in (GENERAL, "accent", "real_digits", "real_sentences")]
    whole = tiny_corpus(work / "corpus", rows)
    monkeypatch.setattr(preparation, "RECOGNISER_EPOCHS", (1.0, 0.5))
    people(work, out, 0, print)
    speech, extra = speech_of(out, None, {}, tmp_path, print)
    index = speech.corpus.index
    assert not extra and speech.recogniser is not None and speech.recogniser.labels == [GENERAL, "sentences", "digits"]
    train = index[index.split == "train"]
    assert train.accent.value_counts().to_dict() == {"sentences": 3, GENERAL: 2, "digits": 1}  # general speech: half as much
    assert set(zip(index.domain, index.accent, strict=True)) == {
        (GENERAL, GENERAL),
        ("accent", "sentences"),
        ("accent", "digits"),
    }
    assert len(index) == 6 + 2 * 3  # synthetic accents are left out
    for i, name in enumerate(index.utterance):
        np.testing.assert_array_equal(speech.corpus.features(i), whole.features(int(name[1:])))
    encoded = speech.states.spans[:, :, 1] > 0
    assert encoded[0].tolist() == [not (s == "train" and d == GENERAL) for s, d in zip(index.split, index.domain, strict=True)]
    assert encoded[1].sum() == 4 and speech.posteriors is not None and np.isfinite(speech.posteriors).all()


def test_augmentation_is_bounded_and_repeatable() -> None:
    wave = speech_like(1.0)
    for seed in range(30):
        out = augment(wave, np.random.default_rng(seed))
        assert np.isfinite(out).all() and np.abs(out).max() <= 1 and len(out) >= len(wave)
        np.testing.assert_array_equal(out, augment(wave, np.random.default_rng(seed)))
    for kind in ("silence", "noise", "music"):
        sound = out_of_domain_noise(kind, 1.0, np.random.default_rng(0))
        assert len(sound) == 16_000 and np.isfinite(sound).all() and np.abs(sound).max() <= 1


def test_real_speakers_are_split_whole(tmp_path: Path) -> None:
    parts = split_speakers([f"s{i}" for i in range(20)])
    assert sorted(parts.values()).count("test") == 4 and sorted(parts.values()).count("dev") == 2
    assert list(split_speakers(["a", "b"]).values()).count("test") == 1
    with pytest.raises(ManifestError, match=r"There is no manifest .*manifest.jsonl"):
        read_real([tmp_path])
    for line, said in (
        ("{", "Line 1 of manifest.jsonl is not valid JSON"),
        (
            '{"audio": "a.wav", "text": "one"}',
            "Line 1 of manifest.jsonl has no accent and no speaker; each line needs audio, text",
        ),
    ):
        (tmp_path / "manifest.jsonl").write_text(line + "\n")
        with pytest.raises(ManifestError, match=said):
            read_real([tmp_path])


def test_the_llm_reads_frames_and_predicts_only_the_sentence() -> None:
    rng, tokens = np.random.default_rng(0), [5, 9, 9, 7, 30, 12]
    heard = [recipe.ctc_frames(tokens, 64, rng) for _ in range(200)]
    assert all(0 <= token < 64 and not 0 < token < 4 for frames in heard for token in frames)
    exact = [[t for t, before in zip(f, [0, *f], strict=False) if t and t != before] == tokens for f in heard]
    assert 0.4 < np.mean(exact) < 0.9  # mostly what was said, with the errors a CTC head makes
    batch = recipe.language_batch([([1, *heard[0], 3, *tokens, 2], len(heard[0]) + 1), ([1, 3, 5, 2], 1)])
    assert batch["labels"][0][batch["labels"][0] >= 0].tolist() == [3, *tokens, 2]
    assert batch["labels"][1].tolist()[:4] == [-100, 3, 5, 2] and batch["attention_mask"][1].sum() == 4


@pytest.mark.usefixtures("few_tokens")
def test_the_whole_recipe_runs_resumes_and_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything from corpus to model card, very small; a second call finds every stage done and repeats the results."""
    real = tmp_path / "real"
    real.mkdir()
    rows = []
    for k in range(12):
        soundfile.write(real / f"{k}.wav", speech_like(0.5 + k / 20, k), 16_000)
        rows.append({"audio": f"{k}.wav", "text": DIGITS[k % 10], "accent": "US", "speaker": f"s{k % 4}"})
    (real / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    small = replace(
        recipe.Recipe(),
        sizes=Sizes(general=24, per_accent=4, real_sentence_views=1, composed_digits=4, test_general=4, test_per_accent=2,
                    dev_general=4, dev_per_accent=2, outside=6),
        vocabulary=64, llm_sentences=60, encoder_epochs=1, llm_epochs=1, base_epochs=1, recogniser_epochs=(0.3, 0.3, 0.3), adapter_epochs=1,
        encoder=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, subsampling_conv_channels=8, layerdrop=0.0),
        llm=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2),
        projector=dict(projector_hidden_size=32, projector_layers=1, projector_heads=2, projector_intermediate_size=32),
        rank=1, shared_rank=1,
    )  # fmt: skip
    monkeypatch.setattr(recipe.Recipe, "scaled", lambda self, factor: small)
    monkeypatch.setattr(comparing, "SPEED_ROUNDS", 1)
    for module in (demo_corpus, recipe):  # each works in other processes once; they take long to start
        pools = iter([ProcessPoolExecutor])
        monkeypatch.setattr(
            module, "ProcessPoolExecutor", lambda *given, pools=pools, **named: next(pools, _Pool)(*given, **named)
        )
    said: list[str] = []
    out, work = tmp_path / "out", tmp_path / "work"
    first = recipe.build(out, [real], work=work, report=said.append)
    extended = (
        first.methods["hdmole"].dev["accent"] > (first.methods.get("hdmole-extended") or first.methods["hdmole"]).dev["accent"]
    )
    names = ["base", "lora", "full", "hdmole", *(["hdmole-extended"] if extended else [])]
    assert list(first.methods) == names and set(first.methods["lora"].dev) == {"accent", "general"}
    assert {"general", "accent", "real_digits"} == set(first.methods["base"].domains)
    assert (out / "README.md").is_file() and len(list((out / "samples").glob("*.flac"))) == 18
    asr, lines = ASR.load(out), read_manifest(out / "samples" / "manifest.jsonl")
    assert set(first.samples) == {line.audio.stem for line in lines} and len(lines) == 18
    clip = next(line for line in lines if line.audio.stem == "indian_1")
    heard = {method: asr.transcribe(clip.decode(), method).text for method in names}
    assert first.samples["indian_1"] == {method: count_errors(clip.text, text)[0] for method, text in heard.items()}
    assert str(tmp_path) not in "".join(f.read_text() for f in [*out.rglob("*.json"), out / "README.md"])
    frozen = load_file(work / "base" / "model.safetensors")
    adapted = load_file(work / "full" / "model.safetensors")
    assert any(not np.array_equal(frozen[k], v) for k, v in adapted.items())
    count = len(said)
    with monkeypatch.context() as patched:  # what takes longest and is not compared
        patched.setattr(releasing, "in_domain", lambda *_: first.in_domain)
        patched.setattr(releasing, "write_samples", lambda *_: first.samples)
        second = recipe.build(out, [real], work=work, report=said.append)
    assert second.methods == first.methods and second.accent_recogniser == first.accent_recogniser
    assert not any("step" in line for line in said[count:])
    shutil.copytree(out, tmp_path / "released")
    count = len(said)
    with monkeypatch.context() as patched:  # with the weights of a released model, speech is made but nothing trained
        patched.setattr(recipe, "release", lambda trained, out: first)
        recipe.build(tmp_path / "again", [real], work=tmp_path / "anew", report=said.append, released=tmp_path / "released")
    trained = {line.split("-training")[0].split()[-1] for line in said[count:] if "step" in line}
    assert trained == (set() if extended else {"hdmole-extended"})  # what the release left out
    restored, known = (load_file(f / "hdmole" / "adapter_model.safetensors") for f in (tmp_path / "anew", out / "adapters"))
    assert restored.keys() == known.keys() and all(np.array_equal(restored[k], v) for k, v in known.items())
    job = next(
        j for j in recipe.Build(work, [real], 0, small, said.append).jobs if j["domain"] == "accent" and j["split"] == "test"
    )
    with Synthesiser() as synthesiser:
        wave = render(job, synthesiser)
    again = say_again(job["text"], job["accent"], job["speaker"].name)
    assert again is not None and len(again) == pytest.approx(len(wave), rel=0.02)
    assert say_again(job["text"], job["accent"], "nobody") is None
    monkeypatch.setattr(recognisers, "EPOCHS", (0.3, 0.3))
    recognisers.recognisers(work, 0, said.append)
    config = tmp_path / "compare.toml"  # the work folder is what a comparison starts from
    rates = "".join(f"{m} = [1e-3]\n" for m in ("full", "gated_lora", "hdmole"))
    methods = ["full", "gated_lora", "hdmole", "recogniser_early", "recogniser_better"]
    config.write_text(f'data = "{work}"\nmethods = {methods}\nhdmole = {{r = 1}}\n[rates]\n{rates}')
    compared = compare(config, tmp_path / "compared", said.append)
    assert compared is not None and list(compared.methods) == ["base", *methods]
    assert set(compared.other_recognisers) == {"early", "better"}
    carried = json.loads((tmp_path / "compared" / "work" / "recogniser_better-0" / "adapter" / "adapter_config.json").read_text())
    assert carried["recogniser"]["layers"] == 2 and compared.accent_recogniser == first.accent_recogniser
    assert set(compared.methods["hdmole"].domains) == {"accent", "general", "real_digits", "unseen"}
    told, now = first.methods["base"].domains["general"], compared.methods["base"].domains["general"]
    assert now == told.model_copy(update={"per_seed": {0: told.wer}})
