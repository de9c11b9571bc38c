"""The limits of the app, in one place; a file may name others.

`hdmole app --settings FILE` sets the environment variable `HDMOLE_SETTINGS`, which
`hdmole transcribe` obeys too.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from hdmole.errors import UserError


class SettingsError(UserError):
    """A settings file that cannot be used. The codes begin with `settings.`"""


@dataclass(frozen=True)
class Settings:
    """The limits. A settings file is TOML and names those that differ."""

    upload_mb: int = 100  # of an uploaded file
    seconds: float = 1800  # of audio in a file
    kept_mb: float = 500  # of all visitors' own recordings; beyond it, the one used longest ago goes first
    turns: int = 0  # tasks that the model works on at once; 0 for half of the machine's cores
    waiting: int = 300  # tasks that may wait for a turn; who comes then is asked to come later
    waiting_of_one: int = 20  # of one tab
    starts_a_minute: int = 120  # tasks that one tab may start in a minute; each change of routing is one
    passwords_a_minute: int = 10  # wrong ones, of all visitors together; then nobody may try for the rest of the minute


def settings() -> Settings:
    """The limits of this process. Raises SettingsError."""
    named = os.environ.get("HDMOLE_SETTINGS")
    return read(Path(named)) if named else Settings()


@cache
def read(path: Path) -> Settings:
    """The limits in a settings file, and the usual ones where it names none.

    Raises SettingsError if the file cannot be read, names something else, or gives a limit that is
    no number above 0 (`turns` may be 0).
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sentence = "The settings file {name} cannot be read ({reason}); docs/app.md says what it may hold."
        raise SettingsError("settings.unreadable", sentence, name=path.name, reason=error) from None
    known = {field.name: field.default for field in fields(Settings)}
    for name, value in values.items():
        if name not in known:
            sentence = "The settings file names {setting}, which is no setting; it may name {known}."
            raise SettingsError("settings.unknown", sentence, setting=name, known=", ".join(known))
        whole = isinstance(value, int) and not isinstance(value, bool)
        fraction = isinstance(value, float) and name in ("seconds", "kept_mb")
        if not (whole or fraction) or not 0 < value + (name == "turns") < 1e9:
            sentence = "The setting {setting} is {value}; give a number above 0, and a whole one unless it counts seconds or MB."
            raise SettingsError("settings.value", sentence, setting=name, value=repr(value))
    return Settings(**values)


def password_digest(password: str, salt: bytes = b"") -> str:
    """The salt, by default a new one, and the scrypt digest of a password, in hexadecimal."""
    salt = salt or secrets.token_bytes(16)
    return f"{salt.hex()}:{hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1).hex()}"


def keep_password(password: str = "") -> str:
    """The digest of the app's password; empty if it has none.

    The password is the one given, or that in the environment variable `HDMOLE_PASSWORD`, which is
    removed. The processes that are started later get the digest only.
    """
    password = password or os.environ.get("HDMOLE_PASSWORD", "")
    os.environ.pop("HDMOLE_PASSWORD", None)
    if password:
        os.environ["HDMOLE_PASSWORD_DIGEST"] = password_digest(password)
    return os.environ.get("HDMOLE_PASSWORD_DIGEST", "")


def app_command_line(main: Path, address: str, port: int, data: Sequence[Path], limits: Path | None) -> list[str]:
    """The command that starts the app's `main` file by Streamlit, which takes the limits in a file
    and the folders `data` that visitors may open from the environment.

    Raises SettingsError if a folder does not exist or the file cannot be used.
    """
    for folder in data:
        if not folder.is_dir():
            sentence = "There is no folder {folder}; give --data the folder that visitors may open."
            raise SettingsError("settings.no_folder", sentence, folder=folder)
    if data:
        os.environ["HDMOLE_DATA"] = os.pathsep.join(str(folder.resolve()) for folder in data)
    if limits is not None:
        os.environ["HDMOLE_SETTINGS"] = str(limits.resolve())
    command = [sys.executable, "-m", "streamlit", "run", str(main), "--server.address", address]
    command += ["--server.maxUploadSize", str(settings().upload_mb)]
    if "STREAMLIT_SERVER_ALLOWED_HOSTS" not in os.environ:  # which an operator sets where visitors come by another name
        for host in dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), address]):
            command += ["--server.allowedHosts", host]
    return [*command, "--server.port", str(port)]
