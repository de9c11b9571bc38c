"""What a reader of a corpus gives, and what readers share."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdmole.errors import UserError


class CorpusError(UserError):
    """A corpus that cannot be read. The codes begin with `corpus.`"""


@dataclass(frozen=True)
class Row:
    """One recording of a corpus."""

    audio: Path  # of the file; of embedded audio its name
    text: str
    accent: str = ""  # empty where the corpus names none
    speaker: str = ""
    offset: float = 0.0  # seconds into the file
    duration: float | None = None  # seconds; None for all that follows
    content: bytes | None = field(default=None, repr=False)  # of embedded audio


# What corpora call the fields, in small letters; the first that is there is taken.
FIELDS = {
    "audio": (
        "audio", "audio_filepath", "audio_path", "audio_file", "file_name", "filename", "filepath", "file_path", "file", "path", "wav",
    ),
    "text": ("text", "sentence", "transcript", "transcription", "raw_transcription"),
    "accent": ("accent", "accents", "dialect", "subdialect", "native_language", "native_lang", "l1"),
    "speaker": ("speaker", "speaker_id", "client_id", "spk", "spk_id"),
}  # fmt: skip


def find_fields(known: Iterable[str], columns: Mapping[str, str], where: str, every_row: bool = True) -> dict[str, str]:
    """Which of the `known` fields of a corpus hold audio, text, accent and speaker.

    Args:
        known: names of the corpus's fields.
        columns: the user's choice, such as {"accent": "region"}; it comes before `FIELDS`.
        where: what messages call the corpus.
        every_row: whether all rows have the same fields, so that none may lack what the user names.

    Raises:
        CorpusError: there is no field for audio or text, or none of the name that the user gives.
    """
    known = [str(name) for name in known]
    small = {name.strip().casefold(): name for name in reversed(known)}
    found = {}
    for wanted, usual in FIELDS.items():
        needed = wanted in ("audio", "text")
        if wanted in columns:
            if columns[wanted] in known:
                found[wanted] = columns[wanted]
            elif needed or every_row:
                sentence = "{where} has no field {field}; it has {known}."
                raise CorpusError("corpus.no_such_field", sentence, where=where, field=columns[wanted], known=", ".join(known))
        elif name := next((small[alias] for alias in usual if alias in small), None):
            found[wanted] = name
        elif needed:
            sentence = "{where} has no field for {wanted}, it has {known}; say which holds it with --column {wanted}=NAME."
            raise CorpusError("corpus.field_missing", sentence, where=where, wanted=wanted, known=", ".join(known) or "none")
    return found


def one_file(place: Path, split: str, pattern: str, what: str) -> Path:
    """The file that a user means by a path: the file itself, or the one in a folder.

    Args:
        place: the file, or its folder.
        split: a part of the corpus; the file's name then has this word in it, or the file lies in
            the subfolder of this name.
        pattern: regular expression of the names that are looked at.
        what: what messages call such a file.

    Raises:
        CorpusError: there is none, or more than one.
    """
    if place.is_file():
        return place
    folder = place / split if split and (place / split).is_dir() else place
    files = sorted(file for file in folder.glob("*") if re.search(pattern, file.name) and file.is_file())
    if split and folder == place:
        files = [file for file in files if split.casefold() in re.split(r"[^a-z0-9]+", file.name.casefold())]
    if not files:
        sentence = "{folder} holds no {what}{split}; give the folder that does, or the file."
        raise CorpusError(
            "corpus.nothing_found", sentence, folder=folder, what=what, split=f" with {split} in its name" if split else ""
        )
    if len(files) > 1:
        sentence = "{folder} holds {names}; choose one with --split, or give the file."
        raise CorpusError("corpus.several_found", sentence, folder=folder, names=", ".join(file.name for file in files[:8]))
    return files[0]


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text in UTF-8, with their numbers from 1, without those that are empty.

    Raises CorpusError if there is no such file, or if it is not text in UTF-8.
    """
    if not file.is_file():
        sentence = "There is no {name} in {folder}; give the folder of the corpus that holds it."
        raise CorpusError("corpus.file_missing", sentence, name=file.name, folder=file.parent)
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise CorpusError("corpus.not_text", "{name} is not text in UTF-8.", name=file) from None


def table_rows(file: Path, quoted: bool = True) -> Iterator[dict[str, str]]:
    """The rows of a table with a heading, by the names of its columns.

    Columns are divided by tabs where the heading has one, else by semicolons or commas.

    Args:
        file: a text in UTF-8.
        quoted: whether quotation marks enclose cells. In tables of Common Voice they are part of
            the sentence.

    Raises:
        CorpusError: there is no such table, or it cannot be read.
    """
    _, heading = next(text_lines(file), (0, ""))
    divider = next((mark for mark in ("\t", ";") if mark in heading), ",")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines, delimiter=divider, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
            for row in reader:
                if None in row:
                    sentence = "Line {number} of {name} has more cells than the heading has columns; mend it."
                    raise CorpusError("corpus.bad_table", sentence, number=reader.line_num, name=file.name)
                yield {key: value or "" for key, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            sentence = "{name} cannot be read as a table in UTF-8 ({reason})."
            raise CorpusError("corpus.bad_table", sentence, name=file.name, reason=error) from None


def as_text(value: Any) -> str:
    """A value of a corpus as text; empty where there is none."""
    return "" if value is None or value != value else str(value).strip()
