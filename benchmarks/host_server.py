"""A real ComfyUI server with this repository in it, for the benchmarks that need one.

The host tests' client, launcher and workflow reader do the work; this is the door to them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "host"))

from client import Graph, Host, Node  # noqa: E402
from launch import HostMissingError, Installation, find_host, running_host  # noqa: E402
from workflow import load, to_api  # noqa: E402

__all__ = ["REPOSITORY", "Graph", "Host", "Installation", "Node", "add_comfyui_option",
           "find_installation", "load", "started", "to_api"]


def add_comfyui_option(parser: argparse.ArgumentParser) -> None:
    """The option that `find_installation` reads."""
    parser.add_argument("--comfyui", help="its folder; default COMFYUI_PATH or ~/comfy/ComfyUI")


def find_installation(parser: argparse.ArgumentParser, comfyui: str | None) -> Installation:
    """The ComfyUI at `comfyui`, else the host tests' one; ends the program where there is none."""
    environ = dict(os.environ)
    if comfyui:
        environ["COMFYUI_PATH"] = comfyui
    try:
        return find_host(environ)
    except HostMissingError as reason:
        parser.error(str(reason))


@contextlib.contextmanager
def started(installation: Installation, extra_args: Sequence[str] = ("--cpu",)) -> Iterator[Host]:
    """A server in a base directory of its own, both gone on exit. Raises HostStartError."""
    with tempfile.TemporaryDirectory() as base, running_host(
        installation, Path(base), {"ComfyUI-PixArt-Delta": REPOSITORY}, extra_args,
    ) as host:
        yield host
