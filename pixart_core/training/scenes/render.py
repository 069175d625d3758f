"""Scenes as pictures and as outlines, anti-aliased from signed distances, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scene import COLORS, SHAPES, Scene
from .shapes import signed_distance

LINE = 2 / 128
"""Width of the lines of an outline, as a share of Scene.length."""

_SLOTS = 3


def render(scenes: Sequence[Scene], shift: Tensor | None = None) -> Tensor:
    """Scenes of one size as pictures (N, 3, H, W), float32 in 0..1.

    `shift` (N, 4, 3) is added to the colours of background and objects; see `color_shifts`.
    Raises ValueError for no scenes or scenes of several sizes.
    """
    width, height = _common_size(scenes)
    names = list(COLORS)
    table = torch.tensor([COLORS[name] for name in names]).float() / 255
    rows = [[s.background, *(o.color for o in s.objects)] for s in scenes]
    index = torch.tensor([[names.index(c) for c in row] + [0] * (1 + _SLOTS - len(row))
                          for row in rows])
    colors = table[index]  # (N, 4, 3)
    if shift is not None:
        colors = (colors + shift).clamp(0, 1)
    image = colors[:, 0, :, None, None].expand(-1, -1, height, width).clone()
    for chosen, slot, distance in _objects(scenes):
        alpha = (0.5 - distance).clamp(0, 1)[:, None]  # (n, 1, H, W)
        image[chosen] = torch.lerp(image[chosen], colors[chosen, slot + 1, :, None, None], alpha)
    return image


def outline(scenes: Sequence[Scene], line: float | None = None) -> Tensor:
    """The exact outlines of scenes of one size, white on black: (N, 1, H, W), float32 in 0..1.

    `line` is the width of the lines in pixels, by default 2 px at 128 x 128 and in proportion.
    """
    width, height = _common_size(scenes)
    edges = torch.zeros(len(scenes), height, width)
    for chosen, _, distance in _objects(scenes):
        wide = [line if line is not None else LINE * scenes[i].length for i in chosen.tolist()]
        reach = torch.tensor(wide)[:, None, None] / 2
        edges[chosen] = torch.maximum(edges[chosen], (reach + 0.5 - distance.abs()).clamp(0, 1))
    return edges[:, None]


def color_shifts(seeds: Sequence[int], amount: float = 2.0) -> Tensor:
    """For `render`: changes of up to `amount` 255ths of every colour, (N, 4, 3), by seeds alone."""
    drawn = [torch.rand(1 + _SLOTS, 3, generator=torch.Generator().manual_seed(seed))
             for seed in seeds]
    return (torch.stack(drawn) * 2 - 1) * (amount / 255)


def _common_size(scenes: Sequence[Scene]) -> tuple[int, int]:
    sizes = {(s.width, s.height) for s in scenes}
    if len(sizes) != 1:
        given = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)) or "none"
        raise ValueError(f"scenes of one size were expected, {given} given; group them first")
    return sizes.pop()


def _objects(scenes: Sequence[Scene]):
    """(rows, slot, pixels to the outline (n, H, W)) for the objects of one shape and slot."""
    width, height = _common_size(scenes)
    columns = torch.arange(width).float() + 0.5
    lines = torch.arange(height).float() + 0.5
    for slot in range(_SLOTS):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes)
                    if len(s.objects) > slot and s.objects[slot].shape == shape]
            if not rows:
                continue
            things = [scenes[i].objects[slot] for i in rows]
            cx, cy, r = (torch.tensor([getattr(o, name) for o in things])[:, None, None]
                         for name in ("x", "y", "radius"))
            x, y = (columns[None, None] - cx) / r, (lines[None, :, None] - cy) / r
            yield torch.tensor(rows), slot, signed_distance(shape, x, y) * r
