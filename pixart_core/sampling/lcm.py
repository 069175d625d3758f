"""Latent consistency sampling (arXiv 2310.04378; PixArt-delta, arXiv 2401.05252): pure functions.

x is variance preserving throughout: x_t = sqrt(alpha-bar) x0 + sqrt(1 - alpha-bar) noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from .schedule import NUM_TRAIN_TIMESTEPS, _per_sample, add_noise, noise_levels

Grid = Literal["diffusers", "official"]

ANCHORS = 50
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def lcm_timesteps(steps: int, grid: Grid = "diffusers", strength: float = 1.0) -> list[int]:
    """The timesteps of an LCM run, noisiest first.

    They are taken from the 50 anchors the student was distilled on, 19, 39, ... 999, of which
    `strength` below 1 (image-to-image) keeps the first int(50 strength). The grids differ in how
    `steps` of them are spread: "diffusers" at equal fractions of the list, as LCMScheduler does,
    "official" every (anchors // steps)-th one, as the PixArt-alpha repository does; both give the
    same for 1, 2, 5 and 7 steps. Raises ValueError for an unknown grid, strength outside (0, 1]
    or more steps than anchors.
    """
    if grid not in get_args(Grid):
        raise ValueError(f"grid is {grid!r}; use one of {get_args(Grid)}")
    if not 1 <= steps <= ANCHORS:
        raise ValueError(f"LCM steps is {steps}; use 1 to {ANCHORS} (1 to 8 are usual)")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}; use a number above 0 and at most 1")
    kept = int(ANCHORS * strength)
    if kept < steps:
        raise ValueError(f"strength {strength} leaves {kept} of the {ANCHORS} LCM timesteps, too "
                         f"few for {steps} steps; the smallest strength for {steps} is "
                         f"{_smallest_strength(steps)}")
    spacing = NUM_TRAIN_TIMESTEPS // ANCHORS
    anchors = [spacing * k - 1 for k in range(kept, 0, -1)]
    if grid == "official":
        return anchors[:: kept // steps][:steps]
    # In floats, not i * kept // steps: diffusers' floor of a linspace falls one anchor short at a
    # few step counts, and the aim is its list.
    return [anchors[int(i * (kept / steps))] for i in range(steps)]


def _smallest_strength(steps: int) -> float:
    strength = steps / ANCHORS
    return strength if int(ANCHORS * strength) >= steps else math.nextafter(strength, 1.0)


def boundary_scalings(t: int | Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of the consistency function, float64 for an int `t`, of `t`'s shape.

    c_skip = d^2 / ((10 t)^2 + d^2), c_out = 10 t / sqrt((10 t)^2 + d^2), d = 0.5 (appendix C of
    the LCM paper): the function is the identity at t = 0.
    """
    if isinstance(t, Tensor):
        scaled = TIMESTEP_SCALING * t.to(_real(t.device))
    else:
        scaled = torch.tensor(TIMESTEP_SCALING * t, dtype=torch.float64)
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square.sqrt()


def _real(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def lcm_denoise(eps: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
    """The consistency function: the clean latents that `eps` at timestep `t` of `x` speaks of.

    c_out (x - sqrt(1 - alpha-bar) eps) / sqrt(alpha-bar) + c_skip x; eps and x (B, 4, H, W),
    `t` an int or (B,). The sum runs in float32, for 1 / sqrt(alpha-bar) reaches 157.
    """
    signal, sigma = _per_sample(noise_levels(t), x)
    c_skip, c_out = _per_sample(boundary_scalings(t), x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x0 = (wide - sigma * eps.to(wide.dtype)) / signal
    return (c_out * x0 + c_skip * wide).to(x.dtype)


def lcm_step(
    eps: Tensor,
    x: Tensor,
    t: int | Tensor,
    t_next: int | Tensor | None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of multistep consistency sampling (algorithm 3 of the LCM paper).

    eps (B, 4, H, W) is the network's noise prediction at x (B, 4, H, W) and timestep `t`. Returns
    (x_next, denoised): the prediction re-noised to `t_next` with `noise` (B, 4, H, W), and the
    prediction itself. t_next=None ends the run: x_next is `denoised` and no noise is needed.
    Raises ValueError when a step that goes on has no noise.
    """
    denoised = lcm_denoise(eps, x, t)
    if t_next is None:
        return denoised, denoised
    if noise is None:
        raise ValueError(f"lcm_step to timestep {t_next} needs noise; only the last step "
                         "(t_next=None) goes without")
    return add_noise(denoised, noise, t_next), denoised


def step_noise(shape: tuple[int, ...] | torch.Size, seed: int) -> Iterator[Tensor]:
    """Endless noise for the steps after the first: float32 CPU tensors of `shape`.

    It comes from a generator of its own, seeded seed + 1 (modulo 2^64), so that it is not the
    noise the picture started from. ComfyUI's "lcm" sampler draws the very same when it runs on
    the CPU; drawn on the CPU, it is the same for every device.
    """
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)
    while True:
        yield torch.randn(tuple(shape), generator=generator)


def sample_lcm(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    timesteps: list[int],
    noise: Iterator[Tensor],
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """A whole LCM run: `predict(x, t)` gives eps; returns the last denoised latents.

    x (B, 4, H, W) is at the noise level of timesteps[0]; `callback(i, denoised)` follows step i.
    """
    denoised = x
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        fresh = None if last else next(noise).to(x)
        x, denoised = lcm_step(predict(x, t), x, t, None if last else timesteps[i + 1], fresh)
        if callback is not None:
            callback(i, denoised)
    return denoised
