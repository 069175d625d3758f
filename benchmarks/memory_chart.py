"""The picture of docs/small-memory.md: what each recipe holds in each phase of a 1024-px picture.

`python -m benchmarks.memory_chart assets/small-memory.png` counts the bytes as
`benchmarks.small_memory` does and draws them as bars.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .small_memory import GB, Phase, recipe_phases

SIZE, FINE = (1600, 980), 2
LEFT, RIGHT, TOP, ROW, BAR = 470, 1500, 150, 150, 30
NAMES = ("text encoding", "sampling", "decoding")
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115))  # Okabe and Ito's
INK, GREY, GRID, PAPER = (40, 40, 40), (110, 110, 110), (222, 222, 222), (255, 255, 255)
CARDS = (4, 6, 8)


def draw(recipes: Mapping[str, Sequence[Phase]]) -> Image.Image:
    """Bars of three phases for each recipe, and lines where cards of 4, 6 and 8 GB end."""
    image = Image.new("RGB", tuple(FINE * side for side in SIZE), PAPER)
    pen = ImageDraw.Draw(image)
    largest = max(phase.total for phases in recipes.values() for phase in phases) / GB
    scale = (RIGHT - LEFT) / largest
    bottom = TOP + ROW * len(recipes)
    text(pen, (LEFT, 40), "GB alive at 1024 px, phase by phase", 40)
    for size in CARDS:
        x = LEFT + size * scale
        line(pen, (x, TOP - 25), (x, bottom - 20), GRID)
        text(pen, (x, TOP - 30), f"{size} GB", 26, GREY, "mb")
    for number, (name, phases) in enumerate(recipes.items()):
        top = TOP + number * ROW
        title, _, detail = name.partition(": ")
        text(pen, (40, top + 20), title, 34)
        text(pen, (40, top + 64), detail, 26, GREY)
        for place, (phase, color) in enumerate(zip(phases, COLORS, strict=True)):
            y = top + place * (BAR + 8)
            width = phase.total / GB * scale
            pen.rectangle([FINE * LEFT, FINE * y, FINE * (LEFT + width), FINE * (y + BAR)], color)
            text(pen, (LEFT + width + 12, y + BAR / 2), f"{phase.total / GB:.1f}", 26, INK, "lm")
    for place, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        x = LEFT + place * 340
        pen.rectangle([FINE * x, FINE * (bottom + 10), FINE * (x + 30), FINE * (bottom + 40)],
                      color)
        text(pen, (x + 44, bottom + 25), name, 28, INK, "lm")
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def text(pen: ImageDraw.ImageDraw, at: tuple[float, float], words: str, size: int,
         color: tuple[int, int, int] = INK, anchor: str = "la") -> None:
    """Words at a place of the finished picture."""
    font = ImageFont.load_default(FINE * size)
    pen.text((FINE * at[0], FINE * at[1]), words, color, font, anchor)


def line(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float],
         color: tuple[int, int, int]) -> None:
    pen.line([tuple(FINE * side for side in point) for point in (start, end)], color, 2 * FINE)


def main(argv: Sequence[str]) -> None:
    """Count, draw and save."""
    path = Path(argv[0])
    part = path.with_suffix(".png.part")
    draw(recipe_phases()).save(part, "PNG", optimize=True)
    part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
