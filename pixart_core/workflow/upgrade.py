"""From a document with ExtraModels nodes to one with this pack's, in either of its formats."""

from __future__ import annotations

import copy
from typing import Any

from .api_graph import ApiGraph
from .conditioning import apply_controls, fold_sizes, join_halves
from .extramodels import NOT_MAPPED, OLD_NODES
from .graph import Graph, LeftError, WorkflowError
from .plan import CONTROL_COND, make_plan
from .report import Report, Row
from .rules import RULES, Change, Plan, family_of
from .ui_graph import CLIP, T5, Counter, UiGraph

VERSIONS = (0.4, 1)


def upgrade(document: Any, control_base: str | None = None) -> tuple[Any, Report]:
    """A copy of a workflow with the nodes of ComfyUI_ExtraModels replaced, and what was done.

    `document` is parsed JSON: the format the web page saves, the API format, or an object that
    holds them as `workflow` or `prompt` (as posted to /prompt). `control_base` names the base
    model below a ControlNet, which is a file of its own here. A document without such nodes comes
    back equal. Raises WorkflowError where it is no workflow, or of an unknown version.
    """
    document, report = copy.deepcopy(document), Report()
    if not isinstance(document, dict) or not document:
        raise WorkflowError(f"a workflow is a JSON object with nodes, got {_shortly(document)}")
    parts = _parts(document)
    if not parts:
        raise WorkflowError("this JSON is no ComfyUI workflow: neither nodes and links, as the web "
                            "page saves them, nor class_type and inputs, as its API takes them")
    for part in parts:
        if "nodes" in part and isinstance(part["nodes"], list):
            _upgrade_page(part, control_base, report)
        else:
            _upgrade_levels([ApiGraph(part)], set(), control_base, report)
    return document, report


def _shortly(value: Any) -> str:
    return "an empty object" if value == {} else f"a {type(value).__name__}"


def _parts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The workflows in a document."""
    if isinstance(document.get("nodes"), list) or _is_prompt(document):
        return [document]
    found = [part for name in ("workflow", "prompt")
             if isinstance(part := document.get(name), dict)
             and (isinstance(part.get("nodes"), list) or _is_prompt(part))]
    for name in ("extra_data", "extra_pnginfo"):
        if isinstance(document.get(name), dict):
            found += _parts(document[name])
    return found


def _is_prompt(document: dict[str, Any]) -> bool:
    return bool(document) and all(isinstance(node, dict) and "class_type" in node
                                  for node in document.values())


def _upgrade_page(workflow: dict[str, Any], control_base: str | None, report: Report) -> None:
    version = workflow.get("version", VERSIONS[0])
    if version not in VERSIONS:
        raise WorkflowError(f"its format is version {version!r}; "
                            f"{' and '.join(map(str, VERSIONS))} are known")
    inner = (workflow.get("definitions") or {}).get("subgraphs") or []
    levels = [workflow, *(level for level in inner if isinstance(level, dict))]
    nodes, links = _used_ids(levels)
    graphs = [UiGraph(level, nodes, links, "" if level is workflow
                      else str(level.get("name") or level.get("id"))) for level in levels]
    subgraphs = {str(level["id"]): level for level in levels[1:] if "id" in level}
    renamed = _upgrade_levels(graphs, set(subgraphs), control_base, report)
    for _ in range(len(graphs) + 1):
        if not any([*(graph.retype() for graph in graphs), _retype_instances(graphs, subgraphs)]):
            break
    for graph in graphs:
        graph.rename_primitives()
        _rename_shown_widgets(graph, subgraphs, renamed)
    if report.upgraded:
        _promise_ids(levels, nodes.last, links.last)
    for name, group in ((workflow.get("extra") or {}).get("groupNodes") or {}).items():
        for node in group.get("nodes") or []:
            if node.get("type") in OLD_NODES or node.get("type") in NOT_MAPPED:
                report.add(Row(node.get("index", "-"), node["type"], "",
                               ("it is inside a group node; convert that to nodes on the page "
                                "first",), str(name)))


def _used_ids(levels: list[dict[str, Any]]) -> tuple[Counter, Counter]:
    """What further nodes and links may be called: page-wide, and beyond what the file promises."""
    nodes, links = [], []
    for level in levels:
        state = level.get("state") or {}
        nodes += [level.get("last_node_id"), state.get("lastNodeId"),
                  *(node.get("id") for node in level.get("nodes") or []
                    if isinstance(node, dict))]
        rows = level.get("links") or []
        if not isinstance(rows, list):
            raise WorkflowError(f"its links are {rows!r}, a list was expected")
        links += [level.get("last_link_id"), state.get("lastLinkId"),
                  *(row.get("id") if isinstance(row, dict) else row[0]
                    for row in rows if row and isinstance(row, dict | list))]
    return (Counter([i for i in nodes if type(i) is int]),
            Counter([i for i in links if type(i) is int]))


def _promise_ids(levels: list[dict[str, Any]], node: int, link: int) -> None:
    """Every level says beyond which ids the page may go on: no lower than any that is in use."""
    for level in levels:
        for holder, name, last in ((level, "last_node_id", node), (level, "last_link_id", link),
                                   (level.get("state") or {}, "lastNodeId", node),
                                   (level.get("state") or {}, "lastLinkId", link)):
            if type(holder.get(name)) is int:
                holder[name] = max(holder[name], last)


def _upgrade_levels(graphs: list[Any], subgraphs: set[str], control_base: str | None,
                    report: Report) -> dict[tuple[str, str, str], str | None]:
    """Apply the rules to every level; {(subgraph, node, old widget): new widget} comes back."""
    families = {family_of(graph, node) for graph in graphs for node in graph.ids()} - {""}
    renamed: dict[tuple[str, str, str], str | None] = {}
    for graph in graphs:
        plan, order = make_plan(graph, families, control_base, subgraphs), graph.ids()
        start = len(report.rows)
        for node in order:
            if graph.kind(node) in RULES:
                renamed |= _apply(graph, node, plan, report)
            elif graph.kind(node) in NOT_MAPPED:
                reason = NOT_MAPPED[graph.kind(node)]
                report.add(Row(node, graph.kind(node), "", (reason,), graph.place))
            elif node in plan.kept_control:
                report.add(Row(node, CONTROL_COND, "", (plan.kept_control[node],), graph.place))
        apply_controls(graph, plan, report)
        fold_sizes(graph, plan, report)
        join_halves(graph, plan, report)
        report.rows[start:] = sorted(report.rows[start:], key=lambda row: order.index(row.node))
    return renamed


def _apply(graph: Graph, node: Any, plan: Plan,
           report: Report) -> dict[tuple[str, str, str], str | None]:
    kind = graph.kind(node)
    try:
        change: Change = RULES[kind](graph, node, plan)
    except LeftError as error:
        report.add(Row(node, kind, "", (str(error),), graph.place))
        return {}
    graph.replace(node, change.kind, change.values, change.wires)
    for name, wire in change.connect.items():
        graph.connect(node, name, wire)
    report.add(Row(node, kind, change.kind, tuple(change.notes), graph.place))
    for name, old, new in change.moves:
        report.move(name, old, new)
    new_names = {old: new for new, old in change.wires.items()}
    if kind == "T5v11Loader":
        new_names |= {"t5v11_name": "t5_name", "device": "device"}
    return {(graph.place, str(node), name): new_names.get(name)
            for name in OLD_NODES[kind].widgets}


def _retype_instances(graphs: list[UiGraph], subgraphs: dict[str, dict[str, Any]]) -> bool:
    """Let the nodes that stand for a subgraph have the types of its ends."""
    changed = False
    for graph in graphs:
        for node in graph.nodes.values():
            level = subgraphs.get(str(node["type"]), {})
            for side in ("inputs", "outputs"):
                ends = {end.get("name"): end.get("type") for end in level.get(side) or []}
                for slot in node.get(side) or []:
                    if slot.get("type") == T5 and ends.get(slot.get("name")) == CLIP:
                        slot["type"], changed = CLIP, True
    return changed


def _rename_shown_widgets(graph: UiGraph, subgraphs: dict[str, dict[str, Any]],
                          renamed: dict[tuple[str, str, str], str | None]) -> None:
    """Widgets of inner nodes that a subgraph's node shows are listed by name."""
    for node in graph.nodes.values():
        level = subgraphs.get(str(node["type"]))
        shown = (node.get("properties") or {}).get("proxyWidgets")
        if level is None or not isinstance(shown, list):
            continue
        place, kept = str(level.get("name") or level.get("id")), []
        for entry in shown:
            key = (place, str(entry[0]), str(entry[1])) if len(entry) >= 2 else None
            if key not in renamed:
                kept.append(entry)
            elif renamed[key] is not None:
                kept.append([entry[0], renamed[key], *entry[2:]])
        node["properties"]["proxyWidgets"] = kept


