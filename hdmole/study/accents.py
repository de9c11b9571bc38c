"""Train an accent recogniser on the frozen encoder of a model, and measure its calibration.

A posterior that is surer than it is right routes wrongly with confidence. So the temperature is
chosen on speakers that the training has not heard, and accuracy and calibration are measured on
speakers that neither has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hdmole.errors import UserError
from hdmole.files import write_json
from hdmole.names import GENERAL
from hdmole.speech.asr import ASR
from hdmole.speech.manifest import Line
from hdmole.study.results import provenance
from hdmole.training.preparation import SPLITS, corpus_of, encode_layers, recogniser_stages, train_recogniser

MEASURED = "accents.json"  # beside the recogniser
HELD_OUT = 0.15  # share of an accent's speakers on which the temperature is chosen, and again on which it is measured
RATE = 1.5e-3  # peak learning rate
BINS = 10  # of confidence, for the calibration error


class AccentsError(UserError):
    """Speech that no accent recogniser can be trained on. The codes begin with `accents.`"""


def split_speakers(lines: Sequence[Line], seed: int) -> dict[str, list[Line]]:
    """Lines for training, dev and test, by speaker; each accent has speakers in all three.

    Raises AccentsError if a line names no speaker, a speaker has several accents, an accent has
    fewer than three speakers, or there is no accent but the general one.
    """
    accents: dict[str, str] = {}
    for line in lines:
        if line.speaker == f"line-{line.number}":
            sentence = (
                "Line {number} names no speaker; name one on each line, as speakers are held out to calibrate the recogniser."
            )
            raise AccentsError("accents.no_speaker", sentence, number=line.number)
        if accents.setdefault(line.speaker, line.accent) != line.accent:
            sentence = "Speaker {speaker} has the accents {one} and {other}; give each speaker one."
            raise AccentsError(
                "accents.two_accents", sentence, speaker=line.speaker, one=accents[line.speaker], other=line.accent
            )
    if not set(accents.values()) - {GENERAL}:
        raise AccentsError("accents.none", "The manifest has no accent but the general one; there is nothing to recognise.")
    split: dict[str, str] = {}
    for accent in sorted(set(accents.values())):
        speakers = sorted((s for s in accents if accents[s] == accent), key=lambda s: sha256(f"{seed} {s}".encode()).digest())
        if len(speakers) < 3:
            sentence = "The accent {accent} has {count} speakers; it needs three: one to train, to calibrate and to measure on."
            raise AccentsError("accents.few_speakers", sentence, accent=accent, count=len(speakers))
        held = max(1, round(HELD_OUT * len(speakers)))
        split |= {s: "dev" if k < held else "test" if k < 2 * held else "train" for k, s in enumerate(speakers)}
    return {name: [line for line in lines if split[line.speaker] == name] for name in SPLITS}


def calibration_error(posteriors: np.ndarray, targets: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017), from 0 to 1.

    Utterances are put into `BINS` equal bins of confidence, the largest class probability. In each
    bin accuracy and mean confidence are compared; the differences are weighted by the bin's share.

    Args:
        posteriors: (utterances, N + 1).
        targets: class of each utterance, (utterances,).
    """
    confidence, right = posteriors.max(1), posteriors.argmax(1) == targets
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(sum(abs((right[bins == b] - confidence[bins == b]).sum()) for b in np.unique(bins)) / len(targets))


def train_accents(asr: ASR, lines: Sequence[Line], out: Path, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Train a recogniser of the accents of a manifest, and write it and `MEASURED` into a folder.

    It reads the outputs of the frozen encoder's layers, so the encoder has to run only once for
    recognition and transcription together.

    Args:
        asr: the model whose frozen base is used.
        lines: the speech; "general" is the accent of the general domain.
        out: folder of the recogniser, which `AccentRecogniser.load` reads.
        seed: random seed of the split and the training.
        report: called with each line about the progress.

    Returns:
        What `MEASURED` holds: of the test speakers `accuracy`, its mean over classes
        `balanced_accuracy`, mean `confidence` and calibration error `ece`, for all utterances and
        for each accent; the `confusion` matrix (spoken, recognised); and how it was made.

    Raises:
        AccentsError: see `split_speakers`.
        SpeechError: a recording cannot be read.
    """
    splits = split_speakers(lines, seed)
    labels = [GENERAL, *sorted({line.accent for line in lines} - {GENERAL})]
    base, device = asr.models["base"], str(asr.device)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix="work-") as name:
        work = Path(name)
        corpus = corpus_of(splits, labels[1:], asr.extractor, work / "corpus", report)
        layered = encode_layers(corpus, base, work / "layers", list(range(len(corpus.index))), report)
        mels = torch.from_numpy(np.array(corpus.features(0), np.float32))[None].to(asr.device)
        with torch.no_grad():
            width = base.encode(mels, torch.ones(mels.shape[:2], dtype=torch.bool, device=asr.device))[0].shape[-1]
        recogniser, posteriors = train_recogniser(
            layered, labels, recogniser_stages(layered.select("train")), work / "recogniser", rate=RATE, seed=seed, report=report,
            device=device, layers=layered.mels.shape[1] // width,
        )  # fmt: skip
        recogniser.save(out)
        index, rows = corpus.index, np.array(corpus.select("test"))
    targets, pi = np.array([labels.index(accent) for accent in index.accent])[rows], posteriors[rows]
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (targets, pi.argmax(1)), 1)

    def measured(these: np.ndarray) -> dict[str, Any]:
        return {
            "utterances": int(these.sum()),
            "speakers": int(index.speaker.iloc[rows[these]].nunique()),
            "accuracy": round(float((pi[these].argmax(1) == targets[these]).mean()), 4),
            "confidence": round(float(pi[these].max(1).mean()), 4),
            "ece": round(calibration_error(pi[these], targets[these]), 4),
        }

    accents = {label: measured(targets == k) for k, label in enumerate(labels) if (targets == k).any()}
    found: dict[str, Any] = {
        **measured(np.ones(len(rows), bool)),
        "balanced_accuracy": round(float(np.mean([of["accuracy"] for of in accents.values()])), 4),
        "accents": accents,
        "labels": labels,
        "confusion": confusion.tolist(),
        "temperature": round(float(recogniser.temperature), 4),
        "training": {
            split: {"utterances": len(of), "speakers": len({line.speaker for line in of})} for split, of in splits.items()
        },
        "provenance": provenance(seed, device).to_dict(),
    }
    write_json(out / MEASURED, found)
    return found
