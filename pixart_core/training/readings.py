"""What a text encoder must know of a scene's caption: its attributes, object by object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .draws import mix_seed
from .scenes import (
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Scene,
    SceneSettings,
    captions,
    draw_scene,
)
from .scenes.scene import KINDS

IGNORED = -100  # of torch's cross-entropy

QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "count": ("1", "2", "3"),
    "background": tuple(COLORS),
    "place": PLACES,
    "axis": ("across", "down"),
    "color 1": tuple(COLORS),
    "shape 1": SHAPES,
    "size 1": SIZES,
    "color 2": tuple(COLORS),
    "shape 2": SHAPES,
    "size 2": SIZES,
}
"""What is asked, with the possible answers; object 1 is the left or the upper one."""

_CHOICES = 4  # captions of a scene, of which one is chosen


def answers(scene: Scene, caption: Caption) -> dict[str, int]:
    """The number of the right answer to each question, IGNORED where the caption does not say."""
    first, second = scene.objects[0], scene.objects[-1]
    if scene.relation in ("right", "below"):
        first, second = second, first
    said = {"kind": scene.kind, "count": str(len(scene.objects)),
            "background": scene.background, "place": scene.place}
    if scene.relation is not None:
        said["axis"] = "across" if scene.relation in RELATIONS[:2] else "down"
    for number, thing in ((1, first), (2, second)):
        if number == 1 or scene.kind == "two":
            said |= {f"color {number}": thing.color, f"shape {number}": thing.shape,
                     f"size {number}": thing.size}
    if scene.kind == "two" and "place" not in caption.named:
        # nothing says which is the first one
        said = {name: value for name, value in said.items() if name[-1] not in "12"}
        said.pop("axis")
    attribute = {"axis": "place"}
    return {
        name: QUESTIONS[name].index(said[name])
        if said.get(name) is not None
        and (name == "kind" or attribute.get(name, name.split()[0]) in caption.named)
        else IGNORED
        for name in QUESTIONS
    }


@dataclass(frozen=True)
class Readings:
    """Captions of scenes and what they say: `answers` (B, questions) int64, IGNORED where open."""

    numbers: tuple[int, ...]
    texts: tuple[str, ...]
    answers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str) -> Readings:
        return replace(self, answers=self.answers.to(device))


class SceneReadings:
    """Captions of the scenes of one seed, as training samples; nothing is read from files."""

    def __init__(self, settings: SceneSettings, seed: int = 0) -> None:
        self.settings, self.seed = settings, seed

    def batch(self, index: int, size: int, rank: int = 0, world: int = 1) -> Readings:
        """Part `rank` of `world` of batch `index`: `size` of its size * world captions."""
        first = index * size * world + rank * size
        return self.readings(range(first, first + size), "train")

    def readings(self, numbers: Sequence[int], split: str) -> Readings:
        """The captions of scenes `numbers` of a split, one each."""
        texts, rows = [], []
        for number in numbers:
            scene = draw_scene(self.seed, number, self.settings, split)
            choice = mix_seed(self.seed, number, _CHOICES) % _CHOICES
            caption = captions(scene, self.seed, number, _CHOICES)[choice]
            texts.append(caption.text)
            rows.append(list(answers(scene, caption).values()))
        return Readings(tuple(numbers), tuple(texts), torch.tensor(rows))
