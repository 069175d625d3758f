"""LoRA files of every layout as one list of changes to native weights.

What comes out is named as the released models are, with fused q, k and v: a change to one of them
is a change to a group of rows. What the changes are is in `lora_layer`, merging in `lora_apply`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folder import read_json_object
from .header import CheckpointError
from .identify import explain
from .lora_layer import Kind, LoRA, LoRALayer, change_shape
from .lora_names import (
    WHOLE,
    Place,
    find_place,
    is_raw_parameter,
    is_text_encoder,
    other_model,
    split_key,
)
from .lora_peft import PeftConfig, config_of_header, find_config
from .read import read_checkpoint

METADATA_KEY = "pixart_lora"  # in the header of files that were written for ComfyUI's own loader

_GIVEN = "alpha that was given"
_NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {  # any one of each group
    "lora": (("down",), ("up",)),
    "loha": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "lokr": (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")),
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "lora": ("mid",), "loha": ("hada_t1", "hada_t2"),
    "lokr": ("lokr_w1_b", "lokr_w2_b", "lokr_t2"),
}
_PAIRS = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("hada_t1", "hada_t2"))


def read_lora(source: str | Path | Mapping[str, Tensor], *, alpha: float | None = None,
              config: Mapping[str, Any] | None = None,
              metadata: Mapping[str, str] | None = None) -> LoRA:
    """A LoRA for PixArt's transformer from a file, a PEFT folder or tensors.

    Reads PEFT (LoRA with rsLoRA and DoRA, LoHa, LoKr; adapter_config.json in the folder or beside
    the file), diffusers, OneTrainer and Kohya, LyCORIS, and native names. `alpha` counts instead
    of what the file says; `config` (an adapter_config.json's content) and `metadata` (a
    safetensors header) are for tensors that were read already.

    Raises CheckpointError for files that cannot be read, are no LoRA, or one of another model.
    """
    name = "the LoRA"
    peft = None if config is None else PeftConfig.from_dict(config)
    if isinstance(source, Mapping):
        tensors = {k: v for k, v in source.items() if isinstance(v, Tensor)}
    else:
        path = Path(source)
        checkpoint = read_checkpoint(path)
        tensors, metadata, name = checkpoint.state_dict, checkpoint.metadata, path.name
        found = find_config(path)
        if found is not None and peft is None:
            peft = PeftConfig.from_dict(read_json_object(found), found.name)
    metadata = metadata or {}
    peft = peft or config_of_header(metadata, name)
    groups, unused = _group(tensors, name)
    base_norm = _written_for_the_host(metadata, name)
    notes: list[str] = []
    layers = [layer for module, (place, leaves) in groups.items()
              for layer in _layers(module, place, leaves, peft, alpha, base_norm, name, unused)]
    if not layers:
        raise CheckpointError(f"{name}: none of its {len(tensors)} tensors belongs to a PixArt "
                              f"transformer ({', '.join(unused[:3])}, ...)")
    if _alpha_is_missing(groups, peft, alpha):
        notes.append(f"{name} does not say its alpha, which PEFT keeps in adapter_config.json: "
                     "every layer counts with scale 1. Put that file beside it, or give alpha "
                     "(alpha on PixArt LoRA Loader, `pixart convert --lora --alpha A`, `pixart "
                     "generate --lora FILE:STRENGTH:A`)")
    free = sum(layer.kind == "lokr" and layer.rank is None for layer in layers)
    if alpha is not None and peft is None and free:
        notes.append(f"{name}: alpha does not apply to {free} of its {len(layers)} layers, whole "
                     "LoKr matrices that have no rank to divide it by; they count with scale 1")
    notes += _about_unused(unused, name)
    rslora = (peft is not None and peft.rslora
              and any(layer.alpha_from in (peft.source, _GIVEN) for layer in layers))
    return LoRA(tuple(layers), tuple(unused), tuple(notes), name, rslora)


Groups = dict[str, tuple[Place, dict[str, Tensor]]]


def _group(tensors: Mapping[str, Tensor], source: str) -> tuple[Groups, list[str]]:
    """Tensors by the module they belong to, and the names that belong to none."""
    groups: Groups = {}
    unused: list[str] = []
    has_adapter = False
    for key, tensor in tensors.items():
        if ".original_module." in key:  # PEFT's copy of what a trained whole module replaced
            continue
        module, leaf = split_key(key)
        has_adapter |= leaf not in (*WHOLE, "", "alpha", "scalar")
        place = None if is_text_encoder(key) else find_place(module)
        if place is None or (not leaf and not is_raw_parameter(place.module)):
            unused.append(key)
            continue
        leaves = groups.setdefault(module, (place, {}))[1]
        leaf = leaf or "weight"
        if leaf in leaves and not torch.equal(leaves[leaf], tensor):
            raise CheckpointError(f"{source} holds several adapters ({key} is the second for its "
                                  "weight); save one of them alone")
        leaves[leaf] = tensor
    if not has_adapter:
        raise CheckpointError(f"{source} is no LoRA: it {explain(tensors)}")
    foreign = other_model(key for key in unused if not is_text_encoder(key))
    if foreign:
        raise CheckpointError(f"{source} is a LoRA for {foreign[0]} ({foreign[1]} found); a LoRA "
                              "trained on PixArt is needed")
    return groups, unused


def _layers(module: str, place: Place, leaves: dict[str, Tensor], peft: PeftConfig | None,
            alpha: float | None, base_norm: bool, source: str,
            unused: list[str]) -> list[LoRALayer]:
    """The changes that the tensors of one module make; those that make none go to `unused`."""
    left = dict(leaves)
    weight = place.module if is_raw_parameter(place.module) else f"{place.module}.weight"
    at = (weight, place.part, place.parts)
    bias = (f"{place.module}.bias", place.part, place.parts)
    layers: list[LoRALayer] = []
    numbers = {leaf: _number(left.pop(leaf), f"{leaf} of {module}", source)
               for leaf in ("alpha", "scalar") if leaf in left}
    norm = left.pop("dora_scale", left.get("magnitude"))
    left.pop("magnitude", None)
    scale = 1.0
    for kind, needed in _NEEDED.items():
        names = [name for group in needed for name in group] + list(_OPTIONAL[kind])
        tensors = {name: left.pop(name) for name in names if name in left}
        if not tensors:
            continue
        missing = [" or ".join(group) for group in needed
                   if not any(name in tensors for name in group)]
        missing += [f"{a} and {b}" for a, b in _PAIRS if (a in tensors) != (b in tensors)]
        if missing:
            raise CheckpointError(f"{source}: {module} lacks {', '.join(missing)}; the file is "
                                  "incomplete")
        layer = LoRALayer(*at, kind, tensors)
        scale, origin = _scale(layer, place, numbers.get("alpha"), peft, alpha, source)
        scale *= numbers.get("scalar", 1.0)  # LyCORIS trains this factor beside alpha / rank
        layer = dataclasses.replace(layer, scale=scale, alpha_from=origin)
        if norm is not None:
            magnitude, rows = _magnitude(norm, layer, module, source)
            layer = dataclasses.replace(layer, magnitude=magnitude, base_norm=base_norm and rows)
            norm = None
        layers.append(layer)
    if norm is not None:
        raise CheckpointError(f"{source}: {module} has a DoRA magnitude and no LoRA; the file is "
                              "incomplete")
    for leaf, where, kind in (("diff", at, "diff"), ("diff_b", bias, "diff"),
                              ("up_bias", bias, "diff"), ("weight", at, "value"),
                              ("bias", bias, "value")):
        if leaf in left:
            layers.append(LoRALayer(*where, kind, {kind: left.pop(leaf)},
                                    scale if leaf == "up_bias" else 1.0))
    unused.extend(f"{module} ({leaf})" for leaf in left)
    if not any(layer.kind in _NEEDED for layer in layers):
        unused.extend(f"{module}.{leaf}" for leaf in numbers if leaf == "scalar" or not layers)
    for layer in layers:
        _require_sound(layer, module, source)
    return layers


def _number(tensor: Tensor, what: str, source: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise CheckpointError(f"{source}: the {what} is not one finite number")
    return value


def _scale(layer: LoRALayer, place: Place, own_alpha: float | None, peft: PeftConfig | None,
           alpha: float | None, source: str) -> tuple[float, str]:
    """What the change is multiplied by, and what said so: alpha / rank unless PEFT's config says
    otherwise.

    A LoKr without factorised matrices has no rank: LyCORIS leaves it alone, PEFT does not.
    """
    rank = layer.rank
    if not rank and (peft is None or (own_alpha is not None and alpha is None)):
        return 1.0, "no rank, so no alpha"
    if own_alpha is not None and alpha is None:
        return own_alpha / rank, "alpha in the file"
    if peft is None:
        return (1.0, "assumed: nothing says alpha") if alpha is None else (alpha / rank, _GIVEN)
    said = peft.rank_of(place.path)
    if rank and said != rank:
        raise CheckpointError(f"{peft.source} says rank {said:g} for {place.path}, the tensors of "
                              f"{source} have {rank}; it belongs to another LoRA")
    return (peft.scale_of(place.path, rank or said, alpha),
            peft.source if alpha is None else _GIVEN)


def _magnitude(norm: Tensor, layer: LoRALayer, module: str,
               source: str) -> tuple[Tensor, bool]:
    """DoRA's magnitude as (out, 1) or (1, in), and whether it is the former.

    PEFT writes (out,), or (1, out, 1, 1) for a convolution; LyCORIS (out, 1, ...) or (1, in, ...).
    """
    rows = change_shape(layer, source)[0]
    if norm.ndim == 4 and norm.shape[0] == 1 and norm.numel() == rows:
        norm = norm.reshape(rows)
    if norm.ndim and norm.numel() == norm.shape[0] == rows:
        return norm.reshape(rows, 1), True
    if norm.ndim > 1 and norm.shape[0] == 1 and norm.shape[1] == norm.numel():
        return norm.reshape(1, -1), False
    raise CheckpointError(f"{source}: the DoRA magnitude of {module} has shape "
                          f"{tuple(norm.shape)}; ({rows},) was expected")


def _require_sound(layer: LoRALayer, module: str, source: str) -> None:
    change_shape(layer, source)
    for name, tensor in layer.tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{source}: {name} of {module} holds values that are not finite "
                                  "numbers; the file is damaged, or the training diverged")


def _alpha_is_missing(groups: Groups, peft: PeftConfig | None, alpha: float | None) -> bool:
    """Whether a scale was taken as 1 that PEFT keeps beside the file. diffusers' files have it at
    1 where they say nothing."""
    return peft is None and alpha is None and any(
        "alpha" not in leaves and "base_model." in module and leaves.keys() & {"down", "hada_w1_a",
                                                                               "lokr_w2_b"}
        for module, (_, leaves) in groups.items())


def _written_for_the_host(metadata: Mapping[str, str], source: str) -> bool:
    text = metadata.get(METADATA_KEY)
    if text is None:
        return False
    try:
        return json.loads(text)["dora_norm"] == "base"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: {METADATA_KEY} in its header is damaged") from error


def _about_unused(unused: list[str], source: str) -> list[str]:
    text = [key for key in unused if is_text_encoder(key)]
    other = [key for key in unused if not is_text_encoder(key)]
    notes = []
    if text:
        notes.append(f"{source}: {len(text)} tensors are for the text encoder and are not used "
                     f"here ({text[0]}, ...)")
    if other:
        shown = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        notes.append(f"{source}: {len(other)} tensors belong to no PixArt weight or are of an "
                     f"unknown kind and are not used: {shown}")
    return notes
