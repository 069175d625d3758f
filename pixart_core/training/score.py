"""Pictures against scenes: what was asked for and is there, and how sure such shares are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .detect import Detected, DetectedObject, detect, detect_all, size_word
from .scenes.captions import ATTRIBUTES
from .scenes.draw import AWAY
from .scenes.scene import Scene, SceneObject

_MIDDLE = 0.6 * AWAY  # of Scene.length; nearer than that to a middle line is on it
_BATCH = 64
COLUMNS = (*ATTRIBUTES, "all")


@dataclass(frozen=True)
class Scores:
    """How right a picture is: 0..1 for every attribute that was asked for, None for the others.

    Of a pair or several objects, colour, shape and size are the share of the objects.
    """

    background: float | None
    count: float | None
    color: float | None
    shape: float | None
    size: float | None
    place: float | None

    @property
    def all(self) -> float:
        """1 when everything that was asked for is right, else 0."""
        values = [getattr(self, name) for name in ATTRIBUTES]
        return float(all(value == 1 for value in values if value is not None))


@dataclass(frozen=True)
class Share:
    """A mean of `count` scores and its binomial standard error, sqrt(p (1 - p) / n)."""

    mean: float
    count: int

    @property
    def error(self) -> float:
        return math.sqrt(self.mean * (1 - self.mean) / self.count)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class Report:
    """Shares by kind of scene ("one", "two", "count" and "all" of them), then by COLUMNS.

    Attributes that no picture was asked for are left out.
    """

    rows: dict[str, dict[str, Share]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: mean, standard error and count of every share."""
        return {kind: {name: {"mean": share.mean, "error": share.error, "count": share.count}
                       for name, share in row.items()} for kind, row in self.rows.items()}


def score(scene: Scene, image: Tensor, named: Collection[str] | None = None) -> Scores:
    """How right a picture (3, H, W) in 0..1 is, of the attributes `named` (None: all there are)."""
    return compare(scene, detect(image), tuple(image.shape[-2:]), named)


def compare(scene: Scene, seen: Detected, size: tuple[int, int],
            named: Collection[str] | None = None) -> Scores:
    """`score` of what was seen in a picture of `size` (height, width) px.

    Objects are taken for those of the scene whose colour and shape they have, then for those of
    their size, then for those in their place. A kind of scene that has no size or place words
    (equal objects) is never asked for them.
    """
    asked = set(ATTRIBUTES if named is None else named)
    if scene.kind == "count":
        asked -= {"size", "place"}
    count = len(scene.objects)
    found: list[DetectedObject | None] = [*seen.objects]
    found += [None] * (count - len(found))
    best: dict[str, float] = {}
    for chosen in itertools.permutations(found, count):
        candidate = _matched(scene, chosen, size)
        if not best or _rank(candidate, asked) > _rank(best, asked):
            best = candidate
    best["background"] = float(seen.background == scene.background)
    best["count"] = float(len(seen.objects) == count)
    return Scores(**{name: best[name] if name in asked else None for name in ATTRIBUTES})


def report(scenes: Sequence[Scene], images: Iterable[Tensor],
           named: Sequence[Collection[str] | None] | None = None) -> Report:
    """The mean scores of pictures (3, H, W) in 0..1, each against its scene.

    `named` are the attributes that each one's caption names. Raises ValueError for lists of
    different lengths and for none.
    """
    images = list(images)
    named = [None] * len(scenes) if named is None else named
    if not len(scenes) == len(images) == len(named):
        raise ValueError(f"{len(scenes)} scenes, {len(images)} pictures and {len(named)} captions "
                         "were given; one of each was expected")
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    scores: dict[int, Scores] = {}
    for shape, members in groups.items():
        for start in range(0, len(members), _BATCH):
            rows = members[start: start + _BATCH]
            for i, seen in zip(rows, detect_all(torch.stack([images[i] for i in rows])),
                               strict=True):
                scores[i] = compare(scenes[i], seen, shape[-2:], named[i])
    return summarize(scenes, [scores[i] for i in range(len(scenes))])


def summarize(scenes: Sequence[Scene], scores: Sequence[Scores]) -> Report:
    """Means over the scenes of each kind and over all. Raises ValueError for none."""
    if not scenes:
        raise ValueError("there are no scenes to report on")
    rows = {}
    for kind in (*dict.fromkeys(s.kind for s in scenes), "all"):
        chosen = [s for s, scene in zip(scores, scenes, strict=True)
                  if kind in ("all", scene.kind)]
        rows[kind] = {}
        for name in COLUMNS:
            values = [v for s in chosen if (v := getattr(s, name)) is not None]
            if values:
                rows[kind][name] = Share(sum(values) / len(values), len(values))
    return Report(rows)


def place_word(x: float, y: float, width: float, height: float) -> str:
    """What a middle at (x, y) is called in a picture of that size: a word of PLACES."""
    near = _MIDDLE * math.sqrt(width * height)
    dx, dy = x - width / 2, y - height / 2
    upright = "" if abs(dy) < near else "top" if dy < 0 else "bottom"
    across = "" if abs(dx) < near else "left" if dx < 0 else "right"
    return " ".join(filter(None, (upright, across))) or "centre"


def relation_word(first: DetectedObject, second: DetectedObject) -> str:
    """Where the first is from the second, by the larger of the two distances."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _rank(values: dict[str, float], asked: set[str]) -> tuple[float, ...]:
    right = {name: value if name in asked else 0.0 for name, value in values.items()}
    return right["color"] + right["shape"], right["size"], right["place"]


def _matched(scene: Scene, found: Sequence[DetectedObject | None],
             size: tuple[int, int]) -> dict[str, float]:
    """Colour, shape, size and place when found[i] (None: nothing) is the scene's object i."""
    pairs: list[tuple[SceneObject, DetectedObject]] = [
        (w, f) for w, f in zip(scene.objects, found, strict=True) if f is not None]
    height, width = size
    length, total, alone = math.sqrt(width * height), len(scene.objects), scene.kind == "one"
    right = {
        "color": sum(f.color == w.color for w, f in pairs) / total,
        "shape": sum(f.shape == w.shape for w, f in pairs) / total,
        "size": sum(size_word(f.radius, length, alone) == w.size for w, f in pairs) / total,
    }
    placed = len(pairs) == total
    if placed and scene.kind == "one":
        placed = place_word(found[0].x, found[0].y, width, height) == scene.place
    elif placed and scene.kind == "two":
        placed = relation_word(found[0], found[1]) == scene.relation
    return {**right, "place": float(placed)}
