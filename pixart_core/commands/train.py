"""`pixart train`: preparing data and training."""

from __future__ import annotations

import typer

from .train_cache import cache
from .train_evaluate import evaluate
from .train_run import register
from .train_scenes import scenes

train = typer.Typer(name="train", help="Train PixArt models: prepare data, then train.",
                    no_args_is_help=True)
train.command("cache")(cache)
train.command("evaluate")(evaluate)
train.command("scenes")(scenes)
register(train)
