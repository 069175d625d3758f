"""What a generated picture shows (background, colour, shape, size, place), scored against a scene.

`python -m benchmarks.score` measures the detector itself on 128 held-out renders.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .scenes import (
    COLOR_NAMES,
    MIDDLE,
    PALETTE,
    SHAPES,
    SIZE,
    Scene,
    coverage,
    render,
    sample_scene,
)

ATTRIBUTES = ("bg", "count", "color", "shape", "size", "pos")


class _Templates(NamedTuple):
    masks: Tensor  # (T, 64, 64), centred
    names: list[tuple[str, float]]  # shape and radius
    areas: Tensor
    cx: Tensor
    cy: Tensor


@lru_cache(maxsize=1)
def _templates() -> _Templates:
    """Every shape at radii 5 to 19 in half pixels, with area and centre of mass."""
    radii = torch.arange(5.0, 19.01, 0.5)
    middle = torch.full((len(radii),), MIDDLE)
    masks = torch.cat([coverage(shape, middle, middle, radii) for shape in SHAPES])
    names = [(shape, float(r)) for shape in SHAPES for r in radii]
    return _Templates(masks, names, masks.sum((1, 2)), *_centre(masks))


def _centre(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass (cx, cy) of masks (N, 64, 64), in pixels."""
    grid = torch.arange(SIZE).float() + 0.5
    area = masks.sum((1, 2))
    return (masks.sum(1) * grid).sum(1) / area, (masks.sum(2) * grid).sum(1) / area


def components(mask: Tensor, min_area: int = 24) -> list[Tensor]:
    """The 8-connected parts of a bool mask (H, W), largest first, without specks."""
    if not mask.any():
        return []
    height, width = mask.shape
    labels = torch.arange(1, height * width + 1).view(height, width).float() * mask
    while True:
        spread = functional.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    values, counts = labels[mask].unique(return_counts=True)
    return [labels == values[i] for i in counts.argsort(descending=True) if counts[i] >= min_area]


def _color_name(color: Tensor) -> str:
    return COLOR_NAMES[(PALETTE - color).norm(dim=1).argmin()]


def _best_template(mask: Tensor) -> tuple[float, str | None, float | None]:
    """Overlap (IoU), shape and radius of the template most like `mask` (64, 64)."""
    templates = _templates()
    area = mask.sum()
    cx, cy = (value[0] for value in _centre(mask[None]))
    near = ((templates.areas > area * 0.75) & (templates.areas < area * 1.35)).nonzero()[:, 0]
    best: tuple[float, str | None, float | None] = (-1.0, None, None)
    if not len(near):
        return best
    dx = (cx - templates.cx[near]).round().long()
    dy = (cy - templates.cy[near]).round().long()
    for shift_x, shift_y in itertools.product((-1, 0, 1), repeat=2):
        moved = torch.stack([
            torch.roll(templates.masks[c], (int(y) + shift_y, int(x) + shift_x), (0, 1))
            for c, x, y in zip(near, dx, dy, strict=True)
        ])
        overlap = torch.minimum(moved, mask).sum((1, 2)) / torch.maximum(moved, mask).sum((1, 2))
        i = overlap.argmax()
        if overlap[i] > best[0]:
            best = (overlap[i].item(), *templates.names[near[i]])
    return best


def detect(image: Tensor) -> dict[str, Any]:
    """Background colour and up to three objects of a picture (3, H, W) in 0..1.

    Other sizes are averaged down to 64 px. An object has color, shape, iou, r, cx, cy and area.
    """
    if image.shape[-1] != SIZE:
        image = functional.adaptive_avg_pool2d(image, SIZE)
    rim = torch.cat([image[:, :2].flatten(1), image[:, -2:].flatten(1),
                     image[:, :, :2].flatten(1), image[:, :, -2:].flatten(1)], 1)
    background = rim.median(1).values
    contrast = (image - background[:, None, None]).norm(dim=0)
    objects = []
    for part in components(contrast > 0.16)[:3]:
        # Cut at half of this part's own contrast, so that soft edges do not add to its area.
        amplitude = contrast[part].quantile(0.8)
        mask = (part & (contrast > 0.5 * amplitude)).float()
        area = mask.sum()
        if area < 20:
            continue
        cx, cy = (value[0].item() for value in _centre(mask[None]))
        core = (mask > 0) & (contrast > 0.8 * amplitude) & (contrast < 1.25 * amplitude)
        color = image[:, core if core.sum() > 8 else mask > 0].median(1).values
        iou, shape, r = _best_template(mask)
        objects.append({"color": _color_name(color), "shape": shape, "iou": iou, "r": r,
                        "cx": cx, "cy": cy, "area": area.item()})
    return {"bg": _color_name(background), "objs": objects}


def position_word(cx: float, cy: float) -> str:
    """The place a centre at (cx, cy) pixels would be called by."""
    dx, dy = cx - MIDDLE, cy - MIDDLE
    if max(abs(dx), abs(dy)) < 7:
        return "centre"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _relation_word(first: Scene, second: Scene) -> str:
    dx, dy = first["cx"] - second["cx"], first["cy"] - second["cy"]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _match(scene: Scene, found: list[Scene | None]) -> dict[str, float]:
    """Shares of right attributes when found[i] (None: nothing) is taken for the i-th object."""
    wanted = scene["objs"]
    large = 11.4 if scene["two"] else 12.6
    pairs = [(w, f) for w, f in zip(wanted, found, strict=True) if f is not None]
    right = {
        "color": sum(f["color"] == w["color"] for w, f in pairs),
        "shape": sum(f["shape"] == w["shape"] for w, f in pairs),
        "size": sum(f["r"] is not None and (f["r"] > large) == (w["size"] == "large")
                    for w, f in pairs),
    }
    result = {name: count / len(wanted) for name, count in right.items()}
    if len(pairs) < len(wanted):
        placed = False
    elif scene["two"]:
        placed = _relation_word(found[0], found[1]) == scene["rel"]
    else:
        placed = position_word(found[0]["cx"], found[0]["cy"]) == scene["pos"]
    return {**result, "pos": float(placed)}


def score(scene: Scene, image: Tensor) -> dict[str, float]:
    """How right a picture (3, H, W) in 0..1 is: 0 or 1 per attribute, `iou`, and `all` together.

    Of a pair's attributes the value is the share of the objects; objects are matched in the order
    that scores best.
    """
    seen = detect(image)
    objects = seen["objs"]
    count = len(scene["objs"])
    slots = [*objects, *[None] * max(0, count - len(objects))]
    best: dict[str, float] = {}
    for found in itertools.permutations(slots, count):
        candidate = _match(scene, list(found))
        if not best or sum(candidate.values()) > sum(best.values()):
            best = candidate
    result = {"bg": float(seen["bg"] == scene["bg"]), "count": float(len(objects) == count), **best}
    result["iou"] = sum(o["iou"] for o in objects[:count]) / count if objects else 0.0
    result["all"] = float(all(result[name] == 1.0 for name in ATTRIBUTES))
    return result


def report(scenes: list[Scene], images: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """Mean scores over scenes with one object ("single"), with two ("two") and over "all"."""
    scores = [score(scene, image) for scene, image in zip(scenes, images, strict=True)]

    def mean(keep: Callable[[Scene], bool]) -> dict[str, float]:
        kept = [s for s, scene in zip(scores, scenes, strict=True) if keep(scene)]
        return {name: round(sum(s[name] for s in kept) / max(len(kept), 1), 3)
                for name in (*ATTRIBUTES, "iou", "all")}

    return {"single": mean(lambda s: not s["two"]), "two": mean(lambda s: s["two"]),
            "all": mean(lambda s: True)}


def main() -> None:
    """Score the detector on renders whose content is known."""
    rng = random.Random(5)
    scenes = [sample_scene(rng, True) for _ in range(128)]
    for name, means in report(scenes, render(scenes)).items():
        print(name, means)


if __name__ == "__main__":
    main()
