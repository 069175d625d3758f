"""The commands of `pixart`, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import console, version_text
from .convert import convert
from .encode import encode
from .generate import generate
from .inspect import inspect
from .quantize import quantize
from .train import train
from .workflow import app as workflow

__all__ = ["app"]

app = typer.Typer(
    name="pixart",
    help="PixArt-alpha, PixArt-delta (LCM) and PixArt-Sigma on the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(encode)
app.command()(inspect)
app.command()(convert)
app.command()(quantize)
app.add_typer(train)
app.add_typer(workflow, name="workflow")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(version_text(), highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                          help="Show the version and leave.")] = False,
) -> None:
    """PixArt-alpha, PixArt-delta (LCM) and PixArt-Sigma on the command line."""
