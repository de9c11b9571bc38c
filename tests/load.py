"""Many visitors at once: each gets an answer, and nothing is left of those who have gone. `make load` runs it.

Usage: python tests/load.py [VISITORS] [SESSIONS]. Starts the app on the demo model. The visitors open a sample of two to three
seconds each at the same moment and wait for all transcripts. Then so many sessions are opened and closed, ten at a time, and
the app's memory is compared with that after the first tenth of them. It ends within three minutes on two idle cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.asyncio.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 45.0  # seconds in which 95 % of the visitors must have their answer
GROWTH = 1.10  # of memory over the sessions
TOGETHER = 10  # sessions open at once
PATIENCE = 150.0  # seconds that a visitor waits
POLL = 0.4  # seconds between two looks of a page at its work


class Visitor:
    """A browser's tab, as far as the app sees it."""

    def __init__(self, connection: ClientConnection, page: str, query: str) -> None:
        self.connection, self.page, self.query, self.fragment = connection, page, query, ""
        self.cards = ""

    async def run(self, fragment: str = "") -> None:
        """Have the page, or a fragment of it, run."""
        message = BackMsg()
        message.rerun_script.query_string = self.query
        message.rerun_script.page_name = self.page
        message.rerun_script.fragment_id = fragment
        await self.connection.send(message.SerializeToString())

    async def finished(self) -> None:
        """Read messages until a run has ended."""
        while True:
            message = ForwardMsg.FromString(await self.connection.recv(decode=False))
            kind = message.WhichOneof("type")
            if kind == "auto_rerun":
                self.fragment = message.auto_rerun.fragment_id
            elif kind == "delta" and "class='cards'" in (body := message.delta.new_element.html.body):
                self.cards = body
            elif kind == "session_event" and message.session_event.WhichOneof("type") == "script_compilation_exception":
                raise RuntimeError("the page cannot be run")
            elif kind == "script_finished":
                return

    async def answer(self) -> None:
        """Wait for the transcripts of all methods."""
        await self.run()
        await self.finished()
        for _ in range(int(PATIENCE / POLL)):
            if "class='card" in self.cards and "waiting" not in self.cards:
                return
            await asyncio.sleep(POLL)
            await self.run(self.fragment)
            await self.finished()


async def visit(address: str, sample: str) -> float:
    """Seconds until a visitor has all transcripts of a sample; infinity if that takes too long."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE), connect(address, subprotocols=["streamlit"], max_size=None) as connection:  # type: ignore[list-item]
            await Visitor(connection, "transcribe", f"model=demo&sample={sample}").answer()
    except TimeoutError:
        return float("inf")
    return time.monotonic() - started


async def look(address: str) -> None:
    """Open the start page and close it."""
    async with asyncio.timeout(PATIENCE), connect(address, subprotocols=["streamlit"], max_size=None) as connection:  # type: ignore[list-item]
        visitor = Visitor(connection, "", "model=demo")
        await visitor.run()
        await visitor.finished()


def memory(process: int) -> float:
    """Megabytes of memory that a process holds."""
    return int((Path("/proc") / str(process) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def started() -> tuple[subprocess.Popen[bytes], str]:
    """The app on the demo model, and its address for browsers' messages."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app/main.py", "--server.port", str(port)]
    environment = {**os.environ, "HDMOLE_MODEL": "demo"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2).close()
                return process, f"ws://127.0.0.1:{port}/_stcore/stream"
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("the app does not start")
    except BaseException:
        process.kill()
        raise


async def sessions(address: str, count: int) -> None:
    for first in range(0, count, TOGETHER):
        await asyncio.gather(*(look(address) for _ in range(first, min(first + TOGETHER, count))))


def main(visitors: int, count: int) -> int:
    process, address = started()
    try:
        asyncio.run(visit(address, "general_1"))  # loads the model
        names = [
            line["audio"].partition(".")[0] for line in map(json.loads, (ROOT / "assets/demo/samples/manifest.jsonl").open())
        ]

        async def everyone() -> list[float]:
            return await asyncio.gather(*(visit(address, names[k % len(names)]) for k in range(visitors)))

        seconds = np.array(asyncio.run(everyone()))
        late = float(np.quantile(seconds, 0.95))
        load = os.getloadavg()[0]
        print(
            f"{visitors} visitors: {np.isfinite(seconds).sum()} answered, median {np.median(seconds):.1f} s, 95 % within {late:.1f} s, "
            f"last {seconds.max():.1f} s (load of the machine {load:.1f})",
            flush=True,
        )
        asyncio.run(sessions(address, count // 10))
        before = memory(process.pid)
        asyncio.run(sessions(address, count - count // 10))
        after = memory(process.pid)
        print(f"{count} sessions opened and closed: {before:.0f} MB after the first tenth, {after:.0f} MB after all", flush=True)
        return int(not late <= LONGEST or after > GROWTH * before)
    finally:
        process.kill()
        process.wait(20)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the app ends too
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(given + [50, 1_000][len(given) :])))
