"""The training loop: any recipe, on one process or many (accelerate), stopped and resumed exactly.

What a step computes follows from the settings, the weights and the step's number. Nothing else
carries over between steps, so a run that was interrupted goes on as if it never had been.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ..extras import require
from ..model import PixArtTransformer
from .checkpoint import RunState, checkpoints_in, load_run, read_state, save_run
from .curves import Curves
from .draws import Draws
from .interrupts import interrupts, leave_interrupts
from .optimizers import learning_rate, make_optimizer, set_learning_rate
from .precision import attend_in_float32, checkpoint_blocks, keep_time_path_float32
from .recipe import Losses, Recipe
from .settings import RunSettings, to_json

logger = logging.getLogger(__name__)

# what may differ between the start of a run and its continuation
_FREE = {"out", "steps", "workers", "save_every", "keep", "sample_every", "log_every", "vae",
         "sample_count", "sample_steps", "sample_guidance"}


@dataclass(frozen=True)
class Progress:
    """One report of a run: steps done, of how many, values of the curves, samples per second."""

    step: int
    steps: int
    values: dict[str, float]
    rate: float


class Listener(Protocol):
    """What is told how a run goes, on the main process alone."""

    def progress(self, report: Progress) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, whether it was stopped before its end, files it left."""

    step: int
    stopped: bool
    files: list[Path]


class _Silent:
    def progress(self, report: Progress) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class _Steps(Dataset):
    """Batch k of this process, for k from the first step that is left to the last."""

    def __init__(self, recipe: Recipe, first: int, last: int, rank: int, world: int) -> None:
        self.samples, self.size = recipe.samples, recipe.settings.batch_size
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError
        return self.samples.batch(self.first + index, self.size, self.rank, self.world)


def train(recipe: Recipe, listener: Listener | None = None) -> Outcome:
    """Run `recipe` to its last step, or until Ctrl-C, from its newest checkpoint if there is one.

    Ctrl-C ends the step that runs, writes a checkpoint and returns; a second one breaks off.
    Raises CheckpointError for a full disk or a damaged checkpoint, ValueError where `out` holds a
    run with other settings or the loss is no number any more.
    """
    settings = recipe.settings
    accelerator = _accelerator(settings)
    main = accelerator.is_main_process
    listener = listener if listener is not None and main else _Silent()
    settings.out.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(settings, recipe.parameter_groups())
    for module in recipe.every_module():
        module.to(accelerator.device)
    prepare_modules(recipe)
    state = _resume(recipe, optimizer, accelerator, listener)
    trained, prepared = accelerator.prepare(recipe.trained, optimizer)
    accumulation, done = settings.gradient_accumulation, state.step
    batches = _batches(recipe, done * accumulation, accelerator)
    curves = Curves(settings.out, done) if main else None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    meter = _Meter(settings.batch_size * accumulation * accelerator.num_processes)

    def save() -> None:
        nonlocal saved
        if main and saved != done:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            save_run(settings.out, recipe, optimizer,
                     RunState(done, json.loads(to_json(settings)), scaler), settings.keep)
        saved = done
        accelerator.wait_for_everyone()

    saved = done
    with interrupts() as interrupted:
        stopped = False
        while done < settings.steps and not stopped:
            rate = learning_rate(settings, done)
            set_learning_rate(optimizer, rate)
            total: dict[str, torch.Tensor] = {}
            for micro in range(accumulation):
                batch = next(batches).to(accelerator.device)
                draws = Draws(settings.seed, batch.numbers, accelerator.device)
                last = micro == accumulation - 1
                with nullcontext() if last else accelerator.no_sync(trained):
                    with accelerator.autocast():
                        losses = recipe.loss(trained, batch, draws)
                    accelerator.backward(losses.total / accumulation)
                _add(total, losses, accumulation)
            if settings.max_grad_norm is not None:
                total["gradient_norm"] = accelerator.clip_grad_norm_(parameters,
                                                                     settings.max_grad_norm)
            prepared.step()
            prepared.zero_grad()
            recipe.after_step(done)
            done += 1
            stopped = _agree(interrupted.is_set(), accelerator)
            told = done % settings.log_every == 0 or done in (1, settings.steps) or stopped
            kept = done % settings.save_every == 0 or done == settings.steps or stopped
            if told or kept:
                values = _values(total, accelerator)
                _require_number(values, done, settings)
            if told:
                values["learning_rate"] = rate
                if main:
                    curves.write(done, values)
                    listener.progress(Progress(done, settings.steps, values, meter.rate(done)))
            if kept:
                save()
            if main and settings.sample_every and done % settings.sample_every == 0:
                curves.pictures(done, recipe.sample(done))
    files = recipe.export(settings.out) if main else []
    if curves is not None:
        curves.close()
    accelerator.wait_for_everyone()
    return Outcome(done, stopped, files)


def _accelerator(settings: RunSettings) -> Any:
    accelerate = require("accelerate", "training", extra="train")
    # its state outlives a run; another run of this process may want another precision
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(mixed_precision=settings.precision)
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if accelerator.num_processes < started:  # without a GPU it looks past torchrun
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(mixed_precision=settings.precision, cpu=True)
    return accelerator


def prepare_modules(recipe: Recipe) -> None:
    """Give the modules of `recipe` what its settings of precision and checkpointing ask for."""
    if recipe.settings.precision != "no":
        models = {id(m): m for module in recipe.every_module() for m in module.modules()
                  if isinstance(m, PixArtTransformer)}
        for model in models.values():
            keep_time_path_float32(model)
            if next(model.parameters()).device.type == "cpu":
                attend_in_float32(model)
    if recipe.settings.gradient_checkpointing:
        checkpoint_blocks([recipe.trained])


def _defaults(settings: RunSettings) -> dict[str, Any]:
    """What a setting is where nobody gives it."""
    return {field.name: field.default for field in dataclasses.fields(settings)
            if isinstance(field.default, bool | int | float | str | None)}


def _resume(recipe: Recipe, optimizer: torch.optim.Optimizer, accelerator: Any,
            listener: Listener) -> RunState:
    """The state to go on from: that of the newest checkpoint of `out`, or the beginning."""
    found = checkpoints_in(recipe.settings.out)
    if not found:
        return RunState(0, {})
    state = read_state(found[-1], recipe)
    mine = json.loads(to_json(recipe.settings))
    theirs = _defaults(recipe.settings) | state.settings  # a run from before a setting existed
    changed = sorted(name for name in mine.keys() | theirs.keys()
                     if name not in _FREE - recipe.fixed and mine.get(name) != theirs.get(name))
    if changed:
        name = changed[0]
        raise ValueError(
            f"{recipe.settings.out} holds a run with other settings: {name} is "
            f"{theirs.get(name)!r} there and {mine.get(name)!r} here"
            + (f" ({', '.join(changed[1:])} differ too)" if changed[1:] else "")
            + "; go on with the same settings, or use another out folder")
    load_run(found[-1], recipe, optimizer)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    listener.message(f"going on from step {state.step} ({found[-1]})")
    return state


def _batches(recipe: Recipe, first: int, accelerator: Any) -> Iterator[Any]:
    settings = recipe.settings
    last = settings.steps * settings.gradient_accumulation
    steps = _Steps(recipe, first, max(first, last), accelerator.process_index,
                   accelerator.num_processes)
    return iter(DataLoader(steps, batch_size=None, num_workers=settings.workers, shuffle=False,
                           prefetch_factor=4 if settings.workers else None,
                           worker_init_fn=leave_interrupts))


def _add(total: dict[str, torch.Tensor], losses: Losses, accumulation: int) -> None:
    parts = {"loss": losses.total, **losses.parts}
    for name, value in parts.items():
        total[name] = total.get(name, 0.0) + value.detach().float() / accumulation


def _values(total: dict[str, torch.Tensor], accelerator: Any) -> dict[str, float]:
    """Means over the processes, as numbers."""
    stacked = torch.stack([torch.as_tensor(v, device=accelerator.device).float()
                           for v in total.values()])
    return dict(zip(total, accelerator.reduce(stacked, "mean").tolist(), strict=True))


def _require_number(values: dict[str, float], done: int, settings: RunSettings) -> None:
    """Raise ValueError for a loss that is none, or gradients that have just spoilt the weights.

    With fp16 gradients overflow now and then: the loss scaler leaves such a step out.
    """
    looked_at = ["loss"] if settings.precision == "fp16" else ["loss", "gradient_norm"]
    wrong = [name for name in looked_at if not math.isfinite(values.get(name, 0.0))]
    if not wrong:
        return
    checkpoints = checkpoints_in(settings.out)
    kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "nothing was saved"
    raise ValueError(f"the {wrong[0].replace('_', ' ')} is {values[wrong[0]]} at step {done}: "
                     f"training diverged; {kept}. Try a lower learning_rate, more warmup_steps or "
                     "a smaller max_grad_norm"
                     + (", or precision bf16" if settings.precision == "fp16" else ""))


def _agree(stop: bool, accelerator: Any) -> bool:
    """Whether any process was told to stop."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


class _Meter:
    """Samples per second since the report before."""

    def __init__(self, samples_per_step: int) -> None:
        self._samples, self._step, self._time = samples_per_step, None, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        steps = step - self._step if self._step is not None else 1
        rate = steps * self._samples / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate
