"""Conditions that join one batch: captions of unequal length, padded, with a mask."""

from __future__ import annotations

import comfy.conds
import torch
import torch.nn.functional as F
from torch import Tensor


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """(B, L, ...) -> (B, length, ...), zeros at the end."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


class CaptionCond(comfy.conds.CONDRegular):
    """T5 states (B, L, D) that concatenate with captions of other lengths."""

    def can_concat(self, other: CaptionCond) -> bool:
        return (self.cond.shape[2] == other.cond.shape[2]
                and self.cond.device == other.cond.device)

    def concat(self, others: list[CaptionCond]) -> Tensor:
        captions = [self.cond, *(other.cond for other in others)]
        longest = max(caption.shape[1] for caption in captions)
        return torch.cat([_pad_tokens(caption, longest) for caption in captions])


class CaptionMaskCond(comfy.conds.CONDRegular):
    """The mask (B, L) int beside a CaptionCond; None in the batch when nothing is padded.

    `full` says that this caption has no padding of its own, known without looking at the tensor.
    Integers, because the host casts every other dtype to the model's.
    """

    def __init__(self, cond: Tensor, full: bool) -> None:
        super().__init__(cond)
        self.full = full

    def _copy_with(self, cond: Tensor) -> CaptionMaskCond:
        return type(self)(cond, self.full)

    def can_concat(self, other: CaptionMaskCond) -> bool:
        return self.cond.device == other.cond.device

    def concat(self, others: list[CaptionMaskCond]) -> Tensor | None:
        masks = [self, *others]
        longest = max(mask.cond.shape[1] for mask in masks)
        if all(mask.full and mask.cond.shape[1] == longest for mask in masks):
            return None
        return torch.cat([_pad_tokens(mask.cond, longest) for mask in masks])
