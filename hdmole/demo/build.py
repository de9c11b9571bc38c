"""Train the demo model from nothing: corpus, encoder, LLM, general-domain base, accent recogniser, three adaptations.

One command, `hdmole demo build`; every stage leaves its result in the work folder and is skipped when that is there,
and a stage that was cut off goes on from its last checkpoint. What is published ends up in `out`:

    corpus -> tokenizer -> encoder (CTC) -> llm -> states (encoder outputs, computed once) -> base -> recogniser
           -> full | lora | hdmole (the projector, under one recipe) -> released folder -> in-domain score -> results
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForCTC, LlamaConfig, ParakeetCTCConfig, PreTrainedTokenizerFast

from hdmole.demo.corpus import N_MELS, Batches, Corpus, Sizes, make, plan, read_real, spec_augment
from hdmole.demo.synth import ACCENTS, GENERAL
from hdmole.demo.text import is_digit_string, sentences
from hdmole.demo.training import ctc_objective, embedding_objective, fit, language_objective, smoothed_objective
from hdmole.recogniser import AccentRecogniser
from hdmole.speech_llm import SpeechLLM, SpeechLLMConfig
from hdmole.tuner import HDMoLEConfig

PROJECTOR_LINEARS = r"multi_modal_projector\..*(linear_1|linear_2|q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
EXPERTS = [name for name in ACCENTS if name != GENERAL]


@dataclass(frozen=True)
class Recipe:
    """What the demo model is trained with; the defaults are the released model's."""

    sizes: Sizes = field(default_factory=Sizes)
    vocabulary: int = 512
    encoder: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768,
            subsampling_conv_channels=32, layerdrop=0.0, attention_dropout=0.0, dropout=0.0, activation_dropout=0.0,
        )
    )  # fmt: skip
    llm: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
        )
    )
    projector: dict[str, Any] = field(default_factory=lambda: dict(projector_hidden_size=512, projector_layers=2))
    llm_sentences: int = 30_000
    encoder_epochs: tuple[float, float] = (4, 3)
    llm_epochs: float = 4
    base_epochs: float = 2.5
    recogniser_epochs: tuple[float, float] = (9, 4.5)
    adapter_epochs: float = 1
    rank: int = 2
    shared_rank: int = 10
    rates: dict[str, float] = field(
        default_factory=lambda: {
            "encoder-digits": 5e-4,
            "encoder-all": 8e-4,
            "encoder-long": 1e-3,
            "llm": 2e-3,
            "base": 1e-3,
            "recogniser": 1.5e-3,
            "full": 5e-4,
            "lora": 2e-3,
            "hdmole": 2e-3,
        }
    )

    def scaled(self, factor: float) -> Recipe:
        """The same recipe on `factor` times the data, for a quick trial."""
        return self if factor == 1 else Recipe(sizes=self.sizes.scaled(factor), llm_sentences=max(200, int(30_000 * factor)))


class Build:
    """The stages, each a method that returns its product and makes it only if the work folder has none."""

    def __init__(self, work: Path, real_speech: list[Path], seed: int, recipe: Recipe, report: Callable[[str], None]) -> None:
        self.work, self.seed, self.recipe = work, seed, recipe
        work.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._report, self._start = report, time.time()
        self.jobs = plan(recipe.sizes, read_real(real_speech), seed)

    def report(self, text: str) -> None:
        line = f"[{(time.time() - self._start) / 60:5.1f} min] {text}"
        with (self.work / "log.txt").open("a") as log:
            log.write(line + "\n")
        self._report(line)

    # -- data ---------------------------------------------------------------------------------------------------------

    def corpus(self) -> Corpus:
        folder = self.work / "corpus"
        if not (folder / "index.parquet").is_file():
            for k, share in enumerate(make(self.jobs, folder)):
                if k % 25 == 0:
                    self.report(f"corpus: {share:.0%} of {len(self.jobs)} utterances")
        corpus = Corpus(folder)
        parts = corpus.index.split + " " + corpus.index.domain
        for part, seconds in corpus.index.seconds.groupby(parts):
            self.report(f"corpus: {part}, {len(seconds)} utterances, {seconds.sum() / 3600:.1f} h")
        return corpus

    def tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerFast:
        folder = self.work / "tokenizer"
        if not folder.is_dir():
            bpe = Tokenizer(models.BPE(unk_token="<pad>"))
            bpe.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
            bpe.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
            bpe.decoder = decoders.Metaspace()  # type: ignore[assignment]
            trainer = trainers.BpeTrainer(
                vocab_size=self.recipe.vocabulary,
                special_tokens=["<pad>", "<bos>", "<eos>", "<sep>"],
                initial_alphabet=list("abcdefghijklmnopqrstuvwxyz'"),
            )
            train = corpus.index[(corpus.index.split == "train") & (corpus.index.domain != "accent")]
            bpe.train_from_iterator(train.text, trainer)
            PreTrainedTokenizerFast(
                tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", sep_token="<sep>",
                clean_up_tokenization_spaces=False,
            ).save_pretrained(folder)  # fmt: skip
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _labels(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, eos: bool) -> Callable[[list[int]], dict[str, Tensor]]:
        ends = [tokenizer.eos_token_id] if eos else []
        ids = [list(t) + ends for t in tokenizer(list(corpus.index.text), add_special_tokens=False)["input_ids"]]
        return lambda rows: {"labels": _pad([ids[i] for i in rows])}

    # -- models -------------------------------------------------------------------------------------------------------

    def encoder(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Any:
        """CTC on the general accent and real speech (digits and free sentences): never on the test accents."""
        folder = self.work / "encoder"
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(self.seed)
            config = ParakeetCTCConfig(vocab_size=len(tokenizer), pad_token_id=0, encoder_config=self.recipe.encoder)
            model = _initialise(AutoModelForCTC.from_config(config)).to(self.device, memory_format=torch.channels_last)
            everything = corpus.select("train", GENERAL, "real_digits", "real_sentences")
            digits = [i for i in everything if is_digit_string(corpus.index.text[i])]
            rng = np.random.default_rng(self.seed)
            # ten words first: CTC leaves its plateau on them within minutes, on the whole vocabulary it rests there
            for name, rows, epochs, frames in (
                ("digits", digits, 1.0, 4_000),
                ("all", everything, self.recipe.encoder_epochs[0], 4_000),
                ("long", everything, self.recipe.encoder_epochs[1], 8_000),
            ):
                masks = 0 if name == "digits" else 1
                batches = Batches(
                    rows,
                    lambda i, masks=masks: {
                        "input_features": spec_augment(corpus.features(i), rng, masks) if masks else corpus.features(i)
                    },
                    corpus.index.frames.to_numpy(),
                    frames,
                    self._labels(corpus, tokenizer, eos=False),
                    seed=self.seed,
                )
                fit(
                    model, batches, ctc_objective, self.work / f"encoder-{name}-training", epochs=epochs,
                    rate=self.recipe.rates[f"encoder-{name}"], report=self.report, seed=self.seed,
                    warmup=0.2 if name == "digits" else 0.05, last=0.5 if name == "digits" else 0.01,
                )  # fmt: skip
            model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        return AutoModelForCTC.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)

    def llm(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """A small Llama trained on text of the training grammar: to go on writing it, and to read it out of frames.

        Three examples in four put before `<sep>` what a CTC head would hear in the sentence (`ctc_frames`). The LLM so
        learns from text alone, in minutes, to write what stands before `<sep>`; without that, the base rests for long
        at the language model's own loss before it looks at the audio.
        """
        folder = self.work / "llm"
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(self.seed)
            config = LlamaConfig(
                vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                max_position_embeddings=1024, attention_dropout=0.0, **self.recipe.llm,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config).to(self.device)
            rng = np.random.default_rng(self.seed)
            texts = sentences(self.recipe.llm_sentences, self.seed + 1, "train")
            ids = []
            for text in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                heard = ctc_frames(text, len(tokenizer), rng) if rng.random() < 0.75 else []
                ids.append(([1, *heard, 3, *text, 2], len(heard) + 1))
            order = sorted(range(len(ids)), key=lambda i: len(ids[i][0]))
            batches = [language_batch([ids[i] for i in order[k : k + 48]]) for k in range(0, len(order), 48)]
            fit(
                model, batches, language_objective, self.work / "llm-training", epochs=self.recipe.llm_epochs,
                rate=self.recipe.rates["llm"], report=self.report, seed=self.seed,
            )  # fmt: skip
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(torch.device(self.device))  # type: ignore[arg-type]

    def states(self, corpus: Corpus, encoder: Any) -> States:
        """Encoder outputs of every utterance, two SpecAugment views of the training ones."""
        folder = self.work / "states"
        if not (folder / "spans.npy").is_file():
            folder.mkdir(exist_ok=True)
            train = corpus.select("train", GENERAL, "accent", "real_digits")
            rng = np.random.default_rng(self.seed)
            spans = np.zeros((2, len(corpus.index), 2), np.int64)
            parts, offset = [], 0
            rest = [i for i in range(len(corpus.index)) if corpus.index.split[i] != "train"]
            for view, rows, change in ((0, train, True), (1, train, True), (0, rest, False)):
                batches = Batches(
                    rows,
                    lambda i, change=change: {
                        "input_features": spec_augment(corpus.features(i), rng, 1, 0.05) if change else corpus.features(i)
                    },
                    corpus.index.frames.to_numpy(),
                    40_000,
                    lambda rows: {"rows": torch.tensor(rows)},
                )
                for n in range(len(batches)):
                    batch = batches[n]
                    with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
                        out = encoder.encoder(
                            input_features=batch["input_features"].to(self.device),
                            attention_mask=batch["attention_mask"].to(self.device),
                        )
                    lengths = out.attention_mask.sum(1).tolist()
                    for i, state, length in zip(batch["rows"].tolist(), out.last_hidden_state, lengths, strict=True):
                        parts.append(state[:length].half().cpu().numpy())
                        spans[view, i] = offset, length
                        offset += length
                self.report(f"states: view {view} of {len(rows)} utterances done")
            np.save(folder / "states.npy", np.concatenate(parts))
            np.save(folder / "spans.npy", spans)
        return States(np.load(folder / "states.npy", mmap_mode="r"), np.load(folder / "spans.npy"), self.seed)

    def _batches(
        self, corpus: Corpus, states: States, tokenizer: PreTrainedTokenizerFast, rows: list[int], extra: Any
    ) -> Batches:
        labels = self._labels(corpus, tokenizer, eos=True)
        return Batches(
            rows,
            lambda i: {"encoder_states": states.draw(i)},
            states.spans[0, :, 1],
            1_000,
            lambda rows: {**labels(rows), **extra(rows)},
            seed=self.seed,
            max_rows=24,
        )

    def base(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, states: States) -> SpeechLLM:
        """Projector and LLM end to end on the general domain: `en-us` synthesis and real digits."""
        folder = self.work / "base"
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(self.seed)
            encoder, llm = self.encoder(corpus, tokenizer), self.llm(tokenizer)
            config = SpeechLLMConfig(
                audio_config=encoder.config,
                text_config=llm.config,
                sep_token_id=3,
                **self.recipe.projector,
            )
            model = SpeechLLM(config)
            model.to(torch.device(self.device))  # type: ignore[arg-type]
            model.audio_tower.load_state_dict(encoder.state_dict())
            model.language_model.load_state_dict(llm.state_dict())
            model.audio_tower.requires_grad_(False)
            model.language_model.set_attn_implementation("eager")  # the fastest on short sequences and a CPU
            batches = self._batches(corpus, states, tokenizer, corpus.select("train", GENERAL, "real_digits"), lambda rows: {})
            # first the projector alone learns to say in the LLM's embeddings what the CTC head hears, which the LLM can read
            for name, objective, epochs in (
                ("aligned", embedding_objective, 0.3),
                ("whole", smoothed_objective, self.recipe.base_epochs),
            ):
                fit(
                    model, batches, objective, self.work / f"base-{name}-training", epochs=epochs,
                    rate=self.recipe.rates["base"], report=self.report, seed=self.seed,
                )  # fmt: skip
            model.save_pretrained(folder)
        model = SpeechLLM.from_pretrained(folder, dtype=torch.float32)
        model.to(torch.device(self.device)).eval()  # type: ignore[arg-type]
        model.requires_grad_(False)
        return model

    def recogniser(self, corpus: Corpus) -> tuple[AccentRecogniser, np.ndarray]:
        """The accent recogniser and its posteriors (utterances, N + 1) for every utterance.

        Real recordings that the base was trained on count as "general": the base knows them. The posteriors of
        training utterances come from masked features and a temperature that makes them no surer than on dev speakers.
        """
        folder = self.work / "recogniser"
        model = AccentRecogniser(n_mels=N_MELS, labels=list(ACCENTS)).to(self.device)
        index = corpus.index
        targets = torch.tensor([list(ACCENTS).index(a) if a in ACCENTS else 0 for a in index.accent])
        rng = np.random.default_rng(self.seed)
        if not (folder / "posteriors.npy").is_file():
            torch.manual_seed(self.seed)
            # first on what was recorded, then on masked features of more general and real speech
            for name, masked, share, epochs in zip(
                ("clear", "masked"), (False, True), (2, 4), self.recipe.recogniser_epochs, strict=True
            ):
                most = share * self.recipe.sizes.per_accent
                general = rng.permutation(corpus.select("train", GENERAL))[:most]
                real = rng.permutation(corpus.select("train", "real_digits", "real_sentences"))[:most]
                rows = sorted({*general.tolist(), *real.tolist(), *corpus.select("train", "accent")})
                weight = torch.bincount(targets[rows], minlength=len(ACCENTS)).float().clamp_min(1).reciprocal()
                weight = (weight / weight.mean()).to(self.device)
                batches = Batches(
                    rows,
                    lambda i, masked=masked: {
                        "input_features": spec_augment(corpus.features(i), rng, 1) if masked else corpus.features(i)
                    },
                    index.frames.to_numpy(),
                    7_000,
                    lambda rows: {"labels": targets[rows]},
                )

                def objective(model: Any, batch: dict[str, Tensor], weight: Tensor = weight) -> Tensor:
                    logits = model(batch["input_features"], batch["attention_mask"]).float()
                    return nn.functional.cross_entropy(logits, batch["labels"], weight, label_smoothing=0.05)

                fit(
                    model, batches, objective, self.work / f"recogniser-{name}-training", epochs=epochs,
                    rate=self.recipe.rates["recogniser"], report=self.report, seed=self.seed,
                )  # fmt: skip
            logits = self._accent_logits(model, corpus, rng)
            dev = torch.tensor(corpus.select("dev", GENERAL, "accent"))
            model.temperature.fill_(_temperature(logits[dev], targets[dev]))
            accuracy = (logits[dev].argmax(1) == targets[dev]).float().mean().item()
            train = torch.tensor(corpus.select("train", "accent"))
            softened = float(model.temperature)
            wanted = (logits[dev] / softened).softmax(1).amax(1).mean()
            while (logits[train] / softened).softmax(1).amax(1).mean() > wanted and softened < 10:
                softened *= 1.05
            divisor = torch.tensor([softened if s == "train" else float(model.temperature) for s in index.split])
            folder.mkdir(exist_ok=True)
            np.save(folder / "posteriors.npy", (logits / divisor[:, None]).softmax(1).numpy())
            save_file(model.state_dict(), folder / "model.safetensors")
            self.report(
                f"recogniser: {accuracy:.1%} on dev speakers, temperature {float(model.temperature):.2f}, "
                f"{softened:.2f} for training posteriors"
            )
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval(), np.load(folder / "posteriors.npy")

    def _accent_logits(self, model: Any, corpus: Corpus, rng: np.random.Generator) -> Tensor:
        logits = torch.zeros(len(corpus.index), len(ACCENTS))
        split = corpus.index.split
        batches = Batches(
            list(range(len(corpus.index))),
            lambda i: {"input_features": spec_augment(corpus.features(i), rng) if split[i] == "train" else corpus.features(i)},
            corpus.index.frames.to_numpy(),
            40_000,
            lambda rows: {"rows": torch.tensor(rows)},
        )
        model.eval()
        for n in range(len(batches)):
            batch = batches[n]
            with torch.no_grad():
                out = model(batch["input_features"].to(self.device), batch["attention_mask"].to(self.device))
            logits[batch["rows"]] = out.float().cpu()
        return logits

    # -- adaptations of the projector, under one recipe ---------------------------------------------------------------

    def adapt(self, method: str, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, states: States, **changes: Any) -> Any:
        """Adapt the base's projector to the accents by `full`, `lora` or `hdmole`; same data, order, steps and seed."""
        recogniser, posteriors = self.recogniser(corpus) if method == "hdmole" else (None, np.zeros(0))
        name = changes.pop("name", method)
        folder = self.work / name
        torch.manual_seed(self.seed)
        base: Any = self.base(corpus, tokenizer, states)
        model = self._adapted(method, base, recogniser, changes)
        if not folder.is_dir():
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.report(f"{name}: {trainable} trainable parameters")
            extra = (
                (lambda rows: {"accent_posterior": torch.from_numpy(posteriors[rows])}) if method == "hdmole" else lambda rows: {}
            )
            batches = self._batches(corpus, states, tokenizer, corpus.select("train", "accent"), extra)
            rate = self.recipe.rates[method]
            slow = [p for n, p in model.named_parameters() if p.requires_grad and "threshold" not in n]
            fast = [p for n, p in model.named_parameters() if p.requires_grad and "threshold" in n]
            groups: Any = [{"params": slow}, {"params": fast, "lr": 10 * rate, "weight_decay": 0.0}] if fast else None
            fit(
                model, batches, smoothed_objective, self.work / f"{name}-training", epochs=self.recipe.adapter_epochs,
                rate=rate, report=self.report, groups=groups, seed=self.seed,
            )  # fmt: skip
            if method == "full":
                folder.mkdir()
                kept = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("multi_modal_projector.")}
                save_file(kept, folder / "model.safetensors")
            else:
                model.save_pretrained(folder)
        elif method == "full":
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        else:
            model = PeftModel.from_pretrained(self.base(corpus, tokenizer, states), folder)
        return model.eval()

    def _adapted(self, method: str, base: SpeechLLM, recogniser: AccentRecogniser | None, changes: dict[str, Any]) -> Any:
        if method == "full":
            base.multi_modal_projector.requires_grad_(True)
            return base
        if method == "lora":
            rank = len(EXPERTS) * self.recipe.rank + self.recipe.shared_rank
            return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTOR_LINEARS))
        assert recogniser is not None
        config = HDMoLEConfig(
            accents=EXPERTS,
            target_modules=PROJECTOR_LINEARS,
            recogniser=recogniser.arguments,
            **{"r": self.recipe.rank, "shared_expert_rank": self.recipe.shared_rank, "router_accent": 0.0, **changes},
        )
        model: Any = get_peft_model(base, config)
        model.base_model.set_recogniser(recogniser)
        return model


class States:
    """Cached encoder outputs; `draw(i)` picks a random view, `get(i)` the first."""

    def __init__(self, states: np.ndarray, spans: np.ndarray, seed: int) -> None:
        self.states, self.spans = states, spans
        self.rng = np.random.default_rng(seed)

    def get(self, i: int, view: int = 0) -> np.ndarray:
        offset, length = self.spans[view, i]
        return self.states[offset : offset + length]

    def draw(self, i: int) -> np.ndarray:
        return self.get(i, int(self.rng.integers(0, 2)))


def _initialise(model: Any) -> Any:
    """PyTorch's own initialisation in place of transformers' (standard deviation 0.02 everywhere).

    With 32 subsampling channels the latter leaves 2e-7 of the input's variation after three convolutions: the encoder
    starts deaf, and CTC stays on its plateau for as long as we cared to wait (700 steps).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
            if "subsampling" in name and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _pad(ids: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=-100)


def ctc_frames(tokens: list[int], vocabulary: int, rng: np.random.Generator, blank: int = 0) -> list[int]:
    """A sentence's tokens as a CTC head might hear them: one frame or two each, blanks between, a few errors."""
    frames = [blank] * int(rng.integers(1, 5))
    for token in tokens:
        chance = rng.random()
        if chance < 0.03:  # missed
            frames.append(blank)
            continue
        heard = int(rng.integers(4, vocabulary)) if chance < 0.08 else token
        frames += [heard] * int(rng.integers(1, 3)) + [blank] * min(int(rng.geometric(0.5)), 4)
    return frames + [blank] * int(rng.integers(0, 4))


def language_batch(examples: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Token ids padded to a batch; of each example the first so many tokens are read, not to be predicted."""
    ids = _pad([tokens for tokens, _ in examples])
    labels = ids.clone()
    for row, (_, read) in enumerate(examples):
        labels[row, :read] = -100
    return {"input_ids": ids.clamp_min(0), "labels": labels, "attention_mask": (ids >= 0).long()}


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature with the least cross-entropy (Guo et al. 2017)."""
    grid = torch.linspace(0.5, 5, 91)
    losses = torch.stack([nn.functional.cross_entropy(logits / t, targets) for t in grid])
    return float(grid[losses.argmin()])


def build(
    out: Path,
    real_speech: list[Path],
    seed: int = 0,
    scale: float = 1.0,
    work: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train everything and write the released model to `out`; returns the results' summary.

    Parameters
    ----------
    out : the model folder, `assets/demo`
    real_speech : folders with a `manifest.jsonl` of real recordings; may be empty
    seed, scale : random seed; share of the recipe's data and sentences, 1 for the released model
    work : where the stages keep what they made, to resume from; `build/demo` where not given
    """
    from hdmole.demo.release import release

    work = work or Path("build/demo")
    work.mkdir(parents=True, exist_ok=True)
    stages = Build(work, real_speech, seed, Recipe().scaled(scale), report)
    corpus = stages.corpus()
    tokenizer = stages.tokenizer(corpus)
    states = stages.states(corpus, stages.encoder(corpus, tokenizer))
    stages.base(corpus, tokenizer, states)
    stages.recogniser(corpus)
    for method in ("full", "lora", "hdmole"):
        stages.adapt(method, corpus, tokenizer, states)
    return release(stages, corpus, states, out)
