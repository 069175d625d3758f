"""Noise schedule and few-step samplers as pure functions."""

from .dpm import sample_dpm
from .lcm import (
    boundary_scalings,
    lcm_denoise,
    lcm_step,
    lcm_timesteps,
    sample_lcm,
    step_noise,
)
from .schedule import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    alphas_cumprod,
    betas,
    dpm_timesteps,
    noise_levels,
    sigmas,
)

__all__ = [
    "NUM_TRAIN_TIMESTEPS",
    "add_noise",
    "alphas_cumprod",
    "betas",
    "boundary_scalings",
    "dpm_timesteps",
    "lcm_denoise",
    "lcm_step",
    "lcm_timesteps",
    "noise_levels",
    "sample_dpm",
    "sample_lcm",
    "sigmas",
    "step_noise",
]
