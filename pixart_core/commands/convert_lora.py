"""`pixart convert --lora`: a LoRA of any layout as a file for ComfyUI's own LoRA loaders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from ..checkpoint.lora import read_lora
from ..checkpoint.lora_export import host_tensors, write_host_lora
from ..load import open_transformer

Cast = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_EXACT = (".alpha", ".dora_scale")  # kept in float32, for they are few and multiply everything


def write_lora(source: Path, target: Path, cast: Cast, base: Path | None,
               fields: Mapping[str, Any], alpha: float | None) -> tuple[int, list[str]]:
    """Write the LoRA of `source` for ComfyUI's loaders; parameters written, and what to say.

    `base` is the transformer that DoRA's norms are taken from, with its config `fields`. `alpha`
    counts instead of what the LoRA says. Raises BadParameter for a target that is no file or an
    alpha that is no number above 0, CheckpointError as `read_lora` and `host_tensors` do.
    """
    if target.is_dir() or target.suffix == "":
        raise typer.BadParameter("a LoRA is written as one file; let OUT end in .safetensors")
    if fields and base is None:
        raise typer.BadParameter("--set is for the model of --base; a LoRA has no config")
    if alpha is not None and not 0 < alpha < math.inf:
        raise typer.BadParameter(f"--alpha is {alpha}; use a number above 0")
    lora = read_lora(source, alpha=alpha)
    weights = None
    if base is not None:
        weights = open_transformer(base, check_finite=False, **fields)[0]
    tensors = host_tensors(lora, weights)
    exact = {name: tensor for name, tensor in tensors.items() if name.endswith(_EXACT)}
    write_host_lora(target, {**cast(tensors), **exact})
    return sum(tensor.numel() for tensor in tensors.values()), list(lora.notes)
