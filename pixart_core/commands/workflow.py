"""`pixart workflow upgrade`: workflows of ComfyUI_ExtraModels on this pack's nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..workflow import Report, WorkflowError, read_workflow, upgrade, write_workflow
from .common import console, flag, plain_errors

app = typer.Typer(no_args_is_help=True, help="Saved ComfyUI workflows.")


@app.callback()
def _group() -> None:
    """Saved ComfyUI workflows: move those of ComfyUI_ExtraModels to PixArt-Delta."""


@app.command("upgrade")
def upgrade_command(
    source: Annotated[Path, typer.Argument(
        metavar="OLD", help="A workflow as the web page saves it or in API format (.json), or a "
                            "picture that ComfyUI saved (.png).")],
    output: Annotated[Path | None, flag(
        "--output", "-o", help="The .json file to write. [OLD.pixart.json beside OLD]")] = None,
    in_place: Annotated[bool, flag(
        "--in-place", help="Write to OLD itself.")] = False,
    dry_run: Annotated[bool, flag(
        "--dry-run", help="Say what would be done and write nothing.")] = False,
    api: Annotated[bool, flag(
        "--api", help="Of a picture, take the API prompt, not the page's workflow.")] = False,
    control_base: Annotated[str | None, flag(
        help="The base model of a ControlNet, which is a file of its own here, as the list on "
             "PixArt Model Loader shows it; by default the released model of that size.")] = None,
) -> None:
    """Replace the nodes of ComfyUI_ExtraModels by PixArt-Delta's and ComfyUI's own.

    Positions, groups, notes and all other nodes stay. What cannot be replaced is left and listed
    with the reason, and so are the files that belong into another folder. Exit code 0 also where
    there is nothing to upgrade (then nothing is written) or something was left; 1 for a file that
    is no workflow.
    """
    if in_place and output is not None:
        raise typer.BadParameter("--in-place writes to OLD itself; leave --output out")
    with plain_errors():
        document = read_workflow(source, "prompt" if api else None)
        try:
            upgraded, report = upgrade(document, control_base)
        except WorkflowError as error:
            raise WorkflowError(f"{source.name}: {error}") from error
        if not report.rows:
            console.print(Text(f"{source.name}: nothing to upgrade, no node of "
                               "ComfyUI_ExtraModels is in it"), soft_wrap=True)
            return
        target = None if dry_run or not report.upgraded else _target(source, output, in_place)
        if target is not None:
            write_workflow(target, upgraded)
        _print(report, source.name)
        told = f"{len(report.upgraded)} upgraded, {len(report.left)} left"
        where = f"written to {target}" if target is not None else "nothing was written"
        console.print(Text(f"{told}; {where}"), soft_wrap=True)


def _target(source: Path, output: Path | None, in_place: bool) -> Path:
    """Where to write. Raises ValueError for a place that would lose something."""
    if in_place:
        if source.suffix.lower() == ".png":
            raise ValueError("--in-place is for .json files; a picture stays as it is, name the "
                             "workflow with --output")
        return source
    if output is None:
        output = source.with_name(f"{source.stem}.pixart.json")
        if output.exists():
            raise ValueError(f"{output} is there already; name another file with --output")
    if output.suffix.lower() != ".json":
        raise ValueError(f"{output.name} does not end in .json; workflows are written as JSON")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"{output} is a folder" if output.is_dir()
                         else f"the folder {output.parent} does not exist")
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the workflow itself; --in-place writes to it")
    return output


def _print(report: Report, title: str) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for heading in ("node", "was", "is now", "mind"):
        table.add_column(heading, overflow="fold")
    for row in report.rows:
        table.add_row(Text(row.where), Text(row.old),
                      Text(row.new) if row.new else Text("left", style="yellow"),
                      Text("; ".join(row.notes), style="dim" if row.new else ""))
    console.print(table)
    if report.moves:
        moves = Table(title="files to move", title_justify="left", box=None)
        for heading in ("file", "from models/", "to models/"):
            moves.add_column(heading, overflow="fold")
        for move in report.moves:
            moves.add_row(Text(move.name), Text(move.old or "."), Text(move.new))
        console.print(moves)
