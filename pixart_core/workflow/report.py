"""What an upgrade did, what it left, and what the user has to do by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One node: its id and type before, what became of it ("" when it was left), and why or what
    differs. `place` is the subgraph it lies in."""

    node: Any
    old: str
    new: str
    notes: tuple[str, ...] = ()
    place: str = ""

    @property
    def where(self) -> str:
        return f"{self.place}: {self.node}" if self.place else str(self.node)


@dataclass(frozen=True, order=True)
class Move:
    """A file or folder of models/ that the new nodes look for elsewhere."""

    name: str
    old: str
    new: str


@dataclass
class Report:
    """Rows in the order of the document; files to move, each once."""

    rows: list[Row] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    @property
    def upgraded(self) -> list[Row]:
        return [row for row in self.rows if row.new]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if not row.new]

    def add(self, row: Row) -> None:
        """Note a node, once where a document holds a graph in both formats."""
        if (row.where, row.old, row.new) not in [(r.where, r.old, r.new) for r in self.rows]:
            self.rows.append(row)

    def move(self, name: str, old: str, new: str) -> None:
        one = Move(name, old, new)
        if name and one not in self.moves:
            self.moves.append(one)
