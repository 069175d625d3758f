"""From a workflow as the web page saves it (nodes, links, widget values) to an API prompt.

The page does the same when a workflow is queued. Only what the templates use is covered: no
subgraphs, no bypassed nodes, no reroutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL = {"fixed", "increment", "decrement", "randomize"}  # control_after_generate, page only
NOTES = {"Note", "MarkdownNote"}


def load(path: Path) -> dict:
    """The JSON of a workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def to_api(workflow: Mapping, object_info: Mapping[str, dict]) -> dict[str, dict]:
    """The prompt of `workflow`; raises ValueError where node and definition do not fit together."""
    links = {link[0]: link for link in workflow["links"]}
    return {
        str(node["id"]): {"inputs": _inputs(node, links, object_info), "class_type": node["type"],
                          "_meta": {"title": title(node, object_info)}}
        for node in sorted(workflow["nodes"], key=lambda node: node["id"])
        if node["type"] not in NOTES
    }


def title(node: Mapping, object_info: Mapping[str, dict]) -> str:
    """The title the page shows above a node."""
    return node.get("title") or object_info[node["type"]].get("display_name") or node["type"]


def inputs_of(info: Mapping) -> Iterator[tuple[str, Any, dict]]:
    """Name, type and options of every input, in the order the page lists them."""
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, ()):
            spec = info["input"][kind][name]
            yield name, spec[0], spec[1] if len(spec) > 1 else {}


def _inputs(node: Mapping, links: Mapping[int, list], object_info: Mapping[str, dict]) -> dict:
    where = f"node {node['id']} ({node['type']})"
    if node["type"] not in object_info:
        raise ValueError(f"{where}: the host has no such node")
    wired = {slot["name"]: links[slot["link"]] for slot in node["inputs"]
             if slot.get("link") is not None}
    values = list(node.get("widgets_values") or ())
    result: dict[str, Any] = {}
    for name, kind, options in inputs_of(object_info[node["type"]]):
        if isinstance(kind, list) or kind in WIDGET_TYPES:
            if not values:
                raise ValueError(f"{where}: no value is left for the widget {name}")
            result[name] = values.pop(0)
            if options.get("control_after_generate") and values.pop(0) not in CONTROL:
                raise ValueError(f"{where}: {name} is not followed by control_after_generate")
            if options.get("image_upload"):
                values.pop(0)  # the upload button
        if name in wired:
            _, source, slot, target, _, _ = wired.pop(name)
            if target != node["id"]:
                raise ValueError(f"{where}: {name} names a link of node {target}")
            result[name] = [str(source), slot]
    if values or wired:
        raise ValueError(f"{where}: left over are the values {values} and the wires {list(wired)}")
    return result
