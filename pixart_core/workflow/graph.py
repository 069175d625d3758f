"""What the rules need of a graph, whichever of ComfyUI's two formats it is written in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

REROUTES = ("Reroute", "Reroute (rgthree)")
FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", ".bin", ".pth", ".pt", ".ckpt")


class WorkflowError(ValueError):
    """The document is no workflow, or one that contradicts itself."""


class LeftError(ValueError):
    """A node cannot be upgraded; the message is the reason."""


class Wire(NamedTuple):
    """Where an input comes from: a node and one of its outputs."""

    node: Any
    slot: int


class Reader(NamedTuple):
    """An input that an output feeds: a node and the input's name."""

    node: Any
    name: str


class Graph(ABC):
    """One level of a workflow: its nodes and the wires between them.

    Nodes are known by their ids. A node id that is not in `ids()` stands for the outside of a
    subgraph; `kind` is "" for it.
    """

    place = ""  # the subgraph's name, for the report

    @abstractmethod
    def ids(self) -> list[Any]:
        """All nodes, in the order they are written."""

    @abstractmethod
    def kind(self, node: Any) -> str:
        """The node's type."""

    @abstractmethod
    def active(self, node: Any) -> bool:
        """False for muted and bypassed nodes."""

    @abstractmethod
    def values(self, node: Any) -> dict[str, Any]:
        """Widget values of an old or new node by name; LeftError when they fit no version."""

    @abstractmethod
    def literals(self, node: Any) -> list[Any]:
        """Widget values of any node, without their names."""

    @abstractmethod
    def wires(self, node: Any) -> dict[str, Wire]:
        """The inputs of a node that are wired."""

    @abstractmethod
    def readers(self, node: Any, slot: int) -> list[Reader]:
        """The inputs that an output feeds directly."""

    @abstractmethod
    def replace(self, node: Any, kind: str, values: Mapping[str, Any],
                wires: Mapping[str, str]) -> None:
        """Make a node one of another type, in its place.

        `values` are widget values; the others get their defaults. `wires` tells for each new input
        the old one whose wire it takes over; other wires are cut.
        """

    @abstractmethod
    def set_value(self, node: Any, name: str, value: Any) -> None:
        """Set a widget of a new node."""

    @abstractmethod
    def connect(self, node: Any, name: str, wire: Wire) -> None:
        """Wire an input of a new node, a widget too."""

    @abstractmethod
    def redirect(self, old: Wire, new: Wire) -> None:
        """Let everything that reads `old` read `new`."""

    @abstractmethod
    def add(self, kind: str, values: Mapping[str, Any], beside: Any) -> Any:
        """A further node near `beside`; its id."""

    @abstractmethod
    def remove(self, node: Any) -> None:
        """Take a node out, and its wires with it."""

    def source(self, node: Any, name: str) -> Wire | None:
        """Where an input comes from, reroutes followed."""
        wire, seen = self.wires(node).get(name), set()
        while wire is not None and self.kind(wire.node) in REROUTES:
            if wire.node in seen:  # a ring of reroutes, which leads nowhere
                return None
            seen.add(wire.node)
            wire = next(iter(self.wires(wire.node).values()), None)
        return wire

    def all_readers(self, node: Any, slot: int) -> Iterator[Reader]:
        """The inputs that an output feeds, reroutes followed."""
        waiting, seen = self.readers(node, slot), set()
        while waiting:
            reader = waiting.pop(0)
            if self.kind(reader.node) not in REROUTES:
                yield reader
            elif reader.node not in seen:
                seen.add(reader.node)
                waiting = self.readers(reader.node, 0) + waiting

    def downstream(self, node: Any) -> Iterator[Any]:
        """Every node behind the first output of `node`, nearest first."""
        waiting, seen = [Reader(node, "")], {node}
        while waiting:
            here = waiting.pop(0).node
            for slot in range(self.output_count(here)):
                for reader in self.all_readers(here, slot):
                    if reader.node not in seen:
                        seen.add(reader.node)
                        waiting.append(reader)
                        yield reader.node

    @abstractmethod
    def output_count(self, node: Any) -> int:
        """How many outputs a node has that may be wired."""

    def files(self, node: Any) -> list[str]:
        """The model files that a node names."""
        return [value for value in self.literals(node)
                if isinstance(value, str) and value.lower().endswith(FILE_SUFFIXES)]
