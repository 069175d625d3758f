"""What `pixart quantize` was asked for, as the functions for each kind of model see it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer

from ..quant.policy import Method


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of methods that look at activations, None where they were not given."""

    t5: Path | None = None
    tokenizer: Path | None = None
    t5_precision: str | None = None
    prompts: Path | None = None
    embeddings: list[Path] | None = None
    negative_embeddings: Path | None = None
    count: int | None = None
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    rank: int | None = None
    rows: int | None = None
    gptq: bool | None = None
    seed: int | None = None
    device: str | None = None
    calibration_dtype: str | None = None
    base: Path | None = None
    control_images: Path | None = None
    hed: Path | None = None
    vae: Path | None = None

    def given(self) -> list[str]:
        """The options that were given, as they are typed."""
        return ["--" + f.name.replace("_", "-") for f in dataclasses.fields(self)
                if getattr(self, f.name) is not None]

    def require_files(self) -> None:
        """ValueError for a file or folder that was named and is not there."""
        for path in (self.t5, self.tokenizer, self.prompts, *(self.embeddings or ()),
                     self.negative_embeddings, self.base, self.control_images, self.hed, self.vae):
            if path is not None and not path.exists():
                raise ValueError(f"{path} does not exist")


@dataclass(frozen=True)
class Request:
    """One run: from where to where, how, and what to tell. `kind` is what `identify` says."""

    source: Path
    target: Path
    kind: str
    method: Method
    dtype: torch.dtype | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    report: Path | None = None
    calibration: CalibrationOptions = CalibrationOptions()

    def refuse_calibration(self, *allowed: str) -> None:
        """BadParameter for options that a method which rounds by itself would ignore."""
        given = [name for name in self.calibration.given() if name not in allowed]
        if given:
            raise typer.BadParameter(f"{', '.join(given)} given: {self.method.name} rounds each "
                                     "weight by itself and has no use for that; leave it out, or "
                                     "use --method svdquant")


def check_target(source: Path, target: Path, report: Path | None) -> None:
    """Raise, before anything is read, for an OUT or a report that could not be written."""
    if target.suffix.lower() not in (".safetensors", ".sft"):
        raise typer.BadParameter(f"OUT is {target}; quantised weights are written as .safetensors "
                                 "files only")
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if target.exists():
        raise ValueError(f"{target} exists already; delete it, or name another file")
    if report is not None and report.is_dir():
        raise ValueError(f"--report {report} is a folder; name a .json file")
    for path in (target, report):
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"the folder {path.parent} cannot be written to")
