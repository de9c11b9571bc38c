"""Screenshots of the app: `python -m app.screenshots [--model demo] [--out DIR]`.

This starts the app on a free port and opens every page in Chromium, wide (1280 x 800) and narrow
(400 x 800), light and dark.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAGES = {
    "home": "",
    "transcribe": "transcribe",
    "routing": "routing",
    "thresholds": "thresholds",
    "correspondence": "correspondence",
    "compare": "compare",
    "paper": "paper",
    "corpus": "corpus",
    "report": "report",
    "about": "about",
}
SIZES = {"wide": (1280, 800), "narrow": (400, 800)}


@contextmanager
def running_app(model: str) -> Iterator[str]:
    """Run the app on a free port, and give its address.

    Raises RuntimeError if it does not start within three minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
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
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HDMOLE_MODEL": model}, stdout=subprocess.DEVNULL)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError("The app did not start within three minutes; start it with 'make app' to see why.")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def take(url: str, out: Path, themes: list[str], sizes: list[str], full_page: bool, sample: str) -> None:
    """Write a screenshot `PAGE.png` of every page into `out`.

    Names of narrow and dark screenshots end in `-narrow` and `-dark`.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_FLAGS)
        for size in sizes:
            width, height = SIZES[size]
            for theme in themes:
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)  # type: ignore[arg-type]
                for name, path in PAGES.items():
                    page.goto(f"{url}/{path}" + (f"?sample={sample}" if sample else ""))
                    page.locator(
                        ".cards, .js-plotly-plot, [data-testid='stImage'] img, [data-testid='stAlertContentInfo'], [data-testid='stFileUploader'], iframe"
                    ).first.wait_for(timeout=90_000)
                    page.locator(".st-key-cancel").wait_for(state="hidden", timeout=90_000)  # all methods have heard it
                    page.wait_for_timeout(2_500)  # figures are drawn one after the other
                    if full_page:
                        page.set_viewport_size({"width": width, "height": _height(page)})
                        page.wait_for_timeout(1_500)
                    target = out / f"{name}{'' if size == 'wide' else '-' + size}{'' if theme == 'light' else '-' + theme}.png"
                    page.screenshot(path=target)
                    page.set_viewport_size({"width": width, "height": height})
                    print(target)
                page.close()
        browser.close()


def _height(page: object) -> int:
    return int(page.evaluate("document.querySelector('.stMainBlockContainer').scrollHeight + 20"))  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("HDMOLE_MODEL", "demo"), help="demo, or a model's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots", help="where the pictures go")
    parser.add_argument("--theme", action="append", choices=["light", "dark"], help="default: light")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: both")
    parser.add_argument("--full", action="store_true", help="the whole page, not just what a screen shows")
    parser.add_argument("--sample", default="", help="name of the sample to show")
    given = parser.parse_args()
    with running_app(given.model) as address:
        take(address, given.out, given.theme or ["light"], given.size or list(SIZES), given.full, given.sample)
