"""One real ComfyUI server for the whole session, with this pack and the probe nodes in it.

COMFYUI_PATH names the host (else ~/comfy/ComfyUI), COMFYUI_PYTHON its Python; see launch.find_host.
Without a host every test of this folder skips, for one reason.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PACK_NAME = "ComfyUI-PixArt-Delta"
BROKEN_PACKS = {
    "broken_import_on_purpose": "raise ImportError('broken on purpose')\n",
    "broken_entrypoint_on_purpose": "def comfy_entrypoint():\n    raise ValueError('on purpose')\n",
}
sys.path.insert(0, str(HERE))  # the tests import client and launch

from launch import (  # noqa: E402
    HostMissingError,
    HostStartError,
    find_host,
    has_package,
    log_tail,
    missing_requirements,
    running_host,
)

_SEEDS = itertools.count(1000)
_LOG = pytest.StashKey[Path]()
_START = pytest.StashKey[int]()
_HOST = pytest.StashKey[object]()  # the Installation, or why there is none
_BROKEN = pytest.StashKey[bool]()  # the server did not start, which was reported in full


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[_HOST] = find_host()
    except HostMissingError as reason:
        config.stash[_HOST] = reason
    config.addinivalue_line("markers", "gguf: needs the package gguf in the host's environment")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips here and not in a fixture, so that all the skips share one line of the summary."""
    found = item.config.stash[_HOST]
    if isinstance(found, HostMissingError):
        pytest.skip(str(found))
    if item.get_closest_marker("gguf") and not has_package(found.python, "gguf"):
        pytest.skip("no package gguf in the environment of this ComfyUI, which reads GGUF files; "
                    f"install it there: {found.python} -m pip install gguf")
    if item.config.stash.get(_BROKEN, False):
        pytest.fail("the ComfyUI server did not start; see the first error", pytrace=False)
    log = item.config.stash.get(_LOG, None)
    item.stash[_START] = log.stat().st_size if log and log.exists() else 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash[_HOST]
    if isinstance(found, HostMissingError):
        found = f"skipped, {str(found).split(';')[0]}"
    else:
        missing = missing_requirements(found.python, REPOSITORY / "requirements.txt")
        if missing:
            found = (f"{found}, whose environment lacks {', '.join(missing)}: tests that need them "
                     f"fail; install them there: {found.python} -m pip install -r requirements.txt")
    terminalreporter.write_line(f"host suite: {found}")


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def installation(pytestconfig: pytest.Config):
    """The ComfyUI under test: launch.Installation with path, python and version."""
    return pytestconfig.stash[_HOST]


@pytest.fixture(scope="session")
def host(installation, tmp_path_factory, request):
    """A started ComfyUI: client.Host. The server ends with the session."""
    base = tmp_path_factory.mktemp("comfyui")
    packs = {PACK_NAME: REPOSITORY, "probe": HERE / "probe"}
    _add_broken_packs(base / "custom_nodes")
    request.config.stash[_LOG] = base / "server.log"
    try:
        with running_host(installation, base, packs) as started:
            yield started
    except HostStartError as reason:
        request.config.stash[_BROKEN] = True
        raise pytest.fail.Exception(str(reason), pytrace=False) from None


def _add_broken_packs(custom_nodes: Path) -> None:
    """Two packs that cannot load, to see that check_packs notices on this very host."""
    for name, source in BROKEN_PACKS.items():
        (custom_nodes / name).mkdir(parents=True)
        (custom_nodes / name / "__init__.py").write_text(source)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Shows what the server logged during a failed test."""
    report = (yield).get_result()
    log = item.config.stash.get(_LOG, None)
    if report.failed and log is not None and not item.config.stash.get(_BROKEN, False):
        report.sections.append(("ComfyUI server log", log_tail(log, start=item.stash[_START])))


@pytest.fixture(scope="session")
def encoder():
    """The engine's T5 on the starter's file: transformers, float32."""
    import torch

    import pixart_core as pc
    from pixart_core.starter import find_starter

    return pc.text.T5TextEncoder.from_path(find_starter().t5_file, dtype=torch.float32)


@pytest.fixture
def lives_on(host):
    """After every bad prompt the next good one works; its seed is new, so nothing is cached."""
    from graphs import StarterGraph

    yield
    assert host.alive()
    graph = StarterGraph()
    graph.picture(graph.lcm(steps=1, seed=next(_SEEDS)))
    host.run(graph)
