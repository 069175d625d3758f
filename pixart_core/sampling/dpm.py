"""DPM-Solver++ (2M) (arXiv 2211.01095) on given timesteps, through diffusers' scheduler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..extras import require
from .schedule import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS


def sample_dpm(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    timesteps: list[int],
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """A whole run: `predict(x, t)` gives eps; returns clean latents (B, 4, H, W).

    x (B, 4, H, W) is variance preserving and at the noise level of timesteps[0]. Second order,
    midpoint, ending at sigma 0: ComfyUI's "dpmpp_2m" with the sigmas of these timesteps.
    `callback(i, denoised)` follows step i. Raises ImportError without diffusers.
    """
    diffusers = require("diffusers", "DPM-Solver++")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=timesteps)
    for i, t in enumerate(timesteps):
        x = scheduler.step(predict(x, t), torch.tensor(t), x).prev_sample
        if callback is not None:
            callback(i, scheduler.model_outputs[-1])
    return x
