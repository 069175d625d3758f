"""One-step sampling of a DMD student (arXiv 2311.18828, as PixArt-Sigma's repository trains it)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import _per_sample, noise_levels

DMD_TIMESTEP = 400


def dmd_step(eps: Tensor, x: Tensor, t: int | Tensor = DMD_TIMESTEP) -> Tensor:
    """The student's picture: (x - sqrt(1 - alpha-bar) eps) / sqrt(alpha-bar).

    eps and x (B, 4, H, W), `t` an int or (B,). x is unit-variance noise and nothing else: the
    student was trained to read it as x_t at t = 400, where a diffused picture holds
    0.898 of noise. The sum runs in float32 or finer; the result has x's dtype.
    """
    signal, sigma = _per_sample(noise_levels(t), x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((wide - sigma * eps.to(wide.dtype)) / signal).to(x.dtype)


def sample_dmd(
    predict: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The whole run: `predict(x, t)` gives eps, once; returns clean latents (B, 4, H, W).

    `noise` (B, 4, H, W) has unit variance; `callback(0, denoised)` follows the step.
    """
    denoised = dmd_step(predict(noise, DMD_TIMESTEP), noise)
    if callback is not None:
        callback(0, denoised)
    return denoised
