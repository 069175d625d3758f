"""Whether a picture follows the lines it was steered by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .components import grown
from .detect import find_parts, soft

_LINE = 0.35  # of the brightest pixel, for a pixel of a hint to be part of a line


@dataclass(frozen=True)
class EdgeAgreement:
    """Shares in 0..1: of the picture's edges that the hint has, of the hint's that it follows."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Their harmonic mean; 0 where either is 0."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def edge_agreement(image: Tensor, hint: Tensor) -> EdgeAgreement:
    """How far the outlines of what a picture (3, H, W) in 0..1 shows are those of a hint.

    The hint (1 or 3, H, W) has white lines on black, of any thickness. An edge pixel is right
    within 1 px of one of the other (at 128 x 128, in proportion elsewhere). Raises ValueError
    for sizes that differ.
    """
    if image.shape[-2:] != hint.shape[-2:]:
        raise ValueError(f"a picture of {tuple(image.shape[-2:])} and a hint of "
                         f"{tuple(hint.shape[-2:])} were given; both must have one size")
    found, wanted = shown_edges(image[None])[0], hint_lines(hint)
    reach = max(1, round(math.sqrt(image.shape[-2] * image.shape[-1]) / 128))
    return EdgeAgreement(_within(found, wanted, reach), _within(wanted, found, reach))


def shown_edges(images: Tensor) -> Tensor:
    """Outline pixels (N, H, W) bool of all that stands out in pictures (N, 3, H, W) in 0..1."""
    parts = find_parts(images)
    size = images.shape[-2:]
    inside = torch.zeros(len(images), *size, dtype=torch.bool)
    for owner, color, region in zip(parts.owner.tolist(), parts.color, parts.region, strict=True):
        wider = F.interpolate(region[None, None].float(), size=size)[0, 0]
        inside[owner] |= soft(images[owner], wider, color, parts.background[owner]) > 0.5
    return inside & (grown((~inside).float()) > 0)


def hint_lines(hint: Tensor) -> Tensor:
    """The middle of the lines of a hint (1 or 3, H, W): (H, W) bool."""
    bright = hint.float().mean(0)
    if not bright.max() > 0:
        return torch.zeros_like(bright, dtype=torch.bool)
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    soft = F.pad(bright[None, None], (2, 2, 2, 2), mode="replicate")
    soft = F.conv2d(F.conv2d(soft, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))
    around = F.pad(soft, (1, 1, 1, 1))[0, 0]
    soft = soft[0, 0]
    ridge = ((soft > around[1:-1, :-2]) & (soft >= around[1:-1, 2:])
             | (soft > around[:-2, 1:-1]) & (soft >= around[2:, 1:-1]))
    return ridge & (bright > _LINE * bright.max())


def _within(edges: Tensor, others: Tensor, reach: int) -> float:
    return (grown(others.float(), reach)[edges] > 0).float().mean().item() if edges.any() else 0.0
