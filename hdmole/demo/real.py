"""Adapt Whisper base to real speakers: `hdmole demo build --real`.

    corpus -> statistics of the frozen encoder's layers -> accent recogniser and posteriors
           -> lora | hdmole | full (adaptations of the encoder's linear layers)
           -> scale of each adapter, chosen on dev -> released folder -> results on test

* Each stage is kept in the work folder and skipped if it is there. An interrupted training goes on
  from its last checkpoint.
* All methods get the same batches in the same order, with general speech among them.
* No speaker is in two splits. Recordings whose licence forbids commercial use are judged only.
* Accents of real people (their first languages) and of the synthesiser share experts, but never a
  domain of the results: `real_...` is people, `synthetic_...` is espeak-ng.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

from hdmole.demo.corpus import render, split_speakers
from hdmole.demo.synth import ACCENTS, Synthesiser, speakers
from hdmole.demo.text import is_digit_string, sentences
from hdmole.files import write_json, write_text
from hdmole.method.recogniser import LayerRecogniser
from hdmole.method.tuner import HDMoLEConfig
from hdmole.models import pretrained
from hdmole.models.speech_llm import encode_all
from hdmole.models.whisper import ClipExtractor, Whisper, layer_statistics
from hdmole.names import GENERAL
from hdmole.speech.decoding import greedy
from hdmole.speech.loading import ModelError
from hdmole.speech.manifest import ManifestError, manifest_rows
from hdmole.speech.mel import stored_mel_features
from hdmole.speech.segments import framed
from hdmole.speech.words import score, spelt
from hdmole.study.bootstrap import summarise
from hdmole.study.results import Results, provenance, save
from hdmole.study.tables import markdown_table
from hdmole.training.adapt import Adaptation, pad, parameter_groups, trainable
from hdmole.training.data import Batches, Corpus, write_corpus
from hdmole.training.loop import fit, smoothed_objective
from hdmole.training.preparation import best_temperature

TARGETS = r"model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"
METHODS = ("lora", "hdmole", "full", "hdmole-extended")
RATES = {"lora": 1e-3, "hdmole": 1e-3, "hdmole-extended": 1e-3, "full": 1e-5 * 3}
SCALES = (1.0, 0.6)  # of an adapter; one is chosen on dev
FORGOTTEN = 0.5  # points of WER on general speech that an adapter may lose on dev
YOUNGEST = 12  # years; younger speakers are judged, but not trained on
ADULT = 18  # years
LONGEST = 7.0  # seconds of the longest training utterance
# first language of a real speaker -> expert
EXPERT = {
    "Mandarin": "mandarin", "French": "french", "German": "german", "Spanish": "spanish", "Hindi": "indian", "Marathi": "indian",
    "Kannada": "indian", "Tamil": "indian", "Telugu": "indian", "Gujarati": "indian", "Urdu": "indian",
    "US": GENERAL, "English": GENERAL, GENERAL: GENERAL,
}  # fmt: skip
LABELS = list(ACCENTS)  # the general domain first


@dataclass(frozen=True)
class Sizes:
    """How many utterances are used. The sentences of real speakers are all used."""

    composed: int = 200  # digit strings joined from single digits
    synthetic: int = 24  # of each accent
    general: int = 120  # synthetic
    orders: int = 100  # real general speech
    judged: int = 150  # at most, of each domain in test, and half of it in dev
    judged_synthetic: int = 10  # of each accent

    def scaled(self, factor: float) -> Sizes:
        """All sizes times `factor`, but at least 2."""
        return Sizes(**{name: max(2, round(value * factor)) for name, value in vars(self).items()})


# -- corpus ----------------------------------------------------------------------------------------


def read_people(folders: Sequence[Path]) -> pd.DataFrame:
    """The recordings that the manifests in some folders list.

    Returns:
        One row per recording: `path`, `text`, `accent`, `speaker`, `age`, `source`, `split` and
        `domain` (real_adults, real_children, real_digits, real_general).

    Raises:
        ManifestError: there is no manifest, or a line of one cannot be used.
    """
    rows = []
    for manifest in [file for folder in folders for file in sorted(Path(folder).rglob("manifest.jsonl"))]:
        for _, row in manifest_rows(manifest):
            speaker = row.get("speaker") or f"line-{row['audio']}"
            rows.append(
                {"path": str(manifest.parent / row["audio"]), "text": row["text"], "accent": row["accent"], "speaker": speaker,
                 "age": row.get("age") or 99, "source": str(row.get("source", manifest.parent)), "seconds": row.get("seconds", 0.0),
                 "licence": str(row.get("licence", "not given")), "judged_only": "NC" in str(row.get("licence", "")), "alone": not row.get("speaker")}
            )  # fmt: skip
    if not rows:
        sentence = "There is no manifest.jsonl in {folders}; give --real-speech a folder of recordings."
        raise ManifestError("manifest.absent_all", sentence, folders=", ".join(map(str, folders)) or "no folder")
    table = pd.DataFrame(rows)
    parts = {name: split_speakers(list(group.speaker)) for name, group in table.groupby("source")}
    table["split"] = [parts[source][speaker] for source, speaker in zip(table.source, table.speaker, strict=True)]
    # recordings without a speaker cannot be kept apart, so that none is judged
    table.loc[table.alone, "split"] = "train"
    for _, group in table[table.judged_only].groupby("source"):
        names = sorted(set(group.speaker), key=lambda name: hashlib.md5(name.encode()).hexdigest())
        table.loc[group.index, "split"] = ["dev" if names.index(s) < len(names) // 2 else "test" for s in group.speaker]
    digits = table.text.map(is_digit_string)
    kind = np.where(table.age < ADULT, "real_children", "real_adults")
    table["domain"] = np.where(digits, "real_digits", np.where(table.accent == GENERAL, "real_general", kind))
    return table


def plan(people: pd.DataFrame, sizes: Sizes, seed: int) -> list[dict[str, Any]]:
    """What the corpus consists of, as jobs for `hdmole.demo.corpus.render`."""
    rng, jobs = np.random.default_rng(seed), []
    single = people.text.map(lambda text: is_digit_string(text) and " " not in text)
    for (split, domain), group in people[~single].groupby(["split", "domain"]):
        if split == "train":
            group = group[(group.age >= YOUNGEST) & (group.seconds <= LONGEST)]
        most = {"dev": sizes.judged // 2, "test": sizes.judged}.get(str(split))
        if most is None:
            most = sizes.orders if domain == "real_general" else len(group)
        for i in sorted(rng.permutation(len(group))[:most]):
            row = group.iloc[i]
            jobs.append(dict(kind="read", split=split, domain=domain, accent=row.accent, text=row.text, speaker=row.speaker,
                             paths=[row.path], augment=False))  # fmt: skip
    groups = [g for _, g in people[single].groupby("speaker") if len(g) >= 30]
    for group in groups:
        first = group.iloc[0]
        for _ in range(max(2, sizes.composed // max(1, len(groups)))):
            picked = group.iloc[rng.integers(0, len(group), rng.integers(2, 9))]
            jobs.append(dict(kind="read", split=first.split, domain="real_digits", accent=first.accent, text=" ".join(picked.text),
                             speaker=first.speaker, paths=list(picked.path), augment=False))  # fmt: skip
    for split in ("train", "dev", "test"):
        people_ = speakers(split, 40 if split == "train" else 8, seed)
        for k, accent in enumerate(ACCENTS):
            if split == "train":
                count = sizes.general if accent == GENERAL else sizes.synthetic
            else:
                count = sizes.judged_synthetic * (4 if accent == GENERAL else 1)
            domain = "synthetic_general" if accent == GENERAL else "synthetic_accents"
            for i, text in enumerate(sentences(count, seed + 31 * k + len(split), split)):
                jobs.append(dict(kind="say", split=split, domain=domain, accent=accent, text=text,
                                 speaker=people_[(i + k) % len(people_)], augment=split == "train"))  # fmt: skip
    return [{**job, "seed": [seed, number]} for number, job in enumerate(jobs)]


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
        work.mkdir(parents=True, exist_ok=True)
        self.extractor = ClipExtractor.from_pretrained(base)
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def report(self, text: str) -> None:
        line = f"[{(time.time() - self._start) / 60:5.1f} min] {text}"
        with (self.work / "log.txt").open("a") as log:
            log.write(line + "\n")
        self._report(line)

    def whisper(self) -> Any:
        """The base in float32, without gradients."""
        model: Any = Whisper.from_pretrained(self.base, dtype=torch.float32, use_safetensors=True)
        return model.eval().requires_grad_(False)

    def corpus(self) -> Corpus:
        """Mel features of all utterances."""
        folder = self.work / "corpus"
        if not (folder / "index.parquet").is_file():
            jobs, mels, rows = plan(read_people(self.folders), self.sizes, self.seed), [], []
            with Synthesiser() as synthesiser:
                for number, job in enumerate(jobs):
                    wave = framed(render(job, synthesiser))[0]
                    mels.append(stored_mel_features(self.extractor, wave))
                    name = job["speaker"] if isinstance(job["speaker"], str) else job["speaker"].name
                    told = {key: job[key] for key in ("split", "domain", "accent", "text")}
                    seconds = len(wave) / 16_000
                    rows.append({"utterance": f"{job['domain']}-{number:06d}", **told, "speaker": name, "seconds": seconds})
            write_corpus(folder, pd.DataFrame(rows), mels)
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
                    layers, valid = model.encode_layers(features, mask)
                    found.update(zip(part.tolist(), layer_statistics(layers, valid).numpy().astype(np.float16), strict=True))
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
            train = torch.tensor((index.split == "train").to_numpy()) & (target >= 0)
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
                if split != "train":
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
            rows, lambda i: {"input_features": corpus.features(i)}, corpus.index.frames.to_numpy(), 3_600, extra, seed=self.seed,
            max_rows=4,
        )  # fmt: skip

    def adapt(self, name: str, corpus: Corpus, posteriors: np.ndarray) -> Any:
        """Train one method, or load it."""
        folder = self.work / name
        torch.manual_seed(self.seed)
        base = self.whisper()
        if folder.is_dir():
            return _with_full(base, folder) if name == "full" else PeftModel.from_pretrained(base, folder).eval()
        model = adapted(base, name)
        self.report(f"{name}: {trainable(model):,} trainable parameters")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        fit(
            model, self.batches(corpus, posteriors, name.startswith("hdmole")), smoothed_objective, folder.with_name(f"{name}-training"),
            epochs=self.epochs, rate=RATES[name], report=self.report, groups=parameter_groups(named, RATES[name], Adaptation(name, name.split("-")[0])), seed=self.seed,
        )  # fmt: skip
        part = folder.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if name == "full":
            part.mkdir()
            save_file({n: p.detach().contiguous() for n, p in named}, part / "model.safetensors")
        else:
            model.save_pretrained(part)
        part.rename(folder)
        return model.eval()

    def hear(self, model: Any, corpus: Corpus, rows: Sequence[int], posteriors: np.ndarray | None) -> list[str]:
        """Transcripts of utterances, in the order of `rows`; `posteriors` route an HDMoLE model."""
        texts: dict[int, str] = {}
        ordered = sorted(rows, key=lambda i: int(corpus.index.frames.iloc[i]))
        for k in range(0, len(ordered), 8):
            part = ordered[k : k + 8]
            routing = None if posteriors is None else torch.from_numpy(posteriors[part]).float()
            mels = [torch.from_numpy(np.array(corpus.features(i), np.float32)) for i in part]
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

    def scale(self, name: str, model: Any, corpus: Corpus, posteriors: np.ndarray | None, base: pd.DataFrame) -> float:
        """Scale the adapter by the factor that is best on dev, and return it.

        The best is the one with the fewest errors of adults among those that lose at most
        `FORGOTTEN` points on real general speech; if all lose more, the one that loses least.
        """
        file = self.work / f"{name}-scale.json"
        own = {n: p.detach().clone() for n, p in model.named_parameters() if _scaled(n, name)}
        start = {n: p.detach().clone() for n, p in self.whisper().named_parameters()} if name == "full" else {}

        def set_to(factor: float) -> None:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if n in own:
                        p.copy_(start[n] + factor * (own[n] - start[n]) if start else factor * own[n])

        if not file.is_file():
            known, found = _wer(base), {}
            for factor in SCALES:
                set_to(factor)
                wer = _wer(self.judge(f"{name} x {factor}", model, corpus, "dev", posteriors, "real_adults", "real_general"))
                found[factor] = (wer.get("real_adults", 0.0), wer.get("real_general", 0.0) - known.get("real_general", 0.0))
            kept = {f: errors for f, (errors, lost) in found.items() if lost <= FORGOTTEN}
            best = min(kept, key=kept.__getitem__) if kept else min(found, key=lambda f: found[f][1])
            file.write_text(json.dumps({"scale": best, "dev": {str(f): values for f, values in found.items()}}) + "\n")
        factor = float(json.loads(file.read_text())["scale"])
        set_to(factor)
        return factor


def adapted(base: Any, name: str) -> Any:
    """The base with what a method trains; only that requires a gradient."""
    if name == "full":
        for module in base.model.encoder.layers.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(True)
        return base
    accents = LABELS[1:]
    if name == "lora":
        return get_peft_model(base, LoraConfig(r=28, lora_alpha=56, target_modules=TARGETS))
    if name == "hdmole":
        config = HDMoLEConfig(accents=accents, r=3, alpha=48.0, init_weights="kaiming", target_modules=TARGETS)
    else:
        config = HDMoLEConfig.extended(accents, r=2, shared_expert_rank=12, router_accent=0.0, target_modules=TARGETS)
    return get_peft_model(base, config)


def _with_full(base: Any, folder: Path) -> Any:
    base.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return base


def _scaled(parameter: str, method: str) -> bool:
    return "model.encoder.layers." in parameter if method == "full" else "_B." in parameter


def _padded(mels: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    features = nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(m, np.float32)) for m in mels], batch_first=True)
    return features, torch.arange(features.shape[1])[None] < torch.tensor([len(m) for m in mels])[:, None]


def _wer(table: pd.DataFrame) -> dict[str, float]:
    sums = table.groupby("domain")[["errors", "words"]].sum()
    return {str(d): float(100 * row.errors / row.words) for d, row in sums.iterrows()}


def _train_recogniser(statistics: Tensor, target: Tensor, rows: Tensor, seed: int, epochs: int = 40) -> LayerRecogniser:
    torch.manual_seed(seed)
    model = LayerRecogniser(LABELS, statistics.shape[1], statistics.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    x, y = statistics[rows], target[rows]
    counts = torch.bincount(y, minlength=len(LABELS)).clamp_min(1)
    weight = (len(y) / counts) ** 0.5
    for _ in range(epochs):
        for part in torch.randperm(len(y)).split(64):
            loss = functional.cross_entropy(model(x[part]), y[part], weight=weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def build(
    out: Path, folders: Sequence[Path], seed: int, scale: float, work: Path, report: Callable[[str], None],
    methods: Sequence[str] = METHODS[:3], base: Path | None = None, epochs: float = 1.0,
) -> Results:  # fmt: skip
    """Train the methods on recordings of real people, and write the released folder.

    Args:
        out: the released folder: adapters, accent recogniser, results; without the base.
        folders: folders with a manifest.jsonl, or with folders that have one.
        seed: random seed.
        scale: share of the recipe's sizes, for a quick trial.
        work: where stages keep what they made; run again to resume.
        report: called with each line about the progress.
        methods: which of `METHODS` are trained, in this order.
        base: folder of Whisper base; found or downloaded if not given.
        epochs: passes over the training speech; may be a fraction.

    Raises:
        ManifestError: a manifest cannot be used.
        PretrainedError: Whisper base is not to be had.
        ModelError: a method is unknown.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        sentence = "There is no method {unknown}; the methods are {methods}."
        raise ModelError("model.no_such_real_method", sentence, unknown=", ".join(unknown), methods=", ".join(METHODS))
    base = base or pretrained.get("whisper-base", report=report)
    sizes = Sizes() if scale == 1 else Sizes().scaled(scale)
    stages = Build(work, base, folders, sizes, seed, epochs, report)
    corpus, model = stages.corpus(), stages.whisper()
    recogniser, posteriors = stages.recogniser(corpus, stages.statistics(corpus, model))
    dev, tables, sizes_, factors = work / "base-dev.parquet", [], {"base": 0}, {}
    if not dev.is_file():
        stages.judge("base", model, corpus, "dev", None, "real_adults", "real_general").to_parquet(dev)
    for name in methods:
        routing = posteriors if name.startswith("hdmole") else None
        trained = stages.adapt(name, corpus, posteriors)
        factors[name] = stages.scale(name, trained, corpus, routing, pd.read_parquet(dev))
        if name == "full":
            sizes_[name] = sum(m.numel() for m in adapted(stages.whisper(), name).parameters() if m.requires_grad)
        else:
            sizes_[name] = sum(p.numel() for n, p in trained.named_parameters() if "hdmole_" in n or "lora_" in n)
            _publish(trained, out / "adapters" / name)
    recogniser.save(out / "accents")
    config = {
        "model_type": "whisper",
        "pretrained": "whisper-base",
        "pretrained_sha256": pretrained.digest(base),
        "scales": factors,
    }
    write_json(out / "config.json", config)
    for name in ("base", *methods):
        file = work / f"{name}-test.parquet"
        if not file.is_file():
            routing = posteriors if name.startswith("hdmole") else None
            trained = stages.whisper() if name == "base" else stages.adapt(name, corpus, posteriors)
            if name != "base":
                stages.scale(name, trained, corpus, routing, pd.read_parquet(dev))
            stages.judge(name, trained, corpus, "test", routing).to_parquet(file)
        tables.append(pd.read_parquet(file))
    rows = pd.concat(tables, ignore_index=True)
    hours = corpus.index.groupby(["split", "domain"]).seconds.sum() / 3600
    origin = provenance(
        seed, "cpu", base_sha256=str(config["pretrained_sha256"]), epochs=epochs,
        data="real recordings by unseen speakers, and synthetic speech (espeak-ng)",
        hours={" ".join(map(str, key)): round(float(h), 2) for key, h in zip(hours.index.tolist(), hours, strict=True)},
    )  # fmt: skip
    results = summarise(rows, origin)
    for name, entry in results.methods.items():
        entry.trainable = sizes_[name]
    save(out / "results", results, rows)
    write_text(out / "README.md", model_card(results, read_people(folders), factors))
    return results


def model_card(results: Results, people: pd.DataFrame, scales: Mapping[str, float]) -> str:
    """The README.md of the model folder. Every figure comes from the results.

    Args:
        results: measured on test.
        people: the recordings, as `read_people` returns them.
        scales: method -> what its adapter was multiplied by.
    """
    origin = results.provenance
    sources = "\n".join(
        f"| {source} | {', '.join(sorted(set(group.licence)))} | {'judged only' if group.judged_only.all() else 'trained and judged'} |"
        for source, group in people.groupby("source")
    )
    hours = ", ".join(f"{k} {v:g}" for k, v in (origin.hours or {}).items())
    return f"""# Whisper base, adapted to real speakers

Adapters and an accent recogniser for OpenAI's Whisper base. The base itself is not in this folder: `hdmole models get whisper-base`
finds or downloads it. It is under the MIT licence, as released by OpenAI.

**It can hear** read English of adults, with an open vocabulary. **It was adapted to** adults from China who learn English, and to digits
of people with other first languages. Children were not trained on; their rates are below. Accents of the synthesiser
(`synthetic_...`) are espeak-ng and not people.

**It cannot hear** other languages. On noise and music it may invent text. It has no in-domain score yet.

## Results

Word error rate in %, with 95 % intervals from a bootstrap over speakers, on speakers that were never trained on. Digits in a text are
read as words. One seed. The adapters were multiplied by what was best on dev: {", ".join(f"{m} {s:g}" for m, s in scales.items())}.

{markdown_table(results)}

Routing needs the accent, which a network finds from the layers of the frozen encoder. Its classes are {", ".join(LABELS)}; real and
synthetic speech of one accent share a class.

## Speech

| Source | Licence | Use |
|---|---|---|
{sources}

Hours, with synthetic speech: {hours}.

## Made by

`{origin.command}` at commit {origin.short_commit}, seed {origin.seed}, {origin.date}, on {origin.machine}, torch {origin.torch},
transformers {origin.transformers}.
"""


def _publish(model: Any, folder: Path) -> None:
    """Write an adapter in float16, without paths of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.half().contiguous() for k, v in load_file(file).items()}, file, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": None}, indent=1) + "\n")
