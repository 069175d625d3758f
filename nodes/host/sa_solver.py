"""SA-Solver in the host: PixArt-alpha's recipe, which the host's own sa_solver cannot be set to.

The host's decides by the end of a step whether it is stochastic, and takes the last step, to a
sigma above 0, with order 2 where the recipe has 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import trange

from ...pixart_core import sampling


@torch.no_grad()
def sample_sa_solver(model: Any, x: Tensor, sigmas: Tensor,
                     extra_args: dict[str, Any] | None = None,
                     callback: Callable[[dict[str, Any]], None] | None = None,
                     disable: bool | None = None, eta: float = 1.0) -> Tensor:
    """The engine's SA-Solver with the signature of the host's samplers.

    A step is stochastic, with `eta`, where the timestep that the model is told at its start is
    200 to 800. Latents come back variance exploding, as from the host's own samplers: the engine's
    last factor, sqrt(alpha-bar) at timestep 0 (1 - 5e-5), is left out.
    """
    extra_args = extra_args or {}
    schedule = model.inner_model.model_patcher.get_model_object("model_sampling")
    timesteps = [int(t) for t in schedule.timestep(sigmas[:-1]).round().tolist()]
    ones = x.new_ones([x.shape[0]])
    with trange(len(timesteps), disable=disable) as bar:

        def report(i: int, x: Tensor, denoised: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                          "denoised": denoised})

        return sampling.sample_sa_solver(
            lambda x, i: model(x, sigmas[i] * ones, **extra_args), x, sigmas.tolist(),
            sampling.sa_taus(timesteps, eta),
            sampling.step_noise(x.shape, extra_args.get("seed") or 0), report)


def sa_solver_sampler(eta: float) -> comfy.samplers.KSAMPLER:
    """A SAMPLER for SamplerCustom and SamplerCustomAdvanced."""
    return comfy.samplers.KSAMPLER(sample_sa_solver, {"eta": eta})
