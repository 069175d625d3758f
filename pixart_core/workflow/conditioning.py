"""ControlNets and size conditioning: what was on the prompt's wire and in the model's file."""

from __future__ import annotations

from typing import Any

from .graph import Graph, LeftError, Wire
from .plan import CONTROL_COND
from .report import Report, Row
from .rules import Change, Plan, limit_tokens

SIZE_COND = "PixArtResolutionCond"
T5_CLIPS = ("PixArtT5Loader",)


def apply_controls(graph: Graph, plan: Plan, report: Report) -> None:
    """Put a ControlNet loader beside each model loader that held one, and wire it in."""
    loaders: dict[Any, Any] = {}
    for node, control in plan.controls.items():
        if control.loader not in loaders:
            loaders[control.loader] = graph.add("PixArtControlNetLoader",
                                                {"control_net_name": control.file},
                                                control.loader)
            report.move(control.file, "checkpoints", "controlnet")
        graph.replace(node, "PixArtControlNetApply", {}, {"positive": "cond"})
        graph.connect(node, "control_net", Wire(loaders[control.loader], 0))
        graph.connect(node, "image", control.image)
        graph.connect(node, "vae", control.vae)
        notes = [f"with PixArt ControlNet Loader, node {loaders[control.loader]}; takes the image "
                 f"itself: VAE Encode, node {control.encoder}, is not needed for it"]
        report.add(Row(node, CONTROL_COND, "PixArtControlNetApply", tuple(notes), graph.place))


def join_halves(graph: Graph, plan: Plan, report: Report) -> None:
    """One node for the positive and the negative of a sampler: they run as one batch then."""
    for first, control in plan.controls.items():
        for second, other in plan.controls.items():
            if first == second or control != other:
                continue
            if not all(node in graph.ids() and graph.active(node) for node in (first, second)):
                continue
            halves = [list(graph.all_readers(node, 0)) for node in (first, second)]
            if not (len(halves[0]) == len(halves[1]) == 1
                    and halves[0][0].node == halves[1][0].node
                    and (halves[0][0].name, halves[1][0].name) == ("positive", "negative")):
                continue
            prompt = graph.wires(second).get("positive")
            if prompt is None:
                continue
            graph.connect(first, "negative", prompt)
            graph.redirect(Wire(second, 0), Wire(first, 1))
            graph.remove(second)
            report.rows = [row for row in report.rows
                           if (row.node, row.place) != (second, graph.place)]
            report.add(Row(second, CONTROL_COND, "PixArtControlNetApply",
                           (f"joined with node {first}, which takes both prompts",), graph.place))


def fold_sizes(graph: Graph, plan: Plan, report: Report) -> None:
    """Move what PixArt Resolution Conditioning said into the text encoder before it."""
    waiting = [node for node in graph.ids() if graph.kind(node) == SIZE_COND]
    while waiting:
        # those nearest to the prompt first: of several in a row the last one counts
        node = next((n for n in waiting if _origin(graph, n) not in waiting), waiting[0])
        waiting.remove(node)
        try:
            new, notes = _fold(graph, node, plan)
        except LeftError as error:
            report.add(Row(node, SIZE_COND, "", (str(error),), graph.place))
            continue
        report.add(Row(node, SIZE_COND, new, tuple(notes), graph.place))


def _origin(graph: Graph, node: Any) -> Any:
    wire = _before(graph, graph.source(node, "cond"))[0]
    return wire.node if wire is not None else None


def _before(graph: Graph, wire: Wire | None) -> tuple[Wire | None, bool]:
    """The wire from the text encoder, ControlNets stepped over; whether it goes only one way."""
    alone, seen = True, set()
    while wire is not None and wire not in seen:
        seen.add(wire)
        alone &= len(list(graph.all_readers(*wire))) == 1
        if graph.kind(wire.node) != "PixArtControlNetApply":
            break
        wire = graph.source(wire.node, "negative" if wire.slot else "positive")
    return wire, alone


def _fold(graph: Graph, node: Any, plan: Plan) -> tuple[str, list[str]]:
    if not graph.active(node):
        raise LeftError("it is muted or bypassed; delete it on the page, or make it active and "
                        "run this again")
    values, wires = graph.values(node), graph.wires(node)
    if "cond" not in wires:
        raise LeftError("nothing is wired to cond")
    if plan.families == {"sigma"}:
        _take_out(graph, node)
        return "(taken out)", ["PixArt-Sigma is not told the size; it had no effect"]
    for name in ("width", "height"):
        if name not in wires and not isinstance(values.get(name), int | float):
            raise LeftError(f"{name} is {values.get(name)!r}, a number was expected")
    wire, alone = _before(graph, graph.source(node, "cond"))
    kind = graph.kind(wire.node) if wire is not None else ""
    notes: list[str] = []
    if wire is not None and alone and kind == "CLIPTextEncode":
        kind = _encode_here(graph, wire.node, plan, notes)
    if wire is None or kind != "PixArtTextEncode" or not alone:
        why = "is used elsewhere, too" if kind == "PixArtTextEncode" else "is no PixArt Text Encode"
        raise LeftError(f"what it reads ({kind or 'outside of the subgraph'}) {why}; set width and "
                        "height on the PixArt Text Encode before it and delete it")
    for name in ("width", "height"):
        if name in wires:
            graph.connect(wire.node, name, wires[name])
        else:
            graph.set_value(wire.node, name, int(values[name]))
    _take_out(graph, node)
    notes.append(f"as width and height of node {wire.node}; the aspect ratio follows them, it was "
                 "always that of the latent")
    return "PixArtTextEncode", notes


def _encode_here(graph: Graph, node: Any, plan: Plan, notes: list[str]) -> str:
    """Make a stock CLIPTextEncode on T5 a PixArtTextEncode, which takes a size."""
    source = graph.source(node, "clip")
    if source is None or graph.kind(source.node) not in T5_CLIPS:
        return graph.kind(node)
    change = Change("PixArtTextEncode", {"clean_caption": False})
    limit_tokens(node, plan, change)
    text = [value for value in graph.literals(node) if isinstance(value, str)]
    graph.replace(node, change.kind, {**change.values, "text": text[0] if text else ""},
                  {"clip": "clip", "text": "text"})
    notes.append(f"node {node} (CLIPTextEncode) is a PixArt Text Encode now")
    return "PixArtTextEncode"


def _take_out(graph: Graph, node: Any) -> None:
    graph.redirect(Wire(node, 0), graph.wires(node)["cond"])
    graph.remove(node)
