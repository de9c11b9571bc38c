"""The kinds of corpora that can be imported; `KINDS` is the table of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdmole.corpora.formats import Paths, hugging_face, kaldi, lhotse, nemo, reading, supervised, table
from hdmole.corpora.rows import CorpusError, Row, as_text
from hdmole.names import GENERAL

Columns = Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """A kind of corpus: its name for people, what FOLDER is, and how it is read."""

    name: str
    folder: str  # what the user gives
    read: Callable[[Path, Columns, str], Iterator[Row]]  # folder, columns, split
    splits: tuple[str, ...] = ()  # of which one must be chosen; empty where splits have no fixed names


def _kaldi(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    yield from kaldi(folder / split, columns)


def _kespeech(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    """Without a phase, "train" and "dev" are those of both phases."""
    below = folder / "Tasks" / "ASR"
    for part in [split] if (below / split).is_dir() else [f"{split}_phase1", f"{split}_phase2"]:
        yield from kaldi(below / part, columns)


def _speechocean(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    yield from (replace(row, accent="Mandarin") for row in kaldi(folder / split, columns))


def _edacc(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    """lhotse reads the questionnaire.

    Its recipe writes `wav.scp` into the corpus, which is not done here.
    """
    folder = folder / "edacc_v1.0" if (folder / "edacc_v1.0").is_dir() else folder
    from lhotse.recipes.edacc import parse_linguistic_background

    asked = parse_linguistic_background(folder / "linguistic_background.csv")
    accents = {speaker: as_text(answers[columns.get("accent", "accent")]) for speaker, answers in asked.items()}
    yield from kaldi(folder / split, {}, lambda recording: folder / "data" / f"{recording}.wav", accents)


def _common_voice(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    yield from table(folder / f"{split}.tsv", columns, audio=folder / "clips", quoted=False)


_REGIONS = (
    "New England", "Northern", "North Midland", "South Midland", "Southern", "New York City", "Western", "Army Brat",
)  # fmt: skip


def _timit(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    """Files of the LDC, in capital or small letters; `dev` and `core` are the usual speakers.

    lhotse's recipe reads a copy with another layout only; from it come the lists of speakers.
    """
    from lhotse.recipes.timit import get_speakers

    speakers = dict(zip(("dev", "core"), map(set, get_speakers()), strict=True)).get(split)
    for file in sorted(folder.rglob("*")):
        parts = [name.casefold() for name in file.parts[-4:]]
        if len(parts) < 4 or not re.fullmatch(r"[^.]+\.wav", parts[3]) or not re.fullmatch("dr[1-8]", parts[1]):
            continue
        if parts[0] != ("train" if split == "train" else "test") or (speakers is not None and parts[2] not in speakers):
            continue
        prompt = next((other for ending in (".TXT", ".txt") if (other := file.with_suffix(ending)).is_file()), None)
        text = " ".join(prompt.read_text(encoding="utf-8", errors="replace").split()[2:]) if prompt else ""
        yield Row(file, text, _REGIONS[int(parts[1][2]) - 1], parts[2])


def _aishell(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    from lhotse.recipes.aishell import prepare_aishell

    folder = folder.parent if folder.name == "data_aishell" else folder
    yield from _prepared(prepare_aishell(folder)[split], folder, columns, GENERAL)


def _aishell2(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    from lhotse.recipes.aishell2 import prepare_aishell2

    folder = folder.parent if folder.name == "AISHELL-2" else folder
    yield from _prepared(prepare_aishell2(folder)[split], folder, columns, GENERAL)


def _wenetspeech(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    from lhotse.recipes.wenet_speech import prepare_wenet_speech

    yield from _prepared(prepare_wenet_speech(folder, [split])[split], folder, columns, GENERAL)


def _l2arctic(folder: Path, columns: Columns, split: str) -> Iterator[Row]:
    from lhotse.recipes.l2_arctic import prepare_l2_arctic

    yield from _prepared(prepare_l2_arctic(folder)[split], folder, columns)


def _prepared(found: Mapping[str, Any], folder: Path, columns: Columns, accent: str = "") -> Iterator[Row]:
    """What a recipe of lhotse has found; `accent` is that of rows without one."""
    recordings = {recording.id: recording for recording in found["recordings"]}
    for row in supervised(recordings, found["supervisions"], columns, Paths(folder)):
        yield replace(row, accent=row.accent or accent)


_CHINESE = ("train", "dev", "test")
KINDS = {
    "kaldi": Kind("Kaldi", "data folder with wav.scp and text", _kaldi),
    "nemo": Kind("NeMo", "manifest, or its folder", nemo),
    "lhotse": Kind("lhotse", "manifest of cuts or supervisions, or its folder", lhotse),
    "csv": Kind("CSV or TSV", "table with a heading, or its folder", table),
    "huggingface": Kind("Hugging Face dataset", "folder of save_to_disk, an audiofolder, or Parquet files", hugging_face),
    "commonvoice": Kind(
        "Common Voice", "folder of a language, with clips/", _common_voice, ("train", "dev", "test", "validated", "other", "invalidated")
    ),
    "kespeech": Kind(
        "KeSpeech", "folder with Audio/ and Tasks/", _kespeech,
        (*_CHINESE, "train_phase1", "train_phase2", "dev_phase1", "dev_phase2"),
    ),
    "aishell": Kind("AISHELL-1", "folder with data_aishell/", _aishell, _CHINESE),
    "aishell2": Kind("AISHELL-2", "folder with AISHELL-2/", _aishell2, _CHINESE),
    "wenetspeech": Kind(
        "WenetSpeech", "folder with WenetSpeech.json and audio/", _wenetspeech, ("L", "M", "S", "DEV", "TEST_NET", "TEST_MEETING")
    ),
    "l2arctic": Kind("L2-ARCTIC", "folder with one folder for each speaker", _l2arctic, ("read", "suitcase")),
    "edacc": Kind("EdAcc", "folder with edacc_v1.0/", _edacc, ("dev", "test")),
    "speechocean762": Kind("speechocean762", "folder with train/, test/ and WAVE/", _speechocean, ("train", "test")),
    "timit": Kind("TIMIT", "folder with TRAIN/ and TEST/", _timit, ("train", "dev", "core", "test")),
}  # fmt: skip


def read_corpus(kind: str, folder: Path, split: str = "", columns: Columns | None = None) -> Iterator[Row]:
    """The recordings of a corpus, one after the other.

    Args:
        kind: a key of `KINDS`.
        folder: what `Kind.folder` says.
        split: the part of the corpus; needed where `Kind.splits` has some.
        columns: the fields in which audio, text, accent and speaker stand, where these are not
            among the usual names; see `rows.FIELDS`.

    Raises:
        CorpusError: there is no such kind or split, or the corpus cannot be read.
        ManifestError: a line of a manifest cannot be obeyed.
    """
    if kind not in KINDS:
        sentence = "There is no kind of corpus {kind}; choose one of {kinds}."
        raise CorpusError("corpus.no_such_kind", sentence, kind=kind, kinds=", ".join(KINDS))
    about = KINDS[kind]
    if about.splits and split not in about.splits:
        sentence = "{name} has the parts {splits}; choose one with --split."
        raise CorpusError("corpus.split", sentence, name=about.name, splits=", ".join(about.splits))
    if not folder.exists():
        raise CorpusError("corpus.no_folder", "There is no {folder}; give the {what}.", folder=folder, what=about.folder)
    with reading(f"{about.name} in {folder}"):
        yield from about.read(folder, columns or {}, split)
