"""Optimisers and learning rates, through the libraries that have them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..extras import require
from .settings import RunSettings

_FLOOR = 1 / 30  # of the learning rate, where a cosine ends


def make_optimizer(settings: RunSettings, groups: Iterable[dict[str, Any]],
                   ) -> torch.optim.Optimizer:
    """The optimiser of a run over parameter groups, each with an optional `scale` of the rate.

    Raises ImportError, with what to install, for an optimiser whose package is missing.
    """
    groups = [{"scale": 1.0, **group} for group in groups]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw8bit":
        bitsandbytes = require("bitsandbytes", "the 8-bit optimiser", extra="adamw8bit")
        return bitsandbytes.optim.AdamW8bit(groups, lr=rate, betas=settings.betas,
                                            eps=settings.eps, weight_decay=decay)
    if settings.optimizer == "came":
        came = require("came_pytorch", "the CAME optimiser", extra="came")
        # arXiv 2307.02047; third beta and both epsilons as Sigma was trained with
        return came.CAME(groups, lr=rate, betas=(*settings.betas, 0.9999), eps=(1e-30, 1e-16),
                         weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, betas=settings.betas, eps=settings.eps,
                             weight_decay=decay)


def learning_rate(settings: RunSettings, step: int) -> float:
    """The learning rate of optimiser step `step`, from 0."""
    rate = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.schedule == "cosine":
        progress = step / settings.steps
        rate *= _FLOOR + (1 - _FLOOR) * (0.5 + 0.5 * math.cos(math.pi * progress))
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
