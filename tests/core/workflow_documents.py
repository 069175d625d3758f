"""Sample workflows of ComfyUI_ExtraModels, and readers of documents in both formats."""

import json
from pathlib import Path

from pixart_core.workflow import upgrade
from pixart_core.workflow.targets import TARGETS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "extramodels"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
PAGES = [name for name in NAMES if not name.startswith("api_")]


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def levels(document):
    return [document, *document.get("definitions", {}).get("subgraphs", [])]


def link_row(link):
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return tuple(link[name] for name in names) if isinstance(link, dict) else tuple(link)


def check_links(document):
    """Each link stands at both its ends, each end names a link that is there, and types fit."""
    for level in levels(document):
        nodes = {node["id"]: node for node in level["nodes"]}
        assert len(nodes) == len(level["nodes"])
        rows = [link_row(link) for link in level["links"]]
        assert len({row[0] for row in rows}) == len(rows)
        ends = set()
        for number, origin, out, target, slot, kind in rows:
            if origin == -10:
                source = level["inputs"][out]
                assert number in source["linkIds"]
            else:
                source = nodes[origin]["outputs"][out]
                assert number in source["links"]
            if target == -20:
                goal = level["outputs"][slot]
                assert number in goal["linkIds"]
            else:
                goal = nodes[target]["inputs"][slot]
                assert goal["link"] == number
                ends.add((target, slot))
            assert source["type"] == kind, (number, source, kind)
            assert goal["type"] in (kind, "*") or goal.get("widget"), (number, goal, kind)
        numbers = {row[0] for row in rows}
        for node in level["nodes"]:
            for index, slot in enumerate(node["inputs"]):
                assert slot.get("link") is None or (node["id"], index) in ends
            for slot in node["outputs"]:
                assert set(slot.get("links") or ()) <= numbers
        if "last_link_id" in level:
            assert max(numbers, default=0) <= level["last_link_id"]
            assert max(nodes, default=0) <= level["last_node_id"]


def node(document, number):
    if "nodes" not in document:
        return document[str(number)]
    return next(n for level in levels(document) for n in level["nodes"] if n["id"] == number)


def value(document, number, name):
    """A widget of a new node."""
    found = node(document, number)
    if "class_type" in found:
        return found["inputs"][name]
    return found["widgets_values"][TARGETS[found["type"]].widget_index(name)]


def kind(document, number):
    found = node(document, number)
    return found.get("class_type") or found["type"]


def feeds(document, number, name):
    """(node, slot) that an input is wired to."""
    found = node(document, number)
    if "class_type" in found:
        return tuple(found["inputs"][name])
    slot = next(s for s in found["inputs"] if s["name"] == name)
    rows = [link_row(link) for level in levels(document) for link in level["links"]
            if found in level["nodes"]]
    return next((row[1], row[2]) for row in rows if row[0] == slot["link"])


def reason(report, number):
    [row] = [row for row in report.left if row.node == number]
    return row.notes[0]


def alone(kind_name, **inputs):
    """What becomes of one API node: (type, inputs, report)."""
    document, report = upgrade({"1": {"class_type": kind_name, "inputs": inputs}})
    return document["1"]["class_type"], document["1"]["inputs"], report
