"""DMD in the host: a sampler of one step and its sigmas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import trange

from ...pixart_core import sampling


def dmd_sigmas() -> Tensor:
    """The noise level that the student is told, and 0: (2,), variance exploding."""
    return sampling.solver_sigmas([sampling.DMD_TIMESTEP]).float()


@torch.no_grad()
def sample_dmd(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Callable[[dict[str, Any]], None] | None = None,
               disable: bool | None = None) -> Tensor:
    """The engine's one step with the signature of the host's samplers.

    The host gives x = latent + sigma noise, of which the network would see 0.898 of the noise.
    The student starts from the noise alone, and sees all of it. Where the host adds none (a
    custom sampler with add_noise off), the latent is what the student starts from.

    Raises ValueError for sigmas of more than one step, or of one that does not end at 0.
    """
    if len(sigmas) != 2 or sigmas[1] != 0:
        raise ValueError(f"the DMD sampler takes one step to sigma 0; the sigmas are "
                         f"{[round(s, 4) for s in sigmas.tolist()]}: wire those of PixArt DMD "
                         "Schedule")
    sigma = sigmas[0]
    if model.noise.any():
        x = model.noise.to(x) * (1 + sigma**2) ** 0.5
    for i in trange(1, disable=disable):
        denoised = model(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
    return denoised


def dmd_sampler() -> comfy.samplers.KSAMPLER:
    """A SAMPLER for SamplerCustom and SamplerCustomAdvanced."""
    return comfy.samplers.KSAMPLER(sample_dmd)
