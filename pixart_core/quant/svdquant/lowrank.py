"""The low-rank branch: truncated SVD, and its refinement against the rounding of the residual.

SVDQuant (arXiv 2411.05007), section 4.2: L = SVD_r(W^), then by turns Q(R) of R = W^ - L and
L = SVD_r(W^ - Q(R)) for as long as the output comes closer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .smoothed import Branch, Smoothed

EXACT_UP_TO = 256  # the shorter side of a matrix whose SVD is computed in full
_OVERSAMPLING = 16
_POWER_ITERATIONS = 1


class Factors(NamedTuple):
    """up (N, r) and down (K, r) of a matrix (N, K) close to up down^T.

    `basis` (K, r or more): orthonormal input directions, from which the SVD of a matrix nearby
    can start.
    """

    up: Tensor
    down: Tensor
    basis: Tensor


class Refined(NamedTuple):
    """The best branch and the output error of every round tried."""

    branch: Branch
    errors: list[float]


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator,
                  start: Tensor | None = None) -> Factors:
    """The best, or for large matrices nearly the best, approximation of rank `rank`.

    Large matrices: randomised range finder with one power iteration and 16 extra directions
    (Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1), or a step from the basis `start`.
    The singular values are shared out evenly between the two factors.
    """
    if min(matrix.shape) <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        if start is None:
            start = torch.randn(matrix.shape[1], min(rank + _OVERSAMPLING, *matrix.shape),
                                generator=generator, device=matrix.device, dtype=matrix.dtype)
            for _ in range(_POWER_ITERATIONS):
                start = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ start).Q).Q
        span = torch.linalg.qr(matrix @ start).Q  # (N, directions)
        left, values, right = torch.linalg.svd(span.T @ matrix, full_matrices=False)
        left = span @ left
    half = values[:rank].sqrt()
    kept = min(rank + _OVERSAMPLING, len(values))
    return Factors(left[:, :rank] * half, right[:rank].T * half, right[:kept].T)


def no_branch(smoothed: Smoothed) -> Branch:
    """A branch of rank 0."""
    return smoothed.branch(smoothed.weight[:, :0], smoothed.weight[:0].T)


def first_branch(smoothed: Smoothed, rank: int, generator: torch.Generator) -> Branch:
    """The branch that takes the `rank` largest singular values of the smoothed weight, or none."""
    if rank == 0:
        return no_branch(smoothed)
    factors = truncated_svd(smoothed.weight, rank, generator)
    return smoothed.branch(factors.up, factors.down)


def refine(smoothed: Smoothed, rank: int, rounds: int, generator: torch.Generator,
           tolerance: float = 0.0) -> Refined:
    """Up to `rounds` rounds of L <- SVD_r(W^ - Q(R)); the one of least output error is kept.

    Stops at the first round that does not lower the error by more than the share `tolerance`.
    `errors` starts with that of the plain SVD of the weight.
    """
    factors = truncated_svd(smoothed.weight, rank, generator)
    best, errors = None, []
    for _ in range(rounds + 1):
        branch = smoothed.branch(factors.up, factors.down)
        quantized = smoothed.rounded_residual(branch)
        errors.append(smoothed.error(branch, quantized))
        if best is None or errors[-1] < errors[-2]:
            best = branch
        if len(errors) > 1 and not errors[-1] < errors[-2] * (1 - tolerance):
            break
        factors = truncated_svd(smoothed.weight - quantized, rank, generator, factors.basis)
    return Refined(best, errors)
