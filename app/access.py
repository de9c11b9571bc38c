"""What a visitor may open on this machine, and how files are named to visitors.

* Results and manifests are opened in the folders that were named at the start (`hdmole app --data
  DIR`), in the model's folder and in the repository's assets. Nothing else is, and nothing is said
  about whether it exists.
* The evaluations of this app are opened by a key that only those know who have the address.
* Audio that results name is played from these same folders, and only if it is audio.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from hdmole.errors import UserError
from hdmole.speech.manifest import find_inside

ROOT = Path(__file__).resolve().parent.parent
_evaluations: dict[str, Path] = {}  # key -> folder of an evaluation that this app made


class AccessError(UserError):
    """A visitor asked for something that is not theirs to open."""


def data_folders() -> list[Path]:
    """The folders that `hdmole app --data` named, from the environment variable `HDMOLE_DATA`."""
    return [Path(name).absolute() for name in os.environ.get("HDMOLE_DATA", "").split(os.pathsep) if name]


def open_folders(model: Path) -> list[Path]:
    """All folders whose content visitors may open.

    `model` is the folder of the model that is shown.
    """
    model = model.absolute()
    found = [ROOT / "assets", model, *data_folders()]
    if model.parent.name == "snapshots":  # a model from the hub consists of links to these
        found.append(model.parent.parent / "blobs")
    return found


def evaluation_key(folder: Path) -> str:
    """The key under which an evaluation's folder is opened; the same each time."""
    known = {path: key for key, path in _evaluations.items()}
    key = known.get(folder) or f"evaluation-{secrets.token_urlsafe(16)}"
    _evaluations[key] = folder
    return key


def results_folder(given: str, model: Path) -> Path:
    """The results folder that a visitor named, by a key or by a path.

    Raises AccessError where it is not to be opened.
    """
    if given in _evaluations:
        return _evaluations[given] / "results"
    found = _find(given, model)
    if found is None:
        raise AccessError(
            "access.results",
            "Results of this name cannot be opened here; choose some from the list, or start the app with `--data FOLDER`, "
            "which opens what lies in FOLDER.",
        )
    return found


def manifest_file(given: str, model: Path) -> Path:
    """The manifest that a visitor named by its path.

    Raises AccessError where it is not to be opened.
    """
    found = _find(given, model)
    if found is None:
        raise AccessError(
            "access.manifest",
            "A manifest of this name cannot be opened here; upload a ZIP, or start the app with `--data FOLDER`, which opens what "
            "lies in FOLDER.",
        )
    return found


def _find(given: str, model: Path) -> Path | None:
    roots = open_folders(model)
    found = [find_inside(folder / given, roots) for folder in (Path.cwd(), *data_folders())]
    allowed = [path for path in found if path is not None and len(path.name) < 256]  # no file system has longer names
    return next((path for path in allowed if os.path.exists(path)), allowed[0] if allowed else None)


def audio_of(results: Path, named: str, model: Path) -> bytes | None:
    """The content of the audio file that results in a folder name.

    None where it is no audio, or not to be opened.
    """
    own = [results, *(folder for folder in _evaluations.values() if results == folder / "results")]
    path = find_inside(results / named, [*own, *open_folders(model)])
    try:
        content = path.read_bytes() if path is not None and path.is_file() else b""
    except (OSError, ValueError):
        return None
    return content if audio_type(content) else None


_STARTS = [
    (rb"(RIFF|RIFX|RF64)....WAVE", "audio/wav"), (rb"fLaC", "audio/flac"), (rb"OggS", "audio/ogg"), (rb"\x1aE\xdf\xa3", "audio/webm"),
    (rb"....ftyp", "audio/mp4"), (rb"ID3|\xff[\xe2-\xff]", "audio/mpeg"), (rb"FORM....AIF[FC]", "audio/aiff"), (rb"caff", "audio/x-caf"),
]  # fmt: skip


def audio_type(content: bytes) -> str:
    """The media type of audio, by how its container begins.

    It is empty where browsers know no such container.

    A file's name says nothing here: one that names itself `data:text/html,x.wav` would be served as
    a page.
    """
    return next((kind for start, kind in _STARTS if re.match(start, content, re.DOTALL)), "")


def plain(text: object) -> str:
    """The text so that Markdown shows it as it is.

    No link, image, formula, icon, colour or HTML comes of it.

    An underscore inside a word has no meaning in Markdown and stays. Streamlit looks for addresses
    and icons once more in the finished text, so that an invisible character has to part these.
    """
    escaped = re.sub(r"([\\`*\[\]{}#!|<>~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))
    return re.sub(r":(?=[/\w+-])|@(?=\w)|\bwww(?=\.)", lambda found: found[0] + "\u2060", escaped, flags=re.IGNORECASE)


def hide_folders(text: str) -> str:
    """The text with only the names of the files whose paths stand in it.

    Where the server keeps them is nobody's business.
    """
    return re.sub(r"(?<![\w/:.])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'\":;,()]+[\\/])+", "", text)
