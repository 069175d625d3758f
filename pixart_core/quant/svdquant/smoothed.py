"""A layer seen through one smoothing vector: where every choice of the solver is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import int4
from .layer import relative_error


class Branch(NamedTuple):
    """A low-rank branch with the rounding of its storage: up (N, r), down (K, r) for raw x."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Calibration:
    """A layer to quantise and what it does to sample inputs; all tensors float32.

    weight (N, K), x (rows, K), target (rows, N) = x weight^T; `dtype` is that of what is stored.
    """

    weight: Tensor
    x: Tensor
    target: Tensor
    dtype: torch.dtype
    act_unsigned: bool = False

    def held_back(self) -> tuple[Calibration, Calibration]:
        """Three of every four rows, and the fourth ones, to measure on what was not fitted."""
        fourth = torch.arange(len(self.x), device=self.x.device) % 4 == 3
        fitted, others = (replace(self, x=self.x[rows], target=self.target[rows])
                          for rows in (~fourth, fourth))
        return fitted, others

    def rounded(self, tensor: Tensor) -> Tensor:
        """A float32 tensor as storage holds it, in float32 again."""
        return tensor.to(self.dtype).float()


class Smoothed:
    """Weight times smooth, inputs divided by smooth and in 4 bits.

    weight (N, K); inputs (rows, K): what the 4-bit weights are multiplied with, where a shift of
    the activations has been taken out again, as the bias does it.
    """

    def __init__(self, calibration: Calibration, smooth: Tensor) -> None:
        self.calibration = calibration
        self.smooth = calibration.rounded(smooth)
        self.weight = calibration.weight * self.smooth
        unsigned = calibration.act_unsigned
        self.inputs = int4.fake_quantize_activations(calibration.x, self.smooth, unsigned)
        if unsigned:
            self.inputs -= int4.GELU_SHIFT / self.smooth

    def branch(self, up: Tensor, down: Tensor) -> Branch:
        """Factors of a part up down^T of the smoothed weight, as they are stored."""
        rounded = self.calibration.rounded
        return Branch(rounded(up), rounded(down / self.smooth.unsqueeze(1)))

    def residual(self, branch: Branch) -> Tensor:
        """What the branch leaves of the smoothed weight for 4 bits, (N, K)."""
        return torch.addmm(self.weight, branch.up, (branch.down * self.smooth.unsqueeze(1)).T,
                           alpha=-1)

    def rounded_residual(self, branch: Branch) -> Tensor:
        """The residual in 4 bits, rounded to nearest."""
        return int4.fake_quantize_weight(self.residual(branch), self.calibration.dtype)

    def error(self, branch: Branch, quantized: Tensor) -> float:
        """Relative output error of the branch and a quantised residual (N, K) together."""
        low_rank = self.calibration.x @ branch.down
        found = torch.addmm(self.inputs @ quantized.T, low_rank, branch.up.T)
        return relative_error(found, self.calibration.target)
