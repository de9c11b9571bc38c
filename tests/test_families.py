"""Every family whose LLM reads audio tokens: the class's own text, rows, traces, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import speech_like
from tiny_families import FOLDERS, save
from tiny_whisper import few_tokens
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor
from typer.testing import CliRunner

import hdmole.cli
from hdmole import AccentRecogniser, HDMoLEConfig, trace
from hdmole.models.family import FAMILIES, family
from hdmole.models.speech_llm import encode_all
from hdmole.speech.decoding import greedy
from hdmole.speech.loading import ModelError, read_config

ACCENTS = ["indian", "german"]
POSTERIOR = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.4, 0.5, 0.1]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for kind in FOLDERS:
        save(kind, root / kind)
    return {kind: root / kind for kind in FOLDERS}


def loaded(kind: str, folders: dict[str, Path]) -> Any:
    return family(kind).from_pretrained(folders[kind], dtype=torch.float32).eval()


def sounds() -> list[np.ndarray]:
    return [np.pad(speech_like(seconds, k), 800) for k, seconds in enumerate((1.0, 2.3, 0.61))]


def features(kind: str, folders: dict[str, Path]) -> list[Tensor]:
    extractor = family(kind).extractor(folders[kind])
    return [extractor(sound)["input_features"][0] for sound in sounds()]


def own_inputs(kind: str, processor: Any, sound: np.ndarray, model: Any) -> Any:
    """What the class's own processor makes of a sound."""
    if kind in ("glmasr", "qwen3_asr"):
        return processor.apply_transcription_request(sound, **({"language": "en"} if kind == "qwen3_asr" else {}))
    if kind == "qwen2_audio":
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": model.request}]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return processor(text=text, audio=[sound], sampling_rate=16_000, return_tensors="pt")
    if kind == "granite_speech":
        return processor("<|audio|>" + model.request, torch.tensor(sound)[None], return_tensors="pt")
    # Voxtral's needs Mistral's package for the tokens
    heard = processor.feature_extractor(sound, sampling_rate=16_000, return_tensors="pt")["input_features"]
    ids = torch.tensor([[*model.prompt.before, *[24] * 50, *model.prompt.after]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": heard}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_text_is_that_of_the_class_itself_alone_and_in_a_batch(kind: str, folders: dict[str, Path]) -> None:
    model, own = loaded(kind, folders), AutoModelForMultimodalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folders[kind])
    with torch.no_grad():
        states = encode_all(model, features(kind, folders))
    together = greedy(model, states, processor.tokenizer)
    assert len({heard.text for heard in together}) == 3
    for sound, alone, heard in zip(sounds(), states, together, strict=True):
        inputs = own_inputs(kind, processor, sound, model)
        written = own.generate(**inputs, max_new_tokens=len(heard.ids), do_sample=False)[0]
        assert written[inputs["input_ids"].shape[1] :].tolist() == heard.ids
        (again,) = greedy(model, [alone], processor.tokenizer)
        assert again.ids == heard.ids and heard.times is None
        with torch.no_grad():
            mask = torch.ones(1, len(alone), dtype=torch.bool)
            out = model(encoder_states=alone[None], encoder_mask=mask, labels=torch.tensor([heard.ids]))
            four = model(encoder_states=alone[None], encoder_mask=mask, labels=torch.tensor([heard.ids]), num_items_in_batch=4)
        np.testing.assert_allclose(out.logits[0, :-1].log_softmax(-1).amax(-1), heard.log_probs, atol=1e-3)
        assert float(out.loss) == pytest.approx(-np.mean(heard.log_probs), abs=1e-3)
        assert float(four.loss) == pytest.approx(float(out.loss) * len(heard.ids) / 4, rel=1e-4)


@pytest.mark.parametrize("place", ["projector", "encoder", "llm"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_frame_of_every_layer_is_routed_by_its_utterance(kind: str, place: str, folders: dict[str, Path]) -> None:
    base = loaded(kind, folders)
    config = HDMoLEConfig(accents=ACCENTS, r=2, target_modules=base.places[place])
    model: Any = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "hdmole_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    mels, labels = features(kind, folders), torch.tensor([[30, 31, 2], [32, 33, 2], [34, 35, 2]])
    batch = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
    mask = torch.arange(batch.shape[1])[None] < torch.tensor([len(m) for m in mels])[:, None]
    given: dict[str, Any] = dict(input_features=batch, attention_mask=mask, labels=labels)
    with torch.no_grad(), trace(model, seconds_per_frame=base.seconds_per_frame) as together:
        logits = model(**given, accent_posterior=POSTERIOR).logits
        other = model(**given, accent_posterior=POSTERIOR.roll(1, 0)).logits
    assert not torch.allclose(logits, other, atol=1e-3)
    assert len(together.layer_names) == sum("hdmole_A" in n for n, _ in model.named_parameters())
    calls = {name: [r.call for r in together.records if r.layer == name] for name in together.layer_names}
    first = type(together)(ACCENTS, [r for r in together.records if r.call < len(calls[r.layer]) // 2])
    for u, mel in enumerate(mels):
        one: dict[str, Any] = dict(
            input_features=mel[None], attention_mask=torch.ones(1, len(mel)).bool(), labels=labels[u : u + 1]
        )
        with torch.no_grad(), trace(model, seconds_per_frame=base.seconds_per_frame) as alone:
            found = model(**one, accent_posterior=POSTERIOR[u : u + 1]).logits[0]
        torch.testing.assert_close(found, logits[u], rtol=1e-3, atol=1e-3)
        for name in alone.layer_names:
            ours, theirs = alone.arrays(name), first.arrays(name, u)
            assert np.allclose(theirs["posterior"], POSTERIOR[u, 1:]) and ours["frame"].tolist() == list(
                range(len(ours["frame"]))
            )
            if place != "llm":  # padding comes after the frames of the sound, and before the tokens of the LLM
                count = len(ours["frame"])
                assert theirs["frame"][:count].tolist() == ours["frame"].tolist()
                np.testing.assert_allclose(theirs["gate"][:count], ours["gate"], atol=1e-4)
                padded = place == "encoder" and kind in ("glmasr", "qwen2_audio")  # these encoders hear silence after it, too
                assert np.nanmax(ours["time"]) < (4.0 if padded or kind == "voxtral" else len(sounds()[u]) / 16_000 + 0.3)
    model(**given, accent_posterior=POSTERIOR).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_adapter_may_carry_a_recogniser_of_encoder_states(kind: str, folders: dict[str, Path]) -> None:
    base, mel = loaded(kind, folders), features(kind, folders)[0][None]
    heard: dict[str, Any] = dict(input_features=mel, attention_mask=torch.ones(1, mel.shape[1]).bool())
    with torch.no_grad():
        states, mask = base.encode(**heard)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=states.shape[-1], channels=8, layers=1).eval()
    config = HDMoLEConfig(accents=ACCENTS, r=2, target_modules=base.places["encoder"], recogniser=recogniser.arguments)
    model: Any = get_peft_model(base, config).eval()
    model.base_model.set_recogniser(recogniser)
    torch.testing.assert_close(model.base_model.recognise((), heard), recogniser.posterior(states, mask), rtol=1e-4, atol=1e-5)


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(hdmole.cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    for split in ("train", "dev", "test"):
        lines = []
        for k, accent in enumerate(["general", *ACCENTS]):
            soundfile.write(root / f"{split}{k}.wav", speech_like(0.8 + 0.3 * k, k), 16_000)
            lines.append({"audio": f"{split}{k}.wav", "text": "turn it on", "accent": accent, "speaker": f"{split}-{accent}"})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def adapter(kind: str, folders: dict[str, Path], folder: Path) -> Path:
    """An adapter whose recogniser reads features as the class's own processor has them, mel bins first."""
    base = loaded(kind, folders)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=16, channels=8, feature_layout="mel_first")
    config = HDMoLEConfig(accents=ACCENTS, r=2, target_modules=base.places["projector"], recogniser=recogniser.arguments)
    model: Any = get_peft_model(base, config)
    model.base_model.set_recogniser(recogniser)
    for name, parameter in model.named_parameters():
        if "hdmole_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_the_commands_use_adapters_from_anywhere(folders: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    mine = adapter("qwen3_asr", folders, tmp_path / "mine")
    given = ("--model", folders["qwen3_asr"], "--adapter", mine)
    sound = speech / "test2.wav"
    (base,) = json.loads(invoke("transcribe", sound, *given, "--method", "base", "--json"))
    (heard,) = json.loads(invoke("transcribe", sound, *given, "--json"))
    assert heard["method"] == "mine" and base["method"] == "base" and heard["text"] != base["text"]
    assert heard["timing"] == "none" and all(w["start"] is None and w["end"] is None for w in heard["words"])
    assert set(heard["accent"]) == {"general", *ACCENTS} and len(heard["layers"]) == 2
    invoke("trace", sound, *given, "--out", tmp_path / "trace.parquet")
    table = pd.read_parquet(tmp_path / "trace.parquet")
    assert set(table.utterance) == {0} and 0.9 < table.time.max() < 1.6
    invoke("evaluate", "--manifest", speech / "test.jsonl", *given, "--out", tmp_path / "out")
    rows = pd.read_parquet(tmp_path / "out" / "utterances.parquet")
    assert set(rows.method) == {"base", "mine"} and len(rows) == 6
    (mine_row,) = rows[(rows.method == "mine") & (rows.utterance == "test2.wav")].hypothesis
    assert mine_row == hdmole.normalise(heard["text"])
    routing = pd.read_parquet(tmp_path / "out" / "routing.parquet")
    (posterior,) = routing[(routing.utterance == "test2.wav") & (routing.accent == "german")].posterior.unique()
    assert posterior == pytest.approx(heard["accent"]["german"], abs=1e-3)
    done = CliRunner().invoke(hdmole.cli.app, ["transcribe", str(sound), *map(str, given), "--adapter", str(mine)])
    assert done.exit_code == 1 and "Two adapters have the name 'mine'" in " ".join(done.output.split())


@pytest.mark.parametrize("kind", [*FOLDERS, "whisper"])
def test_methods_are_compared(
    kind: str, folders: dict[str, Path], speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names the model; a plain Whisper has a vocabulary without most languages and times."""
    monkeypatch.setattr("hdmole.training.preparation.RECOGNISER_EPOCHS", (1.0, 0.5))
    model = few_tokens(tmp_path / "whisper", english_only=True) if kind == "whisper" else folders[kind]
    paths = "\n".join(f'{split} = "{speech / split}.jsonl"' for split in ("train", "dev", "test"))
    (tmp_path / "c.toml").write_text(
        f'model = "no-such-model"\nmethods = ["hdmole"]\nepochs = 2\n[manifests]\n{paths}\n[rates]\nhdmole = [1e-3]\n'
    )
    invoke("compare", "--config", tmp_path / "c.toml", "--model", model, "--out", tmp_path / "out")
    rows = pd.read_parquet(tmp_path / "out" / "utterances.parquet")
    assert rows.groupby("method").utterance.nunique().to_dict() == {"base": 3, "hdmole": 3}
    routing = pd.read_parquet(tmp_path / "out" / "routing.parquet")
    assert set(routing.utterance) == {"test0.wav", "test1.wav", "test2.wav"}
    adapter = tmp_path / "out" / "work" / "hdmole-0" / "adapter"
    place = next(iter(family(kind).places))  # the projector, or the encoder without one
    assert routing.layer.nunique() == sum("hdmole_A" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]["hdmole"]["place"] == place
    (heard,) = json.loads(invoke("transcribe", speech / "test1.wav", "--model", model, "--adapter", adapter, "--json"))
    (compared,) = rows[(rows.method == "hdmole") & (rows.utterance == "test1.wav")].hypothesis
    assert hdmole.normalise(heard["text"]) == compared


def test_the_table_names_every_family_and_an_unknown_one_what_to_copy(tmp_path: Path) -> None:
    table = invoke("models")
    for kind, entry in FAMILIES.items():
        assert kind in table and f"hdmole/models/{entry.file}.py" in table and entry.tested in table
        assert (Path(hdmole.__file__).parent / "models" / f"{entry.file}.py").is_file()
        assert family(kind).__name__ == entry.kind
    assert {kind for kind, entry in FAMILIES.items() if "tiny random" in entry.tested} == set(FOLDERS)
    (tmp_path / "config.json").write_text('{"model_type": "moonshine"}')
    with pytest.raises(ModelError, match=r"holds a 'moonshine' model.*copy hdmole/models/glm_asr.py") as raised:
        read_config(tmp_path)
    assert raised.value.code == "model.other_type"
