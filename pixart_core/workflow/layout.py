"""Where a further node finds room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TITLE, GAP = 30, 20


def pair(value: Any, default: tuple[float, float]) -> tuple[float, float]:
    """A position or size, which files hold as a list or as {"0": x, "1": y}."""
    if isinstance(value, dict):
        value = [value.get("0"), value.get("1")]
    if isinstance(value, list | tuple) and len(value) >= 2 and all(
            isinstance(number, int | float) for number in value[:2]):
        return float(value[0]), float(value[1])
    return default


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top (of the title), right and bottom of a node; a collapsed one is taken as open."""
    x, y = pair(node.get("pos"), (0.0, 0.0))
    width, height = pair(node.get("size"), (210.0, 60.0))
    return x, y - TITLE, x + width, y + height


def free_place(near: dict[str, Any], size: list[int],
               nodes: Iterable[dict[str, Any]]) -> list[float]:
    """The position below `near`, and below all that lies in the way there."""
    left, _, _, bottom = box(near)
    boxes = [box(node) for node in nodes]
    top = bottom + GAP
    while True:
        right, low = left + size[0], top + TITLE + size[1]
        hit = [b for b in boxes if left < b[2] and b[0] < right and top < b[3] and b[1] < low]
        if not hit:
            return [left, top + TITLE]
        top = max(b[3] for b in hit) + GAP
