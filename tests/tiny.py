"""A tiny random model with every file of a real one, and a tiny corpus, so that tests of everything around take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ParakeetFeatureExtractor, PreTrainedTokenizerFast

from hdmole.method.recogniser import AccentRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models.speech_llm import SpeechLLM, SpeechLLMConfig
from hdmole.speech.domain import DomainScorer, domain_features
from hdmole.speech.words import count_errors
from hdmole.study.bootstrap import summarise
from hdmole.study.results import RecogniserResult, base_digest, provenance, save
from hdmole.training.adapt import Speech
from hdmole.training.data import Corpus, States, write_corpus

ACCENTS = ["indian", "german", "scottish"]
METHODS = ["base", "lora", "full", "hdmole", "hdmole-extended"]
SENTENCES = ["turn on the lights", "play some jazz music", "seven eight nine", "call anna at six", "what is the weather today"]
SAMPLES = Path(__file__).resolve().parent.parent / "assets" / "demo" / "samples"
SECONDS = 1.25  # of each of the tiny model's samples
TARGETS = r"multi_modal_projector\..*(linear_1|linear_2|q_proj|fc1)"


def tiny_speech_llm(vocabulary: int = 64, layers: int = 2, seed: int = 0) -> SpeechLLM:
    """Random weights, 32 wide everywhere; the LLM has so many layers."""
    torch.manual_seed(seed)
    encoder = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, subsampling_conv_channels=8, layerdrop=0.0
    )  # fmt: skip
    audio = dict(model_type="parakeet_ctc", vocab_size=vocabulary, pad_token_id=0, encoder_config=encoder)
    text = dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        max_position_embeddings=512,
    )  # fmt: skip
    config = SpeechLLMConfig(
        audio_config=audio, text_config=text, projector_hidden_size=32, projector_heads=2, projector_intermediate_size=64
    )
    model = SpeechLLM(config).eval()
    for module in model.audio_tower.modules():  # transformers' initialisation lets no signal through so small an encoder
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
            module.reset_parameters()
    for name, parameter in model.language_model.named_parameters():  # loud enough to write words, if senseless ones
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    return model


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """Speech without pauses, float32, 16 kHz: the demo model's samples one after the other, from the `seed`-th on."""
    files = sorted(SAMPLES.glob("*_1.flac"))
    sounds = [soundfile.read(file, dtype="float32")[0] for file in files[seed % len(files) :] + files[: seed % len(files)]]
    return np.resize(np.concatenate(sounds), int(seconds * 16_000)).astype(np.float32)


def tones(seconds: float, seed: int = 0) -> np.ndarray:
    """Tone bursts at the pace of syllables, float32, 16 kHz; Silero VAD takes the first two seconds for speech."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    pitch = 120 + 20 * seed + 30 * np.sin(2 * np.pi * 0.7 * time)
    wave = sum(np.sin(2 * np.pi * h * np.cumsum(pitch) / 16_000) / h for h in range(1, 6))
    return (0.2 * wave * np.clip(np.sin(2 * np.pi * 3.1 * time), 0, 1)).astype(np.float32)


def build_tiny_model(folder: Path) -> Path:
    """Write the model folder: base, LoRA, full and both HDMoLE adapters, in-domain score, samples, results, model card."""
    folder.mkdir(parents=True)
    bpe = Tokenizer(models.BPE(unk_token="<pad>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<pad>", "<bos>", "<eos>", "<sep>"])
    bpe.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", sep_token="<sep>"
    ).save_pretrained(folder)
    ParakeetFeatureExtractor(feature_size=80, sampling_rate=16_000).save_pretrained(folder)
    # With this seed every method writes words.
    tiny_speech_llm(bpe.get_vocab_size(), layers=1, seed=7).save_pretrained(folder)

    def base() -> SpeechLLM:
        return SpeechLLM.from_pretrained(folder, dtype=torch.float32)

    full = {
        f"multi_modal_projector.{k}": v + 0.05 * torch.randn_like(v) for k, v in base().multi_modal_projector.state_dict().items()
    }
    (folder / "adapters" / "full").mkdir(parents=True)
    save_file(full, folder / "adapters" / "full" / "model.safetensors")
    torch.manual_seed(1)
    recogniser = AccentRecogniser(["general", *ACCENTS], channels=16)
    adapters = {
        "lora": LoraConfig(r=4, target_modules=TARGETS),
        "hdmole": HDMoLEConfig(accents=ACCENTS, r=2, alpha=2.0, target_modules=TARGETS, recogniser=recogniser.arguments),
        "hdmole-extended": HDMoLEConfig.extended(
            ACCENTS, target_modules=TARGETS, recogniser=recogniser.arguments, shared_expert_rank=2
        ),
    }
    for name, config in adapters.items():
        model = get_peft_model(base(), config)
        for key, parameter in model.named_parameters():
            if "_B" in key or "lora_B" in key:
                torch.nn.init.normal_(parameter, std=1.0 if name == "hdmole" else 0.2)  # whose weights and scale are small
        model.save_pretrained(str(folder / "adapters" / name))

    samples, lines = folder / "samples", []
    samples.mkdir()
    for k, accent in enumerate(["general", *ACCENTS]):
        soundfile.write(samples / f"{accent}_1.flac", speech_like(SECONDS, k), 16_000)
        lines.append({"audio": f"{accent}_1.flac", "text": SENTENCES[k], "accent": accent, "speaker": f"s{k}"})
    (samples / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    rng = np.random.default_rng(0)
    rows = [_features(rng, inside) for inside in (True, False) for _ in range(20)]
    DomainScorer.fit(pd.DataFrame(rows), np.repeat(["speech", "noise"], 20), ["speech"]).save(folder / "domain.json")

    results = []
    for method in METHODS:
        for k, line in enumerate(lines * 3):
            reference = str(line["text"])
            hypothesis = reference if (k + len(method)) % 3 else reference.rsplit(" ", 1)[0] + " wrong"
            errors, words = count_errors(reference, hypothesis)
            results.append(
                dict(
                    method=method, seed=0, domain="general" if line["accent"] == "general" else "accent", accent=line["accent"],
                    speaker=f"s{k % 5}", utterance=f"u{k}", reference=reference, hypothesis=hypothesis, errors=errors, words=words,
                )
            )  # fmt: skip
    table = pd.DataFrame(results)
    labels = ["general", *ACCENTS]
    measured = summarise(table, provenance(0, "cpu", base_sha256=base_digest(folder)))
    confusion = [[1] * len(labels)] * len(labels)
    measured.accent_recogniser = RecogniserResult(balanced_accuracy=0.25, labels=labels, confusion=confusion)
    save(folder / "results", measured, table)
    (folder / "README.md").write_text("# A tiny random model\n\nIt has learned nothing and is for tests only.\n")
    return folder


def _features(rng: np.random.Generator, inside: bool) -> dict[str, float]:
    noise = 0.2 if inside else 3.0
    logits = rng.standard_normal((20, 8)) * (6 if inside else 0.5)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return domain_features(
        samples=rng.standard_normal(16_000).astype(np.float32),
        ctc_log_probs=log_probs,
        ctc_text="turn on the lights" if inside else "t n",
        text="turn on the lights",
        token_log_probs=[-noise * rng.random() for _ in range(5)],
        alignment_score=-noise,
        posterior=np.array([0.9, 0.05, 0.05]) if inside else np.ones(3) / 3,
    )


def tiny_corpus(folder: Path, rows: list[tuple[str, str, str]], frames: int = 40) -> Corpus:
    """A corpus of (split, domain, accent); every feature of utterance i is i + 1."""
    index = pd.DataFrame(rows, columns=["split", "domain", "accent"])
    index = index.assign(text="one two", speaker="s", utterance=[f"u{i}" for i in range(len(rows))], seconds=1.0)
    write_corpus(folder, ((row, np.full((frames, 80), i + 1, np.float16)) for i, row in enumerate(index.to_dict("records"))))
    return Corpus(folder)


def tiny_speech(folder: Path, model: Path, rows: list[tuple[str, str, str]]) -> Speech:
    """Speech for the tiny model, of (split, domain, accent), whose recogniser has no idea of the accent.

    There are two views; view v of utterance i is three frames of 100 v + i.
    """
    corpus, count, labels = tiny_corpus(folder, rows, frames=4), len(rows), ["general", *ACCENTS]
    states = np.concatenate([np.full((3, 32), 100 * view + i, np.float16) for view in (0, 1) for i in range(count)])
    spans = np.array([[[3 * (count * view + i), 3] for i in range(count)] for view in (0, 1)])
    torch.manual_seed(0)
    posteriors = np.full((count, len(labels)), 1 / len(labels), np.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Speech(corpus, States(states, spans), tokenizer, model, AccentRecogniser(labels, channels=16), posteriors)
