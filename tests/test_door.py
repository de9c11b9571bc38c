"""The password of the app, its limits, and the file that names them."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driver import assert_no_exception
from streamlit.testing.v1 import AppTest
from test_cli import run_here

from app import door, turns
from app.turns import QueueError, Ticket, Turns
from hdmole.settings import Settings, SettingsError, password_digest, read, settings

ROOT = Path(__file__).resolve().parent.parent
SECRET = "open sesame"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    door._wrong.clear()
    read.cache_clear()
    for name in ("HDMOLE_PASSWORD", "HDMOLE_PASSWORD_DIGEST", "HDMOLE_SETTINGS"):
        os.environ.pop(name, None)


def test_nothing_is_shown_before_the_password(open_app: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDMOLE_PASSWORD", SECRET)
    at = open_app("about")
    assert [box.label for box in at.text_input] == ["Password"] and at.text_input[0].proto.type == 1  # its letters are hidden
    assert not at.title and not at.markdown and not at.caption
    assert "HDMOLE_PASSWORD" not in os.environ and SECRET not in os.environ["HDMOLE_PASSWORD_DIGEST"]
    at.text_input[0].set_value("open barley")
    at.button[0].click().run()
    assert [error.value for error in at.error] == ["The password is wrong."] and not at.title
    at.text_input[0].set_value(SECRET)
    at.button[0].click().run()
    assert_no_exception(at)
    assert at.title and not any(box.label == "Password" for box in at.text_input)
    assert "let_in" in repr(at.session_state) and SECRET not in repr(at.session_state) + str(at.query_params)
    assert [box.label for box in open_app("about").text_input] == ["Password"]  # another visitor


def test_attempts_are_limited_whoever_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now = password_digest(SECRET), 1000.0
    monkeypatch.setattr(door.time, "monotonic", lambda: now)
    most = settings().passwords_a_minute
    assert [door.right(f"guess {k}", kept) for k in range(most)] == [False] * most
    assert door.right(SECRET, kept) is None
    now += 61
    assert door.right(SECRET, kept) is True and door.right("", kept) is False


def test_a_digest_has_a_salt_of_its_own_and_says_nothing_of_the_password() -> None:
    one, other = password_digest(SECRET), password_digest(SECRET)
    assert one != other and SECRET not in one
    assert password_digest(SECRET, bytes.fromhex(one.partition(":")[0])) == one


def test_a_file_names_limits_that_differ(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("seconds = 4000.5\nturns = 0\nupload_mb = 700\n")
    assert read(tmp_path / "limits.toml") == Settings(seconds=4000.5, upload_mb=700)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("second = 4000", "names second, which is no setting; it may name upload_mb, seconds,"),
        ("waiting = 0", "The setting waiting is 0; give a number above 0"),
        ("waiting = 1.5", "The setting waiting is 1.5; give"),
        ("waiting = true", "The setting waiting is True; give"),
        ("seconds = nan", "The setting seconds is nan; give"),
        ("seconds = 'long'", "The setting seconds is 'long'; give"),
        ("seconds =", "cannot be read"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "limits.toml").write_text(content)
    with pytest.raises(SettingsError, match=sentence):
        read(tmp_path / "limits.toml")


def test_the_command_hands_on_the_limits_and_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setenv("HDMOLE_MODEL", "demo")
    (tmp_path / "limits.toml").write_text("upload_mb = 321")
    monkeypatch.setenv("HDMOLE_PASSWORD", SECRET)
    assert run_here("app", "--settings", tmp_path / "limits.toml")[0] == 0
    assert started[0][started[0].index("--server.maxUploadSize") + 1] == "321" and settings().upload_mb == 321
    assert SECRET not in str(started) and SECRET not in str(dict(os.environ))
    assert door.right(SECRET, os.environ["HDMOLE_PASSWORD_DIGEST"])
    (tmp_path / "limits.toml").write_text("upload_mb = 'all'")
    read.cache_clear()
    status, said = run_here("app", "--settings", tmp_path / "limits.toml")
    assert status == 1 and "The setting upload_mb is 'all'" in said


def test_an_app_without_the_command_has_the_same_limit_of_uploads() -> None:
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["server"]["maxUploadSize"] == Settings().upload_mb


def test_the_queue_takes_no_more_than_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "settings", lambda: Settings(waiting=3, waiting_of_one=2, starts_a_minute=4))
    now = 1000.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)

    def refusal(visitor: str) -> str:
        try:
            queue.admit(visitor)
        except QueueError as error:
            return error.code
        return ""

    queue = Turns(1)
    assert [refusal("a") for _ in range(5)] == ["", "", "", "", "queue.too_many"] and refusal("b") == ""
    now += 61
    assert refusal("a") == "" and list(queue._starts) == ["a"]  # of those who are gone nothing is kept
    queue._waiting = [Ticket("b", False), Ticket("b", False)]
    assert refusal("b") == "queue.too_many" and refusal("c") == ""
    queue._waiting.append(Ticket("c", False))
    assert refusal("d") == "queue.full" and refusal("") == ""
