"""`hdmole accents train`: who is held out, what is measured, and that an adapter can carry the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from peft import get_peft_model
from tiny import TARGETS, speech_like, tones
from typer.testing import CliRunner

from hdmole import AccentRecogniser, HDMoLEConfig
from hdmole.cli import app
from hdmole.models.speech_llm import SpeechLLM
from hdmole.speech.asr import ASR
from hdmole.speech.manifest import Line
from hdmole.speech.mel import mel_features
from hdmole.speech.segments import framed, spoken
from hdmole.study.accents import AccentsError, calibration_error, split_speakers


def lines(**speakers: int) -> list[Line]:
    """Two lines of each speaker; an accent is followed by how many it has."""
    said = [(accent, f"{accent}{k}") for accent, count in speakers.items() for k in range(count) for _ in range(2)]
    return [Line(n, f"{n}.wav", Path(f"{n}.wav"), "one", accent, speaker) for n, (accent, speaker) in enumerate(said, 1)]


def test_every_accent_has_speakers_of_its_own_in_each_split() -> None:
    given = lines(general=3, german=20)
    found = split_speakers(given, 0)
    assert sorted(line.number for part in found.values() for line in part) == [line.number for line in given]
    speakers = {split: {line.speaker for line in part} for split, part in found.items()}
    assert not speakers["train"] & speakers["dev"] | speakers["train"] & speakers["test"] | speakers["dev"] & speakers["test"]
    count = {split: [sum(s.startswith(a) for s in of) for a in ("general", "german")] for split, of in speakers.items()}
    assert count == {"train": [1, 14], "dev": [1, 3], "test": [1, 3]}  # 15 % of 20 speakers are 3
    assert split_speakers(given, 0) == found != split_speakers(given, 1)


def test_speech_that_teaches_no_recogniser_is_refused() -> None:
    twice = [*lines(german=3), Line(7, "7.wav", Path("7.wav"), "one", "indian", "german0")]
    alone = [Line(1, "1.wav", Path("1.wav"), "one", "german", "line-1")]
    for given, code in (
        (lines(general=3, german=2), "accents.few_speakers"),
        (lines(general=3), "accents.none"),
        (twice, "accents.two_accents"),
        (alone, "accents.no_speaker"),
    ):
        with pytest.raises(AccentsError) as caught:
            split_speakers(given, 0)
        assert caught.value.code == code


def test_the_calibration_error_by_hand() -> None:
    """Two utterances at 0.9, one right: |0.5 - 0.9|; one at 0.6, right: |1 - 0.6|; one at 0.8, wrong: |0 - 0.8|."""
    posteriors = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.2, 0.8]])
    assert calibration_error(posteriors, np.array([0, 0, 0, 0])) == pytest.approx((2 * 0.4 + 0.4 + 0.8) / 4)
    assert calibration_error(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])) == 0


def test_a_recogniser_is_trained_measured_and_carried_by_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    told, sounds = [], {}
    for accent, sound in (("general", tones), ("german", speech_like)):
        for k in range(4):
            for n in range(2):
                name = f"{accent}{k}{n}.wav"
                sounds[name] = sound(1.0 + 0.2 * n, 2 * k + n)
                soundfile.write(tmp_path / name, sounds[name], 16_000, subtype="FLOAT")
                told.append({"audio": name, "text": "one", "accent": accent, "speaker": f"{accent}{k}"})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    out = tmp_path / "accents"
    command = ["accents", "train", tmp_path / "all.jsonl", "--model", tiny_model, "--out", out]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0 and "calibration error" in done.output, done.output
    assert sorted(file.name for file in out.iterdir()) == ["accents.json", "config.json", "model.safetensors"]
    found = json.loads((out / "accents.json").read_text())
    assert found["labels"] == ["general", "german"] and found["utterances"] == 4 and np.sum(found["confusion"]) == 4
    assert found["training"] == {
        split: {"utterances": 2 * count, "speakers": count} for split, count in (("train", 4), ("dev", 2), ("test", 2))
    }

    recogniser, asr = AccentRecogniser.load(out), ASR.load(tiny_model)
    assert recogniser.layers == 3 and float(recogniser.temperature) == pytest.approx(found["temperature"], abs=1e-4)
    given = [
        Line(n, str(line["audio"]), tmp_path / str(line["audio"]), "one", line["accent"], line["speaker"])
        for n, line in enumerate(told)
    ]
    right, confidence = [], []
    for line in split_speakers(given, 0)["test"]:
        sound = framed(sounds[line.name], spoken(sounds[line.name]))[0]
        posterior = recogniser.posterior(*asr.models["base"].encoder_layers(*mel_features(asr.extractor, sound)))[0]
        right.append(recogniser.labels[int(posterior.argmax())] == line.accent)
        confidence.append(float(posterior.max()))
    assert found["accuracy"] == np.mean(right) and found["confidence"] == pytest.approx(np.mean(confidence), abs=0.01)

    config = HDMoLEConfig(accents=["german"], r=2, target_modules=TARGETS, recogniser=recogniser.arguments)
    adapter: Any = get_peft_model(SpeechLLM.from_pretrained(tiny_model, dtype=torch.float32), config)  # type: ignore[arg-type]
    adapter.base_model.set_recogniser(recogniser)
    adapter.save_pretrained(tmp_path / "mine")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in tiny_model.glob("*.*"):
        (plain / file.name).write_bytes(file.read_bytes())
    mine = ASR.load(plain, adapters=[tmp_path / "mine"])
    (segment,) = mine.segment(sounds["german00.wav"])
    expected = recogniser.posterior(*asr.models["base"].encoder_layers(*mel_features(asr.extractor, segment.samples)))[0]
    torch.testing.assert_close(segment.posterior_of("mine"), expected, atol=1e-3, rtol=1e-3)
    assert mine.transcribe(sounds["german00.wav"], "mine").accent["german"] == pytest.approx(float(expected[1]), abs=1e-3)
