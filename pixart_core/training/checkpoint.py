"""The state of a run on disk: everything that going on exactly needs, in safetensors and JSON."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.header import CheckpointError
from ..checkpoint.write import write_checkpoint
from .recipe import Recipe

_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"
_SPARE = 64 << 20  # bytes left over beside a checkpoint


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done, the loss scaler's state, the settings as JSON."""

    step: int
    settings: dict[str, Any]
    scaler: dict[str, Any] | None = None


def checkpoints_in(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = (out / _FOLDER).glob("step-*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / _STATE).is_file())


def save_run(out: Path, recipe: Recipe, optimizer: torch.optim.Optimizer, state: RunState,
             keep: int) -> Path:
    """Write a checkpoint under `out`/checkpoints and remove all but the last `keep`.

    The folder appears under its name only when all of it is written. Raises CheckpointError for a
    full disk, before anything is lost: the older checkpoints stay.
    """
    target = out / _FOLDER / f"step-{state.step:08d}"
    if target.exists():
        return target
    tensors, scalars = pack_optimizer(optimizer.state_dict())
    modules = {name: module.state_dict() for name, module in recipe.modules().items()}
    needed = sum(t.numel() * t.element_size() for part in (tensors, *modules.values())
                 for t in part.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_space(target, needed)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        partial.mkdir()
        for name, state_dict in modules.items():
            write_checkpoint(partial / f"{name}.safetensors", state_dict, recipe.metadata(name))
        if tensors:
            write_checkpoint(partial / _OPTIMIZER, tensors, {})
        document = {"step": state.step, "settings": state.settings, "scaler": state.scaler,
                    "recipe": recipe.name, "optimizer": scalars}
        (partial / _STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints_in(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_state(folder: Path, recipe: Recipe) -> RunState:
    """Where a checkpoint stands and the settings of its run; no weights are read.

    Raises CheckpointError for a damaged checkpoint or one of another recipe.
    """
    document = _document(folder)
    if document.get("recipe") != recipe.name:
        raise CheckpointError(f"{folder} is of a {document.get('recipe')!r} run, this is "
                              f"{recipe.name!r}; use another out folder")
    return RunState(int(document["step"]), dict(document["settings"]), document.get("scaler"))


def load_run(folder: Path, recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights and the optimiser's state of a checkpoint back.

    Raises CheckpointError for a damaged checkpoint or one of another model.
    """
    scalars = _document(folder)["optimizer"]
    try:
        for name, module in recipe.modules().items():
            module.load_state_dict(_read(folder / f"{name}.safetensors"))
        path = folder / _OPTIMIZER
        tensors = _read(path) if path.is_file() else {}
        optimizer.load_state_dict(unpack_optimizer(tensors, scalars))
    except Exception as error:  # safetensors, shapes, names
        raise CheckpointError(f"{folder} does not fit this run or is damaged: {error}") from error


def _document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        int(document["step"]), dict(document["settings"]), document["optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _STATE} is damaged: {error}; remove {folder.name} to go "
                              "on from the checkpoint before it") from error
    return document


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and JSON, so that no pickle is needed.

    A tensor's name is that of its parameter and its own, `3.exp_avg`, with that of a dict around
    it between them: bitsandbytes keeps its 8-bit state in one.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state_dict["state"].items():
        for name, value in values.items():
            inner = value if isinstance(value, dict) else {"": value}
            for own, entry in inner.items():
                if isinstance(entry, Tensor):
                    tensors[".".join(filter(None, (str(index), name, own)))] = entry
            rest = {own: entry for own, entry in inner.items() if not isinstance(entry, Tensor)}
            if isinstance(value, dict) or rest:
                scalars.setdefault(str(index), {})[name] = rest if value is inner else value
    return tensors, {"state": scalars, "param_groups": state_dict["param_groups"]}


def unpack_optimizer(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    """What `pack_optimizer` was given."""
    state: dict[int, dict[str, Any]] = {
        int(index): {name: dict(value) if isinstance(value, Mapping) else value
                     for name, value in values.items()}
        for index, values in scalars["state"].items()}
    for key, tensor in tensors.items():
        index, name, *own = key.split(".")
        values = state.setdefault(int(index), {})
        if own:
            values[name][".".join(own)] = tensor
        else:
            values[name] = tensor
    groups = [{name: tuple(value) if name == "betas" else value for name, value in group.items()}
              for group in scalars["param_groups"]]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _require_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + _SPARE:
        raise CheckpointError(
            f"the disk is full: a checkpoint of this run takes {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free at {target.parent}. Older checkpoints are whole; make "
            "room and start again with the same out folder to go on from the last one")
