"""Readers of formats: Kaldi folders, manifests of NeMo and lhotse, tables, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdmole.corpora.rows import CorpusError, Row, as_text, find_fields, one_file, table_rows, text_lines
from hdmole.errors import UserError
from hdmole.speech.manifest import manifest_rows, part

_ABOVE = 5  # folders above a list of files in which relative paths are looked for
_AT_ONCE = 64  # rows of a Hugging Face dataset in memory
_WHOLE = 0.01  # seconds by which a part may differ from its whole file


# --- Kaldi ------------------------------------------------------------------------------------


def kaldi(
    folder: Path, columns: Mapping[str, str], audio: Callable[[str], Path] | None = None, accents: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The utterances of a Kaldi data folder (https://kaldi-asr.org/doc/data_prep.html).

    `wav.scp` and `text` must be there. `segments`, `utt2spk`, and accents in `utt2accent`,
    `utt2subdialect`, `utt2dialect`, `spk2accent` or `spk2dialect` are read where they are there.
    Relative paths are looked for from the folder, then from those above it.

    Args:
        folder: the data folder.
        columns: "accent" may name another file of accents, by utterance or, with a name that begins
            with "spk", by speaker.
        audio: the file of a recording by its name, in place of `wav.scp`.
        accents: accents by speaker, in place of files.

    Raises:
        CorpusError: a file is missing or damaged, or a recording is a command or lies in an
            archive.
    """
    if audio is None:
        files, found = mapping(folder / "wav.scp"), Paths(folder)
        recordings = {name: found.find(_plain_file(name, value)) for name, value in files.items()}
    else:
        recordings = {}
    texts = mapping(folder / "text")
    speakers = mapping(folder / "utt2spk", needed=False)
    file = columns.get("accent") or next(
        (n for n in ("utt2accent", "utt2subdialect", "utt2dialect", "spk2accent", "spk2dialect") if (folder / n).is_file()), ""
    )
    by_utterance = mapping(folder / file) if file and accents is None and not file.startswith("spk") else {}
    by_speaker = accents if accents is not None else mapping(folder / file) if file.startswith("spk") else {}
    for name, recording, offset, duration in _segments(folder, recordings):
        if audio is None and recording not in recordings:
            sentence = "The file segments in {folder} names the recording {recording}, which wav.scp does not have."
            raise CorpusError("corpus.no_such_recording", sentence, folder=folder, recording=recording)
        speaker = speakers.get(name, "")
        accent = by_utterance.get(name) or by_speaker.get(speaker, "")
        path = recordings[recording] if audio is None else audio(recording)
        yield Row(path, texts.get(name, ""), accent, speaker, offset, duration)


def _segments(folder: Path, recordings: Mapping[str, Path]) -> Iterator[tuple[str, str, float, float | None]]:
    """Name, recording, offset and duration (s) of each utterance. An end of -1 is the file's."""
    file = folder / "segments"
    if not file.is_file() and recordings:
        yield from ((name, name, 0.0, None) for name in recordings)
        return
    for number, line in text_lines(file):
        try:
            name, recording, *times = line.split()
            start, end = map(float, times)
            if start < 0 or (end != -1 and not end > start):
                raise ValueError
        except ValueError:
            sentence = "Line {number} of {name} is not a name, a recording, a start and an end in seconds."
            raise CorpusError("corpus.bad_segment", sentence, number=number, name=file) from None
        yield name, recording, start, None if end == -1 else round(end - start, 6)


def mapping(file: Path, needed: bool = True) -> dict[str, str]:
    """A file of Kaldi with a name and its value on each line; the value may be empty.

    Raises CorpusError if it is needed and not there, or has a name twice.
    """
    found: dict[str, str] = {}
    if not needed and not file.is_file():
        return found
    for number, line in text_lines(file):
        name, *value = line.split(maxsplit=1)
        if name in found:
            sentence = "Line {number} of {name} has {key} for a second time; leave one of the two."
            raise CorpusError("corpus.twice", sentence, number=number, name=file, key=name)
        found[name] = value[0].strip() if value else ""
    return found


def _plain_file(name: str, value: str) -> str:
    """The value of a recording in wav.scp, if it is a file. Raises CorpusError."""
    if "|" in (value[-1:], value[:1]):
        sentence = (
            "The recording {name} in wav.scp is a command ({value}), which is never run here; write its output to a file and "
            "name that. SPHERE files are read as they are."
        )
        raise CorpusError("corpus.command", sentence, name=name, value=value)
    if value.rpartition(":")[2].isdigit() and ":" in value[2:]:
        sentence = "The recording {name} in wav.scp lies in an archive ({value}), which is not read here; name a file of its own."
        raise CorpusError("corpus.archive", sentence, name=name, value=value)
    return value


class Paths:
    """Relative paths of a list of files, looked for from its folder and from those above it."""

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        self._bases = [folder, *folder.parents][: _ABOVE + 1]

    def find(self, name: str) -> Path:
        """The file; where there is none, the path from the folder."""
        for base in self._bases:
            if (base / name).is_file():
                if base != self._bases[0]:  # the next one will lie there too
                    self._bases = [base, *(other for other in self._bases if other != base)]
                return base / name
        return self._bases[0] / name


# --- NeMo and tables --------------------------------------------------------------------------


def nemo(place: Path, columns: Mapping[str, str], split: str = "") -> Iterator[Row]:
    """The lines of a manifest of NeMo: `audio_filepath`, `text`, `offset`, `duration` and others.

    Raises CorpusError, or ManifestError that names a line.
    """
    file = one_file(place, split, r"\.(json|jsonl)$", "manifest (.json or .jsonl)")
    paths = Paths(file.parent)
    for number, row in manifest_rows(file, ()):
        fields = find_fields(row, columns, f"Line {number} of {file.name}", every_row=False)
        if not isinstance(row[fields["audio"]], str):
            sentence = (
                "Line {number} of {name} does not name one audio file; tarred and multi-channel manifests are not read here."
            )
            raise CorpusError("corpus.not_one_file", sentence, number=number, name=file.name)
        offset, duration = part(number, file.name, row)
        accent, speaker = (as_text(row.get(fields.get(what, ""))) for what in ("accent", "speaker"))
        yield Row(paths.find(row[fields["audio"]]), as_text(row[fields["text"]]), accent, speaker, offset, duration)


def table(
    place: Path, columns: Mapping[str, str], split: str = "", audio: Path | None = None, quoted: bool = True
) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a heading.

    `offset` and `duration` in seconds are obeyed. Paths are relative to the table's folder or one
    above it, or to the folder `audio`.

    Raises CorpusError, or ManifestError for a row whose offset or duration is not understood.
    """
    file = one_file(place, split, r"\.(csv|tsv)$", "table (.csv or .tsv)")
    paths, fields = Paths(audio or file.parent), None
    for number, row in enumerate(table_rows(file, quoted), 2):
        fields = fields or find_fields(row, columns, file.name)
        offset, duration = part(number, file.name, row)
        accent, speaker = (row.get(fields.get(what, ""), "").strip() for what in ("accent", "speaker"))
        yield Row(paths.find(row[fields["audio"]]), row[fields["text"]], accent, speaker, offset, duration)


# --- lhotse -----------------------------------------------------------------------------------


def lhotse(place: Path, columns: Mapping[str, str], split: str = "") -> Iterator[Row]:
    """The supervisions of lhotse's manifests: cuts, or recordings with supervisions.

    Raises:
        CorpusError: there are no such manifests, they cannot be read, or audio is no plain file.
    """
    from lhotse import CutSet, SupervisionSet, load_manifest_lazy

    pattern = r"(cuts|supervisions).*\.jsonl(\.gz)?$"
    file = one_file(place, split, pattern, "manifest of cuts or supervisions (.jsonl or .jsonl.gz)")
    with reading(file.name):
        found = load_manifest_lazy(file)
        if isinstance(found, CutSet):
            yield from (row for cut in found for row in _cut(cut, columns, Paths(file.parent)))
            return
        if not isinstance(found, SupervisionSet):
            sentence = "{name} holds no cuts and no supervisions; give the manifest that does."
            raise CorpusError("corpus.other_manifest", sentence, name=file.name)
        beside = file.with_name(file.name.replace("supervisions", "recordings"))
        if beside == file or not beside.is_file():
            sentence = "There is no {beside} beside {name}, which would say where the audio is."
            raise CorpusError("corpus.no_recordings", sentence, beside=beside.name, name=file.name)
        recordings = {recording.id: recording for recording in load_manifest_lazy(beside)}
        yield from supervised(recordings, found, columns, Paths(file.parent))


def supervised(
    recordings: Mapping[str, Any], supervisions: Iterable[Any], columns: Mapping[str, str], paths: Paths
) -> Iterator[Row]:
    """lhotse's supervisions, with the file of each.

    Raises CorpusError where the audio is no plain file.
    """
    for supervision in supervisions:
        if supervision.recording_id not in recordings:
            sentence = "The supervision {name} belongs to the recording {recording}, which is not there."
            raise CorpusError("corpus.no_such_recording", sentence, name=supervision.id, recording=supervision.recording_id)
        yield _supervised(recordings[supervision.recording_id], supervision, supervision.start, columns, paths)


def _cut(cut: Any, columns: Mapping[str, str], paths: Paths) -> Iterator[Row]:
    """The supervisions of a cut. Raises CorpusError if it is mixed, or has no recording."""
    if type(cut).__name__ not in ("MonoCut", "MultiCut") or not cut.has_recording:
        sentence = "The cut {name} is mixed, padded, or has features only; save cuts of plain recordings."
        raise CorpusError("corpus.mixed_cut", sentence, name=cut.id)
    for supervision in cut.supervisions:
        yield _supervised(cut.recording, supervision, cut.start + supervision.start, columns, paths)


def _supervised(recording: Any, supervision: Any, start: float, columns: Mapping[str, str], paths: Paths) -> Row:
    """A supervision that begins `start` seconds into a recording. Raises CorpusError."""
    [*sources] = recording.sources
    if [source.type for source in sources] != ["file"]:
        sentence = "The audio of {name} is no plain file ({kind}); commands are never run, and nothing is downloaded here."
        raise CorpusError(
            "corpus.command", sentence, name=recording.id, kind=", ".join(source.type for source in sources) or "none"
        )
    changes = recording.transforms or []
    names = [change["name"] if isinstance(change, dict) else type(change).__name__ for change in changes]
    if changed := [name for name in names if name != "Resample"]:
        sentence = "The audio of {name} is changed while it is loaded ({changes}); save it as it is to be heard."
        raise CorpusError("corpus.transformed", sentence, name=recording.id, changes=", ".join(changed))
    channels = supervision.channel if isinstance(supervision.channel, list) else [supervision.channel]
    if set(channels) != set(recording.channel_ids):
        sentence = "{name} means one of {count} channels; save each channel as a file of its own."
        raise CorpusError("corpus.channel", sentence, name=supervision.id, count=recording.num_channels)
    known = {**supervision.to_dict(), **(supervision.custom or {}), "audio": "", "text": supervision.text}
    fields = find_fields(known, columns, supervision.id, every_row=False)
    whole = abs(start) < _WHOLE and abs(supervision.duration - recording.duration) < _WHOLE
    text, accent, speaker = (as_text(known.get(fields.get(what, ""))) for what in ("text", "accent", "speaker"))
    part = (0.0, None) if whole else (round(max(start, 0.0), 6), round(supervision.duration, 6))
    return Row(paths.find(sources[0].source), text, accent, speaker, *part)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """In the block, whatever goes wrong in a library becomes a CorpusError about `what`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        sentence = "Reading {what} needs the package {package}; install it with pip install {package}."
        raise CorpusError("corpus.package", sentence, what=what, package=error.name) from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        sentence = "{what} cannot be read ({reason}); docs/data.md says which files belong where."
        raise CorpusError("corpus.unreadable", sentence, what=what, reason=reason) from error


# --- Hugging Face datasets --------------------------------------------------------------------


def hugging_face(folder: Path, columns: Mapping[str, str], split: str = "") -> Iterator[Row]:
    """The rows of a Hugging Face dataset on this disk.

    - A folder of `save_to_disk`: `state.json` and Arrow files, or a subfolder for each split.
    - An audiofolder: `metadata.csv` or `metadata.jsonl` with `file_name` beside the audio, in the
      folder or in a subfolder for each split.
    - A clone from the hub: `SPLIT-*.parquet`, in the folder or below it.

    Embedded audio comes as bytes. What a class label means is read from the dataset.

    Raises CorpusError if it is none of these, has several splits of which none is chosen, or
    has no columns of audio and text.
    """
    if not folder.is_dir():
        raise CorpusError("corpus.no_folder", "There is no folder {folder}; give that of the dataset.", folder=folder)
    within = folder / split if split and (folder / split).is_dir() else folder
    if within == folder and (below := sorted({f.parent.name for n in _DATASETS for f in folder.glob(f"*/{n}")})):
        sentence = "The dataset {folder} has the splits {splits}; choose one with --split."
        raise CorpusError("corpus.split", sentence, folder=folder, splits=", ".join(below))
    for name in ("metadata.csv", "metadata.jsonl"):
        if (within / name).is_file():
            yield from (table if name.endswith(".csv") else nemo)(within / name, columns)
            return
    with reading(folder):
        if (within / "state.json").is_file():
            import pyarrow

            state = json.loads((within / "state.json").read_text(encoding="utf-8"))
            for number, data in enumerate(state["_data_files"]):
                with pyarrow.memory_map(str(within / data["filename"])) as source:
                    stream = pyarrow.ipc.open_stream(source)
                    batches = (batch.slice(k, _AT_ONCE) for batch in stream for k in range(0, batch.num_rows, _AT_ONCE))
                    yield from _embedded(batches, stream.schema, columns, within, number)
            return
        from pyarrow import parquet

        files = sorted(folder.rglob("*.parquet"))
        splits = sorted({file.name.split("-")[0].removesuffix(".parquet") for file in files})
        if split:
            files = [file for file in files if file.name.split("-")[0].removesuffix(".parquet") == split]
        elif len(splits) > 1:
            sentence = "The dataset {folder} has the splits {splits}; choose one with --split."
            raise CorpusError("corpus.split", sentence, folder=folder, splits=", ".join(splits))
        if not files:
            sentence = (
                "{folder} holds no Hugging Face dataset{split}: no state.json, no metadata.csv or .jsonl, no Parquet files."
            )
            raise CorpusError("corpus.no_dataset", sentence, folder=folder, split=f" with the split {split}" if split else "")
        for number, file in enumerate(files):
            opened = parquet.ParquetFile(file)
            yield from _embedded(opened.iter_batches(_AT_ONCE), opened.schema_arrow, columns, file.parent, number)


_DATASETS = ("state.json", "metadata.csv", "metadata.jsonl")


def _embedded(batches: Iterable[Any], schema: Any, columns: Mapping[str, str], folder: Path, number: int) -> Iterator[Row]:
    """The rows of the file `number` of a dataset, with audio as its path or its bytes."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    labels = {
        name: kind["names"] for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }
    fields, paths, count = find_fields(schema.names, columns, str(folder)), Paths(folder), 0
    for batch in batches:
        for row in batch.select([*dict.fromkeys(fields.values())]).to_pylist():
            said = {
                what: as_text(labels[name][row[name]] if name in labels and isinstance(row[name], int) else row[name])
                for what, name in fields.items()
                if what != "audio"
            }
            audio = row[fields["audio"]]
            audio = audio if isinstance(audio, dict) else {"path": as_text(audio)}
            content, name = audio.get("bytes"), as_text(audio.get("path"))
            file = paths.find(name) if content is None else Path(f"{number:04d}-{count:07d}{Path(name).suffix[:8] or '.wav'}")
            yield Row(file, said["text"], said.get("accent", ""), said.get("speaker", ""), content=content)
            count += 1
