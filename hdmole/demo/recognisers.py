"""Other accent recognisers for the demo speech, for comparisons that ask how much they matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hdmole.method.recogniser import AccentRecogniser
from hdmole.names import GENERAL
from hdmole.speech.loading import ModelError
from hdmole.training.adapt import load_base
from hdmole.training.data import Corpus
from hdmole.training.preparation import encode_layers, posteriors_of, train_recogniser

EARLY = 0.63  # share of dev utterances that the early recogniser knows, as in the paper's Table II
RATE = 1.5e-3
EPOCHS = 6.0, 6.0  # of the better recogniser, on plain and on masked features
GENERAL_SHARE, REAL_SHARE = 0.5, 0.25  # utterances in its training, as shares of the accented ones


def recognisers(work: Path, seed: int, report: Callable[[str], None]) -> None:
    """Train an early and a better recogniser on the speech of a work folder of `hdmole demo build`.

    The early one is that of the demo model, stopped once it knows `EARLY` of the dev utterances.
    The better one reads a learned weighted sum of the frozen encoder's layers. Each is written with
    its posteriors to the folders `recogniser-early` and `recogniser-better`, also for the speech in
    unseen accents. What is there is not made again.

    Raises:
        ModelError: the folder lacks the base, the speech or the recogniser.
    """
    for file in ("base/config.json", "corpus/index.parquet", "recogniser/config.json", "unseen/corpus/index.parquet"):
        if not (work / file).is_file():
            sentence = "{work} has no {file}; run 'hdmole demo build --work {work}' first."
            raise ModelError("model.no_work", sentence, work=work, file=file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus, labels = Corpus(work / "corpus"), AccentRecogniser.load(work / "recogniser").labels
    unseen = Corpus(work / "unseen" / "corpus")
    accented = corpus.select("train", "accent")
    rng = np.random.default_rng(seed)
    rows = list(accented)
    for share, domains in ((GENERAL_SHARE, (GENERAL,)), (REAL_SHARE, ("real_digits", "real_sentences"))):
        rows += rng.permutation(corpus.select("train", *domains))[: round(share * len(accented))].tolist()
    rows.sort()
    early, _ = train_recogniser(
        corpus, labels, [("clear", rows, False, 9.0)], work / "recogniser-early", rate=RATE, seed=seed, report=report,
        device=device, until=EARLY,
    )  # fmt: skip
    _of_unseen(early, unseen, work / "unseen" / "recogniser-early")

    judged = [i for split in ("dev", "test") for i in corpus.select(split) if not corpus.index.domain[i].startswith("outside")]
    base = load_base(work / "base", device)
    layers = encode_layers(corpus, base, work / "layers", [*rows, *judged], report)
    heard = encode_layers(unseen, base, work / "unseen" / "layers", list(range(len(unseen.index))), report)
    clear, masked = EPOCHS
    better, _ = train_recogniser(
        layers, labels, [("clear", rows, False, clear), ("masked", rows, True, masked)], work / "recogniser-better",
        rate=RATE, seed=seed, report=report, device=device,
        layers=base.config.audio_config.encoder_config.num_hidden_layers + 1,
    )  # fmt: skip
    _of_unseen(better, heard, work / "unseen" / "recogniser-better")


def _of_unseen(recogniser: AccentRecogniser, corpus: Corpus, folder: Path) -> None:
    """Write a recogniser and its posteriors of speech in unseen accents."""
    if not (folder / "posteriors.npy").is_file():
        recogniser.save(folder)
        np.save(folder / "posteriors.npy", posteriors_of(recogniser, corpus))
