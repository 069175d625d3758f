"""A whole model family by one command: scenes, caches and runs in the order of a file of steps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.read import read_checkpoint
from ..checkpoint.write import write_checkpoint
from ..quant import file_tensors
from .loop import Listener, Outcome, train
from .recipes import RECIPES, make_recipe, recipe_settings
from .settings import read_settings_file
from .steps import ACTIONS

FILE = Path(__file__).resolve().parent / "configs" / "starter.yaml"
_HALF = torch.float16


@dataclass(frozen=True)
class Step:
    """One line of the file: what is done (a recipe, or one of `steps.ACTIONS`), under which name,
    with which settings. `{name}` in a setting stands for the folder of an earlier step."""

    name: str
    do: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """The steps, and which of their files go where in the finished folder."""

    steps: tuple[Step, ...]
    files: Mapping[str, str]


def read_family(path: Path = FILE) -> Family:
    """A file of steps. Raises ValueError for what is no such file, naming the step."""
    entries = read_settings_file(path)
    steps: list[Step] = []
    for number, entry in enumerate(entries.get("steps") or [], 1):
        if not isinstance(entry, Mapping) or not {"name", "do"} <= entry.keys():
            raise ValueError(f"{path.name}: step {number} needs a name and what to do")
        settings = {key: value for key, value in entry.items() if key not in ("name", "do")}
        step = Step(str(entry["name"]), str(entry["do"]), settings)
        if step.do not in (*ACTIONS, *RECIPES):
            raise ValueError(f"{path.name}: step {step.name} is to do {step.do!r}; use one of "
                             f"{', '.join((*ACTIONS, *RECIPES))}")
        if any(step.name == other.name for other in steps):
            raise ValueError(f"{path.name}: two steps are called {step.name}")
        steps.append(step)
    files = entries.get("files")
    if not steps or not isinstance(files, Mapping) or not files:
        raise ValueError(f"{path.name} has no steps, or no files to hand out")
    return Family(tuple(steps), {str(k): str(v) for k, v in files.items()})


def make_starter(out: Path, work: Path, family: Family | None = None,
                 listener: Listener | None = None) -> Outcome:
    """Run every step of a family below `work`, then put its files, in float16, into `out`.

    A step that is done is not done again, and a run that was stopped goes on, so the same call
    finishes what an earlier one began. With Ctrl-C the outcome says so and `out` stays as it is.
    """
    family = family or read_family()
    work.mkdir(parents=True, exist_ok=True)
    folders = {step.name: work / step.name for step in family.steps}
    for number, step in enumerate(family.steps, 1):
        if listener is not None:
            listener.message(f"{number}/{len(family.steps)} {step.name} ({step.do})")
        settings = _filled(dict(step.settings), folders, step.name)
        if step.do in ACTIONS:
            ACTIONS[step.do](folders[step.name], settings)
            continue
        run = recipe_settings(step.do, settings, {"out": folders[step.name]})
        outcome = train(make_recipe(step.do, run), listener)
        if outcome.stopped:
            return outcome
    written = [_hand_out(Path(_filled(source, folders, target)), out / target)
               for target, source in family.files.items()]
    return Outcome(len(family.steps), False, written)


def _filled(value: Any, folders: Mapping[str, Path], name: str) -> Any:
    """A setting with the folders of other steps put in."""
    if isinstance(value, dict):
        return {key: _filled(inner, folders, name) for key, inner in value.items()}
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format(**folders)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{name}: {value!r} names a step that is not there: {error}") from error


def _hand_out(source: Path, target: Path) -> Path:
    """A file or folder of a step where the family wants it; float32 weights become float16."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            _hand_out(file, target / file.name)
    elif source.suffix == ".safetensors":
        checkpoint = read_checkpoint(source, keep_packed=True)
        tensors = file_tensors(checkpoint.packed)
        tensors.update((name, _halved(name, tensor))
                       for name, tensor in checkpoint.state_dict.items()
                       if name not in checkpoint.packed)
        write_checkpoint(target, tensors, checkpoint.metadata)
    else:
        shutil.copyfile(source, target)
    return target


def _halved(name: str, tensor: Tensor) -> Tensor:
    exact = name in ("vae_scale", "vae_shift", "norm")  # scales, and a mean in 0..255
    return tensor.to(_HALF) if tensor.dtype == torch.float32 and not exact else tensor
