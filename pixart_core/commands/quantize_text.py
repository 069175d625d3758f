"""`pixart quantize` for T5 text encoders."""

from __future__ import annotations

import typer

from .common import console, errors, progress_bars
from .quantize_options import Request
from .quantize_t5 import quantize_t5


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
