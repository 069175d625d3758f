"""Which scene has which number: draws from a seed, the same on every machine and version."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..draws import mix_seed
from .scene import COLORS, RELATIONS, SHAPES, SIZES, Scene, SceneObject, held_out
from .shapes import EXTENTS

Split = Literal["train", "held_out", "all"]

# radii, distances and jitter are shares of Scene.length, the root of the picture's area
# alone, a small object is still six latent cells wide at 128 px: less, and no model of a few
# million weights tells a star from a circle
SMALL_ALONE, LARGE_ALONE = (0.185, 0.195), (0.28, 0.29)
SMALL_BESIDE, LARGE_BESIDE = (0.13, 0.145), (0.18, 0.20)
MARGIN = 0.02
GAP = 0.065
AWAY = 0.17  # least distance of a place from the centre
MULTIPLE = 16
_GRIDS = (16, 8)  # pixels of a token and of a latent cell
_MIDDLE_JITTER = 0.03
_ACROSS_JITTER = 0.045
_WIDEST = 2.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class SceneSettings:
    """What kinds of scenes are drawn.

    Attributes:
        image_size: root of the picture's area in pixels, a multiple of 16 from 64.
        ratios: width to height, such as "5:3"; one is chosen for every scene.
        two, counts: shares of scenes of two objects and of two or three equal ones; the rest is
            one object.
        corners: share of the one-object scenes whose object is in a corner.
        spread: how far places and sizes stray from their middles, from 0 for not at all to 1 for
            all that their words allow; the places of counted objects are free. Small models learn
            shapes sooner where it is small.
        grid: whether the distance of a single object from the picture's middle is rounded to
            tokens (16 px), or to latent cells (8 px) where that has no room. Its outline then
            falls on the tokens in one or two ways, which small models learn sooner still.
    """

    image_size: int = 128
    ratios: tuple[str, ...] = ("1:1",)
    two: float = 0.0
    counts: float = 0.0
    corners: float = 0.0
    spread: float = 1.0
    grid: bool = False

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ValueError("no ratios were given; \"1:1\" is square pictures")
        for ratio in self.ratios:
            picture_size(self.image_size, ratio)
        for name in ("two", "counts", "corners", "spread"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use a share from 0 to 1")
        if self.two + self.counts > 1:
            raise ValueError(f"two is {self.two} and counts {self.counts}; together they are more "
                             "than 1")


def picture_size(image_size: int, ratio: str) -> tuple[int, int]:
    """(width, height) in multiples of 16 px of about image_size² pixels.

    Raises ValueError for sizes below 64 or off the multiples, and ratios beyond 2:1.
    """
    if image_size < 64 or image_size % MULTIPLE:
        raise ValueError(f"image_size is {image_size}; use a multiple of {MULTIPLE} from 64")
    try:
        width, height = (float(part) for part in ratio.split(":"))
        share = width / height
    except (ValueError, ZeroDivisionError):
        share = math.nan
    if not 1 / _WIDEST <= share <= _WIDEST:
        raise ValueError(f"ratio is {ratio!r}; write WIDTH:HEIGHT, from 1:2 to 2:1")
    sides = (image_size * math.sqrt(share), image_size / math.sqrt(share))
    width, height = (max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in sides)
    return width, height


class Dice:
    """Draws out of `random()` alone, the one method whose numbers Python promises to keep."""

    def __init__(self, *seeds: int, spread: float = 1.0, grid: bool = False) -> None:
        self._random = random.Random(mix_seed(*seeds)).random
        self._spread, self._grid = spread, grid

    def chance(self, share: float) -> bool:
        return self._random() < share

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def near(self, low: float, high: float) -> float:
        """Uniform over the middle `spread` of low to high; with 1 the same as `uniform`."""
        return low + (high - low) * (0.5 + self._spread * (self._random() - 0.5))

    def on_grid(self, distance: float, low: float, high: float) -> float:
        """The distance, rounded to the coarsest line of the grid that is from low to high."""
        for step in _GRIDS if self._grid else ():
            rounded = round(distance / step) * step
            if low <= rounded <= high:
                return rounded
        return distance

    def choice(self, items: Sequence[_T]) -> _T:
        return items[int(self._random() * len(items))]


def draw_scene(seed: int, number: int, settings: SceneSettings | None = None,
               split: Split = "all") -> Scene:
    """Scene `number` of `seed`; "train" and "held_out" keep to their attribute combinations.

    The same arguments give the same scene for ever; image_size alone changes nothing but the
    scale (and what it rounds to).
    """
    settings = settings or SceneSettings()
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split is {split!r}; use train, held_out or all")
    dice = Dice(seed, number, spread=settings.spread, grid=settings.grid)
    width, height = picture_size(settings.image_size, dice.choice(settings.ratios))
    kind = dice.uniform(0, 1)
    while True:
        if kind < settings.two:
            scene = _two(dice, width, height)
        elif kind < settings.two + settings.counts:
            scene = _count(dice, width, height)
        else:
            scene = _one(dice, width, height, dice.chance(settings.corners))
        if split == "all" or held_out(scene.key) == (split == "held_out"):
            return scene


def draw_scenes(seed: int, numbers: Iterable[int], settings: SceneSettings | None = None,
                split: Split = "all") -> list[Scene]:
    """`draw_scene` for each of `numbers`."""
    return [draw_scene(seed, number, settings, split) for number in numbers]


def _colors(dice: Dice) -> tuple[str, list[str]]:
    """A background and the colours that differ from it."""
    background = dice.choice(list(COLORS))
    return background, [name for name in COLORS if name != background]


def _object(color: str, shape: str, size: str, x: float, y: float, radius: float) -> SceneObject:
    return SceneObject(color, shape, size, round(x, 2), round(y, 2), round(radius, 2))


def _one(dice: Dice, width: int, height: int, corner: bool) -> Scene:
    length = math.sqrt(width * height)
    background, others = _colors(dice)
    color, shape, size = dice.choice(others), dice.choice(SHAPES), dice.choice(SIZES)
    radius = dice.near(*(SMALL_ALONE if size == "small" else LARGE_ALONE)) * length
    rooms = [side / 2 - extent * radius - MARGIN * length
             for side, extent in zip((width, height), EXTENTS[shape], strict=True)]
    across, upright = (room >= AWAY * length for room in rooms)
    if corner and across and upright:
        places = ["top left", "top right", "bottom left", "bottom right"]
    else:
        places = ["centre"] + ["left", "right"] * across + ["top", "bottom"] * upright
    place = dice.choice(places)
    jitter = _MIDDLE_JITTER if place == "centre" else _ACROSS_JITTER
    offsets = []
    for room, (before, after) in zip(rooms, (("left", "right"), ("top", "bottom")), strict=True):
        words = place.split()
        if before in words or after in words:
            least = AWAY * length
            offset = dice.on_grid(dice.near(least, room), least, room + MARGIN * length)
            offsets.append(-offset if before in words else offset)
        else:
            offset = dice.near(-jitter, jitter) * length
            offsets.append(dice.on_grid(offset, -jitter * length, jitter * length))
    thing = _object(color, shape, size, width / 2 + offsets[0], height / 2 + offsets[1], radius)
    return Scene(width, height, "one", background, (thing,), place=place)


def _two(dice: Dice, width: int, height: int) -> Scene:
    length = math.sqrt(width * height)
    background, others = _colors(dice)
    while True:
        what = [(dice.choice(others), dice.choice(SHAPES), dice.choice(SIZES)) for _ in range(2)]
        radii = [dice.near(*(SMALL_BESIDE if size == "small" else LARGE_BESIDE)) * length
                 for _, _, size in what]
        # room left on either axis when both stand beside each other, or below
        free = [side - (GAP + 2 * MARGIN) * length
                - 2 * sum(EXTENTS[shape][axis] * r
                          for (_, shape, _), r in zip(what, radii, strict=True))
                for axis, side in enumerate((width, height))]
        relations = [word for word in RELATIONS if free[word in ("above", "below")] >= 0]
        if what[0][:2] != what[1][:2] and relations:
            break
    relation = dice.choice(relations)
    axis = int(relation in ("above", "below"))
    order = (0, 1) if relation in ("left", "above") else (1, 0)
    start = MARGIN * length + dice.near(0, free[axis] / 2)
    gap = GAP * length + dice.near(0, free[axis] / 2)
    places: dict[int, tuple[float, float]] = {}
    for i in order:
        extent = EXTENTS[what[i][1]][axis] * radii[i]
        side = (height, width)[axis]
        along, across = start + extent, side / 2 + dice.near(-1, 1) * _ACROSS_JITTER * length
        places[i] = (along, across) if axis == 0 else (across, along)
        start += 2 * extent + gap
    objects = tuple(_object(*what[i], *places[i], radii[i]) for i in (0, 1))
    return Scene(width, height, "two", background, objects, relation=relation)


def _count(dice: Dice, width: int, height: int) -> Scene:
    length = math.sqrt(width * height)
    background, others = _colors(dice)
    color, shape, number = dice.choice(others), dice.choice(SHAPES), dice.choice((2, 3))
    radius = dice.near(*SMALL_BESIDE) * length
    half = [extent * radius for extent in EXTENTS[shape]]
    edge = [h + MARGIN * length for h in half]
    while True:
        spots = [tuple(dice.uniform(m, side - m)
                       for m, side in zip(edge, (width, height), strict=True))
                 for _ in range(number)]
        apart = all(max(abs(a[0] - b[0]) - 2 * half[0], abs(a[1] - b[1]) - 2 * half[1])
                    >= GAP * length for i, a in enumerate(spots) for b in spots[:i])
        if apart:
            break
    objects = tuple(_object(color, shape, "small", x, y, radius) for x, y in spots)
    return Scene(width, height, "count", background, objects)
