"""Captioned scenes at 64 px: coloured shapes on coloured backgrounds, drawn from distance fields.

The starter models were trained on the one-object scenes (two_objects=0). Every attribute
combination belongs either to the training set or to the held-out tenth (`held_out`), by a hash.
The order of the random draws is part of the interface: random.Random(seed) names a set of scenes.
"""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import torch
from torch import Tensor

from .captions import caption

__all__ = ["COLORS", "COLOR_NAMES", "PALETTE", "POSITIONS", "RELATIONS", "SHAPES", "SIZES",
           "Scene", "caption", "coverage", "held_out", "render", "sample_scene", "signed_distance"]

COLORS = {
    "red": (215, 35, 40), "green": (40, 160, 60), "blue": (40, 70, 215), "yellow": (248, 220, 50),
    "purple": (140, 50, 170), "orange": (242, 128, 20), "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOR_NAMES = list(COLORS)
PALETTE = torch.tensor([COLORS[name] for name in COLOR_NAMES]).float() / 255
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross"]
POSITIONS = ["left", "right", "top", "bottom", "centre"]
RELATIONS = ["left", "right", "above", "below"]
SIZES = ["small", "large"]
SIZE = 64
MIDDLE = SIZE / 2

Scene = dict[str, Any]
"""bg, objs (each color, shape, size, r, cx, cy in pixels), two, and pos (one) or rel (two)."""

_SECTOR = 2 * math.pi / 5


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points: every sector folded onto half of one, bounded by the edge from tip to notch."""
    tip, notch = 1.12 * r, 0.45
    angle = torch.atan2(x, -y)
    angle = ((angle + _SECTOR / 2).remainder(_SECTOR) - _SECTOR / 2).abs()
    radius = (x * x + y * y).sqrt()
    px, py = radius * torch.cos(angle), radius * torch.sin(angle)
    edge_x = notch * math.cos(_SECTOR / 2) - 1.0
    edge_y = notch * math.sin(_SECTOR / 2)
    length = math.hypot(edge_x, edge_y)
    return (px - tip) * (edge_y / length) + py * (-edge_x / length)


def signed_distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Pixels to the outline, negative inside; x, y (N, H, W) from the centre, y down; r (N, 1, 1).

    Raises ValueError for a shape that is not in SHAPES.
    """
    if shape == "circle":
        return (x * x + y * y).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.86 * r
    if shape == "ring":
        return ((x * x + y * y).sqrt() - 0.74 * r).abs() - 0.26 * r
    if shape == "cross":
        across = torch.maximum(x.abs() - r, y.abs() - 0.34 * r)
        upright = torch.maximum(x.abs() - 0.34 * r, y.abs() - r)
        return torch.minimum(across, upright)
    if shape == "triangle":
        lowered = y - 0.18 * r
        base = lowered - 0.55 * r
        sides = (math.sqrt(3.0) * x.abs() - lowered) / 2 - 0.55 * r
        return torch.maximum(base, sides)
    if shape == "star":
        return _star(x, y, r)
    raise ValueError(f"shape is {shape!r}; use one of {SHAPES}")


def coverage(shape: str, cx: Tensor, cy: Tensor, r: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel the shape covers, 0..1 (N, size, size); cx, cy, r (N,) in pixels."""
    grid = torch.arange(size).float() + 0.5
    x = grid[None, None, :] - cx[:, None, None]
    y = grid[None, :, None] - cy[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    return (0.5 - signed_distance(shape, x, y, r[:, None, None])).clamp(0, 1)


def held_out(key: str, fraction: float = 0.1) -> bool:
    """Whether an attribute combination is kept from training; the same on every machine."""
    return int(hashlib.md5(key.encode()).hexdigest(), 16) % 1000 < fraction * 1000


def _attribute_key(bg: str, objects: list[Scene]) -> str:
    names = [o["color"] + o["shape"] for o in objects]
    return "|".join(names if len(objects) == 2 else [bg, *names])


def sample_scene(
    rng: random.Random, want_held: bool | None = None, two_objects: float = 0.0
) -> Scene:
    """A random scene; `two_objects` is the chance of a pair instead of one object.

    want_held True or False keeps to the held-out or the training combinations.
    """
    while True:
        two = rng.random() < two_objects
        bg = rng.choice(COLOR_NAMES)
        others = [name for name in COLOR_NAMES if name != bg]
        objects = [
            {"color": rng.choice(others), "shape": rng.choice(SHAPES), "size": rng.choice(SIZES)}
            for _ in range(2 if two else 1)
        ]
        if want_held is None or held_out(_attribute_key(bg, objects)) == want_held:
            break
    for o in objects:
        if o["size"] == "small":
            o["r"] = rng.uniform(9.0, 10.3)
        else:
            o["r"] = rng.uniform(12.6, 13.9) if two else rng.uniform(15.0, 17.5)
    if two:
        return {"two": True, "bg": bg, "objs": objects, "rel": _place_pair(objects, rng)}
    return {"two": False, "bg": bg, "objs": objects, "pos": _place_one(objects[0], rng)}


def _place_pair(objects: list[Scene], rng: random.Random) -> str:
    relation = rng.choice(RELATIONS)
    places = (16.5, 47.5)
    if relation in ("right", "below"):
        places = places[::-1]
    for o, place in zip(objects, places, strict=True):
        along = place + rng.uniform(-1.5, 1.5)
        across = MIDDLE + rng.uniform(-4, 4)
        sideways = relation in ("left", "right")
        o["cx"], o["cy"] = (along, across) if sideways else (across, along)
    return relation


def _place_one(o: Scene, rng: random.Random) -> str:
    position = rng.choice(POSITIONS)
    if position == "centre":
        o["cx"] = MIDDLE + rng.uniform(-3, 3)
        o["cy"] = MIDDLE + rng.uniform(-3, 3)
        return position
    nearest = o["r"] + 1.5
    if o["size"] == "small":
        nearest = max(12.5, nearest)
    along = rng.uniform(nearest, 20.5)
    if position in ("right", "bottom"):
        along = SIZE - along
    across = MIDDLE + rng.uniform(-4, 4)
    o["cx"], o["cy"] = (along, across) if position in ("left", "right") else (across, along)
    return position


def render(
    scenes: list[Scene],
    size: int = SIZE,
    generator: torch.Generator | None = None,
    jitter: float = 2.0,
) -> Tensor:
    """The scenes as pictures (N, 3, size, size) in 0..1.

    `jitter` moves every colour by up to that many 255ths, from `generator` (or the global one).
    """
    scale = size / SIZE

    def colors(names: list[str]) -> Tensor:
        chosen = PALETTE[torch.tensor([COLOR_NAMES.index(name) for name in names])]
        if jitter:
            shift = (torch.rand(chosen.shape, generator=generator) * 2 - 1) * jitter / 255
            chosen = (chosen + shift).clamp(0, 1)
        return chosen[:, :, None, None]

    image = colors([s["bg"] for s in scenes]).expand(len(scenes), 3, size, size).clone()
    for slot in range(2):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes)
                    if len(s["objs"]) > slot and s["objs"][slot]["shape"] == shape]
            if not rows:
                continue
            objects = [scenes[i]["objs"][slot] for i in rows]
            cx, cy, r = (torch.tensor([o[name] for o in objects]).float() * scale
                         for name in ("cx", "cy", "r"))
            alpha = coverage(shape, cx, cy, r, size)[:, None]
            color = colors([o["color"] for o in objects])
            image[rows] = image[rows] * (1 - alpha) + color * alpha
    return image
