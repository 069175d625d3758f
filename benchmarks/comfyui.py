"""ComfyUI's own PixArt in this process, from a checkout, on the torch that is already here.

The checkout is only put on the module path. What it needs and this environment lacks (its kernel
and memory libraries, which are the same for every torch) is borrowed from its virtual environment;
torch itself and everything else come from here, so that contenders differ in nothing but their
own code.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

BORROWED = ("comfy_aimdo", "comfy_kitchen", "psutil")


class ComfyUI(NamedTuple):
    """What the benchmarks use of it: `attentions` is its default function first, by name."""

    version: str
    network: type[torch.nn.Module]
    operations: type
    attentions: dict[str, Callable]
    blocks: ModuleType


def find_comfyui(path: str | Path | None = None) -> Path:
    """The checkout at `path`, else at COMFYUI_PATH, else at ~/comfy/ComfyUI.

    Raises ImportError when there is none.
    """
    folder = Path(path or os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()
    if not (folder / "comfy" / "ldm" / "pixart" / "pixartms.py").is_file():
        raise ImportError(f"no ComfyUI with a PixArt at {folder.name}; pass --comfyui or set "
                          "COMFYUI_PATH")
    return folder.resolve()


def import_comfyui(path: str | Path | None = None) -> ComfyUI | str:
    """ComfyUI's PixArt, or one line that says why it cannot be had here."""
    try:
        return _import(find_comfyui(path))
    except Exception as error:  # a host for another machine fails in its own ways
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _import(folder: Path) -> ComfyUI:
    _borrow(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import comfy.cli_args  # looks at sys.argv only when the server asks it to

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True
    import comfy.ldm.modules.attention as attention
    import comfy.ops
    from comfy.ldm.pixart import blocks, pixartms

    functions = {f.__name__: f for f in (attention.optimized_attention,
                                         attention.attention_pytorch)}
    found = re.search(r'__version__\s*=\s*"([^"]+)"', (folder / "comfyui_version.py").read_text())
    return ComfyUI(found.group(1) if found else "(version unknown)", pixartms.PixArtMS,
                   comfy.ops.disable_weight_init, functions, blocks)


class _Borrower:
    """A module finder of last resort that knows BORROWED only."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if path is None and name in BORROWED:
            return PathFinder.find_spec(name, self.folders)
        return None


def _borrow(checkout: Path) -> None:
    if any(isinstance(finder, _Borrower) for finder in sys.meta_path):
        return
    folders = [str(found) for root in (checkout, checkout.parent) for venv in (".venv", "venv")
               for pattern in ("lib/python*/site-packages", "Lib/site-packages")
               for found in (root / venv).glob(pattern)]
    sys.meta_path.append(_Borrower(folders))
