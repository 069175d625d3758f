"""A line chart as a picture, drawn with Pillow alone.

Charts are 1600 x 1100 px, for screens that show them at half that size. They are drawn at twice
the size and averaged, for Pillow draws lines with hard edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

Color = tuple[int, int, int]

SIZE = (1600, 1100)
BOX = (150, 100, 1550, 800)  # left, top, right, bottom of the plotted area
BLUE: Color = (0, 114, 178)  # two colours of Okabe and Ito's, told apart by all eyes
VERMILION: Color = (213, 94, 0)
INK, GREY, PAPER = (40, 40, 40), (110, 110, 110), (255, 255, 255)
FINE = 2  # how much larger charts are drawn
_GRID = (226, 226, 226)
_TITLE, _WORDS, _TICKS = 38, 32, 28  # px
_LEGEND_TOP, _LEGEND_ROW, _COLUMNS = 945, 52, 2
_MARK = 9  # half of a marker


@dataclass(frozen=True)
class Axis:
    """What an axis is of, and its ends."""

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Round numbers from end to end, at most nine steps apart."""
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of their x, joined; `error` above and below each, where known."""

    label: str
    points: Sequence[tuple[float, float]]
    color: Color
    error: Sequence[float] = ()
    square: bool = False


@dataclass(frozen=True)
class Level:
    """A height to compare with: a dashed line across, or a dotted one."""

    label: str
    y: float
    color: Color
    dotted: bool = False


def nice_step(length: float, most: int = 9) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that `length` holds `most` times."""
    power = 10.0 ** math.floor(math.log10(length / most))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20)
                if length / (factor * power) <= most + 1e-9)


def place(x: Axis, y: Axis, at: tuple[float, float]) -> tuple[float, float]:
    """The pixel (from the left, from the top) of a point of the chart."""
    left, top, right, bottom = BOX
    return (left + x.share(at[0]) * (right - left), bottom - y.share(at[1]) * (bottom - top))


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line],
               levels: Sequence[Level] = ()) -> Image:
    """The chart as an RGB picture of SIZE. Raises what `check_chart` raises."""
    check_chart()
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", tuple(FINE * side for side in SIZE), PAPER)
    pen = Pen(ImageDraw.Draw(picture))
    _frame(pen, title, x, y)
    for level in levels:
        pen.pattern(place(x, y, (x.low, level.y)), place(x, y, (x.high, level.y)), level.color,
                    level.dotted)
    for line in lines:
        _draw_line(pen, x, y, line)
    left, top, _, bottom = BOX
    upright = Image.new("RGB", (FINE * (bottom - top), FINE * 48), PAPER)
    Pen(ImageDraw.Draw(upright)).text(((bottom - top) / 2, 24), y.label, _WORDS, "mm")
    picture.paste(upright.rotate(90, expand=True), (FINE * (left - 138), FINE * top))
    _legend(pen, [*lines, *levels])
    return picture.reduce(FINE)


def check_chart() -> None:
    """Raise ImportError unless charts can be drawn here."""
    require("PIL", "drawing charts")
    try:
        _font(_TICKS)
    except TypeError:
        raise ImportError("drawing charts needs Pillow 10.1 or newer; update it with "
                          "`pip install -U pillow`") from None


class Pen:
    """ImageDraw of a picture FINE times the size, in the pixels of the finished one."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def bar(self, box: tuple[float, float, float, float], color: Color) -> None:
        """A filled rectangle: left, top, right, bottom."""
        self._draw.rectangle([FINE * side for side in box], color)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float) -> None:
        self._draw.line([(FINE * a, FINE * b) for a, b in points], color,
                        round(FINE * width), joint="curve")

    def pattern(self, start: tuple[float, float], end: tuple[float, float], color: Color,
                dotted: bool) -> None:
        """A level stroke from left to right, of dashes or dots."""
        for a, b in _pieces(start[0], end[0], *((4, 9) if dotted else (20, 12))):
            self.line([(a, start[1]), (b, start[1])], color, 4)

    def mark(self, at: tuple[float, float], color: Color, square: bool) -> None:
        box = [FINE * (c + side) for side in (-_MARK, _MARK) for c in at]
        (self._draw.rectangle if square else self._draw.ellipse)(box, color)

    def text(self, at: tuple[float, float], text: str, size: int, anchor: str,
             color: Color = INK) -> None:
        self._draw.text((FINE * at[0], FINE * at[1]), text, color, _font(FINE * size),
                        anchor=anchor)


def _frame(pen: Pen, title: str, x: Axis, y: Axis) -> None:
    left, top, right, bottom = BOX
    pen.text(((left + right) / 2, top / 2), title, _TITLE, "mm")
    for tick in y.ticks():
        _, row = place(x, y, (x.low, tick))
        pen.line([(left, row), (right, row)], _GRID, 2)
        pen.text((left - 16, row), f"{tick:g}", _TICKS, "rm", GREY)
    for tick in x.ticks():
        column, _ = place(x, y, (tick, y.low))
        pen.line([(column, bottom), (column, bottom + 12)], GREY, 2)
        pen.text((column, bottom + 36), f"{tick:g}", _TICKS, "mm", GREY)
    pen.line([(left, top), (left, bottom), (right, bottom)], GREY, 2)
    pen.text(((left + right) / 2, bottom + 82), x.label, _WORDS, "mm")


def _draw_line(pen: Pen, x: Axis, y: Axis, line: Line) -> None:
    points = [place(x, y, point) for point in line.points]
    for (column, _), (_, value), error in zip(points, line.points, line.error, strict=False):
        ends = [min(max(value + sign * error, y.low), y.high) for sign in (-1, 1)]
        low, high = (place(x, y, (x.low, end))[1] for end in ends)
        pen.line([(column, low), (column, high)], line.color, 3)
        for row in (low, high):
            pen.line([(column - 10, row), (column + 10, row)], line.color, 3)
    if len(points) > 1:
        pen.line(points, line.color, 5)
    for point in points:
        pen.mark(point, line.color, line.square)


def _legend(pen: Pen, entries: Sequence[Line | Level]) -> None:
    left, _, right, _ = BOX
    wide = (right - left) / _COLUMNS
    for number, entry in enumerate(entries):
        row, column = divmod(number, _COLUMNS)
        start, height = left + 20 + column * wide, _LEGEND_TOP + row * _LEGEND_ROW
        if isinstance(entry, Level):
            pen.pattern((start, height), (start + 84, height), entry.color, entry.dotted)
        else:
            pen.line([(start, height), (start + 84, height)], entry.color, 5)
            pen.mark((start + 42, height), entry.color, entry.square)
        pen.text((start + 104, height), entry.label, _TICKS, "lm")


def _pieces(start: float, end: float, on: float, off: float) -> Iterator[tuple[float, float]]:
    while start < end:
        yield start, min(start + on, end)
        start += on + off


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
