"""`pixart train RECIPE`: settings, progress with the time left, how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import console, plain_errors, progress_bars

_ABOUT = {
    "base": "Train or fine-tune a model: noise prediction and learned variance.",
    "lcm": "Distil a model into one that draws in 2 to 4 steps (PixArt-delta).",
    "lcm-lora": "Distil a model into a LoRA that makes it draw in 2 to 4 steps.",
    "controlnet": "Train a ControlNet-Transformer for a model (PixArt-delta).",
    "lora": "Teach a model a subject or style from a few pictures.",
    "vae": "Train a VAE of TAESD's architecture on a folder of images.",
    "hed": "Train a small HED edge detector on scenes: for the starter family.",
    "text": "Train a small T5 encoder for captions of scenes: for the starter family.",
}
_ARGUMENTS = typer.Argument(metavar="[SETTINGS.yaml] [NAME=VALUE]...", show_default=False,
                            help="A file of settings, then single ones; --show lists them all.")
_SHOW = typer.Option("--show", help="Print the settings and what they mean, and leave.")


def register(group: typer.Typer) -> None:
    """Add one command for each recipe."""
    for name, about in _ABOUT.items():
        group.command(name, help=about)(_command(name))
    group.command("starter")(starter)


def starter(
    out: Annotated[Path, typer.Argument(help="Folder for the finished family.")],
    work: Annotated[Path | None, typer.Option(
        help="Folder of the runs; kept, so that the same command goes on. [OUT.work]")] = None,
    family: Annotated[Path | None, typer.Option(
        help="A file of steps in place of the package's own.")] = None,
) -> None:
    """Make the starter family from nothing: scenes, VAE, T5, models, ControlNet."""
    with plain_errors():
        from ..training.starter import make_starter, read_family

        steps = read_family(family) if family is not None else read_family()
        with _Bar() as bar:
            outcome = make_starter(out, work or out.with_name(f"{out.name}.work"), steps, bar)
        if outcome.stopped:
            console.print("stopped; the same command goes on from there", highlight=False)
            raise typer.Exit(130)
        for path in outcome.files:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _command(name: str):
    def command(arguments: Annotated[list[str] | None, _ARGUMENTS] = None,
                show: Annotated[bool, _SHOW] = False) -> None:
        with plain_errors():
            if show:
                _print_settings(name)
            else:
                _train(name, arguments or [])
    return command


def _train(name: str, arguments: list[str]) -> None:
    from ..training.loop import train
    from ..training.recipes import make_recipe, recipe_settings
    from ..training.settings import parse_pairs, read_settings_file

    files = [a for a in arguments if "=" not in a]
    pairs = parse_pairs([a for a in arguments if "=" in a])
    settings = recipe_settings(name, *map(read_settings_file, files), pairs)
    with _Bar() as bar:
        outcome = train(make_recipe(name, settings), bar)
    for path in outcome.files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if outcome.stopped:
        if not outcome.files:  # one of several processes, of which the first speaks
            raise typer.Exit(130)
        console.print(f"stopped after step {outcome.step} of {settings.steps}; the same command "
                      "goes on from there", highlight=False)
        raise typer.Exit(130)


def _print_settings(name: str) -> None:
    """The recipe's own settings as a file that can be changed and given back, and their words."""
    import dataclasses

    import yaml

    from ..training.recipes import RECIPES, recipe_defaults

    kind = RECIPES[name][1]
    values = {f.name: f.default for f in dataclasses.fields(kind)
              if f.default is not dataclasses.MISSING}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    values.update(recipe_defaults(name))
    needed = [f.name for f in dataclasses.fields(kind) if f.name not in values]
    for owner in reversed(kind.__mro__[:-1]):
        for line in (owner.__doc__ or "").strip().splitlines():
            console.print(f"# {line.strip()}".rstrip(), markup=False, highlight=False,
                          soft_wrap=True)
        console.print()
    for field in needed:
        console.print(f"{field}:  # must be given", markup=False, highlight=False)
    text = yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in values.items()},
                          sort_keys=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """Tells how a run goes: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._bar = progress_bars(console)
        self._task = self._bar.add_task("training", total=None)
        self._said = -1
        self._steps = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, report) -> None:
        if console.is_terminal:
            self._bar.start()  # here, for of several processes one alone is told
        text = f"loss {report.values['loss']:.4f}, {report.rate:.1f} samples/s"
        if report.step < self._steps:  # another run of the same command
            self._bar.reset(self._task)
            self._said = -1
        self._steps = report.step
        self._bar.update(self._task, completed=report.step, total=report.steps, description=text)
        tenth = 10 * report.step // report.steps
        if not console.is_terminal and tenth > self._said:
            self._said = tenth
            console.print(f"step {report.step}/{report.steps}: {text}", highlight=False)

    def message(self, text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)
