"""`pixart train scenes`: the package's own data set, as a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import console, errors, flag, listed, one_of, plain_errors, progress_bars

_SPLITS = ("train", "held_out", "all")


def scenes(
    out: Annotated[Path, typer.Argument(
        help="Folder to write; one of the same settings goes on.")],
    count: Annotated[int, flag(help="Pictures.")] = 30000,
    seed: Annotated[int, flag(help="Another seed, other scenes.")] = 0,
    image_size: Annotated[int, flag(
        help="Pixels of a square picture, a multiple of 16 from 64; other shapes have about as "
             "many.")] = 128,
    ratios: Annotated[str, flag(help="Width to height, from 1:2 to 2:1: 1:1,5:3,3:5.")] = "1:1",
    two: Annotated[float, flag(help="Share of scenes of two objects.")] = 0.0,
    counts: Annotated[float, flag(help="Share of scenes of two or three equal objects.")] = 0.0,
    corners: Annotated[float, flag(
        help="Share of the one-object scenes with the object in a corner.")] = 0.0,
    spread: Annotated[float, flag(
        help="How far places and sizes stray from their middles: 0 not at all, 1 as far as their "
             "words allow.")] = 1.0,
    grid: Annotated[bool, flag(
        "--grid", help="Round places of single objects to the model's tokens.")] = False,
    split: Annotated[str, flag(
        help="train, held_out or all attribute combinations. The evaluation draws held_out ones."
    )] = "train",
    phrasings: Annotated[int, flag(help="Captions of each picture.")] = 4,
    named: Annotated[str | None, flag(
        help="What captions name beside shapes and their count, such as color,background for a "
             "ControlNet that outlines alone shall steer. [some of everything, at random]")] = None,
    edges: Annotated[bool, flag(
        "--edges", help="Write each picture's outline too, to train a ControlNet on.")] = False,
) -> None:
    """Write coloured shapes with captions: a data set to train on that needs no download."""
    with plain_errors():
        one_of("--split", split, _SPLITS)

        from ..training.scenes import ExportSettings, SceneSettings, export_scenes

        settings = ExportSettings(
            count, seed,
            SceneSettings(image_size, listed(ratios), two, counts, corners, spread, grid),
            split, phrasings, outlines=edges,
            named=None if named is None else listed(named))
        with progress_bars(errors, hidden=True) as progress:
            task = progress.add_task("pictures", total=count)
            lines = export_scenes(out, settings,
                                  lambda done, total: progress.update(task, completed=done))
        console.print(f"{lines}  ({count} pictures, {phrasings} captions each)", highlight=False,
                      soft_wrap=True)
