"""The shapes, as distances to their outlines in units of their radius."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scene import SHAPES

# half width and half height of each shape's box
EXTENTS: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0), "square": (0.86, 0.86), "triangle": (0.9815, 0.85),
    "star": (1.0462, 0.995), "ring": (1.0, 1.0), "cross": (1.0, 1.0),
}

_SECTOR = 2 * math.pi / 5
_TIP, _NOTCH = 1.1, 0.5
_HOLE = 0.5
_ARM = 0.34


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline, negative inside, for points from the box's centre, y down.

    x, y broadcast; all in radii. Exact beside the edges; corners are mitred on the outside.
    Raises ValueError for a shape that is not in SHAPES.
    """
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - EXTENTS["square"][0]
    if shape == "ring":
        middle = (1 + _HOLE) / 2
        return (torch.hypot(x, y) - middle).abs() - (1 - middle)
    if shape == "cross":
        x, y = x.abs(), y.abs()
        across = torch.maximum(x - 1, y - _ARM)
        upright = torch.maximum(x - _ARM, y - 1)
        return torch.minimum(across, upright)
    if shape == "triangle":
        half = EXTENTS["triangle"][1]
        sides = (math.sqrt(3.0) * x.abs() - y) / 2 - half / 2
        return torch.maximum(y - half, sides)
    if shape == "star":
        return _star(x, y)
    raise ValueError(f"shape is {shape!r}; use one of {', '.join(SHAPES)}")


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: every sector folded onto half of one, bounded by the edge from tip to notch."""
    y = y - (_TIP - EXTENTS["star"][1])  # the box's centre lies above the middle of the points
    angle = torch.atan2(x, -y)
    angle = ((angle + _SECTOR / 2).remainder(_SECTOR) - _SECTOR / 2).abs()
    away = torch.hypot(x, y)
    along, across = away * torch.cos(angle), away * torch.sin(angle)
    inner = _TIP * _NOTCH
    edge = (inner * math.cos(_SECTOR / 2) - _TIP, inner * math.sin(_SECTOR / 2))
    length = math.hypot(*edge)
    return (along - _TIP) * (edge[1] / length) - across * (edge[0] / length)
