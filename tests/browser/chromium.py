"""Find a Chromium and open the host's web page in it, through Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")  # no look outside
SIZE = {"width": 1600, "height": 1000}


class ChromiumMissingError(RuntimeError):
    """No Chromium or no Playwright on this machine; the message says how to get it."""


def find_chromium(environ: Mapping[str, str] = os.environ) -> Path:
    """The Chromium at CHROMIUM_PATH, else the first of NAMES on PATH, given that Playwright can be
    imported. Raises ChromiumMissingError."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        raise ChromiumMissingError("no Playwright; `pip install playwright`") from None
    named = environ.get("CHROMIUM_PATH")
    if named:
        if not Path(named).is_file():
            raise ChromiumMissingError(f"no Chromium at CHROMIUM_PATH={named}; set it to the file "
                                       "that starts Chromium or Chrome")
        return Path(named)
    found = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in NAMES)),
                 None)
    if found is None:
        raise ChromiumMissingError("no Chromium on PATH; `apt-get install chromium`, or set "
                                   "CHROMIUM_PATH to a Chromium or Chrome")
    return Path(found)


@contextlib.contextmanager
def opened(chromium: Path, profile: Path) -> Iterator[Any]:
    """A page of a headless Chromium with `profile` as its user data: playwright's Page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=FLAGS, viewport=SIZE,
            locale="en-US")
        try:
            yield context.pages[0]
        finally:
            context.close()
