"""The time-uniform schedules that PixArt-alpha and PixArt-Sigma are sampled on."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import NUM_TRAIN_TIMESTEPS, sigmas

Solver = Literal["dpm-solver++", "sa-solver"]

SOLVERS: tuple[str, ...] = get_args(Solver)


def uniform_timesteps(steps: int, strength: float = 1.0) -> list[int]:
    """The timesteps of a time-uniform run, noisiest first: 999 (1 - i / steps), rounded.

    They are those of diffusers' DPMSolverMultistepScheduler and SASolverScheduler as the PixArt
    pipelines and demos set them. The PixArt repositories' own solvers tell the network the numbers
    before rounding. `strength` below 1 is for image-to-image: the last `steps` timesteps of a run
    of int(steps / strength) ones (ComfyUI's `denoise`). Raises ValueError for steps outside
    1..999 or strength outside (0, 1].
    """
    last = NUM_TRAIN_TIMESTEPS - 1
    if not 1 <= steps <= last:
        raise ValueError(f"steps is {steps}; use 1 to {last} (14 to 25 are usual)")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}; use a number above 0 and at most 1")
    total = steps if strength > 0.9999 else int(steps / strength)
    if total > last:
        raise ValueError(f"{steps} steps at strength {strength} need a schedule of {total} steps; "
                         f"there are {last}: use at most {int(last * strength)} steps")
    spacing = last / total
    return [round(spacing * i) for i in range(total, 0, -1)][-steps:]


def solver_sigmas(timesteps: list[int], solver: Solver = "dpm-solver++") -> Tensor:
    """The noise levels of a run over `timesteps`, float64 (len + 1,), variance exploding.

    DPM-Solver++ ends at 0, SA-Solver at the schedule's smallest level, 0.01 at timestep 0. Raises
    ValueError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; use one of {SOLVERS}")
    table = sigmas()
    end = table[:1] if solver == "sa-solver" else table.new_zeros(1)
    return torch.cat([table[timesteps], end])
