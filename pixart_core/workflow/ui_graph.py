"""The format the web page saves: nodes with slots, and a table of links; subgraphs alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .extramodels import OLD_NODES
from .graph import REROUTES, Graph, LeftError, Reader, Wire, WorkflowError
from .layout import free_place
from .links import INPUT_SIDE, OUTPUT_SIDE, Link, Links
from .targets import CONTROL_AFTER, TARGETS

MUTED, BYPASSED = 2, 4
T5, CLIP = "T5", "CLIP"
_PACK_PROPERTIES = ("cnr_id", "aux_id", "ver")


class Counter:
    """Ids that are free in the whole document, subgraphs included."""

    def __init__(self, used: list[int]) -> None:
        self.last = max(used, default=0)

    def next(self) -> int:
        self.last += 1
        return self.last


class UiGraph(Graph):
    """The nodes and links of a workflow, or of a subgraph's definition, changed in place."""

    def __init__(self, level: dict[str, Any], node_ids: Counter, link_ids: Counter,
                 place: str = "") -> None:
        self.level, self.place = level, place
        self._node_ids = node_ids
        nodes = level.get("nodes")
        if not isinstance(nodes, list):
            raise WorkflowError("it has no list of nodes")
        self.nodes: dict[Any, dict[str, Any]] = {}
        for node in nodes:
            if not (isinstance(node, dict) and isinstance(node.get("id"), int | str)
                    and isinstance(node.get("type"), str)):
                raise WorkflowError("a node has no id or no type")
            if node["id"] in self.nodes:
                raise WorkflowError(f"two nodes have the id {node['id']}")
            self.nodes[node["id"]] = node
        self.links = Links(level, link_ids)

    def ids(self) -> list[Any]:
        return list(self.nodes)

    def kind(self, node: Any) -> str:
        return self.nodes[node]["type"] if node in self.nodes else ""

    def active(self, node: Any) -> bool:
        return self.nodes[node].get("mode", 0) not in (MUTED, BYPASSED)

    def values(self, node: Any) -> dict[str, Any]:
        kind, row = self.kind(node), self.nodes[node].get("widgets_values") or []
        if kind in TARGETS:
            target = TARGETS[kind]
            return {name: row[target.widget_index(name)] for name in target.widgets
                    if target.widget_index(name) < len(row)}
        known = OLD_NODES[kind]
        if isinstance(row, dict):
            return {name: row[name] for name in known.widgets if name in row}
        row = list(row)
        if known.seed is not None:
            behind = known.widgets.index(known.seed) + 1
            if len(row) > len(known.widgets) and row[behind] in CONTROL_AFTER:
                del row[behind]
        if not len(known.widgets) - known.optional <= len(row) <= len(known.widgets):
            raise LeftError(f"not a version that is known: it has {len(row)} widget values, "
                            f"{len(known.widgets)} were expected ({', '.join(known.widgets)})")
        return dict(zip(known.widgets, row, strict=False))

    def control_after(self, node: Any) -> str:
        """What stands behind the seed; "fixed" where nothing does."""
        row = self.nodes[node].get("widgets_values") or []
        found = [value for value in row if value in CONTROL_AFTER and isinstance(value, str)]
        return found[0] if isinstance(row, list) and found else "fixed"

    def literals(self, node: Any) -> list[Any]:
        row = self.nodes[node].get("widgets_values") or [] if node in self.nodes else []
        return list(row.values()) if isinstance(row, dict) else list(row)

    def wires(self, node: Any) -> dict[str, Wire]:
        found = {}
        for slot in self._slots(node, "inputs"):
            link = self.links.get(slot.get("link"))
            if link is not None:
                found[slot.get("name", "")] = Wire(link.origin, link.origin_slot)
        return found

    def readers(self, node: Any, slot: int) -> list[Reader]:
        found = []
        for link in self.links.of(Wire(node, slot)):
            inputs = self._slots(link.target, "inputs")
            name = (inputs[link.target_slot].get("name", "")
                    if link.target_slot < len(inputs) else "")
            found.append(Reader(link.target, name))
        return found

    def output_count(self, node: Any) -> int:
        return len(self._slots(node, "outputs"))

    def replace(self, node: Any, kind: str, values: Mapping[str, Any],
                wires: Mapping[str, str]) -> None:
        target, old = TARGETS[kind], self.nodes[node]
        known, control = OLD_NODES.get(old["type"]), self.control_after(node)
        before = {slot.get("name"): slot for slot in self._slots(node, "inputs")}
        kept = {name: before[was].get("link") for name, was in wires.items()
                if was in before and self.links.get(before[was].get("link")) is not None}
        for slot in before.values():
            if slot.get("link") not in kept.values():
                self.links.cut(slot.get("link"), self._slots)
        old["inputs"] = []
        for name, link in {**dict.fromkeys(target.sockets), **kept}.items():
            self._add_input(node, kind, name, link)
        outputs = list(self._slots(node, "outputs"))
        for index, (name, output_type) in enumerate(target.outputs.items()):
            if index == len(outputs):
                outputs.append({"links": None})
            slot = outputs[index]
            slot.pop("localized_name", None)
            slot.pop("shape", None)
            slot.update(name=name, type=output_type)
        old["outputs"] = outputs
        if known is not None and old.get("title") in (known.title, old["type"]):
            del old["title"]
        properties = {name: value for name, value in (old.get("properties") or {}).items()
                      if name not in _PACK_PROPERTIES}
        old["properties"] = {**properties, "Node name for S&R": kind,
                             **({"cnr_id": "comfy-core"} if target.stock else {})}
        old["widgets_values"] = target.widget_values(dict(values), control)
        old["type"] = kind

    def set_value(self, node: Any, name: str, value: Any) -> None:
        target = TARGETS[self.kind(node)]
        self.nodes[node]["widgets_values"][target.widget_index(name)] = value

    def connect(self, node: Any, name: str, wire: Wire) -> None:
        slots = self._slots(node, "inputs")
        index = next((i for i, slot in enumerate(slots) if slot.get("name") == name), None)
        if index is None:
            index = self._add_input(node, self.kind(node), name, None)
        slots = self._slots(node, "inputs")
        self.links.cut(slots[index].get("link"), self._slots)
        slots[index]["link"] = self.links.make(wire, Wire(node, index), slots[index]["type"],
                                               self._slots)

    def redirect(self, old: Wire, new: Wire) -> None:
        for link in self.links.of(old):
            self.links.move_origin(link, new, self._slots)

    def add(self, kind: str, values: Mapping[str, Any], beside: Any) -> Any:
        target, near = TARGETS[kind], self.nodes[beside]
        number = self._node_ids.next()
        rows = max(len(target.outputs), len(target.sockets)) + len(target.widgets)
        size = [300, 30 + 24 * rows]
        node = {
            "id": number, "type": kind, "pos": free_place(near, size, self.nodes.values()),
            "size": size, "flags": {}, "order": len(self.nodes), "mode": near.get("mode", 0),
            "inputs": [{"name": name, "type": input_type, "link": None}
                       for name, input_type in target.sockets.items()],
            "outputs": [{"name": name, "type": output_type, "links": None}
                        for name, output_type in target.outputs.items()],
            "properties": {"Node name for S&R": kind},
            "widgets_values": target.widget_values(dict(values)),
        }
        self.nodes[number] = node
        self.level["nodes"].append(node)
        return number

    def remove(self, node: Any) -> None:
        for slot in self._slots(node, "inputs"):
            self.links.cut(slot.get("link"), self._slots)
        for index in range(self.output_count(node)):
            for link in self.links.of(Wire(node, index)):
                self.links.cut(link.id, self._slots)
        self.level["nodes"].remove(self.nodes.pop(node))

    def retype(self) -> bool:
        """Let links, reroutes and a subgraph's ends carry CLIP where they carried T5.

        True when something changed: the subgraph's instances, or its inside, may follow.
        """
        changed = False
        for _ in range(len(self.nodes) + 1):  # a chain of reroutes takes a turn each
            stable = True
            for link in self.links.all():
                kind = self._type_of(link.origin, link.origin_slot, "outputs")
                goal = self._type_of(link.target, link.target_slot, "inputs")
                if link.type != kind and self.kind(link.origin) in TARGETS:
                    self.links.set_type(link, kind)
                    stable = False
                if link.type == T5 and CLIP in (kind, goal):
                    self.links.set_type(link, CLIP)
                    stable = False
                if link.type == CLIP:
                    stable &= not self._carry_clip(link)
            changed |= not stable
            if stable:
                break
        return changed

    def _type_of(self, node: Any, index: int, side: str) -> Any:
        slots = self._slots(node, side)
        return slots[index].get("type") if index < len(slots) else None

    def _carry_clip(self, link: Link) -> bool:
        """Put CLIP for T5 at what a link passes through; True when it was not there."""
        bends = [slot for node in (link.origin, link.target) if self.kind(node) in REROUTES
                 for side in ("inputs", "outputs") for slot in self._slots(node, side)]
        found = [slot for slot in (*bends, *self._ends(link)) if slot.get("type") == T5]
        for slot in found:
            slot["type"] = CLIP
        for slot in bends:
            if slot.get("name") == T5:
                slot["name"] = CLIP
        return bool(found)

    def _ends(self, link: Link) -> list[dict[str, Any]]:
        """The inputs and outputs of the subgraph itself that a link passes."""
        ends = []
        for node, side, index in ((link.origin, "inputs", link.origin_slot),
                                  (link.target, "outputs", link.target_slot)):
            slots = self.level.get(side)
            if node in (INPUT_SIDE, OUTPUT_SIDE) and isinstance(slots, list) and index < len(slots):
                ends.append(slots[index])
        return ends

    def rename_primitives(self) -> None:
        """A primitive names the widget that it feeds."""
        for link in self.links.all():
            if self.kind(link.origin) != "PrimitiveNode":
                continue
            inputs = self._slots(link.target, "inputs")
            widget = inputs[link.target_slot].get("widget") if link.target_slot < len(
                inputs) else None
            for slot in self._slots(link.origin, "outputs"):
                if isinstance(slot.get("widget"), dict) and widget and \
                        self.kind(link.target) in TARGETS:
                    slot["widget"]["name"] = widget["name"]

    def _slots(self, node: Any, side: str) -> list[dict[str, Any]]:
        if node not in self.nodes:
            return []
        slots = self.nodes[node].get(side)
        return slots if isinstance(slots, list) else []

    def _add_input(self, node: Any, kind: str, name: str, link: Any) -> int:
        """A further input slot, with the link that ends there now; its index."""
        target, slots = TARGETS[kind], self.nodes[node]["inputs"]
        slot: dict[str, Any] = {"name": name, "link": link}
        if name in target.widgets:
            slot |= {"type": target.widgets[name][0], "widget": {"name": name}}
        else:
            slot["type"] = target.sockets[name]
        slots.append(slot)
        if link is not None:
            self.links.move_target(self.links.get(link), len(slots) - 1)
        return len(slots) - 1
