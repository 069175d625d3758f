"""Latent consistency distillation (arXiv 2310.04378, algorithm 1; PixArt-delta, 2401.05252, 3.1).

Pure functions. The guidance is one constant, so neither teacher nor student embeds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling.lcm import ANCHORS
from ..sampling.schedule import NUM_TRAIN_TIMESTEPS, _per_sample, noise_levels


def hop_timesteps(index: Tensor, anchors: int = ANCHORS) -> tuple[Tensor, Tensor]:
    """Where solver hop `index` (B,), 0 to anchors - 1, starts and ends: two (B,) int64.

    Starts are the student's timesteps, 19, 39, ... 999 for 50 anchors; a hop goes one anchor
    down, the first one to 0. Raises ValueError for anchors that do not divide the 1000 timesteps.
    """
    if anchors < 1 or NUM_TRAIN_TIMESTEPS % anchors:
        raise ValueError(f"anchors is {anchors}; use a divisor of {NUM_TRAIN_TIMESTEPS}")
    stride = NUM_TRAIN_TIMESTEPS // anchors
    start = (index.long() + 1) * stride - 1
    return start, (start - stride).clamp(min=0)


def guided_noise(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """The teacher's prediction with guidance w: (1 + w) cond - w uncond (algorithm 1).

    That is a classifier-free guidance scale of 1 + w in the way samplers count it. float32 or
    finer, for half precision would be amplified.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    cond, uncond = cond.to(wide), uncond.to(wide)
    return cond + guidance * (cond - uncond)


def ddim_hop(x: Tensor, eps: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """x (B, 4, H, W) at timestep `start` (B,) one deterministic DDIM step down to `target` (B,).

    DDIM (arXiv 2010.02502), equation 12 with eta = 0, for the noise prediction `eps`. The sum
    runs in float32 or finer, for 1 / sqrt(alpha-bar) reaches 157.
    """
    signal, sigma = _per_sample(noise_levels(start), x)
    next_signal, next_sigma = _per_sample(noise_levels(target), x)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, eps = x.to(wide), eps.to(wide)
    x0 = (x - sigma * eps) / signal
    return next_signal * x0 + next_sigma * eps


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """The mean of sqrt(d^2 + c^2) - c over all differences d: L1 away from 0, L2 near it; 0-d.

    arXiv 2310.14189, section 3.3; c = 0.001 is what PixArt-delta was trained with.
    """
    difference = prediction - target
    return (torch.sqrt(difference**2 + c**2) - c).mean()
