"""The noise schedule every PixArt model was trained with: linear betas, 1000 steps, epsilon.

Tables are made in float64, so that sigma at t = 999 (157.4) keeps its digits; what leaves this
module for a sampler is float64 on the CPU (a scalar timestep) or on the timestep's own device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02


@lru_cache(maxsize=1)
def _alphas_cumprod() -> Tensor:
    return torch.cumprod(1.0 - betas(), dim=0)


def betas() -> Tensor:
    """The 1000 betas, linear from 1e-4 to 0.02, float64 (1000,)."""
    return torch.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)


def alphas_cumprod() -> Tensor:
    """alpha-bar of every timestep, the product of (1 - beta), float64 (1000,)."""
    return _alphas_cumprod().clone()


def sigmas() -> Tensor:
    """sqrt((1 - alpha-bar) / alpha-bar) of every timestep, float64 (1000,): 0.01 to 157.4."""
    alpha_bar = _alphas_cumprod()
    return ((1.0 - alpha_bar) / alpha_bar).sqrt()


@lru_cache(maxsize=8)
def _level_table(device: torch.device) -> Tensor:
    alpha_bar = _alphas_cumprod()
    table = torch.stack([alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()])
    if device.type == "mps":  # has no float64
        table = table.float()
    return table.to(device)


def noise_levels(t: int | Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) at timestep `t`: the signal and noise of x_t.

    `t` is an int (two 0-d float64 CPU tensors come back, which mix with tensors of any device and
    dtype) or an integer tensor of any shape (two tensors of that shape on its device, float64).
    Raises ValueError for an int outside 0..999.
    """
    if isinstance(t, Tensor):
        signal, noise = _level_table(t.device)[:, t.long()]
        return signal, noise
    if not 0 <= t < NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"timestep is {t}; the schedule has timesteps 0 to "
                         f"{NUM_TRAIN_TIMESTEPS - 1}")
    signal, noise = _level_table(torch.device("cpu"))[:, t]
    return signal, noise


def add_noise(x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
    """x_t = sqrt(alpha-bar) x0 + sqrt(1 - alpha-bar) noise (DDPM, equation 4).

    x0 and noise (B, C, H, W); `t` an int or a (B,) tensor. The result has x0's dtype.
    """
    signal, sigma = _per_sample(noise_levels(t), x0)
    return (signal * x0 + sigma * noise).to(x0.dtype)


def _per_sample(levels: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Levels shaped to multiply `x` (B, ...): (B, 1, 1, 1) float32 or finer, or 0-d as they are."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(v if v.ndim == 0 else v.to(dtype).view(-1, *[1] * (x.ndim - 1)) for v in levels)


def dpm_timesteps(steps: int, strength: float = 1.0) -> list[int]:
    """The timesteps of a DPM-Solver++ run, noisiest first: 999 - floor(1000 i / steps).

    These are the ones ComfyUI's "simple" scheduler picks, so a workflow and the pipeline agree.
    `strength` below 1 is for image-to-image: the last `steps` timesteps of a run of
    int(steps / strength) ones (ComfyUI's `denoise`), the first of which says how much noise the
    picture gets. Raises ValueError for steps outside 1..1000 or strength outside (0, 1].
    """
    if not 1 <= steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"steps is {steps}; use 1 to {NUM_TRAIN_TIMESTEPS}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}; use a number above 0 and at most 1")
    total = steps if strength > 0.9999 else int(steps / strength)
    if total > NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"{steps} steps at strength {strength} need a schedule of {total} steps; "
                         f"there are {NUM_TRAIN_TIMESTEPS}: use at most "
                         f"{int(NUM_TRAIN_TIMESTEPS * strength)} steps")
    last = NUM_TRAIN_TIMESTEPS - 1
    spacing = NUM_TRAIN_TIMESTEPS / total
    return [last - int(spacing * i) for i in range(total)][-steps:]
