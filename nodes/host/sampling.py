"""LCM in the host: a sampler function, its sigmas, and one call that samples a latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import trange

from ...pixart_core import sampling
from .schema import known_arguments


def lcm_sigmas(timesteps: list[int]) -> Tensor:
    """The noise levels of LCM timesteps in the host's variance-exploding terms, 0 at the end."""
    levels = sampling.sigmas()[timesteps]
    return torch.cat([levels, levels.new_zeros(1)]).float()


@torch.no_grad()
def sample_lcm(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Callable[[dict[str, Any]], None] | None = None,
               disable: bool | None = None) -> Tensor:
    """The engine's LCM step with the signature of the host's samplers.

    x (B, 4, H, W) is variance exploding here, as everywhere in the host, and variance preserving
    in `lcm_step`; the timestep is the one the model itself is told at each sigma.
    """
    extra_args = extra_args or {}
    schedule = model.inner_model.model_patcher.get_model_object("model_sampling")
    timesteps = [int(t) for t in schedule.timestep(sigmas[:-1]).round().tolist()]
    ones = x.new_ones([x.shape[0]])
    noise = sampling.step_noise(x.shape, extra_args.get("seed") or 0)
    for i in trange(len(timesteps), disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        x0 = model(x, sigma * ones, **extra_args)
        last = i + 1 == len(timesteps)
        x, denoised = sampling.lcm_step(
            (x - x0) / sigma, x / (1 + sigma**2) ** 0.5, timesteps[i],
            None if last else timesteps[i + 1], None if last else next(noise).to(x))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if not last:
            x = x * (1 + sigma_next**2) ** 0.5
    return x


def lcm_sampler() -> comfy.samplers.KSAMPLER:
    """A SAMPLER for SamplerCustom and SamplerCustomAdvanced."""
    return comfy.samplers.KSAMPLER(sample_lcm)


def sample_without_guidance(model: Any, positive: Any, latent: dict[str, Any], seed: int,
                            sampler: comfy.samplers.KSAMPLER, sigmas: Tensor) -> dict[str, Any]:
    """Sample a LATENT with one condition, previews and progress as the stock samplers do."""
    latent = latent.copy()
    sizes = {name: latent.pop(name, None)
             for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    fix = comfy.sample.fix_empty_latent_channels
    image = fix(model, latent["samples"], **known_arguments(fix, sizes))
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    samples = guider.sample(
        noise, image, sampler, sigmas, denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    latent["samples"] = samples.to(comfy.model_management.intermediate_device())
    return latent
