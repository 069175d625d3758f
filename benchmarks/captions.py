"""The caption grammar of the scenes: several ways to say what a picture shows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

_PLACES = {
    "left": ["on the left", "at the left"],
    "right": ["on the right", "at the right"],
    "top": ["at the top"],
    "bottom": ["at the bottom"],
    "centre": ["in the centre", "in the middle"],
}
_RELATIONS = {
    "left": ["to the left of", "left of"],
    "right": ["to the right of", "right of"],
    "above": ["above", "on top of"],
    "below": ["below", "under"],
}
_LEFT_OUT = 0.12


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _object(o: Mapping[str, Any], rng: random.Random, full: bool, article: bool = True) -> str:
    words = [o["color"], o["shape"]]
    if full or rng.random() > _LEFT_OUT:
        words.insert(0, o["size"])
    if article:
        words.insert(0, _article(words[0]))
    return " ".join(words)


def caption(scene: Mapping[str, Any], rng: random.Random, full: bool = False) -> str:
    """One caption of a scene of `scenes.sample_scene`, drawn from `rng`.

    Size and place are now and then left out, as people do; full=True names every attribute.
    """
    bg = scene["bg"]
    ground = f"{_article(bg)} {bg} background"
    on_ground = rng.choice([f"on {ground}", f"on {bg}", f"against {ground}"])
    if scene["two"]:
        first, second = (_object(o, rng, full) for o in scene["objs"])
        what = f"{first} {rng.choice(_RELATIONS[scene['rel']])} {second}"
        form = rng.randrange(4)
        return [f"{what} {on_ground}", f"{ground} with {what}", f"a picture of {what} {on_ground}",
                f"{what}, {bg} background"][form]
    place = rng.choice(_PLACES[scene["pos"]])
    named = full or rng.random() > _LEFT_OUT
    form = rng.randrange(4)
    what = _object(scene["objs"][0], rng, full, article=form != 3)
    if form == 3:
        return f"{what}{f', {place}' if named else ''}, {bg} background"
    what = f"{what} {place}" if named else what
    return [f"{what} {on_ground}", f"{ground} with {what}",
            f"a picture of {what} {on_ground}"][form]
