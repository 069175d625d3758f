"""Pictures of a model that is being trained, from captions that are encoded already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import PixArtConfig
from ..sampling import dpm_timesteps, lcm_timesteps, sample_dpm, sample_lcm, step_noise
from .batch import Batch, Conditions, NullCaption

Forward = Callable[[Tensor, Tensor, Conditions], Tensor]


def conditions_of(batch: Batch, config: PixArtConfig, null: NullCaption | None = None,
                  rows: Tensor | None = None) -> Conditions:
    """What a model of `config` is told of a batch, with the captions of `rows` (B,) bool null."""
    caption, mask = batch.caption, batch.mask
    if rows is not None:
        caption, mask = null.replace(caption, mask, rows)
    if config.micro_conditioning:
        return Conditions(caption, mask, batch.image_size, batch.aspect_ratio)
    return Conditions(caption, mask, None, None)


@torch.no_grad()
def sample_batch(forward: Forward, batch: Batch, config: PixArtConfig, null: NullCaption,
                 sampler: str = "dpm", steps: int = 20, guidance: float = 4.5,
                 seed: int = 0) -> Tensor:
    """Model latents (B, 4, h, w) for the captions of `batch`, from noise of `seed` alone.

    `forward(x, t, conditions)` is the model, t (B,). "dpm" is DPM-Solver++ with guidance, "lcm"
    consistency sampling, which has none.
    """
    count = len(batch)
    shape = batch.latents.shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(batch.latents)
    cond = conditions_of(batch, config)
    none, every = (torch.full((count,), v, device=x.device) for v in (False, True))

    def times(t: int, rows: int) -> Tensor:
        return torch.full((rows,), t, device=x.device)

    def predict(x: Tensor, t: int) -> Tensor:
        return forward(x, times(t, count), cond)[:, :4]

    def predict_guided(x: Tensor, t: int) -> Tensor:
        pair = twice(batch)
        rows = torch.cat([none, every])
        both = forward(torch.cat([x, x]), times(t, 2 * count),
                       conditions_of(pair, config, null, rows))[:, :4]
        eps, uncond = both.chunk(2)
        return uncond + guidance * (eps - uncond)

    if sampler == "lcm":
        return sample_lcm(predict, x, lcm_timesteps(steps), step_noise(shape, seed))
    return sample_dpm(predict_guided if guidance > 1 else predict, x, dpm_timesteps(steps))


def twice(batch: Batch) -> Batch:
    """The batch with every sample twice, first all of them once: for guidance in one pass."""
    def double(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    control = None if batch.control is None else double(batch.control)
    return Batch(batch.numbers * 2, double(batch.latents), double(batch.caption),
                 double(batch.mask), double(batch.image_size), double(batch.aspect_ratio),
                 control, batch.texts * 2)
