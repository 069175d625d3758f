"""`--lora FILE[:STRENGTH]`: which LoRAs, how strong, and what a picture remembers of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..checkpoint.lora_peft import find_config


def choose_loras(options: list[str] | None,
                 recorded: dict[str, Any]) -> tuple[tuple[Path, float], ...]:
    """Files and strengths; where none is said, the one of the same place in `recorded`, else 1.

    Raises BadParameter for a strength that is no number, ValueError for missing files.
    """
    before = recorded.get("loras", [])
    found = []
    for index, option in enumerate(options or []):
        path, strength = _split(option)
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if strength is None:
            strength = before[index] if index < len(before) else 1.0
        found.append((path, strength))
    return tuple(found)


def lora_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The files that decide what the LoRAs do, by the names that a picture keeps: a PEFT config
    beside a file counts, for its alpha."""
    parts: dict[str, Path] = {}
    for number, path in enumerate(paths, start=1):
        parts[f"lora_{number}"] = path
        config = None if path.is_dir() else find_config(path)
        if config is not None:
            parts[f"lora_{number}_config"] = config
    return parts


def _split(option: str) -> tuple[Path, float | None]:
    """A path may have a colon itself (C:/...): only a number behind the last one is a strength."""
    path, colon, text = option.rpartition(":")
    if not colon or Path(option).exists():
        return Path(option), None
    try:
        strength = float(text)
    except ValueError:
        return Path(option), None
    if not math.isfinite(strength):
        raise typer.BadParameter(f"--lora takes FILE:STRENGTH with a finite number, got {option!r}")
    return Path(path), strength
