"""Adapt Whisper base to real speakers: `hdmole demo build --real`.

    corpus -> statistics of the frozen encoder's layers -> accent recogniser and posteriors
           -> lora | hdmole | full | hdmole-extended, each with its learning rate and place
           -> scale of each adapter, chosen on dev -> released folder -> results on test

* Each stage is kept in the work folder and skipped if it is there. An interrupted training goes on
  from its last checkpoint. Several processes can share the trainings.
* `--search` tries all of `TRIALS` for every method and takes the best on dev; without it, every
  method is trained as `CHOSEN` says, as those of the released folder were
  (docs/experiments/whisper.md).
* All methods get the same batches in the same order, with general speech among them.
* No speaker is in two splits. Recordings whose licence forbids commercial use are judged only.
* Accents of real people (their first languages) and of the synthesiser share experts, but never a
  domain of the results: `real_...` is people, `synthetic_...` is espeak-ng.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

from hdmole.demo.corpus import render
from hdmole.demo.real_card import model_card
from hdmole.demo.real_corpus import RECOGNISER, Sizes, plan, read_people
from hdmole.demo.real_domain import in_domain
from hdmole.demo.synth import ACCENTS, Synthesiser
from hdmole.files import write_json, write_text, written
from hdmole.method.recogniser import LayerRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models import pretrained
from hdmole.models.speech_llm import encode_all
from hdmole.models.whisper import ClipExtractor, Whisper, layer_statistics
from hdmole.names import GENERAL
from hdmole.processes import POLL, Task, others, rank_and_count, share
from hdmole.speech.audio import SAMPLE_RATE
from hdmole.speech.decoding import greedy
from hdmole.speech.loading import ModelError, load_adapter, write_sums
from hdmole.speech.mel import stored_mel_features
from hdmole.speech.segments import framed
from hdmole.speech.words import score, spelt
from hdmole.study.bootstrap import summarise
from hdmole.study.results import Results, provenance, save
from hdmole.study.results import Trial as Tried
from hdmole.training.adapt import Adaptation, pad, parameter_groups, trainable
from hdmole.training.data import Batches, Corpus, write_corpus
from hdmole.training.loop import fit, smoothed_objective
from hdmole.training.preparation import best_temperature

_LINEAR = r"(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2"
PLACES = {  # the linear layers that are adapted
    "encoder": rf"model\.encoder\.layers\.\d+\.({_LINEAR})",
    "both": rf"model\.(encoder|decoder)\.layers\.\d+\.({_LINEAR})",
}
WHERE = ("machine", "device", "torch")  # where a method was trained and judged, as its results say
METHODS = ("lora", "hdmole", "full", "hdmole-extended")
# learning rates that are tried, as many for each method, and the place of each
TRIALS: dict[str, list[tuple[float, str]]] = {
    "lora": [(1e-4, "encoder"), (2e-4, "encoder"), (5e-4, "encoder")],
    "hdmole": [(1e-4, "encoder"), (2e-4, "encoder"), (5e-4, "encoder")],
    "full": [(3e-6, "encoder"), (1e-5, "encoder"), (3e-5, "encoder")],
    "hdmole-extended": [(1e-4, "encoder"), (2e-4, "encoder"), (5e-4, "encoder")],
}
CHOSEN = {"lora": (2e-4, "encoder"), "hdmole": (5e-4, "encoder"), "full": (3e-5, "encoder"), "hdmole-extended": (5e-4, "encoder")}
SCALES = (1.0, 0.8, 0.6, 0.4)  # of an adapter; one is chosen on dev
EPOCHS = 1.0  # passes over the training speech
FORGOTTEN = 0.5  # points of WER on general speech that an adapter may lose on dev
# first language of a real speaker -> expert
EXPERT = {
    "Mandarin": "mandarin", "French": "french", "German": "german", "Spanish": "spanish", "Hindi": "indian", "Marathi": "indian",
    "Kannada": "indian", "Tamil": "indian", "Telugu": "indian", "Gujarati": "indian", "Urdu": "indian",
    "US": GENERAL, "English": GENERAL, GENERAL: GENERAL,
}  # fmt: skip
LABELS = list(ACCENTS)  # the general domain first


CHUNK = 50  # utterances that one worker makes at a time


def _make(jobs: list[dict[str, Any]], base: Path) -> list[tuple[np.ndarray, float]]:
    """Mel features and seconds of planned utterances."""
    torch.set_num_threads(1)
    extractor = ClipExtractor.from_pretrained(base, trust_remote_code=False)
    with Synthesiser() as synthesiser:
        waves = [framed(render(job, synthesiser))[0] for job in jobs]
    return [(stored_mel_features(extractor, wave), len(wave) / SAMPLE_RATE) for wave in waves]


class Build:
    """The stages of the training; each is a method that returns its result."""

    def __init__(
        self,
        work: Path,
        base: Path,
        folders: Sequence[Path],
        sizes: Sizes,
        seed: int,
        epochs: float,
        report: Callable[[str], None],
    ) -> None:
        self.work, self.base, self.folders, self.sizes, self.seed, self.epochs = work, base, folders, sizes, seed, epochs
        self._report, self._start = report, time.time()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def report(self, text: str) -> None:
        line = f"[{(time.time() - self._start) / 60:5.1f} min] {text}"
        with (self.work / "log.txt").open("a") as log:
            log.write(line + "\n")
        self._report(line)

    def whisper(self) -> Any:
        """The base in float32, without gradients."""
        model: Any = Whisper.from_pretrained(self.base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        return model.to(self.device).eval().requires_grad_(False)

    def corpus(self) -> Corpus:
        """Mel features of all utterances."""
        folder = self.work / "corpus"
        if not (folder / "index.parquet").is_file():
            jobs = plan(read_people(self.folders), self.sizes, self.seed)
            chunks = [jobs[k : k + CHUNK] for k in range(0, len(jobs), CHUNK)]
            mels: list[np.ndarray] = []
            rows: list[dict[str, Any]] = []
            with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
                for chunk, made in zip(chunks, pool.map(_make, chunks, [self.base] * len(chunks)), strict=True):
                    for job, (features, seconds) in zip(chunk, made, strict=True):
                        name = job["speaker"] if isinstance(job["speaker"], str) else job["speaker"].name
                        told = {key: job[key] for key in ("split", "domain", "accent", "text")}
                        rows.append(
                            {"utterance": f"{job['domain']}-{len(rows):06d}", **told, "speaker": name, "seconds": seconds}
                        )
                        mels.append(features)
                    self.report(f"corpus: {len(rows)} of {len(jobs)} utterances")
            write_corpus(folder, zip(rows, mels, strict=True))
        corpus = Corpus(folder)
        counts = corpus.index.groupby(["split", "domain"]).seconds.agg(["size", "sum"])
        self.report("corpus\n" + counts.rename(columns={"size": "utterances", "sum": "seconds"}).round().to_string())
        return corpus

    def statistics(self, corpus: Corpus, model: Any) -> np.ndarray:
        """Statistics (utterances, layers, 2 d) float16 of the frozen encoder's layers."""
        file = self.work / "statistics.npy"
        if not file.is_file():
            lengths = corpus.index.frames.to_numpy()
            found: dict[int, np.ndarray] = {}
            order = np.argsort(lengths, kind="stable")
            for k in range(0, len(order), 8):
                part = order[k : k + 8]
                features, mask = _padded([corpus.features(i) for i in part])
                with torch.no_grad():
                    layers, valid = model.encode_layers(features.to(self.device), mask.to(self.device))
                    told = layer_statistics(layers, valid).cpu().numpy().astype(np.float16)
                    found.update(zip(part.tolist(), told, strict=True))
            np.save(file.with_suffix(".part.npy"), np.stack([found[i] for i in range(len(lengths))]))
            file.with_suffix(".part.npy").replace(file)
            self.report(f"statistics of {len(lengths)} utterances")
        loaded: np.ndarray = np.load(file)
        return loaded

    def recogniser(self, corpus: Corpus, statistics: np.ndarray) -> tuple[LayerRecogniser, np.ndarray]:
        """The accent recogniser, and its posteriors (utterances, N + 1) of all utterances.

        Those of training utterances come from two recognisers that were trained without their
        speaker, so that they are no surer than those of new speakers.
        """
        folder = self.work / "accents"
        if not (folder / "posteriors.npy").is_file():
            index, given = corpus.index, torch.from_numpy(statistics).float()
            expert = index.accent.map(lambda accent: accent if accent in LABELS else EXPERT.get(accent, ""))
            target = torch.tensor([LABELS.index(e) if e else -1 for e in expert])
            train = torch.tensor(index.split.isin(["train", RECOGNISER]).to_numpy()) & (target >= 0)
            dev = torch.tensor((index.split == "dev").to_numpy()) & (target >= 0)
            half = torch.tensor([int(hashlib.md5(s.encode()).hexdigest(), 16) % 2 for s in index.speaker])
            final = _train_recogniser(given, target, train, self.seed)
            halves = [_train_recogniser(given, target, train & (half == h), self.seed) for h in (0, 1)]
            with torch.no_grad():
                logits = [model(given) for model in (final, *halves)]
            final.temperature.fill_(best_temperature(logits[0][dev], target[dev]))
            crossed = torch.where((half == 0)[:, None], logits[2], logits[1])
            warmth = best_temperature(crossed[train], target[train])
            posteriors = torch.where(train[:, None], (crossed / warmth).softmax(1), (logits[0] / final.temperature).softmax(1))
            final.save(folder)
            right = (logits[0].argmax(1) == target).numpy()
            told = []
            for (split, domain), part in index[(target >= 0).numpy()].groupby(["split", "domain"]):
                if split in ("dev", "test"):
                    told.append(f"{split} {domain} {100 * right[part.index].mean():.0f} %")
            self.report(f"accents recognised: {', '.join(told)}; temperature {float(final.temperature):.2f}")
            np.save(folder / "posteriors.npy", posteriors.numpy())
        return LayerRecogniser.load(folder), np.load(folder / "posteriors.npy")

    def batches(self, corpus: Corpus, posteriors: np.ndarray, routed: bool) -> Batches:
        """The training batches, which are the same for all methods."""
        rows = corpus.select("train")
        texts = [" " + text[:1].upper() + text[1:] + "." for text in corpus.index.text]
        ids = {i: [*self.tokenizer.encode(texts[i], add_special_tokens=False), self.tokenizer.eos_token_id] for i in rows}

        def extra(part: list[int]) -> dict[str, Tensor]:
            found = {"labels": pad([ids[i] for i in part])}
            return found | ({"accent_posterior": torch.from_numpy(posteriors[part]).float()} if routed else {})

        return Batches(
            rows, lambda i: {"input_features": corpus.features(i)}, corpus.index.frames.to_numpy(), 7_200, extra, seed=self.seed,
            max_rows=8,
        )  # fmt: skip

    def adapt(self, trial: Trial, corpus: Corpus, posteriors: np.ndarray) -> Any:
        """Train one method, or load it."""
        name, folder = trial.method, self.work / trial.name / "adapter"
        torch.manual_seed(self.seed)
        base = self.whisper()
        if folder.is_dir():
            return _with_full(base, folder) if name == "full" else load_adapter(base, folder)
        model = adapted(base, name, trial.place)
        self.report(f"{trial.name}: {trainable(model):,} trainable parameters")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        kind = "extended" if name == "hdmole-extended" else name
        fit(
            model, self.batches(corpus, posteriors, trial.routed), smoothed_objective, folder.with_name(f"{trial.name}-training"),
            epochs=self.epochs, rate=trial.rate, report=self.report,
            groups=parameter_groups(named, trial.rate, Adaptation(name, kind)), seed=self.seed,
        )  # fmt: skip
        with written(folder) as part:
            if name == "full":
                part.mkdir()
                save_file({n: p.detach().contiguous() for n, p in named}, part / "model.safetensors")
            else:
                model.save_pretrained(part)
        shutil.rmtree(folder.with_name(f"{trial.name}-training"))
        return model.eval()

    def trial(self, trial: Trial, corpus: Corpus, posteriors: np.ndarray) -> None:
        """Train one method and judge it on dev, with each of `SCALES`."""
        model = self.adapt(trial, corpus, posteriors)
        self.scale(trial, model, corpus, posteriors)

    def test(self, trial: Trial | None, corpus: Corpus, posteriors: np.ndarray) -> None:
        """Judge a method, or the base, on the test speakers."""
        name = trial.method if trial else "base"
        model = self.adapt(trial, corpus, posteriors) if trial else self.whisper()
        if trial:
            self.scale(trial, model, corpus, posteriors)
        table = self.judge(name, model, corpus, "test", posteriors if trial and trial.routed else None)
        where = provenance(self.seed, self.device)
        write_json(self.work / f"{name}-test.json", {of: getattr(where, of) for of in WHERE})
        with written(self.work / f"{name}-test.parquet") as part:
            table.to_parquet(part)

    def hear(self, model: Any, corpus: Corpus, rows: Sequence[int], posteriors: np.ndarray | None) -> list[str]:
        """Transcripts of utterances, in the order of `rows`; `posteriors` route an HDMoLE model."""
        texts: dict[int, str] = {}
        ordered = sorted(rows, key=lambda i: int(corpus.index.frames.iloc[i]))
        size = 64 if self.device == "cuda" else 8
        for k in range(0, len(ordered), size):
            part = ordered[k : k + size]
            routing = None if posteriors is None else torch.from_numpy(posteriors[part]).float().to(self.device)
            mels = [torch.from_numpy(np.array(corpus.features(i), np.float32)).to(self.device) for i in part]
            with torch.no_grad():
                states = encode_all(model, mels, routing)
            heard = greedy(model, states, self.tokenizer, routing)
            texts.update({i: spelt(d.text) for i, d in zip(part, heard, strict=True)})
        return [texts[i] for i in rows]

    def judge(
        self, name: str, model: Any, corpus: Corpus, split: str, posteriors: np.ndarray | None, *domains: str
    ) -> pd.DataFrame:
        """Word errors of one method on a split, one row per utterance."""
        rows = corpus.select(split, *domains)
        index = corpus.index.iloc[rows]
        heard = score(index.text, self.hear(model, corpus, rows, posteriors))
        kept = {column: index[column].to_numpy() for column in ("domain", "accent", "speaker", "utterance")}
        table = pd.DataFrame({"method": name, "seed": self.seed, **kept, "reference": index.text.to_numpy(), **heard})
        self.report(f"{split} {name}: " + ", ".join(f"{d} {wer:.2f} %" for d, wer in _wer(table).items()))
        return table

    def scale(self, trial: Trial, model: Any, corpus: Corpus, posteriors: np.ndarray) -> None:
        """Scale the adapter by the factor that is best on dev, as `best_scale` says."""
        file = self.work / trial.name / "dev.json"
        own = {n: p.detach().clone() for n, p in model.named_parameters() if _scaled(n, trial.method)}
        start = {n: p.detach().clone() for n, p in self.whisper().named_parameters()} if trial.method == "full" else {}

        def set_to(factor: float) -> None:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if n in own:
                        p.copy_(start[n] + factor * (own[n] - start[n]) if start else factor * own[n])

        if not file.is_file():
            routing, found = posteriors if trial.routed else None, {}
            for factor in SCALES:
                set_to(factor)
                heard = self.judge(f"{trial.name} x {factor}", model, corpus, "dev", routing, "real_adults", "real_general")
                found[str(factor)] = _wer(heard)
            write_json(file, found)
        set_to(best_scale(self.dev(trial), self.dev(None))[0])

    def dev(self, trial: Trial | None) -> dict[str, dict[str, float]]:
        """Word error rates in % on dev of a trial, by scale and domain; of the base by domain,
        under "1.0".
        """
        if trial is None:
            return {"1.0": _wer(pd.read_parquet(self.work / "base-dev.parquet"))}
        found: dict[str, dict[str, float]] = json.loads((self.work / trial.name / "dev.json").read_text())
        return found


@dataclass(frozen=True)
class Trial:
    """One training: a method with a learning rate, in the linear layers of one of `PLACES`."""

    method: str
    rate: float
    place: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.method}-{self.place}-{self.rate:g}"

    @property
    def routed(self) -> bool:
        """Whether its layers read the accent posterior."""
        return self.method.startswith("hdmole")


def best_scale(found: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> tuple[float, float, float]:
    """The scale of an adapter that is best on dev.

    It is the one with the fewest errors of adults among those that lose at most `FORGOTTEN` points
    on real general speech; if all lose more, the one that loses least.

    Args:
        found: scale -> domain -> word error rate in %.
        base: the same of the frozen base, under "1.0".

    Returns:
        The scale, points lost beyond `FORGOTTEN`, and the word error rate of adults in %.
    """
    known = base["1.0"].get("real_general", 0.0)
    over = {s: max(0.0, rates.get("real_general", 0.0) - known - FORGOTTEN) for s, rates in found.items()}
    best = min(found, key=lambda s: (over[s], found[s].get("real_adults", 0.0)))
    return float(best), over[best], found[best].get("real_adults", 0.0)


def adapted(base: Any, name: str, place: str = "encoder") -> Any:
    """The base with what a method trains; only that requires a gradient."""
    targets = PLACES[place]
    if name == "full":
        for path, module in base.named_modules():
            if re.fullmatch(targets, path):
                module.requires_grad_(True)
        return base
    accents = LABELS[1:]
    if name == "lora":
        return get_peft_model(base, LoraConfig(r=28, lora_alpha=56, target_modules=targets))
    if name == "hdmole":
        config = HDMoLEConfig(accents=accents, r=3, alpha=48.0, init_weights="kaiming", target_modules=targets)
    else:
        config = HDMoLEConfig.extended(accents, r=2, shared_expert_rank=12, router_accent=0.0, target_modules=targets)
    return get_peft_model(base, config)


def _with_full(base: Any, folder: Path) -> Any:
    base.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return base


def _scaled(parameter: str, method: str) -> bool:
    return ".layers." in parameter if method == "full" else "_B." in parameter


def _padded(mels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    features = nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(m, np.float32)) for m in mels], batch_first=True)
    return features, torch.arange(features.shape[1])[None] < torch.tensor([len(m) for m in mels])[:, None]


def _always() -> bool:
    return True


def _as_tried(trial: Trial, dev: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> Tried:
    """A trial for the results, with its word error rates at its best scale."""
    rates = dev[str(best_scale(dev, base)[0])]
    adults, general = (round(rates[d], 3) if d in rates else None for d in ("real_adults", "real_general"))
    return Tried(method=trial.method, learning_rate=trial.rate, place=trial.place, accent=adults, general=general)


def _wer(table: pd.DataFrame) -> dict[str, float]:
    sums = table.groupby("domain")[["errors", "words"]].sum()
    return {str(d): float(100 * row.errors / row.words) for d, row in sums.iterrows()}


def _train_recogniser(statistics: Tensor, target: Tensor, rows: Tensor, seed: int, epochs: int = 20) -> LayerRecogniser:
    torch.manual_seed(seed)
    model = LayerRecogniser(LABELS, statistics.shape[1], statistics.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    x, y = statistics[rows], target[rows]
    counts = torch.bincount(y, minlength=len(LABELS)).clamp_min(1)
    weight = (len(y) / counts) ** 0.5
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(y) // 128))
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(128):
            loss = functional.cross_entropy(model(x[part]), y[part], weight=weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def build(
    out: Path, folders: Sequence[Path], seed: int, scale: float, work: Path, report: Callable[[str], None],
    methods: Sequence[str] = METHODS, base: Path | None = None, epochs: float = EPOCHS, search: bool = False, processes: int = 1, domain: bool = True,
) -> Results | None:  # fmt: skip
    """Train the methods on recordings of real people, and write the released folder.

    Args:
        out: the released folder: adapters, accent recogniser, results; without the base and without
            the weights of full fine-tuning, which are too large for a repository.
        folders: folders with a manifest.jsonl, or with folders that have one.
        seed: random seed.
        scale: share of the recipe's sizes, for a quick trial.
        work: where stages keep what they made; run again to resume.
        report: called with each line about the progress.
        methods: which of `METHODS` are trained, in this order.
        base: folder of Whisper base; found or downloaded if not given.
        epochs: passes over the training speech; may be a fraction.
        search: try all of `TRIALS` in place of `CHOSEN`.
        processes: number of processes that share the trainings, and the GPU if there is one.
        domain: fit the in-domain score.

    Returns:
        The results in the first process, None in the others.

    Raises:
        ManifestError: a manifest cannot be used.
        PretrainedError: Whisper base is not to be had.
        ModelError: a method is unknown.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        sentence = "There is no method {unknown}; the methods are {methods}."
        raise ModelError("model.no_such_real_method", sentence, unknown=", ".join(unknown), methods=", ".join(METHODS))
    rank, count = rank_and_count()
    base = base or pretrained.get("whisper-base", report=report)
    sizes = Sizes() if scale == 1 else Sizes().scaled(scale)
    stages = Build(work, base, folders, sizes, seed, epochs, report)
    dev = work / "base-dev.parquet"  # written last, so that other processes begin when it is there
    while rank and not dev.is_file():
        time.sleep(POLL)
    corpus, model = stages.corpus(), stages.whisper()
    recogniser, posteriors = stages.recogniser(corpus, stages.statistics(corpus, model))
    if not dev.is_file():
        with written(dev) as part:
            stages.judge("base", model, corpus, "dev", None, "real_adults", "real_general").to_parquet(part)
    trials = {m: [Trial(m, *t) for t in (TRIALS[m] if search else [CHOSEN[m]])] for m in methods}

    def chosen(method: str) -> Trial:
        known = stages.dev(None)
        return min(trials[method], key=lambda trial: best_scale(stages.dev(trial), known)[1:])

    def tried(method: str) -> bool:
        return all((work / trial.name / "dev.json").is_file() for trial in trials[method])

    tasks = [
        Task(trial.name, _always, (work / trial.name / "dev.json").is_file, partial(stages.trial, trial, corpus, posteriors))
        for each in trials.values() for trial in each
    ]  # fmt: skip
    for name in ("base", *methods):
        ready = partial(tried, name) if name in trials else _always
        test = partial(lambda n: stages.test(chosen(n) if n in trials else None, corpus, posteriors), name)
        tasks.append(Task(f"{name}-test", ready, (work / f"{name}-test.parquet").is_file, test))
    command = ["demo", "build", "--real", "--out", out, "--seed", seed, "--scale", scale, "--work", work, "--methods", ",".join(methods),
               "--epochs", epochs, *(["--search"] if search else []), *(part for f in folders for part in ("--real-speech", f))]  # fmt: skip
    with others([str(part) for part in command], processes if count == 1 else 1):
        share(tasks, work / "locks", report)
    if rank:
        return None
    found, sizes_, factors = {name: chosen(name) for name in methods}, {"base": 0}, {}
    for name, trial in found.items():
        sizes_[name] = trainable(adapted(stages.whisper(), name, trial.place))
        factors[name] = best_scale(stages.dev(trial), stages.dev(None))[0]
        if name != "full":
            trained = stages.adapt(trial, corpus, posteriors)
            stages.scale(trial, trained, corpus, posteriors)
            _publish(trained, out / "adapters" / name)
    recogniser.save(out / "accents")
    config = {
        "model_type": "whisper",
        "pretrained": "whisper-base",
        "pretrained_sha256": pretrained.digest(base),
        "scales": factors,
    }
    write_json(out / "config.json", config)
    rows = pd.concat([pd.read_parquet(work / f"{name}-test.parquet") for name in ("base", *methods)], ignore_index=True)
    hours = corpus.index.groupby(["split", "domain"]).seconds.sum() / 3600
    origin = provenance(
        seed, stages.device, base_sha256=str(config["pretrained_sha256"]), epochs=epochs,
        data="real recordings by unseen speakers, and synthetic speech (espeak-ng)",
        hours={" ".join(map(str, key)): round(float(h), 2) for key, h in zip(hours.index.tolist(), hours, strict=True)},
    )  # fmt: skip
    places = [json.loads((work / f"{name}-test.json").read_text()) for name in ("base", *methods)]
    for of in WHERE:
        setattr(origin, of, "; ".join(sorted({place[of] for place in places})))
    results = summarise(rows, origin)
    for name, entry in results.methods.items():
        entry.trainable = sizes_[name]
        if name in found:
            entry.learning_rate, entry.place = found[name].rate, found[name].place
    results.trials = [_as_tried(trial, stages.dev(trial), stages.dev(None)) for each in trials.values() for trial in each]
    (out / "SHA256SUMS").unlink(missing_ok=True)  # of an earlier release
    results.in_domain = in_domain(out, folders, seed, stages.report) if domain else None
    save(out / "results", results, rows)
    write_text(out / "README.md", model_card(results, read_people(folders), factors, LABELS))
    write_sums(out)
    return results


def _publish(model: Any, folder: Path) -> None:
    """Write an adapter in float16, without paths of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.half().contiguous() for k, v in load_file(file).items()}, file, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": None}, indent=1) + "\n")
