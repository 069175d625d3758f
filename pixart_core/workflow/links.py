"""The links of one level: a table of rows, or of objects in subgraphs and newer files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .graph import Wire, WorkflowError

_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
INPUT_SIDE, OUTPUT_SIDE = -10, -20  # the ids of a subgraph's own two ends

Slots = Callable[[Any, str], list[dict[str, Any]]]


class NextId(Protocol):
    """Gives ids that are free."""

    def next(self) -> int: ...


@dataclass
class Link:
    """One row; `raw` is what stands in the document."""

    raw: Any
    id: Any
    origin: Any
    origin_slot: int
    target: Any
    target_slot: int
    type: Any


class Links:
    """Reads and changes the links of `level`, and what nodes and ends say of them."""

    def __init__(self, level: dict[str, Any], ids: NextId) -> None:
        self.level, self._ids = level, ids
        rows = level.setdefault("links", [])
        self._by_id: dict[Any, Link] = {}
        for row in rows:
            if row is None:
                continue
            link = _read(row)
            if link.id in self._by_id:
                raise WorkflowError(f"two links have the id {link.id}")
            self._by_id[link.id] = link
        self._objects = any(isinstance(row, dict) for row in rows) or (
            not rows and "inputNode" in level)

    def get(self, number: Any) -> Link | None:
        """The link of that id; None for one that is not there."""
        return self._by_id.get(number) if number is not None else None

    def all(self) -> list[Link]:
        return list(self._by_id.values())

    def of(self, wire: Wire) -> list[Link]:
        """The links that start at `wire`."""
        return [link for link in self._by_id.values()
                if (link.origin, link.origin_slot) == tuple(wire)]

    def make(self, origin: Wire, target: Wire, kind: str, slots: Slots) -> int:
        """A further link; its id."""
        number = self._ids.next()
        values = (number, *origin, *target, kind)
        row: Any = dict(zip(_FIELDS, values, strict=True)) if self._objects else list(values)
        self.level["links"].append(row)
        self._by_id[number] = _read(row)
        self._list_at_origin(self._by_id[number], slots, add=True)
        return number

    def cut(self, number: Any, slots: Slots) -> None:
        """Take a link out, on both its sides; nothing for one that is not there."""
        link = self.get(number)
        if link is None:
            return
        del self._by_id[number]
        self.level["links"].remove(link.raw)
        self._list_at_origin(link, slots, add=False)
        for slot in slots(link.target, "inputs"):
            if slot.get("link") == number:
                slot["link"] = None
        if link.target == OUTPUT_SIDE:
            _list_at_end(self.level.get("outputs"), link.target_slot, number, add=False)
        self._forget_bends(number)

    def move_origin(self, link: Link, origin: Wire, slots: Slots) -> None:
        """Let a link start elsewhere."""
        self._list_at_origin(link, slots, add=False)
        link.origin, link.origin_slot = origin
        _write(link.raw, "origin_id", origin.node)
        _write(link.raw, "origin_slot", origin.slot)
        self._list_at_origin(link, slots, add=True)

    def move_target(self, link: Link, slot: int) -> None:
        """Let a link end at another input of its target."""
        link.target_slot = slot
        _write(link.raw, "target_slot", slot)

    def set_type(self, link: Link, kind: Any) -> None:
        link.type = kind
        _write(link.raw, "type", kind)

    def _list_at_origin(self, link: Link, slots: Slots, add: bool) -> None:
        if link.origin == INPUT_SIDE:
            _list_at_end(self.level.get("inputs"), link.origin_slot, link.id, add)
            return
        outputs = slots(link.origin, "outputs")
        if link.origin_slot < len(outputs):
            slot = outputs[link.origin_slot]
            others = [number for number in slot.get("links") or [] if number != link.id]
            slot["links"] = [*others, link.id] if add else others or None

    def _forget_bends(self, number: Any) -> None:
        """Bends of the wire, which the page keeps beside the links."""
        for holder in (self.level, self.level.get("extra") or {}):
            if isinstance(holder.get("linkExtensions"), list):
                holder["linkExtensions"] = [entry for entry in holder["linkExtensions"]
                                            if entry.get("id") != number]
            for bend in holder.get("reroutes") or []:
                if number in (bend.get("linkIds") or []):
                    bend["linkIds"].remove(number)


def _list_at_end(ends: Any, index: int, number: Any, add: bool) -> None:
    if isinstance(ends, list) and index < len(ends):
        listed = ends[index].setdefault("linkIds", [])
        if add and number not in listed:
            listed.append(number)
        elif not add and number in listed:
            listed.remove(number)


def _read(row: Any) -> Link:
    values = ([row.get(name) for name in _FIELDS] if isinstance(row, dict)
              else list(row[:6]) if isinstance(row, list | tuple) else [])
    if len(values) < 5 or values[0] is None:
        raise WorkflowError(f"a link is {row!r}; id, origin, slot, target, slot and type were "
                            "expected")
    values += [None] * (6 - len(values))
    if not (type(values[2]) is int and type(values[4]) is int):
        raise WorkflowError(f"link {values[0]} does not name its slots by number")
    return Link(row, *values)


def _write(row: Any, name: str, value: Any) -> None:
    row[name if isinstance(row, dict) else _FIELDS.index(name)] = value
