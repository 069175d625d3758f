"""One rule for each ExtraModels node that PixArt workflows use: what takes its place.

A rule reads a node and answers with a Change, or raises LeftError with the reason before anything
is touched. ControlNets and size conditioning span several nodes: see `conditioning.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any, NamedTuple

from ..resolution import ASPECT_RATIO_BINS, nearest_bin
from .extramodels import BASES, CONTROL_BASES, FAMILIES, IMAGE_SIZES, TOKENS
from .graph import Graph, LeftError, Wire

LOADERS = ("PixArtCheckpointLoader", "PixArtCheckpointLoaderSimple")
ENCODERS = ("T5TextEncode", "PixArtT5TextEncode")
LONG = 60  # words that may be more than 120 tokens
BRACES = ("{ and } stand for random choices in the web page now; write \\{ and \\} where the text "
          "itself is meant")


@dataclass
class Change:
    """What takes a node's place. `wires` is {new input: old input}, `moves` (name, from, to)."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    wires: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    moves: list[tuple[str, str, str]] = field(default_factory=list)
    connect: dict[str, Wire] = field(default_factory=dict)  # wires that were not there before


class Control(NamedTuple):
    """What a ControlNet Conditioning is to be wired to: the loader that holds the ControlNet now,
    its file, the image and the VAE."""

    loader: Any
    file: str
    image: Wire
    vae: Wire
    encoder: Any  # the VAEEncode between them


@dataclass
class Plan:
    """What was found out about one level of a document before the first change."""

    control_base: str | None = None  # the file that the caller wants below ControlNets
    families: set[str] = field(default_factory=set)  # of every loader; "auto" for the simple one
    kept_t5: dict[Any, str] = field(default_factory=dict)  # nodes of a T5 that is left, and why
    kept_control: dict[Any, str] = field(default_factory=dict)  # ControlNet nodes that are left
    controls: dict[Any, Control] = field(default_factory=dict)  # of every other Conditioning
    loaders: dict[Any, Wire | str] = field(default_factory=dict)  # prompt -> model, or its family


Rule = Callable[[Graph, Any, Plan], Change]


def only_wired(graph: Graph, node: Any, *names: str) -> None:
    """LeftError when an input that is translated comes over a wire."""
    odd = [name for name in graph.wires(node) if name not in names]
    if odd:
        raise LeftError(f"{', '.join(odd)} comes over a wire and has no equal here; set it on the "
                        "node and run this again")


def text_value(values: dict[str, Any], name: str) -> str:
    """A value that must be text."""
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise LeftError(f"{name} is {value!r}, a name was expected")
    return value


def named(graph: Graph, node: Any, values: dict[str, Any], name: str) -> str:
    """A file name; "" where it comes over a wire."""
    return "" if name in graph.wires(node) else text_value(values, name)


def family_of(graph: Graph, node: Any) -> str:
    """alpha or sigma of a loader, "auto" where the file decides, "" for other nodes."""
    if graph.kind(node) == "PixArtCheckpointLoader":
        try:
            return FAMILIES.get(graph.values(node).get("model"), "auto")
        except LeftError:
            return "auto"
    return "auto" if graph.kind(node) == "PixArtCheckpointLoaderSimple" else ""


def _model(graph: Graph, node: Any, plan: Plan) -> Change:
    if node in plan.kept_control:
        raise LeftError(plan.kept_control[node])
    return model_change(graph, node, plan)


def model_change(graph: Graph, node: Any, plan: Plan) -> Change:
    """PixArt Model Loader for either of the old loaders."""
    only_wired(graph, node, "ckpt_name")
    values = graph.values(node)
    name, model = named(graph, node, values, "ckpt_name"), values.get("model")
    change = Change("PixArtLoader", {"model_name": name}, {"model_name": "ckpt_name"})
    if graph.kind(node) == "PixArtCheckpointLoader":
        if model not in FAMILIES:
            raise LeftError(f"model is {model!r}; known are {', '.join(FAMILIES)}")
        change.values["variant"] = FAMILIES[model]
    if model in CONTROL_BASES:
        only_wired(graph, node)
        base = plan.control_base or CONTROL_BASES[model]
        change.values["model_name"] = base
        change.notes.append(f"the base model is a file of its own now: {base}"
                            + ("" if plan.control_base else " (--control-base names another)"))
        if node not in [control.loader for control in plan.controls.values()]:
            change.notes.append(f"no ControlNet Conditioning used the ControlNet of {name}; "
                                "the base model alone does the same")
        change.moves.append((base, "checkpoints", "diffusion_models"))
        return change
    if model in IMAGE_SIZES and name.lower().endswith((".safetensors", ".sft")):
        change.notes.append("if it is a diffusers file, keep its config.json beside it, or run "
                            f"pixart convert IN OUT --set image_size={IMAGE_SIZES[model]}")
    change.notes += _inside_a_folder(name, "model_name")
    change.moves.append((name, "checkpoints", "diffusion_models"))
    return change


def _inside_a_folder(name: str, widget: str) -> list[str]:
    parent = PureWindowsPath(name).parent.as_posix()
    if parent == ".":
        return []
    return [f"if a config.json lies beside it, choose the folder as {widget}: {parent}/"]


def _t5(graph: Graph, node: Any, plan: Plan) -> Change:
    if node in plan.kept_t5:
        raise LeftError(plan.kept_t5[node])
    return t5_change(graph, node)


def t5_change(graph: Graph, node: Any) -> Change:
    """PixArt T5 Loader for a T5v11Loader; "file" and "folder" become one list of names."""
    only_wired(graph, node)
    values = graph.values(node)
    name, path_type = text_value(values, "t5v11_name"), values.get("path_type")
    if values.get("t5v11_ver") != "xxl" or path_type not in ("folder", "file"):
        raise LeftError(f"t5v11_ver is {values.get('t5v11_ver')!r} and path_type {path_type!r}; "
                        "xxl, and folder or file, are known")
    device, dtype = str(values.get("device")), str(values.get("dtype", "default"))
    change = Change("PixArtT5Loader", {"device": "cpu" if device == "cpu" else "default"})
    parent = PureWindowsPath(name).parent.as_posix()
    if path_type == "file":
        change.values["t5_name"] = name
        change.moves.append((name, "t5", "text_encoders"))
        change.notes += _inside_a_folder(name, "t5_name")
    elif parent == ".":
        change.values["t5_name"] = "t5/"
        change.moves.append(("the folder t5 itself", "", "text_encoders"))
    else:
        change.values["t5_name"] = f"{parent}/"
        change.moves.append((f"{parent}/", "t5", "text_encoders"))
    if device.startswith("cuda"):
        change.notes.append(f"device was {device}: ComfyUI chooses the card")
    if "bnb" in device + dtype:
        change.notes.append("no bitsandbytes: an fp8 or GGUF file of T5 needs as little memory")
    elif dtype not in ("default", "auto (comfy)"):
        change.notes.append(f"dtype was {dtype}: the file's own is kept; take a T5 file in the "
                            "precision you want")
    return change


def _encode(graph: Graph, node: Any, plan: Plan) -> Change:
    if node in plan.kept_t5:
        raise LeftError(plan.kept_t5[node])
    only_wired(graph, node, "T5", "text")
    reference = graph.kind(node) == "PixArtT5TextEncode"
    text = graph.values(node).get("text", "")
    values = {"text": text, "clean_caption": reference, "weights": not reference}
    change = Change("PixArtTextEncode", values, {"clip": "T5", "text": "text"})
    if reference:
        values["max_tokens"] = TOKENS["alpha"]
        change.notes.append("clean_caption also strips links, HTML and odd symbols, not only case")
    else:
        limit_tokens(node, plan, change)
        if "text" in graph.wires(node) or len(str(text).split()) > LONG:
            change.notes.append("a prompt ends at max_tokens; it went on in further parts of 120")
    if isinstance(text, str) and "{" in text and "text" not in graph.wires(node):
        change.notes.append(BRACES)
    return change


def limit_tokens(node: Any, plan: Plan, change: Change) -> None:
    """Set max_tokens by the model behind the prompt, or wire the model where its file decides."""
    model = plan.loaders.get(node, "")
    if not model and len(plan.families) == 1:
        model = next(iter(plan.families))
    if isinstance(model, Wire):
        change.connect["model"] = model
        change.notes.append("model is wired: it knows its token limit")
    elif model in TOKENS:
        change.values["max_tokens"] = TOKENS[model]
    else:
        change.notes.append("max_tokens is 300; set 120 for PixArt-alpha")


def _resolution(graph: Graph, node: Any, plan: Plan) -> Change:
    only_wired(graph, node)
    values = graph.values(node)
    model, ratio = values.get("model"), values.get("ratio")
    if model not in BASES:
        raise LeftError(f"model is {model!r}; known are {', '.join(BASES)}")
    bins = {f"{key:.2f}": size for key, size in ASPECT_RATIO_BINS[int(BASES[model])].items()}
    if ratio not in bins:
        raise LeftError(f"ratio is {ratio!r}; known are {', '.join(bins)}")
    # its ratios are width over height, those of the published tables height over width
    width, height = bins[ratio]
    trained = nearest_bin(int(BASES[model]), height=height, width=width)
    notes = [] if trained == (height, width) else [
        f"gave {width} x {height}, which is no trained size; {trained[1]} x {trained[0]} is"]
    return Change("PixArtResolution", {"base": BASES[model], "width": width, "height": height,
                                       "aspect_ratio": "from width and height"}, notes=notes)


def _lora(graph: Graph, node: Any, plan: Plan) -> Change:
    only_wired(graph, node, "model", "lora_name", "strength")
    values = graph.values(node)
    return Change("PixArtLoRALoader", {name: values[name] for name in ("lora_name", "strength")
                                       if name in values},
                  {name: name for name in ("model", "lora_name", "strength")},
                  ["a PEFT file without adapter_config.json: set alpha, which was taken as 8"])


def _vae(graph: Graph, node: Any, plan: Plan) -> Change:
    only_wired(graph, node, "vae_name")
    values = graph.values(node)
    if values.get("vae_type") != "kl-f8":
        raise LeftError(f"a VAE of the type {values.get('vae_type')} is none of PixArt's, and "
                        "ComfyUI's Load VAE may not know it")
    dtype = str(values.get("dtype", "auto"))
    notes = [] if dtype == "auto" else [f"dtype was {dtype}: ComfyUI chooses, or start it with "
                                        "--fp32-vae, --fp16-vae or --bf16-vae"]
    return Change("VAELoader", {"vae_name": named(graph, node, values, "vae_name")},
                  {"vae_name": "vae_name"}, notes)


def _sampler(graph: Graph, node: Any, plan: Plan) -> Change:
    same = ("model", "positive", "negative", "latent_image", "seed", "steps", "cfg")
    only_wired(graph, node, *same)
    values = graph.values(node)
    notes = ["the same solver and steps, not the same picture: it knew only as many noise levels "
             "as steps, and filled a short negative up with the null caption (PixArt Null Caption "
             "gives it)"]
    schedule = (values.get("noise_schedule"), values.get("noise_schedule_vp"))
    if schedule != ("linear", "discrete"):
        notes.append(f"noise_schedule {schedule[0]}, {schedule[1]}: the model's own is used")
    return Change("KSampler", {"sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0,
                               **{name: values[name] for name in same if name in values}},
                  {name: name for name in same}, notes)


def _sd3_t5(graph: Graph, node: Any, plan: Plan) -> Change:
    only_wired(graph, node, "sd3_clip")
    padding = graph.values(node).get("padding", 1)
    source = graph.source(node, "sd3_clip")
    kind = graph.kind(source.node) if source is not None else ""
    named = graph.files(source.node) if source is not None and "CLIPLoader" in kind else []
    files = [name for name in named if "t5" in name.lower()]
    if len(files) != 1:
        raise LeftError(f"{kind or 'what it is wired to'} does not name one T5 file; put a T5 "
                        "into models/text_encoders and load it with PixArt T5 Loader")
    notes = [f"loads {files[0]} itself, {kind} is not needed for it"]
    if padding != 1:
        notes.append(f"padding was {padding}: prompts are not padded")
    return Change("PixArtT5Loader", {"t5_name": files[0]}, {}, notes)


RULES: dict[str, Rule] = {
    **dict.fromkeys(LOADERS, _model),
    "T5v11Loader": _t5,
    **dict.fromkeys(ENCODERS, _encode),
    "PixArtResolutionSelect": _resolution,
    "PixArtLoraLoader": _lora,
    "ExtraVAELoader": _vae,
    "PixArtDPMSampler": _sampler,
    "PixArtT5FromSD3CLIP": _sd3_t5,
}
