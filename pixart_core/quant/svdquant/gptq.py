"""GPTQ (arXiv 2210.17323) for a weight in groups of 64: errors are made up for by later columns."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from . import int4
from .smoothed import Branch, Smoothed

log = logging.getLogger(__name__)

DAMPING = 0.01
BLOCK = 128


def residual_codes(smoothed: Smoothed, branch: Branch, dampings: Sequence[float] = (),
                   ) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, K/64), float32, of what the branch leaves of the weight.

    Rounding to nearest, or GPTQ with one of `dampings`: each is fitted to three quarters of the
    rows and the one of least output error on the last quarter is then fitted to all. The Hessian
    of fewer rows than channels fits their noise, and may be worse than rounding on other inputs.
    """
    residual, dtype = smoothed.residual(branch), smoothed.calibration.dtype
    scales = int4.group_scales(residual, dtype)
    nearest = int4.weight_codes(residual, scales), scales
    if not dampings:
        return nearest
    fitted, others = (Smoothed(part, smoothed.smooth)
                      for part in smoothed.calibration.held_back())
    errors = {None: others.error(branch, int4.scale_codes(*nearest))}
    for damping in dampings:
        found = gptq(residual, fitted.inputs, dtype, damping)
        errors[damping] = others.error(branch, int4.scale_codes(*found))
    best = min(errors, key=errors.get)
    log.debug("output error on rows held back, by damping of GPTQ (None: to nearest): %s", errors)
    return nearest if best is None else gptq(residual, smoothed.inputs, dtype, best)


def gptq(weight: Tensor, inputs: Tensor, dtype: torch.dtype, damping: float = DAMPING,
         block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes -7..7 (N, K) and scales (N, K/64), float32, with |inputs (weight - deq)^T| small.

    weight (N, K), inputs (rows, K): for SVDQuant the residual and the quantised smoothed inputs.
    Scales are numbers of `dtype`, taken from the group when its turn comes. `damping` is the share
    of the mean diagonal added to the Hessian. Columns are corrected at once inside a `block`, a
    multiple of 64, and with one product beyond it.
    """
    count, width = weight.shape
    factor = inverse_factor(inputs, damping)
    left = weight.T.contiguous()  # (K, N): a column of the weight lies in one piece
    codes = torch.empty_like(left)
    scales = left.new_empty(width // int4.GROUP, count)
    for first in range(0, width, block):
        last = min(first + block, width)
        errors = torch.empty_like(left[first:last])
        for k in range(first, last):
            group = k // int4.GROUP
            if k % int4.GROUP == 0:
                scales[group] = int4.group_scales(left[k: k + int4.GROUP].T, dtype)[:, 0]
            codes[k] = (left[k] / scales[group]).round_().clamp_(-int4.SIGNED_MAX, int4.SIGNED_MAX)
            errors[k - first] = (left[k] - codes[k] * scales[group]) / factor[k, k]
            left[k + 1: last].addr_(factor[k, k + 1: last], errors[k - first], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return codes.T.contiguous(), scales.T.contiguous()


def inverse_factor(inputs: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U (K, K) with U^T U = (H + d)^-1, H = inputs^T inputs.

    Cholesky of H from its last row upwards gives H = M M^T with M upper triangular, and U is the
    inverse of M: the inverse of H itself is never formed.
    """
    hessian = inputs.T @ inputs
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(torch.where(mean > 0, mean * damping, 1.0))
    reverse, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:  # fewer rows than channels leave H singular but for the damping
        reverse = torch.linalg.cholesky(hessian.double().flip(0, 1))
    upper = reverse.flip(0, 1)
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).to(inputs.dtype)
