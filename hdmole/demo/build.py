"""Train the demo model from scratch.

`hdmole demo build` runs all stages. Each stage writes its result to the work folder and is skipped
if the result is there. An interrupted stage goes on from its last checkpoint. The published model
is written to `out`.

    corpus -> tokenizer -> encoder (CTC) | recogniser, llm -> states (cached encoder outputs)
           -> base -> full | lora | hdmole | hdmole-extended (adaptations of the projector)
           -> released folder -> in-domain score -> results
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForCTC, LlamaConfig, ParakeetCTCConfig, PreTrainedTokenizerFast

from hdmole.demo.corpus import Sizes, make, plan, plan_conflicts, plan_unseen, read_real
from hdmole.demo.release import Trained, release
from hdmole.demo.synth import ACCENTS, CONFLICTING
from hdmole.demo.text import is_digit_string, sentences
from hdmole.files import alone, written
from hdmole.method.recogniser import AccentRecogniser
from hdmole.models.speech_llm import SpeechLLM, SpeechLLMConfig
from hdmole.names import GENERAL
from hdmole.processes import end_with_parent
from hdmole.speech.asr import ASR
from hdmole.speech.loading import ModelError
from hdmole.study.results import Results
from hdmole.training.adapt import Adaptation, Speech, adapt, load_base, pad
from hdmole.training.data import Corpus, States, mel_batches
from hdmole.training.loop import ATTENTION, ctc_objective, embedding_objective, fit, language_objective, smoothed_objective
from hdmole.training.preparation import encode_corpus, posteriors_of, recogniser_stages, train_recogniser


@dataclass(frozen=True)
class Recipe:
    """Sizes, epochs and learning rates of the demo model."""

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
    encoder_epochs: float = 9
    llm_epochs: float = 3
    base_epochs: float = 3
    recogniser_epochs: tuple[float, float, float] = (9, 4.5, 6)
    adapter_epochs: float = 5
    rank: int = 2
    shared_rank: int = 10
    rates: dict[str, float] = field(
        default_factory=lambda: {
            "encoder-digits": 5e-4,
            "encoder-all": 2e-3,
            "llm": 2e-3,
            "base": 2e-3,
            "recogniser": 1.5e-3,
            "full": 0.001,
            "lora": 0.002,
            "hdmole": 0.016,
            "hdmole-extended": 0.001,
        }
    )

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times as much data, for a quick trial."""
        return self if factor == 1 else Recipe(sizes=self.sizes.scaled(factor), llm_sentences=max(200, int(30_000 * factor)))

    def adaptations(self) -> dict[str, Adaptation]:
        """The adaptations of the projector by their names; LoRA has the extended variant's size."""
        shared = {"shared_expert_rank": self.shared_rank, "router_accent": 0.0}
        return {
            "full": Adaptation("full", "full"),
            "lora": Adaptation("lora", "lora", {"r": (len(ACCENTS) - 1) * self.rank + self.shared_rank}),
            "hdmole": Adaptation("hdmole", "hdmole", {"r": self.rank}, threshold_rate=0.1, router_rate=0.1),
            "hdmole-extended": Adaptation("extended", "extended", {"r": self.rank, **shared}, threshold_rate=10),
        }


class Build:
    """The stages of the training.

    Each stage is a method that returns its result. It loads the result if the work folder has it,
    and makes it otherwise.
    """

    def __init__(self, work: Path, real_speech: list[Path], seed: int, recipe: Recipe, report: Callable[[str], None]) -> None:
        self.work, self.real_speech, self.seed, self.recipe = work, real_speech, seed, recipe
        work.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._report, self._start = report, time.time()
        self.jobs = plan(recipe.sizes, read_real(real_speech), seed)

    def report(self, text: str) -> None:
        line = f"[{(time.time() - self._start) / 60:5.1f} min] {text}"
        with (self.work / "log.txt").open("a") as log:
            log.write(line + "\n")
        self._report(line)

    def take(self, released: Path) -> None:
        """Copy the weights of a released model to the work folder.

        The later stages then make the speech, the encoder outputs and the adapters that it lacks.

        Raises:
            ModelError: the folder is not a model that `build` released.
        """
        asr = ASR.load(released, "cpu")
        adapters = released_adapters(released)
        loaded = [f.name for f in adapters.values() if f.name.startswith("hdmole") and f.name in asr.models]
        if missing := {"full", "lora", *(() if loaded else ("hdmole",))} - set(asr.methods):
            sentence = "{folder} has no {methods}, so it is not a model that 'hdmole demo build' released."
            raise ModelError("model.not_released", sentence, folder=released, methods=", ".join(sorted(missing)))
        (self.work / "tokenizer").mkdir(exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(released / file, self.work / "tokenizer" / file)
        base = asr.models["base"]
        for name, model in (("encoder", base.audio_tower), ("base", base)):
            if not (self.work / name / "model.safetensors").is_file():
                with written(self.work / name) as part:
                    model.save_pretrained(part)
        if not (self.work / "recogniser" / "config.json").is_file():
            asr.models[loaded[0]].base_model.hdmole_recogniser["default"].save(self.work / "recogniser")
        for name, folder in adapters.items():
            if not (self.work / name).is_dir():
                with written(self.work / name) as part:
                    shutil.copytree(folder, part)

    # -- data ----------------------------------------------------------------------------------------

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
            bpe.normalizer = normalizers.Lowercase()
            bpe.pre_tokenizer = pre_tokenizers.Metaspace()
            bpe.decoder = decoders.Metaspace()
            trainer = trainers.BpeTrainer(
                vocab_size=self.recipe.vocabulary,
                special_tokens=["<pad>", "<bos>", "<eos>", "<sep>"],
                initial_alphabet=list("abcdefghijklmnopqrstuvwxyz'"),
            )
            train = corpus.index[(corpus.index.split == "train") & (corpus.index.domain != "accent")]
            bpe.train_from_iterator(train.text, trainer)
            made = PreTrainedTokenizerFast(
                tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", sep_token="<sep>",
                clean_up_tokenization_spaces=False,
            )  # fmt: skip
            with written(folder) as part:
                made.save_pretrained(part)
        return tokenizer_in(folder)

    def _labels(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, eos: bool) -> Callable[[list[int]], dict[str, Tensor]]:
        ends = [tokenizer.eos_token_id] if eos else []
        ids = [list(t) + ends for t in tokenizer(list(corpus.index.text), add_special_tokens=False)["input_ids"]]
        return lambda rows: {"labels": pad([ids[i] for i in rows])}

    # -- models ------------------------------------------------------------------------------------

    def encoder(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Any:
        """The encoder, trained with CTC on general and real speech.

        The real speech is digits and free sentences. The synthetic accents are not among the
        training speech.
        """
        folder = self.work / "encoder"
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(self.seed)
            config = ParakeetCTCConfig(vocab_size=len(tokenizer), pad_token_id=0, encoder_config=self.recipe.encoder)
            model = _initialise(AutoModelForCTC.from_config(config)).to(self.device, memory_format=torch.channels_last)
            everything = corpus.select("train", GENERAL, "real_digits", "real_sentences")
            digits = [i for i in everything if is_digit_string(corpus.index.text[i])]
            # The training begins with the ten digits. There the CTC loss leaves its first plateau
            # within minutes. On the whole vocabulary it does not.
            labels = self._labels(corpus, tokenizer, eos=False)
            for name, rows, epochs, frames, masks, shape in (
                ("digits", digits, 1.0, 4_000, 0, {"warmup": 0.2, "last": 0.5}),
                ("all", everything, self.recipe.encoder_epochs, 16_000, 1, {"muon": True}),
            ):
                fit(
                    model, mel_batches(corpus, rows, frames, labels, self.seed, masks), ctc_objective,
                    self.work / f"encoder-{name}-training", epochs=epochs, rate=self.recipe.rates[f"encoder-{name}"],
                    report=self.report, seed=self.seed, **shape,
                )  # fmt: skip
            with written(folder) as part:
                model.to(memory_format=torch.contiguous_format).save_pretrained(part)
        return (
            AutoModelForCTC.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
            .eval()
            .to(self.device)
        )

    def llm(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """A small Llama, trained on sentences of the training grammar.

        In three examples of four, the tokens that a CTC head might output for the sentence
        (`ctc_frames`) stand before `<sep>`. In this way the LLM learns within minutes, and from
        text alone, to write the sentence that stands before `<sep>`. Without this, the base takes
        long to get below the loss of a language model that does not use the audio.
        """
        folder = self.work / "llm"
        if not (folder / "model.safetensors").is_file():
            torch.manual_seed(self.seed)
            config = LlamaConfig(
                vocab_size=len(tokenizer), tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                max_position_embeddings=1024, attention_dropout=0.0, **self.recipe.llm,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).to(self.device)
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
                rate=self.recipe.rates["llm"], report=self.report, seed=self.seed, muon=True,
            )  # fmt: skip
            with written(folder) as part:
                model.save_pretrained(part)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).to(torch.device(self.device))  # type: ignore[arg-type]

    def states(self, corpus: Corpus, encoder: Any) -> States:
        """Encoder outputs of the utterances, in two SpecAugment views for training utterances."""
        train = corpus.select("train", GENERAL, "accent", "real_digits")
        return encode_corpus(corpus, encoder.encoder, self.work / "states", train, self.seed, self.report)

    def base(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, states: States) -> SpeechLLM:
        """The base: projector and LLM, trained on general synthetic speech and real digits."""
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
            model.language_model.set_attn_implementation(ATTENTION)
            speech = Speech(corpus, states, tokenizer, folder)
            batches = speech.batches(corpus.select("train", GENERAL, "real_digits"), self.seed, lambda rows: {}, size=2)
            # First the projector alone is trained to output the LLM's embeddings of the tokens that
            # the CTC head outputs. Then projector and LLM are trained.
            for name, objective, epochs in (
                ("aligned", embedding_objective, 0.3),
                ("whole", smoothed_objective, self.recipe.base_epochs),
            ):
                fit(
                    model, batches, objective, self.work / f"base-{name}-training", epochs=epochs,
                    rate=self.recipe.rates["base"], report=self.report, seed=self.seed, muon=True,
                )  # fmt: skip
            with written(folder) as part:
                model.save_pretrained(part)
        base: SpeechLLM = load_base(folder, self.device)
        return base

    def recogniser(self, corpus: Corpus) -> tuple[AccentRecogniser, np.ndarray]:
        """The accent recogniser, and its posteriors (utterances, N + 1) for every utterance.

        Real recordings count as general speech, because the base was trained on them.
        `train_recogniser` explains how the posteriors of training utterances are made.
        """
        rng = np.random.default_rng(self.seed)
        general = corpus.select("train", GENERAL)
        real = corpus.select("train", "real_digits", "real_sentences")
        stages = []
        # First plain features are used, then masked ones (SpecAugment), then masked ones of all
        # general and real speech.
        for name, masked, share, epochs in zip(
            ("clear", "masked", "all"), (False, True, True), (2, 4, 1000), self.recipe.recogniser_epochs, strict=True
        ):
            most = share * self.recipe.sizes.per_accent
            rows = {*rng.permutation(general)[:most].tolist(), *rng.permutation(real)[:most].tolist()}
            stages.append((name, sorted({*rows, *corpus.select("train", "accent")}), masked, epochs))
        return train_recogniser(
            corpus, list(ACCENTS), stages, self.work / "recogniser", rate=self.recipe.rates["recogniser"], seed=self.seed,
            report=self.report, device=self.device,
        )  # fmt: skip

    def unseen(self, encoder: Any, recogniser: AccentRecogniser) -> None:
        """Make test speech in accents that no model was trained on, for `hdmole compare`."""
        folder = self.work / "unseen"
        if not (folder / "recogniser" / "posteriors.npy").is_file():
            for _ in make(plan_unseen(self.recipe.sizes.test_per_accent, self.seed), folder / "corpus"):
                pass
            corpus = Corpus(folder / "corpus")
            encode_corpus(corpus, encoder.encoder, folder / "states", [], self.seed, self.report)
            recogniser.save(folder / "recogniser")
            with written(folder / "recogniser" / "posteriors.npy") as part:
                np.save(part, posteriors_of(recogniser, corpus))

    # -- adaptations of the projector, under one recipe --------------------------------------------

    def adapt(self, name: str, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, states: States) -> Any:
        """Adapt the base's projector to the accents by one of the recipe's adaptations.

        All of them get the same data in the same order.
        """
        adaptation = self.recipe.adaptations()[name]
        recogniser, posteriors = self.recogniser(corpus) if adaptation.routed else (None, None)
        speech = Speech(corpus, states, tokenizer, self.work / "base", recogniser, posteriors)
        return adapt(
            speech, adaptation, self.work / name, epochs=self.recipe.adapter_epochs,
            rate=self.recipe.rates[name], seed=self.seed, report=self.report, device=self.device,
        )  # fmt: skip

    def beside(self, *lanes: tuple[str, ...]) -> None:
        """On a CPU, run several lists of stages at the same time.

        Each list runs in a process with one thread. This is faster than one stage after the other
        on all threads. On a GPU, this method does nothing.
        """
        products = {
            "encoder": "encoder/model.safetensors",
            "llm": "llm/model.safetensors",
            "recogniser": "recogniser/posteriors.npy",
        }
        missing = [[name for name in lane if not (self.work / products.get(name, name)).exists()] for lane in lanes]
        if self.device == "cpu" and (os.cpu_count() or 1) > 1 and all(missing):
            with ProcessPoolExecutor(len(lanes), get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
                arguments = self.work, self.real_speech, self.seed, self.recipe, self._start
                for lane in [pool.submit(_lane, *arguments, names) for names in missing]:
                    lane.result()


def _lane(work: Path, real_speech: list[Path], seed: int, recipe: Recipe, start: float, names: list[str]) -> None:
    """Run the stages `names` one after the other, on one thread."""
    torch.set_num_threads(1)
    stages = Build(work, real_speech, seed, recipe, partial(print, file=sys.stderr, flush=True))
    stages._start = start
    corpus, tokenizer = Corpus(work / "corpus"), tokenizer_in(work / "tokenizer")
    for name in names:
        match name:
            case "encoder":
                stages.encoder(corpus, tokenizer)
            case "llm":
                stages.llm(tokenizer)
            case "recogniser":
                stages.recogniser(corpus)
            case _:
                stages.adapt(name, corpus, tokenizer, States.load(work / "states"))


def released_adapters(released: Path) -> dict[str, Path]:
    """The adapters of a released model by the names that the recipe gives them.

    Until version 0.2 the extended variant was released as hdmole.
    """
    found = {}
    for folder in sorted((released / "adapters").iterdir()):
        name = folder.name
        if name.startswith("hdmole"):
            config: Any = PeftConfig.from_pretrained(str(folder))
            name = "hdmole-extended" if config.general_class else "hdmole"
        found[name] = folder
    return found


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `Build.tokenizer` wrote."""
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    return loaded


def _initialise(model: Any) -> Any:
    """Initialise a model as PyTorch does.

    Transformers initialises all weights with a standard deviation of 0.02. With 32 subsampling
    channels, this leaves 2e-7 of the input's variation after three convolutions. The CTC loss then
    stayed on its first plateau for the 700 steps that we tried.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
            if "subsampling" in name and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def ctc_frames(tokens: list[int], vocabulary: int, rng: np.random.Generator, blank: int = 0) -> list[int]:
    """Simulate what a CTC head outputs for a sentence.

    Each token has one or two frames, and blanks stand between tokens. A few tokens are missing or
    replaced by others.
    """
    frames = [blank] * int(rng.integers(1, 5))
    for token in tokens:
        chance = rng.random()
        if chance < 0.03:  # the token is missing
            frames.append(blank)
            continue
        heard = int(rng.integers(4, vocabulary)) if chance < 0.08 else token
        frames += [heard] * int(rng.integers(1, 3)) + [blank] * min(int(rng.geometric(0.5)), 4)
    return frames + [blank] * int(rng.integers(0, 4))


def language_batch(examples: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Pad examples to a batch.

    An example is its token ids, and the number of first tokens that are input only. These are not
    predicted.
    """
    ids = pad([tokens for tokens, _ in examples])
    labels = ids.clone()
    for row, (_, read) in enumerate(examples):
        labels[row, :read] = -100
    return {"input_ids": ids.clamp_min(0), "labels": labels, "attention_mask": (ids >= 0).long()}


def build(
    out: Path,
    real_speech: list[Path],
    seed: int = 0,
    scale: float = 1.0,
    work: Path | None = None,
    report: Callable[[str], None] = print,
    released: Path | None = None,
) -> Results:
    """Train everything and write the released model to `out`.

    Args:
        out: the model folder, such as assets/demo.
        real_speech: folders with a `manifest.jsonl` of real recordings; may be empty.
        seed: random seed.
        scale: share of the recipe's data and sentences that is used, 1 for the released model.
        work: folder of the stages' results, from which a later call goes on; build/demo if not
            given.
        report: called with each line about the progress.
        released: a released model whose weights are used. Speech is made, and only the adapters
            that it lacks are trained.

    Returns:
        The results of the released model.

    Raises:
        ManifestError: a manifest of real speech cannot be used.
        ModelError: `released` is not a model that `build` released.
        OutputError: another build is working in `work`, or the disk is full.
    """
    work = work or Path("build/demo")
    with alone(work):
        stages = Build(work, real_speech, seed, Recipe().scaled(scale), report)
        if released is not None:
            stages.take(released)
        corpus = stages.corpus()
        tokenizer = stages.tokenizer(corpus)
        stages.beside(("encoder",), ("recogniser", "llm"))
        encoder = stages.encoder(corpus, tokenizer)
        states = stages.states(corpus, encoder)
        stages.base(corpus, tokenizer, states)
        stages.beside(("full", "lora"), ("hdmole", "hdmole-extended"))
        for name in stages.recipe.adaptations():
            stages.adapt(name, corpus, tokenizer, states)
        recogniser, posteriors = stages.recogniser(corpus)
        stages.unseen(encoder, recogniser)
        return release(Trained(work, seed, stages.jobs, corpus, states, posteriors, stages.report), out)


def conflicts(work: Path, out: Path, seed: int = 0, scale: float = 1.0, report: Callable[[str], None] = print) -> None:
    """Make the speech for a comparison on accents that conflict.

    Args:
        work: work folder of `build`, from which base and tokenizer are taken.
        out: the new folder, for the line `data` of a comparison's configuration.
        seed: random seed of speakers, sentences and training.
        scale: share of the speech that is made.
        report: called with each line about the progress.

    Raises:
        ModelError: `work` has no base.
    """
    if not (work / "base" / "config.json").is_file():
        raise ModelError("model.no_base", "{work} has no base; run 'hdmole demo build --work {work}' first.", work=work)
    out.mkdir(parents=True, exist_ok=True)
    for part in ("base", "tokenizer"):
        shutil.copytree(work / part, out / part, dirs_exist_ok=True)
    sizes = Sizes(general=2_800, per_accent=1_400, test_per_accent=200, dev_per_accent=40).scaled(scale)
    if not (out / "corpus" / "index.parquet").is_file():
        for k, share in enumerate(make(plan_conflicts(sizes, seed), out / "corpus")):
            if k % 25 == 0:
                report(f"corpus: {share:.0%}")
    corpus, base = Corpus(out / "corpus"), load_base(out / "base", "cuda" if torch.cuda.is_available() else "cpu")
    encoder: Any = base.audio_tower
    encode_corpus(corpus, encoder.encoder, out / "states", corpus.select("train", "accent"), seed, report)
    train = corpus.select("train")
    train_recogniser(
        corpus, [GENERAL, *CONFLICTING], recogniser_stages(train), out / "recogniser",
        rate=Recipe().rates["recogniser"], seed=seed, report=report, device=str(base.device),
    )  # fmt: skip
