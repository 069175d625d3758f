"""API format: {id: {class_type, inputs}}, as posted to /prompt and kept in pictures as `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .extramodels import OLD_NODES
from .graph import Graph, LeftError, Reader, Wire, WorkflowError
from .targets import TARGETS


class ApiGraph(Graph):
    """A prompt, changed in place."""

    def __init__(self, prompt: dict[str, Any]) -> None:
        for number, node in prompt.items():
            if not (isinstance(node, dict) and isinstance(node.get("class_type"), str)
                    and isinstance(node.get("inputs", {}), dict)):
                raise WorkflowError(f"node {number} has no class_type and inputs")
        self.prompt = prompt

    def ids(self) -> list[str]:
        return list(self.prompt)

    def kind(self, node: str) -> str:
        return self.prompt[node]["class_type"] if node in self.prompt else ""

    def active(self, node: str) -> bool:
        return True  # a prompt has no others

    def values(self, node: str) -> dict[str, Any]:
        known = OLD_NODES.get(self.kind(node))
        values = {name: value for name, value in self._inputs(node).items()
                  if not self._is_wire(value)}
        if known is not None:
            odd = [name for name in self._inputs(node)
                   if name not in known.widgets + known.sockets]
            missing = [name for name in known.widgets[: len(known.widgets) - known.optional]
                       if name not in self._inputs(node)]
            if odd or missing:
                raise LeftError("not a version that is known: "
                                + "; ".join(f"{word} {', '.join(names)}" for word, names in
                                            (("unknown input", odd), ("missing", missing))
                                            if names))
        return values

    def literals(self, node: str) -> list[Any]:
        return [value for value in self._inputs(node).values() if not self._is_wire(value)]

    def wires(self, node: str) -> dict[str, Wire]:
        return {name: Wire(*value) for name, value in self._inputs(node).items()
                if self._is_wire(value)}

    def readers(self, node: str, slot: int) -> list[Reader]:
        return [Reader(other, name) for other in self.prompt
                for name, wire in self.wires(other).items() if wire == (node, slot)]

    def output_count(self, node: str) -> int:
        return 1 + max((wire.slot for other in self.prompt
                        for wire in self.wires(other).values() if wire.node == node), default=-1)

    def replace(self, node: str, kind: str, values: Mapping[str, Any],
                wires: Mapping[str, str]) -> None:
        target, old = TARGETS[kind], self.prompt[node]
        known, inputs, linked = OLD_NODES.get(old["class_type"]), old["inputs"], self.wires(node)
        row = {name: values.get(name, default)
               for name, (_, default) in target.widgets.items()}
        wired = {new: inputs[was] for new, was in wires.items() if was in linked}
        names = [*target.sockets, *target.widgets]
        meta = old.get("_meta")
        if isinstance(meta, dict) and known and meta.get("title") in (known.title, None,
                                                                      old["class_type"]):
            old["_meta"] = {**meta, "title": target.display_name}
        old["class_type"] = kind
        old["inputs"] = {name: {**row, **wired}[name] for name in names
                         if name in row or name in wired}

    def set_value(self, node: str, name: str, value: Any) -> None:
        self._inputs(node)[name] = value

    def connect(self, node: str, name: str, wire: Wire) -> None:
        self._inputs(node)[name] = [wire.node, wire.slot]

    def redirect(self, old: Wire, new: Wire) -> None:
        for reader in self.readers(*old):
            self.connect(reader.node, reader.name, new)

    def add(self, kind: str, values: Mapping[str, Any], beside: str) -> str:
        numbers = [int(part) for key in self.prompt for part in key.split(":") if part.isdigit()]
        node, target = str(max(numbers, default=0) + 1), TARGETS[kind]
        row = {name: values.get(name, default)
               for name, (_, default) in target.widgets.items()}
        self.prompt[node] = {"class_type": kind, "inputs": row}
        if "_meta" in self.prompt.get(beside, {}):
            self.prompt[node]["_meta"] = {"title": target.display_name}
        return node

    def remove(self, node: str) -> None:
        del self.prompt[node]

    def _inputs(self, node: str) -> dict[str, Any]:
        return self.prompt[node].setdefault("inputs", {}) if node in self.prompt else {}

    def _is_wire(self, value: Any) -> bool:
        return (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
                and type(value[1]) is int)
