"""Fixtures: a real browser, a running app, a tiny model."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from driver import settle, wait_until
from streamlit.testing.v1 import AppTest

import hdmole  # noqa: F401  (the torchaudio guard, before anything else)

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(autouse=True, scope="session")
def _process() -> None:
    """One thread a process, and a garbage collector that passes over what has been imported.

    Every training collects garbage, which takes a third of a second where it looks at all modules.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _torch_seed(request: pytest.FixtureRequest) -> None:
    """Seed torch from the test's name: the same random weights in every run and order."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; skips where there is none, fails there if HDMOLE_REQUIRE_BROWSER is set."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no Chromium on this machine (Debian: apt install chromium)"
        if os.environ.get("HDMOLE_REQUIRE_BROWSER"):
            pytest.fail(f"HDMOLE_REQUIRE_BROWSER is set, but there is {reason}")
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def apps() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The apps that run, by their addresses."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    yield running
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait(10)


@pytest.fixture(scope="session")
def start_app(tmp_path_factory: pytest.TempPathFactory, apps: dict[str, subprocess.Popen[bytes]]) -> Callable[[str], str]:
    """Starts the app on a model and gives its address."""

    def start(model: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = (tmp_path_factory.mktemp("app") / "log.txt").open("wb")
        command = [
            sys.executable,
            "-m",
            "streamlit",
            "run",
            "app/main.py",
            "--server.port",
            str(port),
            "--server.headless",
            "true",
        ]
        environment = {**os.environ, "HDMOLE_MODEL": model, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        apps[address] = process

        def answers() -> bool:
            assert process.poll() is None, "the app ended: " + Path(log.name).read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=2)
                return True
            except OSError:
                return False

        wait_until(answers)
        return address

    return start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model: every file of a real one, nothing learned."""
    from tiny import build_tiny_model

    folder: Any = tmp_path_factory.mktemp("model") / "tiny"
    return build_tiny_model(folder)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of at most 12 tokens: a model that has learned nothing does not know when to stop."""
    from hdmole.models.speech_llm import SpeechLLM

    generate = SpeechLLM.generate
    monkeypatch.setattr(SpeechLLM, "generate", lambda model, **given: generate(model, **{**given, "max_new_tokens": 12}))


@pytest.fixture(scope="session")
def app_url(start_app: Callable[[str], str], tiny_model: Path) -> str:
    """Address of the app, running on the tiny model."""
    return start_app(str(tiny_model))


@pytest.fixture
def open_app(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """Opens a page on the tiny model; the folder of the test is the one that visitors may open."""
    monkeypatch.setenv("HDMOLE_MODEL", str(tiny_model))
    monkeypatch.setenv("HDMOLE_DATA", str(tmp_path))

    def opened(page: str = "transcribe", **query: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
        for name, value in query.items():
            at.query_params[name] = value
        if page:
            at.switch_page(f"../pages/{page}.py")
        return settle(at.run())

    return opened
