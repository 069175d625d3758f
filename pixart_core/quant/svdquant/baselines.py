"""What SVDQuant is compared with: plain rounding, and smoothing without a low-rank branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gptq import residual_codes
from .layer import SVDQuantLayer
from .lowrank import no_branch
from .smooth import SMOOTH_GRID, search_smooth
from .smoothed import Smoothed
from .solve import calibrate, store


@torch.no_grad()
def round_to_nearest(weight: Tensor, bias: Tensor | None = None, *, act_unsigned: bool = False,
                     dtype: torch.dtype = torch.bfloat16) -> SVDQuantLayer:
    """weight (N, K) in 4 bits as it is, activations in 4 bits: no smoothing, a branch of rank 0.

    Raises what `solve_layer` raises.
    """
    nothing = weight.new_zeros(1, weight.shape[-1])
    calibration = calibrate(weight, nothing, bias, act_unsigned, dtype)
    return _without_branch(Smoothed(calibration, torch.ones_like(calibration.x[0])), bias)


@torch.no_grad()
def smooth_only(weight: Tensor, x: Tensor, bias: Tensor | None = None, *,
                act_unsigned: bool = False,
                grid: Sequence[tuple[float, float]] = SMOOTH_GRID,
                dtype: torch.dtype = torch.bfloat16) -> SVDQuantLayer:
    """weight (N, K) in 4 bits after the best smoothing for x (rows, K), a branch of rank 0.

    Raises what `solve_layer` raises.
    """
    calibration = calibrate(weight, x, bias, act_unsigned, dtype)
    return _without_branch(search_smooth(calibration, rank=0, grid=grid).smoothed, bias)


def _without_branch(smoothed: Smoothed, bias: Tensor | None) -> SVDQuantLayer:
    branch = no_branch(smoothed)
    return store(smoothed, branch, *residual_codes(smoothed, branch), bias)
