"""The picture of docs/small-memory.md: what each recipe holds in each phase of a 1024-px picture.

`python -m benchmarks.memory_chart assets/small-memory.png` counts the bytes as
`benchmarks.small_memory` does and draws them as bars.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from pixart_core.training.chart import FINE, GREY, PAPER, Pen
from pixart_core.whole import whole_file

from .measure import GB
from .small_memory import Phase, recipe_phases

SIZE = (1600, 980)
LEFT, RIGHT, TOP, ROW, BAR = 470, 1500, 150, 150, 30
NAMES = ("text encoding", "sampling", "decoding")
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115))  # Okabe and Ito's
GRID = (222, 222, 222)
CARDS = (4, 6, 8)


def draw(recipes: Mapping[str, Sequence[Phase]]) -> Image.Image:
    """Bars of three phases for each recipe, and lines where cards of 4, 6 and 8 GB end."""
    image = Image.new("RGB", tuple(FINE * side for side in SIZE), PAPER)
    pen = Pen(ImageDraw.Draw(image))
    largest = max(phase.total for phases in recipes.values() for phase in phases) / GB
    scale = (RIGHT - LEFT) / largest
    bottom = TOP + ROW * len(recipes)
    pen.text((LEFT, 40), "GB alive at 1024 px, phase by phase", 40, "la")
    for size in CARDS:
        x = LEFT + size * scale
        pen.line([(x, TOP - 25), (x, bottom - 20)], GRID, 2)
        pen.text((x, TOP - 30), f"{size} GB", 26, "mb", GREY)
    for number, (name, phases) in enumerate(recipes.items()):
        top = TOP + number * ROW
        title, _, detail = name.partition(": ")
        pen.text((40, top + 20), title, 34, "la")
        pen.text((40, top + 64), detail, 26, "la", GREY)
        for place, (phase, color) in enumerate(zip(phases, COLORS, strict=True)):
            y = top + place * (BAR + 8)
            width = phase.total / GB * scale
            pen.bar((LEFT, y, LEFT + width, y + BAR), color)
            pen.text((LEFT + width + 12, y + BAR / 2), f"{phase.total / GB:.1f}", 26, "lm")
    for place, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        x = LEFT + place * 340
        pen.bar((x, bottom + 10, x + 30, bottom + 40), color)
        pen.text((x + 44, bottom + 25), name, 28, "lm")
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def main(argv: Sequence[str]) -> None:
    """Count, draw and save."""
    chart = draw(recipe_phases())
    with whole_file(argv[0]) as temporary:
        chart.save(temporary, "PNG", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
