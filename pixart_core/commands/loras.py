"""`--lora FILE[:STRENGTH[:ALPHA]]`: which LoRAs, how strong, and what a picture remembers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from ..checkpoint.lora import read_lora
from ..checkpoint.lora_layer import LoRA
from ..checkpoint.lora_peft import find_config


class ChosenLoRA(NamedTuple):
    """A LoRA file or folder; `alpha` None is what it says itself."""

    path: Path
    strength: float
    alpha: float | None = None

    def read(self) -> LoRA:
        """Its changes; raises CheckpointError as `read_lora` does."""
        return read_lora(self.path, alpha=self.alpha)


def choose_loras(options: list[str] | None, recorded: dict[str, Any]) -> tuple[ChosenLoRA, ...]:
    """The LoRAs named; strength and alpha that are not said are those of the same place in
    `recorded`, else 1 and the file's own.

    Raises BadParameter for a strength or alpha that is no number, ValueError for missing files.
    """
    before = [ChosenLoRA(Path(), *numbers) for numbers in zip(
        recorded.get("loras", []), recorded.get("lora_alphas", itertools.repeat(None)),
        strict=False)]
    found = []
    for index, option in enumerate(options or []):
        path, numbers = _split(option)
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        then = before[index] if index < len(before) else ChosenLoRA(Path(), 1.0)
        found.append(ChosenLoRA(path, *numbers, *then[1 + len(numbers):]))
    return tuple(found)


def record_of(loras: Sequence[ChosenLoRA]) -> dict[str, list[float | None]]:
    """What a picture keeps of them, for `choose_loras`."""
    alphas = [lora.alpha for lora in loras]
    return {"loras": [lora.strength for lora in loras],
            **({"lora_alphas": alphas} if any(a is not None for a in alphas) else {})}


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


def _split(option: str) -> tuple[Path, list[float]]:
    """A path may have a colon itself (C:/...): only numbers behind the last ones count."""
    path, numbers = option, []
    while len(numbers) < 2 and not Path(path).exists():
        rest, colon, text = path.rpartition(":")
        try:
            number = float(text)
        except ValueError:
            break
        if not colon:
            break
        if not math.isfinite(number):
            raise typer.BadParameter("--lora takes FILE:STRENGTH or FILE:STRENGTH:ALPHA with "
                                     f"finite numbers, got {option!r}")
        path, numbers = rest, [number, *numbers]
    return Path(path), numbers
