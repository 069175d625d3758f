"""Smoothing: a factor per input channel that moves outliers from the activations to the weight.

x / lambda has no channel much larger than the others, and the low-rank branch takes the outliers
that W lambda has in return (SVDQuant, arXiv 2411.05007, section 4.1; SmoothQuant, 2211.10438).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import int4
from .lowrank import first_branch
from .smoothed import Calibration, Smoothed

NO_SMOOTHING = (0.0, 0.0)
# exponents (alpha, beta): none; activations alone; both with alpha + beta = 1 around (0.5, 0.5)
SMOOTH_GRID: tuple[tuple[float, float], ...] = (
    NO_SMOOTHING,
    *((i / 10, 0.0) for i in range(1, 10)),
    *((i / 20, 1 - i / 20) for i in range(1, 20, 2)),
)
_LIMIT = 1e4  # a factor and its inverse stay within what float16 can hold


class SmoothSearch(NamedTuple):
    """The best smoothing found, its exponents, and the output error of every pair tried."""

    smoothed: Smoothed
    exponents: tuple[float, float]
    errors: dict[tuple[float, float], float]


def input_spans(x: Tensor, act_unsigned: bool = False) -> Tensor:
    """max|x_i| over the rows of x (rows, K), after the shift where there is one: (K,)."""
    return (x + int4.GELU_SHIFT if act_unsigned else x).abs().amax(0)


def smooth_factor(x_span: Tensor, w_span: Tensor, alpha: float, beta: float) -> Tensor:
    """lambda_i = max|X_i|^alpha / max|W_i|^beta over the geometric mean of all of them, (K,).

    A channel that is always zero counts as an average one, so that every factor is positive.
    """
    logarithm = alpha * _log_span(x_span) - beta * _log_span(w_span)
    return (logarithm - logarithm.mean()).exp().clamp(1 / _LIMIT, _LIMIT)


def _log_span(span: Tensor) -> Tensor:
    """Logarithms of spans (K,), zeros replaced by the mean of the others."""
    used = span > 0
    if not used.any():
        return torch.zeros_like(span)
    logarithm = span.where(used, 1.0).log()
    return logarithm.where(used, logarithm[used].mean())


def search_smooth(calibration: Calibration, rank: int, seed: int = 0,
                  grid: Sequence[tuple[float, float]] = SMOOTH_GRID) -> SmoothSearch:
    """The exponents (alpha, beta) of least output error, the low-rank branch being present.

    No smoothing is always tried and wins a tie: the result is never worse. Rank 0 searches
    without a branch. Raises ValueError where the weight does not fit the storage dtype.
    """
    x_span = input_spans(calibration.x, calibration.act_unsigned)
    w_span = calibration.weight.abs().amax(0)
    errors: dict[tuple[float, float], float] = {}
    best: SmoothSearch | None = None
    for pair in dict.fromkeys([NO_SMOOTHING, *grid]):
        smoothed = Smoothed(calibration, smooth_factor(x_span, w_span, *pair))
        generator = torch.Generator(smoothed.weight.device).manual_seed(seed)
        branch = first_branch(smoothed, rank, generator)
        errors[pair] = smoothed.error(branch, smoothed.rounded_residual(branch))
        if best is None or errors[pair] < errors[best.exponents]:
            best = SmoothSearch(smoothed, pair, errors)
    if not math.isfinite(errors[best.exponents]):
        raise ValueError(f"a weight with numbers as large as {calibration.weight.abs().max():.3g} "
                         f"given, too large for {calibration.dtype}; choose torch.bfloat16")
    return best
