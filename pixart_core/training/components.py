"""The connected parts of masks, many pictures at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def connected(mask: Tensor) -> Tensor:
    """Labels (N, H, W) int64 of bool masks (N, H, W): 0 outside, one positive number per part.

    Parts are 8-connected; numbers are unique within a picture. Every pixel takes the largest
    number around it, then that of the pixel which that number names, until nothing changes:
    long parts are done in a few rounds.
    """
    count, height, width = mask.shape
    if height * width >= 2**24:
        raise ValueError(f"masks of {height} x {width} are too large; make them smaller first")
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32, device=mask.device)
    labels = numbers.view(1, height, width) * mask
    while True:
        spread = grown(labels) * mask
        flat = F.pad(spread.flatten(1), (1, 0))  # number n is pixel n - 1; 0 stays 0
        spread = flat.gather(1, flat.long())[:, 1:].view(count, height, width)
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def grown(x: Tensor, reach: int = 1) -> Tensor:
    """The largest value within `reach` pixels, also diagonally, of maps (..., H, W) of 0 or more.

    As max_pool2d of 2 * reach + 1, by whole rows and columns, which is faster on a CPU.
    """
    for _ in range(reach):
        for axis in (-1, -2):
            side = x.shape[axis]
            wider = F.pad(x, (1, 1) if axis == -1 else (0, 0, 1, 1))
            x = torch.maximum(torch.maximum(x, wider.narrow(axis, 0, side)),
                              wider.narrow(axis, 2, side))
    return x


def largest_parts(labels: Tensor, least: float, most: int) -> list[list[int]]:
    """For each picture the labels of up to `most` parts of at least `least` pixels, largest first.
    """
    found = []
    for picture in labels:
        values, sizes = picture[picture > 0].unique(return_counts=True)
        kept = values[sizes >= least], sizes[sizes >= least]
        order = kept[1].argsort(descending=True, stable=True)[:most]
        found.append(kept[0][order].tolist())
    return found
