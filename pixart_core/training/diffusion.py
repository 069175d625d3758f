"""The objective of a PixArt base model: noise prediction and learned variance, as in IDDPM.

Ho et al. (arXiv 2006.11239) give the posterior, Nichol and Dhariwal (2102.09672) the learned
variance and the hybrid loss. Everything is computed in float32 or finer, whatever the model runs
in.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..sampling.schedule import (
    NUM_TRAIN_TIMESTEPS,
    _per_sample,
    alphas_cumprod,
    betas,
    noise_levels,
)

_PIXEL = 1.0 / 255.0  # half a step of an 8-bit picture scaled to -1..1, for the last decoder step


@lru_cache(maxsize=8)
def _posterior_table(device: torch.device) -> Tensor:
    """For each timestep: log beta, log posterior variance, and the factors of x0 and x_t."""
    beta, alpha_bar = betas(), alphas_cumprod()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    variance[0] = variance[1]  # the posterior of the first step has none; its log would be -inf
    table = torch.stack([
        beta.log(), variance.log(), beta * previous.sqrt() / (1 - alpha_bar),
        (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
    ])
    return (table.float() if device.type == "mps" else table).to(device)


def noise_loss(eps: Tensor, noise: Tensor, t: Tensor, weight_clip: float | None = None,
               weight_floor: float = 1.0) -> Tensor:
    """Squared error of the noise prediction for each sample: (B, 4, H, W) twice -> (B,).

    `weight_clip` weighs a sample by min(weight_floor + 1 / SNR, weight_clip). 1 / SNR alone is the
    error of the predicted picture, the floor adds that of the noise: with 0 a small model spends
    nothing on noise that no eye sees. None weighs all the same, as PixArt was trained (equation 14
    of DDPM).
    """
    error = (eps.to(_wide(eps)) - noise).square().flatten(1).mean(1)
    if weight_clip is None:
        return error
    signal, _ = noise_levels(t)  # 1 / SNR = 1 / alpha-bar - 1
    return error * (signal**-2 - 1 + weight_floor).clamp(max=weight_clip).to(error.dtype)


def focused_timesteps(uniform: Tensor, mean: float, deviation: float) -> Tensor:
    """Timesteps whose t / 1000 is logit-normal (Esser et al., arXiv 2403.03206, equation 19).

    `uniform` (B,) in [0, 1), float64, -> (B,) int64. Between pure noise, in which nothing can be
    seen, and a nearly clean picture, where nothing is left to decide, a model learns what the
    caption's words look like: mean 0.1 and deviation 0.8 put two thirds of the draws into 350 to
    700.
    """
    normal = torch.special.ndtri(uniform.clamp(min=torch.finfo(uniform.dtype).eps))
    share = torch.sigmoid(mean + deviation * normal)
    return (share * NUM_TRAIN_TIMESTEPS).long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)


def variance_loss(out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The variational bound of each sample in bits per dimension, (B,): trains the variance alone.

    `out` (B, 8, H, W) is the network's output at x_t (B, 4, H, W) and t (B,); its noise half is
    detached (IDDPM, section 3.1). The other half v in -1..1 is the log variance between the
    posterior's and beta (equation 15). Timestep 0 is the likelihood of x0 in bins of 8-bit
    pixels, as in the released code, though the model sees latents.
    """
    eps, fraction = out.to(_wide(out)).chunk(2, dim=1)
    eps = eps.detach()
    x0, x_t = x0.to(eps.dtype), x_t.to(eps.dtype)
    rows = _posterior_table(t.device)[:, t.long()].to(eps.dtype)
    log_beta, log_posterior, of_x0, of_xt = _per_sample(tuple(rows), x0)
    signal, sigma = _per_sample(noise_levels(t), x0)
    predicted_x0 = (x_t - sigma * eps) / signal
    mean = of_x0 * predicted_x0 + of_xt * x_t
    true_mean = of_x0 * x0 + of_xt * x_t
    share = (fraction + 1) / 2
    log_variance = share * log_beta + (1 - share) * log_posterior
    divergence = _normal_kl(true_mean, log_posterior, mean, log_variance)
    likelihood = -_binned_log_likelihood(x0, mean, 0.5 * log_variance)
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2.0)


def _normal_kl(mean: Tensor, log_variance: Tensor, other: Tensor, other_log: Tensor) -> Tensor:
    """KL(N(mean, ...) || N(other, ...)) of each element, in nats."""
    ratio = (log_variance - other_log).exp() + (mean - other) ** 2 * (-other_log).exp()
    return 0.5 * (ratio - 1 - log_variance + other_log)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the probability that N(mean, e^log_scale) falls into the bin of each x."""
    inverse = (-log_scale).exp()
    above = _normal_cdf((x - mean + _PIXEL) * inverse)
    below = _normal_cdf((x - mean - _PIXEL) * inverse)
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Of the standard normal, in the tanh approximation that diffusion code computes it with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
