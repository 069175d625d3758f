"""What a training run is told: defaults of the recipe, a YAML file, then `name=value` pairs."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Precision = Literal["no", "bf16", "fp16"]
Optimizer = Literal["adamw", "adamw8bit", "came"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every recipe takes.

    Attributes:
        out: folder of the run: checkpoints, samples, curves and the finished weights.
        steps: optimiser steps of the whole run.
        batch_size: samples per process and forward pass.
        gradient_accumulation: forward passes per optimiser step.
        learning_rate, weight_decay, betas, eps: of the optimiser.
        optimizer: "adamw"; "adamw8bit" (bitsandbytes) or "came" (came-pytorch) where installed.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: "constant", or "cosine" down to a thirtieth at the last step.
        max_grad_norm: gradients are clipped to this norm; null for no clipping.
        precision: "no" (float32), "bf16" or "fp16" for layers that see tokens; weights, time path
            and loss stay float32.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping it.
        seed: of weights that start random, of the order of samples and of all noise.
        workers: processes that read samples ahead; 0 reads in the training process.
        save_every, keep: a checkpoint every so many steps, of which the last `keep` stay.
        sample_every: steps between grids of samples; 0 for none.
        log_every: steps between lines of the curves.
    """

    out: Path
    steps: int
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: Optimizer = "adamw"
    warmup_steps: int = 100
    schedule: Schedule = "constant"
    max_grad_norm: float | None = 1.0
    precision: Precision = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 500
    keep: int = 2
    sample_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "save_every", "keep",
                     "log_every"):
            at_least(self, name, 1)
        for name in ("warmup_steps", "sample_every", "workers", "seed", "weight_decay"):
            at_least(self, name, 0)
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}; use a number above 0, or "
                             "null for no clipping")


def at_least(settings: RunSettings, name: str, lowest: int) -> None:
    """Raise ValueError for a setting that is lower."""
    if getattr(settings, name) < lowest:
        raise ValueError(f"{name} is {getattr(settings, name)!r}; it must be {lowest} or more")


def read_settings(kind: type, *sources: Mapping[str, Any]) -> Any:
    """A settings dataclass out of mappings, of which later ones win.

    Values are brought to the type of their field (text to Path, lists to tuples). Raises
    ValueError for names that the recipe has not, values of another type and missing ones.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for source in sources:
        unknown = sorted(set(source) - set(fields))
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}; this recipe has "
                             f"{', '.join(sorted(fields))}")
        values.update(source)
    values = {name: _fitted(name, value, hints[name]) for name, value in values.items()}
    missing = [name for name, field in fields.items()
               if field.default is dataclasses.MISSING
               and field.default_factory is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given; put it into the settings file or "
                         f"write {missing[0]}=... on the command line")
    return kind(**values)


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The entries of a YAML file. Raises ValueError for a missing file or anything else in it."""
    import yaml

    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not a YAML file of settings: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path.name} holds no settings; lines of NAME: VALUE were expected")
    return entries


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["steps=100", "schedule=cosine"]` as settings; values are written as in YAML."""
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not a setting; write NAME=VALUE")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[name] = value
    return settings


def check_paths(settings: RunSettings) -> None:
    """Raise ValueError unless `out` can be a run's folder and every other path is there.

    Nothing is made or read; so a wrong path is said before a model is loaded, or hours later.
    """
    for field in dataclasses.fields(settings):
        path = getattr(settings, field.name)
        if field.name != "out" and isinstance(path, Path) and not path.exists():
            raise ValueError(f"{field.name} is {path}, which does not exist")
    out = settings.out.absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"out is {settings.out}, but {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out is {settings.out}, but {there} cannot be written to; name a folder "
                         "of your own")


def to_json(settings: Any) -> str:
    """Settings as JSON, for the run's folder and for comparing runs."""
    return json.dumps(dataclasses.asdict(settings), indent=2, default=str)


def _fitted(name: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        if isinstance(value, Mapping) and dict in kinds:
            return value
        return _fitted(name, value, next(a for a in kinds if a is not dict))
    if origin is Literal:
        if value is False and "no" in arguments:  # as YAML reads the bare word
            return "no"
        if value not in arguments:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(name, value, "a list")
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) != len(value):
            raise _wrong(name, value, f"a list of {len(inner)}")
        return tuple(_fitted(name, v, h) for v, h in zip(value, inner, strict=True))
    if hint is float and isinstance(value, str):  # YAML reads 2e-5 as text
        try:
            return float(value)
        except ValueError:
            raise _wrong(name, value, "a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str | Path):
        return Path(value).expanduser()  # shells leave NAME=~/folder as it is
    if origin is dict or hint in (dict, Any):
        if hint is not Any and not isinstance(value, Mapping):
            raise _wrong(name, value, "NAME: VALUE entries")
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(name, value, {int: "a whole number", float: "a number", str: "text",
                                   bool: "true or false"}.get(hint, hint.__name__))
    return value


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{name} is {value!r}; {wanted} was expected")
