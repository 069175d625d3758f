"""Conditions that join one batch: captions of unequal length, padded, with a mask."""

from __future__ import annotations

from typing import NamedTuple

import comfy.conds
import torch
import torch.nn.functional as F
from torch import Tensor


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """(B, L, ...) -> (B, length, ...), zeros at the end."""
    missing = length - x.shape[1]
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


def caption_mask(caption: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask (B, L) int32 of captions (B, L, D), from the one that a conditioning brings.

    ConditioningConcat puts tokens behind captions and leaves the mask as it was. They are text, but
    for zeros, which are the padding of a batch: T5 gives none. None when all is text. Raises
    ValueError for a mask of other captions.
    """
    count, length = caption.shape[:2]
    known = 0
    if mask is not None:
        mask = mask.to(caption.device, torch.int32).reshape(-1, mask.shape[-1])
        known = mask.shape[1]
        if known > length or len(mask) not in (1, count):
            raise ValueError(
                f"the conditioning has {count} captions of {length} tokens and an attention mask "
                f"for {len(mask)} of {known}: a node before the sampler cut the captions and left "
                "the mask; encode with fewer max_tokens instead")
    text = caption[:, known:].any(dim=-1).to(torch.int32)
    # the longest of a batch has no padding: zeros at the end of all are a conditioning zeroed out
    if count == 1 or known == length or not text[:, -1].any():
        text = torch.ones_like(text)
    if mask is None:
        return None if text.all() else text
    return torch.cat([mask.expand(count, -1), text], dim=1)


class CaptionCond(comfy.conds.CONDRegular):
    """T5 states (B, L, D) that concatenate with captions of other lengths."""

    def process_cond(self, batch_size: int, **kwargs: object) -> CaptionCond:
        """One caption for all pictures, or one for each; the host would repeat or drop some."""
        count = len(self.cond)
        if count not in (1, batch_size):
            raise ValueError(f"the conditioning holds {count} prompts and the latent batch has "
                             f"{batch_size} pictures; wire the count of PixArt Prompt Batch to "
                             "the batch_size of the latent, or write one prompt for each picture")
        return super().process_cond(batch_size=batch_size, **kwargs)

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


def join_captions(prompts: list[list]) -> list:
    """CONDITIONING whose captions are those of several prompts, each a CONDITIONING, as a batch.

    Shorter captions are padded with zeros, and an attention mask tells the padding where there is
    any. Raises ValueError when the prompts have different schedules.
    """
    if len({len(conditioning) for conditioning in prompts}) != 1:
        raise ValueError("the prompts come from a CLIP whose hooks change over different steps; "
                         "encode them without hooks")
    return [_join([conditioning[i] for conditioning in prompts]) for i in range(len(prompts[0]))]


def _join(entries: list[list]) -> list:
    captions = [states for states, _ in entries]
    longest = max(states.shape[1] for states in captions)
    joined = torch.cat([_pad_tokens(states, longest) for states in captions])
    options = dict(entries[0][1])
    if any(states.shape[1] < longest for states in captions):
        options["attention_mask"] = torch.cat(
            [_pad_tokens(states.new_ones(states.shape[:2], dtype=torch.int32), longest)
             for states in captions])
    return [joined, options]


class Area(NamedTuple):
    """Rows and columns of the whole latent, the top left corner of the part, and whether the
    condition is the positive one of guidance."""

    whole: tuple[int, int]
    corner: tuple[int, int]
    positive: bool


class AreaCond(comfy.conds.CONDRegular):
    """Where each condition of a batch lies in the whole latent: one Area for each, in order.

    ControlNets need it: their hint covers the whole picture, the model may see a part.
    `residuals` is the number of token tensors they add, for the host's memory estimate.
    """

    def __init__(self, whole: tuple[int, int], positive: bool = True, residuals: int = 0,
                 area: list[int] | None = None) -> None:
        super().__init__(Area(whole, tuple(area[-2:]) if area else (0, 0), positive))
        self.residuals = residuals

    def process_cond(self, batch_size: int, area: list[int] | None = None,
                     **_: object) -> AreaCond:
        return type(self)(self.cond.whole, self.cond.positive, self.residuals, area)

    def can_concat(self, other: AreaCond) -> bool:
        return True

    def concat(self, others: list[AreaCond]) -> tuple[Area, ...]:
        return tuple(cond.cond for cond in (self, *others))

    def size(self) -> list[int]:
        return [self.residuals]
