"""What a picture of coloured shapes shows, as data: frozen, comparable, and JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["one", "two", "count"]
Color = Literal["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]
Size = Literal["small", "large"]
Place = Literal["left", "right", "top", "bottom", "centre",
                "top left", "top right", "bottom left", "bottom right"]
Relation = Literal["left", "right", "above", "below"]

KINDS: tuple[str, ...] = get_args(Kind)
SHAPES: tuple[str, ...] = get_args(Shape)
SIZES: tuple[str, ...] = get_args(Size)
PLACES: tuple[str, ...] = get_args(Place)
RELATIONS: tuple[str, ...] = get_args(Relation)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40), "green": (40, 160, 60), "blue": (40, 70, 215), "yellow": (248, 220, 50),
    "purple": (140, 50, 170), "orange": (242, 128, 20), "white": (245, 245, 245),
    "black": (20, 20, 20),
}
HELD_OUT = 0.1


@dataclass(frozen=True)
class SceneObject:
    """One shape: centre of its box and radius in pixels, y down; a radius is about half its box.

    Raises ValueError for words that the vocabulary has not, or a radius of 0 or less.
    """

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        _check("color", self.color, tuple(COLORS))
        _check("shape", self.shape, SHAPES)
        _check("size", self.size, SIZES)
        if not self.radius > 0:
            raise ValueError(f"radius is {self.radius}; it must be above 0")


@dataclass(frozen=True)
class Scene:
    """A picture of `width` x `height` pixels.

    `kind` "one" is one object at `place`; "two" are two different objects, the first `relation`
    of the second; "count" are two or three objects that differ in nothing but where they are.
    Raises ValueError for objects, place or relation that do not go with the kind.
    """

    width: int
    height: int
    kind: str
    background: str
    objects: tuple[SceneObject, ...]
    place: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        _check("kind", self.kind, KINDS)
        _check("background", self.background, tuple(COLORS))
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a scene of {self.width} x {self.height} px was given; both sides "
                             "must be 1 or more")
        expected = {"one": (1,), "two": (2,), "count": (2, 3)}[self.kind]
        if len(self.objects) not in expected:
            raise ValueError(f"a scene of kind {self.kind!r} has {len(self.objects)} objects; "
                             f"{' or '.join(map(str, expected))} were expected")
        for name, words, kind in (("place", PLACES, "one"), ("relation", RELATIONS, "two")):
            value = getattr(self, name)
            if self.kind == kind:
                _check(name, value, words)
            elif value is not None:
                raise ValueError(f"{name} is {value!r}, but a scene of kind {self.kind!r} has none")

    @property
    def length(self) -> float:
        """The side of a square as large as the picture: what sizes and distances scale with."""
        return math.sqrt(self.width * self.height)

    @property
    def key(self) -> str:
        """The attribute combination that decides the split; not sizes, places or relations."""
        names = sorted(f"{o.color} {o.shape}" for o in self.objects)
        return "|".join(names if self.kind == "two" else [self.background, *names])

    def scaled(self, factor: float) -> Scene:
        """The same scene in another resolution. Raises ValueError unless sides stay whole."""
        sides = (self.width * factor, self.height * factor)
        if any(not float(side).is_integer() for side in sides):
            raise ValueError(f"{self.width} x {self.height} px times {factor:g} are not whole "
                             "pixels")
        objects = tuple(dataclasses.replace(o, x=o.x * factor, y=o.y * factor,
                                            radius=o.radius * factor) for o in self.objects)
        return dataclasses.replace(self, width=int(sides[0]), height=int(sides[1]),
                                   objects=objects)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = dataclasses.asdict(self)
        return {**fields, "objects": list(fields["objects"])}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scene:
        """The scene of `to_dict`; ValueError for anything else."""
        try:
            objects = tuple(SceneObject(**o) for o in fields["objects"])
            return cls(**{**fields, "objects": objects})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{dict(fields)!r} is not a scene: {error}") from error


def held_out(key: str) -> bool:
    """Whether a tenth of attribute combinations that no training draws has `key` in it.

    The same on every machine and for every seed.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 1000 < HELD_OUT * 1000


def _check(name: str, value: Any, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(words)}")
