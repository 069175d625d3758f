"""A LoRA in the words of ComfyUI's own loader: its tensor names, alpha and norms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .convert import diffusers_module
from .header import CheckpointError
from .lora import METADATA_KEY
from .lora_apply import check_fit
from .lora_layer import LoRA, LoRALayer, change, change_shape, row_norms
from .write import write_checkpoint

HOST_METADATA = {METADATA_KEY: json.dumps({"dora_norm": "base"}), "format": "pt"}

_NAMES = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}


def host_leaves(layer: LoRALayer) -> dict[str, Tensor]:
    """The tensors of a layer under the endings ComfyUI knows, with alpha; no DoRA, no value.

    Its loader multiplies by alpha / rank, and where a LoKr has no rank by nothing: there the
    scale goes into a tensor.
    """
    if layer.kind == "diff":
        difference = layer.tensors["diff"]
        return {"diff": difference.float() * layer.scale if layer.scale != 1 else difference}
    tensors = {_NAMES.get(name, name): tensor for name, tensor in layer.tensors.items()}
    if layer.rank is not None:
        tensors["alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float32)
    elif layer.scale != 1:
        tensors["lokr_w1"] = tensors["lokr_w1"].float() * layer.scale
    return tensors


def host_magnitude(layer: LoRALayer, magnitude: Tensor) -> Tensor:
    """DoRA's magnitude with as many dimensions as the weight has."""
    convolution = layer.target == "x_embedder.proj.weight" or ".attn.sr." in layer.target
    return magnitude.reshape(*magnitude.shape, 1, 1) if convolution else magnitude


def has_changed_row_norms(layer: LoRALayer) -> bool:
    """Whether DoRA divides by the norms of the changed rows, which ComfyUI does not know."""
    return (layer.magnitude is not None and not layer.base_norm
            and layer.magnitude.shape == (change_shape(layer, layer.target)[0], 1))


def host_tensors(lora: LoRA, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The LoRA as tensors that ComfyUI's own LoRA loaders apply rightly.

    Its DoRA over output rows divides by the norms of the base weight, training by those of the
    changed one; and it has no replaced values. Both need `base`, the weights (native names) of the
    model that the LoRA will be used with, and hold for that model at any strength.

    Raises CheckpointError where `base` is needed and missing or does not fit, and for a weight
    that has both a LoRA and a difference.
    """
    if base is not None:
        check_fit(lora, {name: tensor.shape for name, tensor in base.items()})
    out: dict[str, Tensor] = {}
    fused: dict[str, list[Tensor | None]] = {}
    seen: set[tuple[str, int]] = set()
    for layer in lora.layers:
        if (layer.target, layer.part) in seen:
            raise CheckpointError(f"{lora.source} changes {layer.target} in two ways at once, "
                                  "which ComfyUI's loader cannot; use PixArt LoRA Loader")
        seen.add((layer.target, layer.part))
        if layer.target.endswith(".bias"):
            difference = _difference(layer, base, lora.source)
            if layer.parts == 1:
                out[f"diffusion_model.{layer.target[:-5]}.diff_b"] = difference
            else:
                parts = fused.setdefault(layer.target, [None] * layer.parts)
                parts[layer.part] = difference
            continue
        name = _module(layer)
        if layer.kind == "value":
            out[f"{name}.diff"] = _difference(layer, base, lora.source)
            continue
        out.update((f"{name}.{leaf}", tensor) for leaf, tensor in host_leaves(layer).items())
        if layer.magnitude is not None:
            out[f"{name}.dora_scale"] = _dora_scale(layer, base, lora.source)
    for target, parts in fused.items():  # its loader knows no part of a bias
        known = [part for part in parts if part is not None]
        if len({part.dtype for part in known}) > 1:
            known, parts = ([None if p is None else p.float() for p in ps] for ps in (known, parts))
        out[f"diffusion_model.{target[:-5]}.diff_b"] = torch.cat(
            [torch.zeros_like(known[0]) if part is None else part for part in parts])
    return out


def write_host_lora(target: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what `host_tensors` gave, marked so that `read_lora` reads it back as it is meant."""
    write_checkpoint(target, tensors, HOST_METADATA)


def _module(layer: LoRALayer) -> str:
    """The name of a weight: part of a fused one in diffusers' names, which alone are for parts."""
    module = layer.target.removesuffix(".weight")
    names = diffusers_module(module)
    if layer.parts > 1 and names:
        return f"transformer.{names[layer.part]}"
    return f"diffusion_model.{module}"


def _difference(layer: LoRALayer, base: Mapping[str, Tensor] | None, source: str) -> Tensor:
    if layer.kind == "diff":
        return host_leaves(layer)["diff"]
    return layer.tensors["value"].float() - _rows(layer, base, source, "a replaced weight")


def _dora_scale(layer: LoRALayer, base: Mapping[str, Tensor] | None, source: str) -> Tensor:
    """The magnitude in ComfyUI's convention."""
    magnitude = layer.magnitude.float()
    if has_changed_row_norms(layer):
        rows = _rows(layer, base, source, "DoRA")
        changed = rows + change(layer, rows.device).reshape(rows.shape)
        magnitude = magnitude * (row_norms(rows) / row_norms(changed))[:, None]
    return host_magnitude(layer, magnitude)


def _rows(layer: LoRALayer, base: Mapping[str, Tensor] | None, source: str, what: str) -> Tensor:
    """The base weight's rows that a layer is for, float32."""
    if base is None:
        raise CheckpointError(f"{source} holds {what} ({layer.target}), which ComfyUI's loader can "
                              "follow only for one base model; name it with --base MODEL")
    if layer.target not in base:
        raise CheckpointError(f"{source} holds {what} for {layer.target}, which the base model has "
                              "not; name the model that it was trained on")
    return base[layer.target].float().chunk(layer.parts)[layer.part]
