"""What a picture of coloured shapes shows: the judge's eye, which is no network.

Parts that stand out from the rim are cut out softly (every pixel by how far it is from the
background's colour to the part's own), brought to one size and place by area and centre of mass,
and compared with the six shapes. Area and centre do not change under blur, so neither do the
radius and place that are read from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .components import connected, grown, largest_parts
from .scenes.draw import LARGE_ALONE, LARGE_BESIDE, SMALL_ALONE, SMALL_BESIDE
from .scenes.scene import COLORS, SHAPES
from .scenes.shapes import EXTENTS, signed_distance

WORK = 96  # root of the area that pictures are brought down to
LEAST_CONTRAST = 0.16  # of a part to the background, as a distance in RGB
LEAST_AREA = 0.006  # of the picture, for a part to count
LEAST_LIKENESS = 0.65  # of a part to a shape (intersection over union)
LEAST_LEAD = 0.03  # of the likeness to that shape over the likeness to any other
NEAREST_COLOR = 0.27  # a colour further from all of the palette has no name
RIM_SHARE = 0.6  # of the rim must have one colour for the picture to have a background
MOST_PARTS = 6
_PATCH = 48
_REACH = 1.9  # of a patch from its centre, in radii of the circle of the same area


@dataclass(frozen=True)
class DetectedObject:
    """One part of a picture, in pixels of that picture, y down.

    `color` and `shape` are None where nothing of the vocabulary comes close; radius, middle `x`,
    `y` and `box` (left, top, right, bottom edge) are those of the most similar shape even so.
    `size` is the word for the radius, `confidence` the likeness to that shape (intersection over
    union).
    """

    color: str | None
    shape: str | None
    size: str
    x: float
    y: float
    radius: float
    box: tuple[float, float, float, float]
    confidence: float


@dataclass(frozen=True)
class Detected:
    """Background colour (None where the rim has none) and objects, largest first."""

    background: str | None
    objects: tuple[DetectedObject, ...]


@dataclass(frozen=True)
class Parts:
    """The parts of a batch of pictures, cut out.

    Attributes:
        background: (N, 3) colour of every rim.
        owner: (K,) the picture that each part is of.
        color: (K, 3).
        region: (K, h, w) bool, a part and what is close to it, in the working resolution.
        alpha: (K, h, w) 0..1, how much of a pixel is part, in the same.
        has_background: (N,) bool, whether the rim is of one colour.
    """

    background: Tensor
    owner: Tensor
    color: Tensor
    region: Tensor
    alpha: Tensor
    has_background: Tensor


def size_word(radius: float, length: float, alone: bool) -> str:
    """What a radius is called in a picture of root area `length`; large is less beside others."""
    small, large = (SMALL_ALONE, LARGE_ALONE) if alone else (SMALL_BESIDE, LARGE_BESIDE)
    border = (small[1] + large[0]) / 2
    return "large" if radius > border * length else "small"


def detect(image: Tensor) -> Detected:
    """What one picture (3, H, W) in 0..1 shows; at least 64 px a side is a good idea."""
    return detect_all(image[None])[0]


@torch.no_grad()
def detect_all(images: Tensor) -> list[Detected]:
    """What pictures (N, 3, H, W) in 0..1 show. Raises ValueError for other shapes."""
    parts = find_parts(images)
    height, width = images.shape[-2:]
    names = _color_names(parts.background)
    grounds = [name if there else None
               for name, there in zip(names, parts.has_background.tolist(), strict=True)]
    objects: list[list[DetectedObject]] = [[] for _ in range(len(images))]
    owners = parts.owner.tolist()
    if owners:
        colors = _color_names(parts.color)
        scale = (width / parts.alpha.shape[2], height / parts.alpha.shape[1])
        for i, (shape, sure, likeness, x, y, radius) in enumerate(_shapes(parts.alpha, *scale)):
            alone = owners.count(owners[i]) == 1
            word = size_word(radius, math.sqrt(width * height), alone)
            half = EXTENTS[shape]
            box = (x - half[0] * radius, y - half[1] * radius,
                   x + half[0] * radius, y + half[1] * radius)
            objects[owners[i]].append(DetectedObject(
                colors[i], shape if sure else None, word, x, y, radius, box, likeness))
    return [Detected(ground, tuple(found)) for ground, found in zip(grounds, objects, strict=True)]


@torch.no_grad()
def find_parts(images: Tensor) -> Parts:
    """The parts of pictures (N, 3, H, W) that stand out from their rim, largest first."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures of shape {tuple(images.shape)} given, (N, 3, H, W) expected")
    work = _reduced(images.float())
    height, width = work.shape[-2:]
    rim = torch.cat([work[:, :, :2].flatten(2), work[:, :, -2:].flatten(2),
                     work[:, :, :, :2].flatten(2), work[:, :, :, -2:].flatten(2)], 2)
    background = rim.median(2).values  # (N, 3)
    near = (rim - background[:, :, None]).norm(dim=1) < NEAREST_COLOR
    contrast = (_smooth(work) - background[:, :, None, None]).square().sum(1)
    labels = connected(contrast > LEAST_CONTRAST**2)
    kept = largest_parts(labels, LEAST_AREA * height * width, MOST_PARTS)
    owner = torch.tensor([i for i, found in enumerate(kept) for _ in found], dtype=torch.long)
    alphas, colors, regions = [], [], []
    for i, found in enumerate(kept):
        for label in found:
            mask = labels[i] == label
            color = _core_color(work[i], mask)
            region = (grown(mask.float(), 3) > 0) & ((labels[i] == 0) | mask)
            alphas.append(soft(work[i], region, color, background[i]))
            colors.append(color)
            regions.append(region)
    none = work.new_zeros(0, height, width)
    return Parts(background, owner, torch.stack(colors) if colors else work.new_zeros(0, 3),
                 torch.stack(regions) if regions else none.bool(),
                 torch.stack(alphas) if alphas else none, near.float().mean(1) >= RIM_SHARE)


def _reduced(images: Tensor) -> Tensor:
    """Averaged down to about WORK² pixels, where there are more."""
    height, width = images.shape[-2:]
    factor = WORK / math.sqrt(height * width)
    if factor >= 1:
        return images
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _smooth(images: Tensor) -> Tensor:
    """A blur of about 0.7 px against noise."""
    kernel = torch.tensor([0.25, 0.5, 0.25], device=images.device)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    weight = (kernel[:, None] * kernel[None]).expand(3, 1, 3, 3)
    return F.conv2d(padded, weight, groups=3)


def _core_color(image: Tensor, mask: Tensor) -> Tensor:
    """Median colour (3,) of the inside of a part, of all of it where it has no inside."""
    core = grown((~mask).float(), 2) == 0
    return image[:, core if core.sum() > 12 else mask].median(1).values


def soft(image: Tensor, region: Tensor, color: Tensor, background: Tensor) -> Tensor:
    """How far the pixels of a region (H, W) are from the background's colour to a part's: 0..1."""
    way = color - background
    along = torch.einsum("chw,c->hw", image - background[:, None, None], way)
    return (along / way.square().sum().clamp(min=1e-6)).clamp(0, 1) * region


class _Bank(NamedTuple):
    patches: Tensor  # (2, 6, P, P), every shape with the area of the unit circle, sharp and soft
    unit: Tensor  # (6,) radius of that circle when the shape's own radius is 1
    drop: Tensor  # (6,) centre of mass below the middle of the box, in own radii


@lru_cache(maxsize=1)
def _bank() -> _Bank:
    fine = (torch.arange(1024) + 0.5) / 1024 * 2.6 - 1.3
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    step = (torch.arange(4 * _PATCH) + 0.5) / (4 * _PATCH) * 2 * _REACH - _REACH
    patches, units, drops = [], [], []
    for shape in SHAPES:
        inside = (signed_distance(shape, x, y) < 0).float()
        units.append(math.sqrt(inside.mean().item() * 2.6**2 / math.pi))
        drops.append(((inside * y).sum() / inside.sum()).item())
        py, px = torch.meshgrid(step, step, indexing="ij")
        filled = signed_distance(shape, px * units[-1], py * units[-1] + drops[-1]) < 0
        patches.append(F.avg_pool2d(filled.float()[None], 4)[0])
    sharp = torch.stack(patches)
    blurred = F.avg_pool2d(F.avg_pool2d(sharp, 5, 1, 2), 5, 1, 2)  # as small shapes after a VAE
    return _Bank(torch.stack([sharp, blurred]), torch.tensor(units), torch.tensor(drops))


def _shapes(alpha: Tensor, scale_x: float, scale_y: float
            ) -> list[tuple[str, bool, float, float, float, float]]:
    """Most similar shape, whether it is one, likeness, and x, y, radius in picture pixels."""
    bank = _bank()
    _, height, width = alpha.shape
    columns = (torch.arange(width) + 0.5) * scale_x
    lines = (torch.arange(height) + 0.5) * scale_y
    weight = alpha.sum((1, 2)).clamp(min=1e-6)
    cx = (alpha.sum(1) * columns).sum(1) / weight
    cy = (alpha.sum(2) * lines).sum(1) / weight
    round_radius = (weight * (scale_x * scale_y / math.pi)).sqrt()
    step = (torch.arange(_PATCH) + 0.5) / _PATCH * 2 * _REACH - _REACH
    x = (cx[:, None] + step * round_radius[:, None]) / (width * scale_x) * 2 - 1
    y = (cy[:, None] + step * round_radius[:, None]) / (height * scale_y) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, _PATCH, -1),
                        y[:, :, None].expand(-1, -1, _PATCH)], 3)
    patch = F.grid_sample(alpha[:, None], grid, align_corners=False)  # (K, 1, P, P)
    likeness = torch.stack([
        torch.minimum(patch, level).sum((2, 3)) / torch.maximum(patch, level).sum((2, 3))
        for level in bank.patches]).amax(0)  # (K, 6)
    (best, second), index = likeness.topk(2).values.T, likeness.argmax(1)
    sure = (best >= LEAST_LIKENESS) & (best - second >= LEAST_LEAD)
    radius = round_radius / bank.unit[index]
    y_middle = cy - bank.drop[index] * radius
    return [(SHAPES[i], *values) for i, *values in zip(
        index.tolist(), sure.tolist(), best.tolist(), cx.tolist(), y_middle.tolist(),
        radius.tolist(), strict=True)]


def _color_names(colors: Tensor) -> list[str | None]:
    """The palette's names for colours (K, 3)."""
    palette = torch.tensor(list(COLORS.values())).float() / 255
    distance, index = torch.cdist(colors.cpu(), palette).min(1)
    names = list(COLORS)
    return [names[i] if d <= NEAREST_COLOR else None
            for d, i in zip(distance.tolist(), index.tolist(), strict=True)]
