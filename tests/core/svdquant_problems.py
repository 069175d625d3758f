"""Small linear layers with the troubles that 4-bit quantisation has, for the SVDQuant tests."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_problem(rows: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight (160, 128), x (rows, 128), bias (160,): nothing stands out anywhere."""
    return normal(160, 128, seed=seed), normal(rows, 128, seed=seed + 1), normal(160, seed=seed + 2)


def outlier_problem(rows: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same with input channels 30 times as large as others in x, and other ones in weight."""
    weight, x, bias = gaussian_problem(rows, seed)
    x[:, [3, 40, 77, 120]] *= 30
    weight[:, [5, 60, 90, 127]] *= 30
    return weight, x, bias


def correlated_problem(rows: int = 256, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight (160, 128), x (rows, 128) that is nearly of rank 16, bias (160,)."""
    weight, _, bias = gaussian_problem(seed=seed)
    x = normal(rows, 16, seed=seed + 3) @ normal(16, 128, seed=4)
    return weight, x + 0.2 * normal(rows, 128, seed=seed + 5), bias
