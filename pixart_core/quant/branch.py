"""A low-rank branch beside a quantised layer: what a LoRA adds without quantising again.

A LoRA changes a weight by up down^T of a small rank. SVDQuant layers (arXiv 2411.05007) have such
a branch already and it is widened; every other format runs the branch next to its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .stored import Tensors, WeightFormat


class Branch(NamedTuple):
    """down (in, r) and up (out, r): the weight gains up down^T."""

    down: Tensor
    up: Tensor

    def to(self, like: Tensor) -> Branch:
        """The branch on the device and in the dtype of `like`; itself where it is so already."""
        return Branch(self.down.to(like), self.up.to(like))


def rows_of(up: Tensor, rows: int, start: int) -> Tensor:
    """up (n, r) of `n` rows from `start` on, as one of all `rows`; the others get zeros.

    Branches of the parts of a fused weight become block-diagonal by it.
    """
    whole = torch.zeros(rows, up.shape[1], dtype=torch.float32, device=up.device)
    whole[start: start + len(up)] = up.float()
    return whole


def side_by_side(branches: Sequence[Branch]) -> Branch:
    """Several branches as one, of the sum of their ranks."""
    return Branch(torch.cat([b.down for b in branches], 1), torch.cat([b.up for b in branches], 1))


def branched_linear(form: WeightFormat, x: Tensor, tensors: Tensors, bias: Tensor | None,
                    branch: Branch) -> Tensor:
    """x (..., in) through a quantised layer with a branch in the dtype of x: (..., out)."""
    widened = getattr(form, "widened", None)
    if widened is not None:
        return form.linear(x, widened(tensors, branch.down, branch.up), bias)
    return form.linear(x, tensors, bias) + (x @ branch.down) @ branch.up.t()
