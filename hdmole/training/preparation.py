"""Make what all methods of a comparison share.

This is mel features, encoder outputs, the accent recogniser and its posteriors.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hdmole.errors import UserError
from hdmole.files import write_text, written
from hdmole.method.recogniser import AccentRecogniser
from hdmole.names import GENERAL
from hdmole.speech.asr import ASR
from hdmole.speech.audio import AudioError
from hdmole.speech.loading import weights_folder
from hdmole.speech.manifest import Line, fingerprint, read_manifest
from hdmole.speech.mel import stored_mel_features
from hdmole.speech.segments import framed, spoken
from hdmole.training.adapt import Speech
from hdmole.training.data import Corpus, States, frames_written, mel_batches, write_corpus
from hdmole.training.loop import BF16, fit


class SpeechError(UserError):
    """Speech that methods cannot be compared on. The codes begin with `speech.`."""


Report = Callable[[str], None]
SPLITS = ("train", "dev", "test")
# Epochs in which the accent recogniser is trained, first on plain features, then on masked ones.
RECOGNISER_EPOCHS = 8.0, 4.0
Stage = tuple[str, list[int], bool, float]
MEL_FRAMES, LAYER_FRAMES = 7_000, 875  # most frames in a batch of a recogniser's training: 70 s


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array. The file appears only when it is complete."""
    with written(path) as part:
        np.save(part, array)


def encode_corpus(corpus: Corpus, encoder: Any, folder: Path, train: list[int], seed: int, report: Report) -> States:
    """Encode a corpus, or load its encoder outputs if `folder` has them.

    Args:
        corpus: the speech.
        encoder: a model of a family (`hdmole.models.family`), or the encoder of a CTC model.
        folder: where the encoder outputs are kept.
        train: training utterances to encode, each in two SpecAugment views. Other training
            utterances are left out. Dev and test utterances are encoded without masks.
        seed: random seed of the views.
        report: called with each line about the progress.
    """
    if (folder / "spans.npy").is_file():
        return States.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(encoder.parameters()).device

    def encode(mels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(encoder, "encode"):
            return encoder.encode(mels, mask)  # type: ignore[no-any-return]
        out = encoder(input_features=mels, attention_mask=mask)
        return out.last_hidden_state, out.attention_mask

    spans = np.zeros((2, len(corpus.index), 2), np.int64)
    rest = [i for i in range(len(corpus.index)) if corpus.index.split[i] != "train"]
    with frames_written(folder / "states.npy") as append:
        for view, rows, change in ((0, train, True), (1, train, True), (0, rest, False)):
            batches = mel_batches(corpus, rows, 40_000, lambda rows: {"rows": torch.tensor(rows)}, seed, int(change), 0.05)
            batches.epoch = view
            for n in range(len(batches) if rows else 0):
                batch = batches[n]
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=BF16):
                    states, valid = encode(batch["input_features"].to(device), batch["attention_mask"].to(device))
                for i, state, length in zip(batch["rows"].tolist(), states, valid.sum(1).tolist(), strict=True):
                    spans[view, i] = append(state[:length].half().cpu().numpy()), length
            report(f"states: view {view} of {len(rows)} utterances done")
    _save(folder / "spans.npy", spans)
    return States.load(folder)


@torch.no_grad()
def encode_layers(corpus: Corpus, base: Any, folder: Path, rows: list[int], report: Report) -> Corpus:
    """Outputs of all encoder layers in the place of mel features, for a recogniser that reads them.

    Args:
        corpus: the speech.
        base: a model of a family, whose `encoder_layers` are the outputs.
        folder: where the outputs are kept; they are loaded if it has them.
        rows: the utterances that are encoded, without masks.
        report: called with each line about the progress.

    Returns:
        A corpus with the index of `corpus`, in which all other utterances have no frames.
    """
    if not (folder / "index.parquet").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        spans = np.zeros((len(corpus.index), 2), np.int64)
        batches = mel_batches(corpus, rows, 40_000, lambda rows: {"rows": torch.tensor(rows)})
        with frames_written(folder / "mels.npy") as append:
            for n in range(len(batches)):
                batch = batches[n]
                with torch.autocast(base.device.type, torch.bfloat16, enabled=BF16):
                    mels, mask = (batch[name].to(base.device) for name in ("input_features", "attention_mask"))
                    layers, valid = base.encoder_layers(mels, mask)
                for i, of, kept in zip(batch["rows"].tolist(), layers.half().cpu(), valid.cpu(), strict=True):
                    length = int(kept.sum())
                    spans[i] = append(of[:length].numpy()), length
                if n % 50 == 0:
                    report(f"layers: {n} of {len(batches)} batches")
        part = folder / "index.part"
        corpus.index.assign(offset=spans[:, 0], frames=spans[:, 1]).to_parquet(part)
        part.replace(folder / "index.parquet")
    return Corpus(folder)


def recogniser_stages(rows: list[int]) -> list[Stage]:
    """The stages of `train_recogniser` on training rows: first plain features, then masked ones."""
    clear, masked = RECOGNISER_EPOCHS
    return [("clear", rows, False, clear), ("masked", rows, True, masked)]


def train_recogniser(
    corpus: Corpus,
    labels: list[str],
    stages: list[Stage],
    folder: Path,
    *,
    rate: float,
    seed: int,
    report: Report,
    device: str = "cpu",
    layers: int = 0,
    until: float | None = None,
) -> tuple[AccentRecogniser, np.ndarray]:
    """Train an accent recogniser and apply it to the corpus, or load the results from `folder`.

    The posteriors of training utterances come from masked features and from a temperature that
    makes them on average no more confident than those of dev speakers.

    Args:
        corpus: the speech.
        labels: the N + 1 classes, "general" first. An accent that is not among them counts as
            general.
        stages: for each stage of the training its name, the training rows, whether their features
            are masked (SpecAugment), and the number of epochs.
        folder: where recogniser and posteriors are kept.
        rate: peak learning rate.
        seed: random seed of initialisation, order of batches and masks.
        report: called with each line about the progress.
        device: where the recogniser is trained.
        layers: number of encoder layers whose outputs are the features of the corpus, which
            `encode_layers` made; 0 for mel features.
        until: share of dev utterances at which each stage is stopped once as many are recognised;
            None trains to the end.

    Returns:
        The recogniser and the posteriors (utterances, N + 1) of all utterances. Those of utterances
        without frames are not numbers, so that they cannot be used by mistake.
    """
    if (folder / "posteriors.npy").is_file():
        return AccentRecogniser.load(folder), np.load(folder / "posteriors.npy")
    index = corpus.index
    targets = torch.tensor([labels.index(a) if a in labels else 0 for a in index.accent])
    if (folder / "config.json").is_file():
        model = AccentRecogniser.load(folder).to(device)
    else:
        model = _fit_recogniser(corpus, labels, targets, stages, folder, rate, seed, report, device, layers, until)
    logits = _accent_logits(model, corpus, seed, device)
    dev = torch.tensor(corpus.select("dev", GENERAL, "accent"))
    if not (folder / "config.json").is_file():
        model.temperature.fill_(best_temperature(logits[dev], targets[dev]))
    accuracy = (logits[dev].argmax(1) == targets[dev]).float().mean().item()
    train, temperature = torch.tensor(corpus.select("train", "accent")), float(model.temperature)
    softer = softer_temperature(logits[train], logits[dev], temperature)
    posteriors = tempered(logits, (index.split == "train").to_numpy(), temperature, softer)
    posteriors[index.frames == 0] = np.nan
    model.save(folder)
    _save(folder / "posteriors.npy", posteriors)
    report(f"recogniser: {accuracy:.1%} on dev speakers, temperature {temperature:.2f}, {softer:.2f} for training posteriors")
    return model.cpu().eval(), posteriors


def _fit_recogniser(
    corpus: Corpus, labels: list[str], targets: Tensor, stages: list[Stage], folder: Path,
    rate: float, seed: int, report: Report, device: str, layers: int, until: float | None,
) -> AccentRecogniser:  # fmt: skip
    torch.manual_seed(seed)
    width, frames = corpus.mels.shape[1] // max(1, layers), LAYER_FRAMES if layers else MEL_FRAMES
    model = AccentRecogniser(n_mels=width, labels=labels, layers=layers).to(device)
    dev = torch.tensor(corpus.select("dev", GENERAL, "accent"))

    def accuracy() -> float:
        logits = _logits_of(model, corpus, dev.tolist(), seed, 0, device)
        model.train()
        return float((logits.argmax(1) == targets[dev]).float().mean())

    for name, rows, masked, epochs in stages:
        weight = torch.bincount(targets[rows], minlength=len(labels)).float().clamp_min(1).reciprocal()
        weight = (weight / weight.mean()).to(device)
        batches = mel_batches(corpus, rows, frames, lambda rows: {"labels": targets[rows]}, seed, int(masked))

        def objective(model: Any, batch: dict[str, Tensor], weight: Tensor = weight) -> Tensor:
            logits = model(batch["input_features"], batch["attention_mask"]).float()
            return nn.functional.cross_entropy(logits, batch["labels"], weight, label_smoothing=0.05)

        fit(
            model, batches, objective, folder.with_name(f"{folder.name}-{name}-training"), epochs=epochs, rate=rate,
            report=report, seed=seed, callbacks=[_Until(accuracy, until)] if until else [],
        )  # fmt: skip
    return model


class _Until(TrainerCallback):
    """Ends a training once `accuracy` is `until` or more; it is measured after every tenth step."""

    def __init__(self, accuracy: Callable[[], float], until: float) -> None:
        self.accuracy, self.until = accuracy, until

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % 10 == 0 and self.accuracy() >= self.until:
            control.should_training_stop = True


def _accent_logits(model: Any, corpus: Corpus, seed: int, device: str) -> Tensor:
    index = corpus.index
    logits = torch.zeros(len(index), len(model.labels))
    for masks, train in ((2, True), (0, False)):
        rows = np.flatnonzero(((index.split == "train") == train) & (index.frames > 0)).tolist()
        logits[rows] = _logits_of(model, corpus, rows, seed, masks, device)
    return logits


@torch.no_grad()
def _logits_of(model: Any, corpus: Corpus, rows: list[int], seed: int, masks: int, device: str) -> Tensor:
    """Logits (R, N + 1) of the utterances `rows`, of features with as many masks in time."""
    model.eval()
    logits = torch.zeros(len(corpus.index), len(model.labels))
    batches = mel_batches(corpus, rows, 40_000, lambda rows: {"rows": torch.tensor(rows)}, seed, masks)
    for n in range(len(batches) if rows else 0):
        batch = batches[n]
        out = model(batch["input_features"].to(device), batch["attention_mask"].to(device))
        logits[batch["rows"]] = out.float().cpu()
    return logits[rows]


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature with the lowest cross-entropy (Guo et al. 2017).

    Temperatures from 0.5 to 5 are tried in steps of 0.05.

    Args:
        logits: logits of each utterance, (utterances, N + 1).
        targets: class of each utterance, (utterances,).
    """
    grid = torch.linspace(0.5, 5, 91)
    losses = torch.stack([nn.functional.cross_entropy(logits / t, targets) for t in grid])
    return float(grid[losses.argmin()])


def softer_temperature(train: Tensor, dev: Tensor, temperature: float) -> float:
    """A temperature at which training posteriors are no more confident than dev posteriors.

    A recogniser is more confident about the speakers that it was trained on. Methods that learn
    from such posteriors would later get less confident ones. Confidence is measured by the mean of
    the largest class probability. The temperature is raised in steps of 5 % until this holds, but
    not further once it has reached 10.

    Args:
        train: logits of training utterances, (U, N + 1).
        dev: logits of dev utterances, (V, N + 1).
        temperature: the temperature of dev utterances, at which the search begins.
    """
    softer = temperature
    wanted = (dev / temperature).softmax(1).amax(1).mean()
    while (train / softer).softmax(1).amax(1).mean() > wanted and softer < 10:
        softer *= 1.05
    return softer


def tempered(logits: Tensor, train: np.ndarray, temperature: float, softer: float) -> np.ndarray:
    """Posteriors (U, N + 1): the softmax of the logits (U, N + 1) divided by a temperature.

    The temperature is `softer` where `train` (U,) is true, and `temperature` elsewhere.
    """
    divisor = torch.where(torch.tensor(train), softer, temperature)
    posteriors: np.ndarray = (logits / divisor[:, None]).softmax(1).numpy()
    return posteriors


def posteriors_of(recogniser: AccentRecogniser, corpus: Corpus) -> np.ndarray:
    """Accent posteriors (utterances, N + 1) of all utterances of a corpus, without masks."""
    batches = mel_batches(corpus, list(range(len(corpus.index))), 40_000, lambda rows: {"rows": torch.tensor(rows)})
    posteriors = np.zeros((len(corpus.index), len(recogniser.labels)), np.float32)
    for n in range(len(batches)):
        batch = batches[n]
        posteriors[batch["rows"].numpy()] = recogniser.posterior(batch["input_features"], batch["attention_mask"]).numpy()
    return posteriors


def speech_of(
    data: Path | None, model: Path | None, manifests: Mapping[str, Path], work: Path, report: Report, rank: int = 0
) -> tuple[Speech, dict[str, Speech]]:
    """The speech that methods are compared on, and further test sets by domain.

    If `data` is given, both are loaded from there. Otherwise the first process (`rank` 0) reads the
    recordings of the manifests and encodes them into `work`, while the others wait.

    Args:
        data: work folder of `hdmole demo build`, or None.
        model: model folder. With `data` it replaces the base. Otherwise it encodes the recordings;
            the demo model does so if it is None.
        manifests: manifest of each split (train, dev, test). They are read if `data` is None.
        work: folder in which the encoded speech is kept.
        report: called with each line about the progress.
        rank: number of this process, from 0.

    Raises:
        ManifestError: a manifest cannot be used.
        ModelError: the model cannot be used.
        SpeechError: the data folder lacks a file, a recording cannot be read, or the splits cannot
            be used (see `read_splits`).
    """
    if data is not None:
        folder = data
        missing = [
            n for n in ("corpus/index.parquet", "states/spans.npy", "recogniser/config.json") if not (folder / n).is_file()
        ]
        if missing:
            raise SpeechError(
                "speech.data_incomplete",
                "{folder} has no {missing}; run 'hdmole demo build --work {folder}' first.",
                folder=folder,
                missing=", ".join(missing),
            )
        base, tokenizer = model or folder / "base", model or folder / "tokenizer"
        there = (folder / "unseen" / "recogniser" / "posteriors.npy").is_file()
        return Speech.load(folder, base, tokenizer), {"unseen": Speech.load(folder / "unseen", base, tokenizer)} if there else {}
    asr = ASR.load(model or "demo")
    splits = read_splits(manifests)
    question = {"lines": {split: fingerprint(lines) for split, lines in splits.items()}, "model": file_digest(asr.folder)}
    asked = json.dumps(question)
    folder, done = work / "speech", work / "speech" / "recogniser" / "posteriors.npy"
    known = folder / "of.json"
    if rank == 0:
        if folder.is_dir() and not (known.is_file() and known.read_text() == asked):
            report("speech: the manifests, recordings or model have changed, so it is made anew")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(known, asked)
        _from_manifests(splits, asr, folder, report)
    while not (done.is_file() and known.is_file() and known.read_text() == asked):
        report("waiting for the first process to encode the speech")
        time.sleep(10)
    return Speech.load(folder, asr.folder, weights_folder(asr.folder)), {}


def speech_digest(speech: Speech, extra: dict[str, Speech]) -> str:
    """A digest of what the runs of a comparison start from.

    It covers the base, the index of the speech, a sample of the encoder outputs, and the
    posteriors.
    """
    digest = sha256(file_digest(speech.base).encode())
    for part in (speech, *extra.values()):
        digest.update(pd.util.hash_pandas_object(part.corpus.index).to_numpy().tobytes())
        digest.update(np.ascontiguousarray(part.states.spans).tobytes())
        digest.update(part.states.states[::997].tobytes())
        if part.posteriors is not None:
            digest.update(np.ascontiguousarray(part.posteriors).tobytes())
    return digest.hexdigest()[:16]


def file_digest(folder: Path) -> str:
    """A digest of the weights and configuration of a model, without its adapters and results."""
    digest = sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def read_splits(files: Mapping[str, Path]) -> dict[str, list[Line]]:
    """The lines of every split.

    Raises:
        ManifestError: a manifest cannot be used.
        SpeechError: a split is missing, a speaker is in two splits, the train manifest has no
            accent, or dev or test has none of its accents.
    """
    manifests = {split: read_manifest(files[split]) for split in SPLITS if split in files}
    if missing := [split for split in SPLITS if split not in manifests]:
        raise SpeechError(
            "speech.no_manifest",
            "The configuration has no manifest for {missing}; a comparison needs {splits}.",
            missing=", ".join(missing),
            splits=", ".join(SPLITS),
        )
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        both = {line.speaker for line in manifests[one]} & {line.speaker for line in manifests[other]}
        both -= {f"line-{line.number}" for line in manifests[one]}
        if both:
            raise SpeechError(
                "speech.speaker_twice",
                "Speaker {speaker} is in both {one} and {other}; a comparison needs speakers apart.",
                speaker=min(both),
                one=one,
                other=other,
            )
    accents = {line.accent for line in manifests["train"]} - {GENERAL}
    if not accents:
        raise SpeechError(
            "speech.no_accent", "The train manifest has no accent but the general one; there is nothing to adapt to."
        )
    for split in ("dev", "test"):
        if not accents & {line.accent for line in manifests[split]}:
            raise SpeechError(
                "speech.other_accents",
                "The {split} manifest has none of the accents of the train manifest ({accents}).",
                split=split,
                accents=", ".join(sorted(accents)),
            )
    return manifests


def _from_manifests(manifests: dict[str, list[Line]], asr: ASR, folder: Path, report: Report) -> None:
    accents = sorted({line.accent for line in manifests["train"]} - {GENERAL})
    corpus = corpus_of(manifests, accents, asr.extractor, folder / "corpus", report)
    train = corpus.select("train")
    encode_corpus(corpus, asr.models["base"], folder / "states", train, 0, report)
    train_recogniser(
        corpus, [GENERAL, *accents], recogniser_stages(train), folder / "recogniser",
        rate=1.5e-3, seed=0, report=report, device=str(asr.device),
    )  # fmt: skip


def corpus_of(
    manifests: Mapping[str, Sequence[Line]], accents: Sequence[str], extractor: Any, folder: Path, report: Report
) -> Corpus:
    """Mel features of the recordings of each split, or those that the folder has already.

    Speech in an accent that is not among `accents` is of the domain "unseen".

    Raises SpeechError if a recording cannot be read.
    """
    if (folder / "index.parquet").is_file():
        return Corpus(folder)
    domains = {GENERAL: GENERAL, **dict.fromkeys(accents, "accent")}
    lines = [(split, line) for split in SPLITS for line in manifests[split]]

    def rows() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for number, (split, line) in enumerate(lines):
            if number % 100 == 0:
                report(f"speech: {number} of {len(lines)} recordings read")
            try:
                audio = line.decode()
            except AudioError as error:
                raise SpeechError(
                    "speech.not_read",
                    "{reason} It is line {number} of the {split} manifest; mend or remove it.",
                    reason=error,
                    number=line.number,
                    split=split,
                ) from None
            row: dict[str, Any] = {
                "split": split, "domain": domains.get(line.accent, "unseen"), "accent": line.accent,
                "text": line.text, "speaker": line.speaker, "utterance": line.name, "seconds": audio.seconds,
            }  # fmt: skip
            yield row, stored_mel_features(extractor, framed(audio.samples, spoken(audio.samples))[0])

    write_corpus(folder, rows())
    return Corpus(folder)
