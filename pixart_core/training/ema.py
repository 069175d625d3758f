"""An exponential moving average of weights: what a run is sampled from and what it hands out."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode that no gradient reaches, for `update_average`."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, parameter by parameter; buffers copied.

    The second line of algorithm 1's update in arXiv 2310.04378. Both must be of one structure.
    """
    mine, theirs = list(average.parameters()), list(model.parameters())
    get_ema_multi_avg_fn(decay)(mine, theirs, 0)
    for buffer, other in zip(average.buffers(), model.buffers(), strict=True):
        buffer.copy_(other)


def warmed_decay(decay: float, step: int) -> float:
    """`decay`, reached gradually: (1 + step) / (10 + step) until it is larger.

    `step` counts updates from 0. A run shorter than the average's memory would otherwise hand out
    its random start.
    """
    return min(decay, (1 + step) / (10 + step))
