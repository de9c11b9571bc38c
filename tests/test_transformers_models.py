"""The adapter on transformers' own LLM-based speech models: tiny random configurations, real forward and generate."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import TARGETS, tiny_speech_llm
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig, Trainer, TrainingArguments

from hdmole import AccentRecogniser, HDMoLEConfig, intervene, route, trace
from hdmole.method.routing import RoutingError
from hdmole.method.tuner import HDMoLELinear
from hdmole.models.speech_llm import SpeechLLM

ACCENTS = ["a", "b", "c"]
AUDIO_TOKEN = 39
TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
AUDIO = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_mel_bins=8)
MODELS: dict[str, tuple[int, int, dict[str, Any]]] = {  # mel frames and audio tokens of an utterance; configuration
    "glmasr": (64, 8, {"audio_config": {**AUDIO, "model_type": "glmasr_encoder", "max_position_embeddings": 64}}),
    "voxtral": (64, 8, {"audio_config": {**AUDIO, "model_type": "voxtral_encoder", "max_source_positions": 32}}),
    "qwen3_asr": (100, 13, {"audio_config": dict(
        num_mel_bins=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16, n_window=50,
        n_window_infer=100, output_dim=16, downsample_hidden_size=4), "eos_token_id": 2, "pad_token_id": 0}),
}  # fmt: skip
PACKED = ("voxtral", "qwen3_asr")  # their projectors see all frames of all utterances in one row


def build(kind: str, targets: str = r".*(linear_[12]|language_model.*[qv]_proj)", **switches: Any) -> PeftModel:
    """A random model and adapter, with a random recogniser, all the same at every call."""
    text = {**TEXT, "model_type": "qwen3" if kind == "qwen3_asr" else "llama"}
    torch.manual_seed(0)
    base = AutoModelForMultimodalLM.from_config(
        AutoConfig.for_model(kind, text_config=text, audio_token_id=AUDIO_TOKEN, **MODELS[kind][2])
    )
    for parameter in base.parameters():  # transformers' initialisation makes all tokens nearly equal
        nn.init.normal_(parameter, std=0.3)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=8, channels=8, feature_layout="mel_first")
    config = HDMoLEConfig.extended(ACCENTS, target_modules=targets, recogniser=recogniser.arguments, **switches)
    model: Any = get_peft_model(base, config)
    model.base_model.set_recogniser(recogniser)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "threshold" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(kind: str, count: int = 3, seed: int = 1) -> dict[str, Any]:
    """A batch of `count` utterances, with the row -> utterance index where the projector needs one."""
    frames, tokens, _ = MODELS[kind]
    random = torch.Generator().manual_seed(seed)
    ids = torch.full((count, tokens + 2), AUDIO_TOKEN)
    ids[:, 0], ids[:, -1] = 1, torch.randint(3, 30, (count,), generator=random)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(count, 8, frames, generator=random),
    }
    if kind != "voxtral":
        batch["input_features_mask"] = torch.ones(count, frames, dtype=torch.long)
    return {**batch, **index(kind, count)}


def index(kind: str, count: int) -> dict[str, Any]:
    rows = torch.arange(count).repeat_interleave(MODELS[kind][1])
    return {"utterance_rows": {"projector": rows}} if kind in PACKED else {}


def one(kind: str, batch: dict[str, Any], u: int) -> dict[str, Any]:
    return {**{k: v[u : u + 1] for k, v in batch.items() if isinstance(v, Tensor)}, **index(kind, 1)}


@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_gradients(kind: str) -> None:
    model, batch = build(kind), inputs(kind)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad} and all("hdmole_" in n for n in reached)
    with torch.no_grad():
        together = model(**batch).logits
        for u in range(3):
            torch.testing.assert_close(model(**one(kind, batch, u)).logits[0], together[u], rtol=1e-4, atol=1e-4)
        posterior = model.base_model.recognise((), batch)
        assert torch.equal(model(**batch, accent_posterior=posterior).logits, together)
        assert not torch.allclose(model(**batch, accent_posterior=posterior.roll(1, 0)).logits, together)
        with model.disable_adapter():
            base = model(**batch).logits
        with intervene(model, accent="general"):
            assert torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_projector_wants_an_index(kind: str) -> None:
    model, batch = build(kind), inputs(kind)
    del batch["utterance_rows"]
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2, num_beams=2)):
        with pytest.raises(RoutingError, match="nothing says which row"):
            call(**batch)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_alone_in_a_batch_and_traced(kind: str, beams: int) -> None:
    model, batch = build(kind), inputs(kind)
    how = dict(max_new_tokens=6, num_beams=beams, do_sample=False, return_dict_in_generate=True, output_scores=True)
    together = model.generate(**batch, **how)
    with trace(model, seconds_per_frame={"projector": 0.08}) as t:
        traced = model.generate(**batch, **how)
    assert torch.equal(traced.sequences, together.sequences)
    assert all(torch.equal(a, b) for a, b in zip(traced.scores, together.scores, strict=True))
    for u in range(3):
        alone = model.generate(**one(kind, batch, u), **how).sequences[0]
        width = min(len(alone), together.sequences.shape[1])
        assert torch.equal(alone[:width], together.sequences[u, :width])
    with route(model.base_model.recognise((), batch), batch.get("utterance_rows")):  # on the base model itself, no PEFT around
        plain = {k: v for k, v in batch.items() if k != "utterance_rows"}
        assert torch.equal(model.get_base_model().generate(**plain, **how).sequences, together.sequences)
    projector, llm = (next(n for n in t.layer_names if part in n) for part in ("linear_1", "language_model"))
    prompt = batch["input_ids"].shape[1]
    arrays = t.arrays(llm, 1)
    assert len(np.unique(arrays["row"])) == beams and np.isnan(arrays["time"]).all()
    for row in np.unique(arrays["row"]):  # the prompt, then one token a step
        frames = arrays["frame"][arrays["row"] == row]
        assert (frames == np.arange(len(frames))).all() and len(frames) >= prompt
    assert t.arrays(projector, 1)["time"].max() == pytest.approx(0.08 * (t.arrays(projector, 1)["frame"].max()))
    with trace(model, layers="language_model.*q_proj", frames=slice(0, 2), aggregate="mean") as small:
        model.generate(**batch, **how)
    assert all("q_proj" in name for name in small.layer_names) and len(small.layer_names) == 2
    assert sum(len(r.arrays["frame"]) for r in small.records) == 2 * 3 * beams  # one mean a layer and row; nothing of later steps


def test_the_trace_under_a_cache_is_that_of_one_pass() -> None:
    model, batch = build("glmasr"), one("glmasr", inputs("glmasr"), 0)
    with trace(model, layers="language_model") as steps:
        sequence = model.generate(**batch, max_new_tokens=6, do_sample=False)
    whole = {**batch, "input_ids": sequence[:, :-1], "attention_mask": torch.ones_like(sequence[:, :-1])}
    with torch.no_grad(), trace(model, layers="language_model") as once:
        model(**whole)
    for name in steps.layer_names:
        for key in ("gate", "local_probability", "tau_local", "frame"):
            np.testing.assert_allclose(steps.arrays(name)[key], once.arrays(name)[key], rtol=1e-4, atol=1e-4)


def test_beams_are_read_from_the_generation_config_and_sequences_count() -> None:
    model, batch = build("glmasr"), inputs("glmasr")
    how: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(**batch, **how, num_beams=2, num_return_sequences=2)
    config = GenerationConfig(**how, num_beams=2, num_return_sequences=2, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(**batch, generation_config=config), expected)
    assert len(model.generate(**batch, max_new_tokens=2, do_sample=True, num_return_sequences=4)) == 12


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_saved_and_loaded_it_generates_the_same(task: str | None, tmp_path: Path) -> None:
    model, batch = build("glmasr", task_type=task), inputs("glmasr")
    pi = torch.rand(3, 4).softmax(1)
    expected = model(**batch).logits, model.generate(**batch, accent_posterior=pi, max_new_tokens=4, num_beams=2)
    model.save_pretrained(str(tmp_path))
    base = build("glmasr").unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    copied = copy.deepcopy(model)
    nn.init.zeros_(next(p for n, p in model.named_parameters() if "hdmole_B" in n))  # the copies stand on their own
    for twin in (loaded, copied):
        assert torch.equal(twin(**batch).logits, expected[0])
        assert torch.equal(twin.generate(**batch, accent_posterior=pi, max_new_tokens=4, num_beams=2), expected[1])


def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    batch = inputs("glmasr", 4)
    data = [{**{k: v[u] for k, v in batch.items()}, "labels": batch["input_ids"][u]} for u in range(4)]

    def run(folder: str, steps: int, checkpointing: bool, resume: bool = False) -> dict[str, Tensor]:
        model = build("glmasr")
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, remove_unused_columns=False,
            report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)  # type: ignore[arg-type]
        return {n: p.detach() for n, p in model.named_parameters()}

    plain, checkpointed = run("plain", 3, False), run("checkpointed", 3, True)
    run("resumed", 1, True)
    resumed = run("resumed", 3, True, resume=True)
    start = dict(build("glmasr").named_parameters())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
        assert ("hdmole_B" in name) <= (not torch.equal(value, start[name]))
        assert ("hdmole_" not in name or "recogniser" in name) <= torch.equal(value, start[name])


def test_threads_that_generate_get_what_they_would_get_alone() -> None:
    model = build("glmasr")
    changes: list[dict[str, Any]] = [{}, {"force": ["b"]}, {"accent": "c"}, {"thresholds": "top_k", "top_k": 1}]
    jobs = [(inputs("glmasr", 1 + i % 3, seed=i), changes[i % 4], 1 + i % 2) for i in range(12)]

    def run(job: tuple[dict[str, Any], dict[str, Any], int]) -> tuple[Tensor, Any]:
        batch, change, beams = job
        with intervene(model, **change), trace(model) as t:
            out = model.generate(**batch, max_new_tokens=4, num_beams=beams, do_sample=False)
        return out, t.to_frame()

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for (a, table), (b, expected) in zip(pool.map(run, jobs), alone, strict=True):
            assert torch.equal(a, b) and table.equals(expected)


def test_checkpointing_under_its_older_name() -> None:
    model, batch = build("glmasr").train(), inputs("glmasr", 2)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_checkpointing_switched_on_before_the_adapter() -> None:
    base = AutoModelForMultimodalLM.from_config(
        AutoConfig.for_model(
            "glmasr", text_config={**TEXT, "model_type": "llama"}, audio_token_id=AUDIO_TOKEN, **MODELS["glmasr"][2]
        )
    )
    base.gradient_checkpointing_enable()
    model: Any = get_peft_model(base, HDMoLEConfig.extended(ACCENTS, target_modules=r".*language_model.*[qv]_proj")).train()
    batch = inputs("glmasr", 2)
    model(**batch, labels=batch["input_ids"], accent_posterior=torch.full((2, 4), 0.25)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_off_the_trace_adds_no_operation() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    layer = next(m for m in build("glmasr").modules() if isinstance(m, HDMoLELinear))
    x = torch.randn(1, 2, layer.in_features)

    def operations() -> int:
        with torch.no_grad(), route(torch.full((1, 4), 0.25)), Count() as count:
            layer(x)
        return count.calls

    off = operations()
    with trace(build("glmasr")):  # another model is traced
        assert operations() == off


def test_a_typed_peft_model_hears_the_accent_without_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's model for causal language models keeps `attention_mask` from the tuner's hook."""
    monkeypatch.setattr(SpeechLLM, "prepare_inputs_for_generation", lambda self, *args, **kwargs: kwargs, raising=False)
    recogniser = AccentRecogniser(["general", *ACCENTS], n_mels=80, channels=8)
    features, mask = torch.randn(2, 80, 80), torch.arange(80) < torch.tensor([[80], [40]])
    for task in (None, "CAUSAL_LM"):
        config = HDMoLEConfig.extended(ACCENTS, target_modules=TARGETS, recogniser=recogniser.arguments, task_type=task)
        model: Any = get_peft_model(tiny_speech_llm(), config)
        model.base_model.set_recogniser(recogniser)
        with trace(model.eval()) as t:
            model(input_features=features, attention_mask=mask, labels=torch.ones(2, 3, dtype=torch.long))
        heard = torch.from_numpy(t.arrays(t.layer_names[0], 1)["posterior"][0])
        torch.testing.assert_close(heard, recogniser.eval().posterior(features, mask)[1, 1:])


def test_adapters_saved_before_version_0_2_load(tmp_path: Path) -> None:
    """Their configuration names the module `hdmole.speech_llm`; those of the demo model are such."""
    torch.manual_seed(0)
    base = tiny_speech_llm()
    base.save_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(base, HDMoLEConfig(accents=ACCENTS, target_modules=TARGETS)).eval()
    for name, parameter in adapted.named_parameters():
        if "hdmole_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["auto_mapping"] = {"base_model_class": "SpeechLLM", "parent_library": "hdmole.speech_llm"}
    file.write_text(json.dumps(config))
    given: dict[str, Any] = dict(
        input_features=torch.randn(1, 80, 80), attention_mask=torch.ones(1, 80), labels=torch.ones(1, 3, dtype=torch.long),
        accent_posterior=torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
    )  # fmt: skip
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hdmole.speech_llm"]).eval()
    assert isinstance(loaded.get_base_model(), SpeechLLM)
    with torch.no_grad():
        expected = adapted(**given).logits
        assert torch.equal(loaded(**given).logits, expected)
        with intervene(loaded, mask=ACCENTS):
            assert not torch.equal(loaded(**given).logits, expected)


@pytest.mark.parametrize("method", ["lora", "hdmole"])
def test_the_demo_models_adapters_load(method: str) -> None:
    demo = Path(__file__).resolve().parent.parent / "assets" / "demo"
    base = SpeechLLM.from_pretrained(demo, dtype=torch.float32)
    adapter: Any = PeftModel.from_pretrained(base, demo / "adapters" / method)
    stored = load_file(demo / "adapters" / method / "adapter_model.safetensors")
    state = get_peft_model_state_dict(adapter)
    assert set(state) == set(stored) and all(torch.equal(state[name], stored[name].to(state[name])) for name in stored)
