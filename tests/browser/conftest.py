"""The host's real web page in headless Chromium: one server and one page for the whole folder.

COMFYUI_PATH and COMFYUI_PYTHON name the host as for tests/host, CHROMIUM_PATH the browser (else
the usual names on PATH). Without one of them every test of this folder skips, for one reason.
Screenshots go to artefacts/<host version>/, which git ignores.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]  # the tests import comfy_page and workflow

from chromium import ChromiumMissingError, find_chromium, opened  # noqa: E402
from comfy_page import PACK_NAME, ComfyPage  # noqa: E402
from launch import (  # noqa: E402
    HostMissingError,
    HostStartError,
    Installation,
    find_host,
    log_tail,
    running_host,
)

SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the first visit opens the template browser by itself
    "Comfy.Minimap.Visible": False,  # it and a fast canvas take the processor from the server
    "LiteGraph.Canvas.MaximumFps": 15,
}
_FOUND = pytest.StashKey[object]()  # (Installation, Chromium), or why one of them is missing
_BROKEN = pytest.StashKey[bool]()  # the server did not start, which was reported in full
_SERVER = pytest.StashKey[object]()
_STARTED = contextlib.ExitStack()  # server and browser, ended after the last test of this folder


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[_FOUND] = find_host(), find_chromium()
    except (HostMissingError, ChromiumMissingError) as reason:
        config.stash[_FOUND] = reason


def pytest_runtest_setup(item: pytest.Item) -> None:
    found = item.config.stash[_FOUND]
    if isinstance(found, Exception):
        pytest.skip(str(found))
    if item.config.stash.get(_BROKEN, False):
        pytest.fail("the ComfyUI server did not start; see the first error", pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash[_FOUND]
    if isinstance(found, Exception):
        line = f"skipped, {str(found).split(';')[0]}"
    else:
        line = f"{found[0]} in {found[1]}"
        if terminalreporter.config.stash.get(_SERVER, None):
            line += f"; screenshots in {artefacts(found[0])}"
    terminalreporter.write_line(f"browser suite: {line}")


def artefacts(installation: Installation) -> Path:
    return HERE / "artefacts" / installation.version


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends server and browser before other folders' tests: while Playwright runs, no other test of
    this process can use asyncio."""
    if nextitem is None or HERE not in nextitem.path.parents:
        _STARTED.close()


@pytest.fixture(scope="session")
def installation(pytestconfig: pytest.Config) -> Installation:
    """The ComfyUI under test, as in tests/host."""
    return pytestconfig.stash[_FOUND][0]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A started ComfyUI with nothing but this pack, and the picture that every ComfyUI comes with:
    client.Host."""
    installation, _ = request.config.stash[_FOUND]
    request.addfinalizer(_STARTED.close)
    shutil.rmtree(artefacts(installation), ignore_errors=True)
    artefacts(installation).mkdir(parents=True)
    try:
        started = _STARTED.enter_context(running_host(
            installation, tmp_path_factory.mktemp("comfyui_page"), {PACK_NAME: REPOSITORY}))
    except HostStartError as reason:
        request.config.stash[_BROKEN] = True
        raise pytest.fail.Exception(str(reason), pytrace=False) from None
    request.config.stash[_SERVER] = started
    started.request("/api/settings", SETTINGS)
    example = installation.path / "input" / "example.png"
    started.upload(Image.open(example), example.name)
    return started


@pytest.fixture(scope="session")
def page(server, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """The loaded web page: comfy_page.ComfyPage."""
    installation, chromium = pytestconfig.stash[_FOUND]
    tab = _STARTED.enter_context(opened(chromium, tmp_path_factory.mktemp("profile")))
    loaded = ComfyPage(tab, artefacts(installation))
    loaded.load(server.url)
    return loaded


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Shows the page, its console and the server's log with a failed test."""
    report = (yield).get_result()
    if not report.failed or item.config.stash.get(_SERVER, None) is None:
        return
    page = item.funcargs.get("page")
    if page is not None:
        report.sections.append(("screenshot", str(page.screenshot(f"failed {item.name}"))))
        report.sections.append(("console of the page", "\n".join(page.errors)))
    log = item.config.stash[_SERVER].base / "server.log"
    report.sections.append(("ComfyUI server log", log_tail(log)))
