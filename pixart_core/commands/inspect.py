"""`pixart inspect`: what a weight file holds, and how that was found out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .common import console, parse_fields, plain_errors
from .describe import describe


def inspect(
    file: Annotated[Path, typer.Argument(
        help="A weight file, a diffusers or T5 folder, or a file of encoded prompts.")],
    fields: Annotated[list[str] | None, typer.Option(
        "--set", help="A config field that the file does not tell, such as num_heads=6.")] = None,
) -> None:
    """Say what a weight file holds: kind, sizes, precision, and how each was decided.

    Of a file of `pixart encode` or PixArt Save Embeddings: prompt, tokens, width and T5.
    """
    with plain_errors():
        rows = describe(file, parse_fields(fields))
        table = Table(title=file.name, title_justify="left", show_lines=False, box=None)
        for heading in ("what", "value", "decided by"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(Text(row.name), Text(row.value), Text(row.source, style="dim"))
        console.print(table)
