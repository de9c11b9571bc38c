"""Writing files so that each is either whole or not there.

If none can be written, an OutputError tells what went wrong.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hdmole.errors import UserError


class OutputError(UserError):
    """A file or folder that cannot be written. The codes begin with `output.`"""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives the path of a new file or folder beside `path`, which the block writes.

    It takes the name `path`, in the place of what had it, once the block has ended and everything
    is on the disk. If the block fails, `path` stays as it was.

    Raises:
        OutputError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    _remove(part)  # that of a process that was killed
    try:
        with disk_space(path):
            yield part
            for file in [*part.rglob("*"), part] if part.is_dir() else [part]:
                _flush(file)
            if part.is_dir() and path.is_dir():  # a folder cannot be replaced in one step
                old = path.with_name(f".old-{path.name}")
                _remove(old)
                path.rename(old)
                part.rename(path)
                _remove(old)
            else:
                part.replace(path)
            _flush(path.parent)
    finally:
        _remove(part)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as `written` does. Raises OutputError if the disk is full."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def write_between(document: Path, place: str, body: str) -> None:
    """Write `body` into a document between `<!-- PLACE -->` and `<!-- /PLACE -->`.

    Raises:
        UserError: the document has no such place.
        OSError: the document cannot be read or written.
    """
    text, start, end = document.read_text(encoding="utf-8"), f"<!-- {place} -->", f"<!-- /{place} -->"
    if not 0 <= text.find(start) < text.find(end):
        raise UserError(
            "readme.place", "{readme} has no place for the table; mark it with {start} and {end}.",
            readme=document, start=start, end=end,
        )  # fmt: skip
    head, rest = text.split(start)
    write_text(document, f"{head}{start}\n{body}\n{end}{rest.split(end)[1]}")


def write_json(path: Path, value: object) -> None:
    """Write JSON, as `written` does.

    Raises:
        OutputError: the disk is full.
        ValueError: a number in it is NaN or infinite.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def disk_space(path: Path) -> Iterator[None]:
    """If the disk is full in the block, or takes no file so large, OutputError says so.

    The libraries that write files each raise something else.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or any(reason in str(error) for reason in ("No space left on device", "File too large"))
            or _full(path)
        ):
            sentence = "There is no space left on the disk for {path}; make some and run the same command again, which goes on."
            raise OutputError("output.disk_full", sentence, path=path) from None
        raise


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In the block, no other process that asks for it works in the folder, which is made.

    Raises:
        OutputError: another process does.
    """
    import fcntl  # only Unix has it, and the tuner needs this module on all systems

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sentence = "Another command is writing to {folder} at this moment; wait until it has ended, or choose another folder."
            raise OutputError("output.in_use", sentence, folder=folder) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _full(path: Path) -> bool:
    """Whether the disk of a path has less than a megabyte left."""
    try:
        return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free < 2**20
    except OSError:
        return False


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
