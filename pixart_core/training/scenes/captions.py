"""The caption grammar: several ways to say what a scene shows, some of which say less."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .draw import Dice
from .scene import Scene, SceneObject

ATTRIBUTES = ("background", "count", "color", "shape", "size", "place")

_PLACES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
_RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_NUMBERS = {2: "two", 3: "three"}
_LEFT_OUT = {"size": 0.2, "place": 0.2, "background": 0.15, "color": 0.05}
_CENTRE_LEFT_OUT = 0.5  # of a single object in the centre; elsewhere its place is said
_TAKEN = 2**32  # what captions draw with, so that they do not follow the scene's own draws


@dataclass(frozen=True)
class Caption:
    """Words, and which attributes of the scene they name; the others are free."""

    text: str
    named: frozenset[str]


def check_attributes(what: str, attributes: Collection[str]) -> None:
    """Raises ValueError, which begins with `what`, for names that are none of ATTRIBUTES."""
    unknown = sorted(set(attributes) - set(ATTRIBUTES))
    if unknown:
        raise ValueError(f"{what} {', '.join(unknown)}; use {', '.join(ATTRIBUTES)}")


def captions(scene: Scene, seed: int, number: int, count: int = 4) -> list[Caption]:
    """`count` captions of scene `number` of `seed`, the same ones every time.

    The first names everything there is to say; the others now and then leave out size, place,
    background or colour, as people do. Of a single object only the centre goes without saying:
    who names no place means the middle, and a small model that may choose among nine blurs them.
    """
    dice = Dice(seed, number, _TAKEN)
    return [_caption(scene, dice, full=i == 0) for i in range(count)]


def full_caption(scene: Scene, seed: int = 0, number: int = 0) -> str:
    """A caption that names every attribute, in one of its phrasings."""
    return captions(scene, seed, number, 1)[0].text


def caption_naming(scene: Scene, attributes: Collection[str], seed: int = 0,
                   number: int = 0) -> Caption:
    """A caption of shapes, their count and `attributes` alone (of ATTRIBUTES)."""
    check_attributes("attributes are", attributes)
    dice = Dice(seed, number, _TAKEN)
    return _written(scene, dice, {name: name in attributes for name in _LEFT_OUT})


def _caption(scene: Scene, dice: Dice, full: bool) -> Caption:
    left_out = dict(_LEFT_OUT)
    if scene.kind == "one":
        left_out["place"] = _CENTRE_LEFT_OUT if scene.place == "centre" else 0.0
    said = {name: full or not dice.chance(share) for name, share in left_out.items()}
    return _written(scene, dice, said)


def _written(scene: Scene, dice: Dice, said: dict[str, bool]) -> Caption:
    named = {"count", "shape", *(name for name, is_said in said.items() if is_said)}
    if scene.kind == "count":
        named -= {"size", "place"}
    what = {"one": _one, "two": _two, "count": _count}[scene.kind](scene, dice, said)
    return Caption(_framed(what, scene.background if said["background"] else None, dice),
                   frozenset(named))


def _framed(what: str, background: str | None, dice: Dice) -> str:
    """The phrase alone, or with the ground it is on."""
    if background is None:
        return dice.choice((what, f"a picture of {what}", f"an image of {what}"))
    ground = f"{_article(background)} {background} background"
    bare = what.removeprefix("a ").removeprefix("an ")
    return dice.choice((
        f"{what} on {ground}", f"{what} against {ground}", f"{what} on {background}",
        f"{ground} with {what}", f"a picture of {what} on {ground}", f"on {ground}, {what}",
        f"{bare}, {background} background",
    ))


def _one(scene: Scene, dice: Dice, said: dict[str, bool]) -> str:
    thing = _thing(scene.objects[0], said)
    if not said["place"]:
        return thing
    return f"{thing} {dice.choice(_PLACES[scene.place])}"


def _two(scene: Scene, dice: Dice, said: dict[str, bool]) -> str:
    first, second, relation = *scene.objects, scene.relation
    if dice.chance(0.5):
        first, second, relation = second, first, _OPPOSITE[relation]
    a, b = _thing(first, said), _thing(second, said)
    if not said["place"]:
        return f"{a} and {b}"
    return f"{a} {dice.choice(_RELATIONS[relation])} {b}"


def _count(scene: Scene, dice: Dice, said: dict[str, bool]) -> str:
    thing = scene.objects[0]
    plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
    words = [_NUMBERS[len(scene.objects)], *[thing.color] * said["color"], plural]
    return " ".join(words)


def _thing(thing: SceneObject, said: dict[str, bool]) -> str:
    words = [*[thing.size] * said["size"], *[thing.color] * said["color"], thing.shape]
    return f"{_article(words[0])} {' '.join(words)}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
