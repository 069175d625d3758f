"""GGUF files in the host's model folders, which its own lists leave out."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

SUFFIX = ".gguf"


def gguf_names(key: str) -> list[str]:
    """GGUF files under a folder key, which the host's own lists leave out; names as in those."""
    found: set[str] = set()
    for root in folder_paths.get_folder_paths(key):
        for folder, _, files in os.walk(root, followlinks=True):
            found |= {os.path.relpath(Path(folder, name), root) for name in files
                      if name.lower().endswith(SUFFIX)}
    return sorted(found)
