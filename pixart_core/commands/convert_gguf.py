"""`pixart convert` to GGUF: transformers in a block format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import typer
from torch import Tensor

from ..checkpoint.gguf import SUFFIX
from ..checkpoint.gguf_write import QUANTS, storage_type, write_gguf
from ..config import PixArtConfig
from .common import one_of

DEFAULT_QUANT = "Q8_0"
ONLY_TRANSFORMERS = "GGUF files are written of PixArt transformers; {} is none"


def check_quant(target: Path, quant: str | None, to: str | None) -> str | None:
    """The block format for `target`, None where it is no GGUF file; BadParameter on a clash."""
    if target.suffix.lower() != SUFFIX:
        if quant is not None:
            raise typer.BadParameter(f"--quant is for GGUF files; let OUT end in {SUFFIX}")
        return None
    if to == "diffusers":
        raise typer.BadParameter("GGUF files hold native names; leave out --to")
    return one_of("--quant", quant or DEFAULT_QUANT, QUANTS)


def write_transformer(target: Path, weights: Mapping[str, Tensor], config: PixArtConfig,
                      quant: str) -> str:
    """Write native weights; returns a line that says what is stored how."""
    write_gguf(target, weights, config, quant)
    kinds = Counter(storage_type(name, tensor, quant) for name, tensor in weights.items())
    return "stored as " + ", ".join(f"{kind} ({count} tensors)"
                                    for kind, count in kinds.most_common())
