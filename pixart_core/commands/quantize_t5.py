"""T5 encoders for `pixart quantize`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from ..checkpoint import CheckpointError


def quantize_t5(path: Path, out: Path, method: str, tokenizer: Path | None = None,
                done: Callable[[str], None] | None = None) -> list[str]:
    """Write the T5 encoder of `path` to `out` ("int8", "fp8" or "int4"); what to say of it.

    `tokenizer` is a spiece.model to have inside in place of the source's own. `done` is told each
    tensor's name. Raises BadParameter for a tokenizer that does not go inside, else as
    `write_quantized_t5`.
    """
    from ..text.t5_quant_file import write_quantized_t5
    from ..text.tokenizer import find_tokenizer

    spiece = None
    if tokenizer is not None:
        found = find_tokenizer(tokenizer)
        if found.suffix.lower() == ".json":
            raise typer.BadParameter(f"{found.name} cannot be kept in the file; give T5's "
                                     "spiece.model")
        spiece = found.read_bytes()
    if out.exists() and out.samefile(path):
        raise CheckpointError(f"{out} is the file that is read; name another one to write")
    kinds = write_quantized_t5(path, out, method, spiece, done)
    said = [", ".join(f"{kind} ({count} tensors)" for kind, count in kinds.most_common())]
    if not _brings_tokenizer(out):
        said.append(f"without a tokenizer, which {path.name} does not bring: ComfyUI has that of "
                    "T5 XXL; elsewhere put spiece.model beside the file, or name it with "
                    "--tokenizer")
    return said


def _brings_tokenizer(path: Path) -> bool:
    from ..text.t5_file import open_t5

    opened = open_t5(path)
    return opened.spiece_model is not None or opened.tokenizer_json is not None
