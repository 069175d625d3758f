"""The rows of `pixart inspect`: what, value, and how it was decided."""

from __future__ import annotations

from typing import Any, NamedTuple

_LIMIT = 300


class Row(NamedTuple):
    name: str
    value: str
    source: str = ""


def as_text(value: Any) -> str:
    """A value as it stands in a row."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def shorten(text: str) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= _LIMIT else f"{text[:_LIMIT]}... ({len(text)} characters)"
