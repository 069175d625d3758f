"""`pixart quantize` for T5 text encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from ..checkpoint import CheckpointError
from .common import console, errors, progress_bars
from .quantize_options import Request


def quantize_text_encoder(request: Request) -> None:
    """Quantise a T5, and say what is stored how; BadParameter for options it has no use for."""
    given = [name for name in request.calibration.given() if name != "--tokenizer"]
    others = {"--set": request.fields, "--report": request.report, "--dtype": request.dtype}
    given += [name for name, value in others.items() if value]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: for PixArt models, and "
                                 f"{request.source.name} is a T5 text encoder")
    with progress_bars(errors, hidden=True) as progress:
        task = progress.add_task("tensors", total=None)
        said = quantize_t5(request.source, request.target, request.method.name,
                           request.calibration.tokenizer, lambda _: progress.advance(task))
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)
    size = request.target.stat().st_size
    console.print(f"{request.target}  ({size / 2**20:,.1f} MiB, {request.method.name})",
                  highlight=False, soft_wrap=True)


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
