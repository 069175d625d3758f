"""Noise schedule and few-step samplers as pure functions."""

from .dmd import DMD_TIMESTEP, dmd_step, sample_dmd
from .dpm import sample_dpm
from .lcm import (
    boundary_scalings,
    lcm_denoise,
    lcm_step,
    lcm_timesteps,
    sample_lcm,
    step_noise,
)
from .sa_solver import sa_taus, sample_sa, sample_sa_solver
from .schedule import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    alphas_cumprod,
    betas,
    dpm_timesteps,
    noise_levels,
    sigmas,
)
from .uniform import SOLVERS, solver_sigmas, uniform_timesteps

__all__ = [
    "DMD_TIMESTEP",
    "NUM_TRAIN_TIMESTEPS",
    "SOLVERS",
    "add_noise",
    "alphas_cumprod",
    "betas",
    "boundary_scalings",
    "dmd_step",
    "dpm_timesteps",
    "lcm_denoise",
    "lcm_step",
    "lcm_timesteps",
    "noise_levels",
    "sa_taus",
    "sample_dmd",
    "sample_dpm",
    "sample_lcm",
    "sample_sa",
    "sample_sa_solver",
    "sigmas",
    "solver_sigmas",
    "step_noise",
    "uniform_timesteps",
]
