"""Judging methods on the visitor's own recordings, and unpacking the ZIP that holds them."""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import shutil
import stat
import threading
import time
import unicodedata
import zipfile
import zlib
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING

from app import access, clips
from app.jobs import Task
from app.texts import Text
from hdmole.speech.manifest import ManifestError
from hdmole.study.evaluate import evaluate
from hdmole.study.results import Results

if TYPE_CHECKING:
    from hdmole.speech.asr import ASR

MOST_UNPACKED = 4e9  # bytes that a ZIP may unpack to
MOST_FILES = 20_000  # in a ZIP
# A file in a ZIP that is larger than so many bytes and so many times what is packed holds no
# speech.
LARGE, MOST_PACKED = 20e6, 100
KEPT = 3600.0  # seconds after its tab was closed for which the recordings of an ended evaluation are kept
_evaluations: list[Evaluation] = []  # whose recordings are on the disk


class Evaluation(Task):
    """Judges `methods` on the recordings of a manifest or of a ZIP.

    A ZIP is unpacked to `folder`/speech. The results are in the folder `out`. A ZIP may name
    its own files only, a manifest on this machine those that visitors may open. `key` names the
    results in an address.
    """

    patience = 600.0  # its results are opened again by the address, so that a reload does not end it

    def __init__(self, asr: ASR, source: Path | IO[bytes], methods: list[str], folder: Path) -> None:
        self.source, self.methods, self.folder, self.out = source, methods, folder, folder / "results"
        self.key = access.evaluation_key(folder)
        self.within = access.open_folders(asr.folder) if isinstance(source, Path) else [folder / "speech"]
        self.summary: Results | None = None
        atexit.register(shutil.rmtree, folder / "speech", ignore_errors=True)
        _evaluations.append(self)
        super().__init__(asr, Path(str(getattr(source, "name", source))).name)

    def of(self, asr: ASR) -> bool:
        """Whether it judges this model."""
        return self._asr.folder == asr.folder

    def forget(self) -> None:
        """Remove the unpacked recordings. The results stay."""
        shutil.rmtree(self.folder / "speech", ignore_errors=True)

    def outlived(self) -> bool:
        """Whether it has ended, and its tab has been closed for longer than recordings are kept."""
        return not self.running and self._closed_for() > KEPT

    def _progress(self, done: float, total: int) -> None:
        self.step = Text("{done} of {total} recordings heard", done=int(done), total=total)
        self._share = done / max(1, total)
        self.long = total > 1
        if done < total:
            self._go_on()
            self._let_others()

    def _work(self) -> None:
        if not isinstance(self.source, Path):
            self.step = Text("Unpacking")
            self.source = unpack(self.source, self.folder / "speech")
        self.summary = evaluate(self._asr, self.source, self.methods, self.out, within=self.within, progress=self._progress)


def forget_closed() -> None:
    """Remove the recordings of evaluations whose tabs were closed long ago."""
    for task in [task for task in _evaluations if task.outlived()]:
        _evaluations.remove(task)
        task.forget()


@cache
def keep_forgetting() -> None:
    """Forget what visitors left behind, every half minute from now on."""

    def run() -> None:
        while True:
            time.sleep(30)
            forget_closed()
            clips.forget_old()

    threading.Thread(target=run, name="forget-closed", daemon=True).start()


def unpack(file: IO[bytes], folder: Path) -> Path:
    """Unpack an uploaded ZIP of recordings into `folder`, and return the path of its manifest.

    Raises ManifestError if it cannot be used.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            if len(entries) > MOST_FILES:
                sentence = "The ZIP holds more than {count} files; divide it into several."
                raise ManifestError("manifest.zip_too_many", sentence, count=f"{MOST_FILES:,}")
            _name_plainly(archive, entries)
            if any(_leads_out(e) for e in entries):
                raise ManifestError(
                    "manifest.zip_leads_out",
                    "The ZIP holds links, or files that would lie outside its folder; pack the files themselves.",
                )
            entries = [e for e in entries if "__MACOSX" not in e.filename and not PurePosixPath(e.filename).name.startswith("._")]
            if sum(e.file_size for e in entries) > MOST_UNPACKED:
                raise ManifestError(
                    "manifest.zip_too_large",
                    "The ZIP unpacks to more than {size} GB; give the manifest's path instead.",
                    size=f"{MOST_UNPACKED / 1e9:g}",
                )
            if any(e.file_size > max(LARGE, MOST_PACKED * e.compress_size) for e in entries):
                raise ManifestError(
                    "manifest.zip_bomb",
                    "The ZIP holds a file that is more than {times} times larger than what is packed of it, which no recording is; "
                    "pack the recordings again.",
                    times=MOST_PACKED,
                )
            manifests = [e for e in entries if e.filename.lower().endswith(".jsonl")]
            if not manifests:
                raise ManifestError(
                    "manifest.not_in_zip",
                    "The ZIP has no manifest; put a .jsonl file with audio, text and accent on each line into it.",
                )
            paths = {}
            for entry in entries:
                if (folder / entry.filename).exists():  # also where the disk takes A and a for the same
                    sentence = "The ZIP holds two files with the name {name}; give each its own name."
                    raise ManifestError("manifest.zip_same_name", sentence, name=entry.filename)
                paths[entry.filename] = Path(archive.extract(entry, folder))
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "password" in str(error):
            raise ManifestError("manifest.zip_locked", "The ZIP is locked with a password; make one without.") from None
        raise ManifestError("manifest.not_a_zip", "The file is not a ZIP that can be read; make it again.") from None
    except OSError as error:
        sentence = "The ZIP cannot be unpacked ({reason}); give its files plain names."
        raise ManifestError("manifest.zip_not_unpacked", sentence, reason=error.strerror or error) from None
    return paths[min(manifests, key=lambda e: (e.filename.count("/"), e.filename)).filename]


def _leads_out(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry of a ZIP is a link, or has an absolute name or one with `..`."""
    names = PurePosixPath(entry.filename), PureWindowsPath(entry.filename)
    return stat.S_ISLNK(entry.external_attr >> 16) or any(name.anchor or ".." in name.parts for name in names)


# How systems write names in a ZIP without saying so: Macs, then Windows in the West, China, Japan,
# Korea, Taiwan, Russia and Eastern Europe. The second is the ZIP's own code page, for which Python
# takes them.
_SPELLINGS = ("utf-8", "cp437", "cp1252", "cp850", "gb18030", "cp932", "cp949", "cp950", "cp866", "cp1251", "cp1250", "cp852")


def _name_plainly(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    """Give a ZIP's entries their names, whichever system packed them: composed letters, and "/"
    between folders.

    Where names do not say how they are spelt, the spelling is that by which the manifests name
    most of them. UTF-8 is taken where no name tells.
    """

    def spelt(entry: zipfile.ZipInfo, spelling: str) -> str:
        name = entry.filename
        if not entry.flag_bits & 0x800:
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode(spelling)
        return unicodedata.normalize("NFC", name.replace("\\", "/"))

    spelling = "utf-8"
    if any(not entry.flag_bits & 0x800 and not entry.filename.isascii() for entry in entries):
        manifests = [e for e in entries if e.filename.lower().endswith(".jsonl") and "__MACOSX" not in e.filename]
        told = b"\n".join(archive.open(e).read(int(LARGE)) for e in manifests[:3]).decode("utf-8", "replace")
        named: set[str] = set()
        for found in re.findall(r'"audio"\s*:\s*("(?:[^"\\\n]|\\.)*")', told):
            with contextlib.suppress(ValueError):
                named.add(PurePosixPath(unicodedata.normalize("NFC", json.loads(found).replace("\\", "/"))).name)
        known = {s: sum(PurePosixPath(spelt(e, s)).name in named for e in entries) for s in _SPELLINGS}
        spelling = max(known, key=known.__getitem__)
    for entry in entries:
        entry.filename = spelt(entry, spelling)
