"""What must be known before the first node changes: which nodes belong together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from .extramodels import CONTROL_BASES
from .graph import Graph, LeftError, Wire
from .rules import ENCODERS, LOADERS, RULES, Control, Plan, family_of, model_change, t5_change

CONTROL_COND = "PixArtControlNetCond"


def make_plan(graph: Graph, families: set[str], control_base: str | None,
              subgraphs: Collection[str]) -> Plan:
    """The plan of one level. `families` are those of the whole document, `subgraphs` the types of
    the nodes that stand for another level."""
    plan = Plan(control_base, families)
    _keep_t5(graph, plan, {"", *subgraphs})
    for node in graph.ids():
        if graph.kind(node) in ENCODERS:
            plan.loaders[node] = _model_of(graph, node, plan)
    _plan_controls(graph, plan)
    return plan


def _keep_t5(graph: Graph, plan: Plan, outside: set[str]) -> None:
    """T5 and CLIP do not fit together: a loader and all that reads it change, or none of them."""
    encoders: dict[Any, Any] = {}
    for node in graph.ids():
        if graph.kind(node) in ENCODERS:
            source = graph.source(node, "T5")
            encoders[node] = source.node if source is not None else None
            kind = graph.kind(source.node) if source is not None else ""
            if kind not in outside and kind != "T5v11Loader":
                plan.kept_t5[node] = f"its T5 comes from node {source.node} ({kind})"
    for node in graph.ids():
        if graph.kind(node) != "T5v11Loader":
            continue
        reason = _why_t5_stays(graph, node, plan, outside)
        if reason:
            plan.kept_t5[node] = reason
            for encoder, loader in encoders.items():
                if loader == node:
                    plan.kept_t5[encoder] = f"its T5 loader, node {node}, is left"


def _why_t5_stays(graph: Graph, node: Any, plan: Plan, outside: set[str]) -> str:
    try:
        t5_change(graph, node)
        for reader in graph.all_readers(node, 0):
            kind = graph.kind(reader.node)
            if kind in ENCODERS:
                RULES[kind](graph, reader.node, plan)
            elif kind not in outside:
                return f"node {reader.node} ({kind}), which is left, needs its T5"
    except LeftError as error:
        return str(error)
    return ""


def _loaders_behind(graph: Graph, node: Any) -> Iterator[Any]:
    """The model loaders of the samplers that `node` leads to."""
    for reader in graph.downstream(node):
        source, seen = graph.source(reader, "model"), set()
        while source is not None and source.node not in seen:
            if graph.kind(source.node) in LOADERS:
                yield source.node
            seen.add(source.node)
            source = graph.source(source.node, "model")


def _model_of(graph: Graph, node: Any, plan: Plan) -> Wire | str:
    """The family of the model that a prompt is for, or its wire where only the file knows."""
    loaders = list(dict.fromkeys(_loaders_behind(graph, node)))
    families = {family_of(graph, loader) for loader in loaders}
    if families != {"auto"}:
        return families.pop() if len(families) == 1 else ""
    try:
        model_change(graph, loaders[0], plan)
    except LeftError:
        return ""
    return Wire(loaders[0], 0) if len(loaders) == 1 else ""


def _plan_controls(graph: Graph, plan: Plan) -> None:
    """Find the file, image and VAE of each ControlNet; one that fails keeps its whole model."""
    holders = [node for node in graph.ids() if graph.kind(node) == "PixArtCheckpointLoader"
               and _control_model(graph, node)]
    reasons: dict[Any, str] = {}
    conds: dict[Any, Any] = {}
    for node in graph.ids():
        if graph.kind(node) != CONTROL_COND:
            continue
        found = list(dict.fromkeys(n for n in _loaders_behind(graph, node) if n in holders))
        found = found or holders
        conds[node] = found[0] if len(found) == 1 else None
        try:
            if conds[node] is None:
                raise LeftError("no one PixArt Checkpoint Loader with a ControlNet model "
                                f"({', '.join(CONTROL_BASES)}) belongs to it")
            plan.controls[node] = _control(graph, node, conds[node])
            model_change(graph, conds[node], plan)
        except LeftError as error:
            reasons[node] = str(error)
    for node, reason in reasons.items():
        plan.kept_control[node] = reason
        loader = conds[node]
        if loader is None:
            plan.kept_control.update(
                {holder: f"its ControlNet, node {node}, is left" for holder in holders})
        else:
            plan.kept_control[loader] = f"its ControlNet, node {node}, is left"
    for node, loader in conds.items():
        if loader in plan.kept_control:
            plan.kept_control.setdefault(node, f"its model loader, node {loader}, is left")
    plan.controls = {node: control for node, control in plan.controls.items()
                     if node not in plan.kept_control}


def _control_model(graph: Graph, node: Any) -> bool:
    try:
        return graph.values(node).get("model") in CONTROL_BASES
    except LeftError:
        return False


def _control(graph: Graph, node: Any, loader: Any) -> Control:
    encoder = graph.source(node, "latent")
    kind = graph.kind(encoder.node) if encoder is not None else ""
    if encoder is None or kind != "VAEEncode":
        raise LeftError(f"its latent comes from {kind or 'nowhere in sight'}, not from a VAE "
                        "Encode, so the control image and the VAE are not known")
    wires = graph.wires(encoder.node)
    if "pixels" not in wires or "vae" not in wires:
        raise LeftError(f"VAE Encode, node {encoder.node}, lacks its image or its VAE")
    return Control(loader, str(graph.values(loader).get("ckpt_name", "")), wires["pixels"],
                   wires["vae"], encoder.node)
