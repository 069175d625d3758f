"""`pixart convert` to GGUF: transformers and T5 encoders in a block format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import typer
from torch import Tensor

from ..checkpoint.gguf import SUFFIX
from ..checkpoint.gguf_write import QUANTS, storage_type, write_gguf
from ..checkpoint.read import PICKLE_SUFFIXES, SAFETENSORS_SUFFIXES
from ..config import PixArtConfig
from .common import one_of

DEFAULT_QUANT = "Q8_0"
NOT_FOR_GGUF = "GGUF files are written of PixArt transformers and T5 encoders; {} is neither"


def check_quant(source: Path, target: Path, quant: str | None, to: str | None) -> str | None:
    """The block format for `target`, None where it is no GGUF file; BadParameter on a clash."""
    if target.suffix.lower() != SUFFIX:
        if to == "gguf":
            raise typer.BadParameter(f"--to gguf writes one {SUFFIX} file; OUT is {target}, write "
                                     f"{_named(source, target)}")
        if quant is not None:
            raise typer.BadParameter(f"--quant is for GGUF files; let OUT end in {SUFFIX}")
        return None
    if to == "diffusers":
        raise typer.BadParameter("GGUF files hold native names; leave out --to, or write --to "
                                 "gguf")
    return one_of("--quant", quant or DEFAULT_QUANT, QUANTS)


def write_transformer(target: Path, weights: Mapping[str, Tensor], config: PixArtConfig,
                      quant: str) -> str:
    """Write native weights; returns a line that says what is stored how."""
    write_gguf(target, weights, config, quant)
    return _stored(Counter(storage_type(name, tensor, quant) for name, tensor in weights.items()))


def write_text_encoder(source: Path, target: Path, quant: str, dtype: torch.dtype | None,
                       tokenizer: Path | None) -> tuple[int, list[str]]:
    """Write the T5 encoder of `source`; parameters written, and what to say.

    `dtype` is what its numbers are rounded to before, `tokenizer` a spiece.model in place of its
    own. Raises CheckpointError as `read_t5` and `write_t5_gguf` do.
    """
    from ..text.t5_file import read_t5
    from ..text.t5_gguf import write_t5_gguf
    from ..text.tokenizer import find_tokenizer

    file = read_t5(source, dtype)
    if tokenizer is not None:
        found = find_tokenizer(tokenizer)
        if found.suffix.lower() == ".json":
            raise typer.BadParameter(f"{found.name} cannot be kept in a GGUF file; give T5's "
                                     "spiece.model")
        file.spiece_model = found.read_bytes()
    said = [_stored(write_t5_gguf(target, file, quant))]
    said.append("the tokenizer is inside" if file.spiece_model is not None else
                f"without a tokenizer, for {source.name} brings no spiece.model: put one beside "
                f"{target.name}, or name it with --tokenizer to have it inside")
    tensors = [*file.state_dict.values(), *file.packed.values()]
    return sum(tensor.shape.numel() for tensor in tensors), said


def _named(source: Path, target: Path) -> Path:
    """What OUT should have been."""
    if target.is_dir():
        return target / f"{source.stem}{SUFFIX}"
    known = target.suffix.lower() in SAFETENSORS_SUFFIXES + PICKLE_SUFFIXES
    return target.with_name((target.stem if known else target.name) + SUFFIX)


def _stored(kinds: Counter[str]) -> str:
    return "stored as " + ", ".join(f"{kind} ({count} tensors)"
                                    for kind, count in kinds.most_common())
