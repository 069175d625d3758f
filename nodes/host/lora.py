"""LoRAs as patches of a MODEL, through the host's own LoRA code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from server import PromptServer
from torch import Tensor

from ...pixart_core.checkpoint.lora import read_lora
from ...pixart_core.checkpoint.lora_apply import check_fit, weight_shapes
from ...pixart_core.checkpoint.lora_export import (
    has_changed_row_norms,
    host_leaves,
    host_magnitude,
)
from ...pixart_core.checkpoint.lora_layer import LoRA, LoRALayer, normalised
from ...pixart_core.checkpoint.lora_peft import find_config
from .files import fingerprint

PREFIX = "diffusion_model."
PatchKey = str | tuple[str, tuple[int, int, int]]


class _Adapter(WeightAdapterBase):
    """One of the host's weight adapters; all it knows is in `weights`, which the host moves."""

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(self, weight: Tensor, key: str, strength: float, strength_model: float,
                         offset: Any, function: Any, intermediate_dtype: Any = torch.float32,
                         original_weight: Any = None) -> Tensor:
        """`weight` with the change in it, in place; the sum is taken in float32."""
        base = weight.float()
        change = self.changed(base, key, original_weight) - base
        weight += function(strength * change).to(weight.dtype)
        return weight

    def changed(self, base: Tensor, key: str, original_weight: Any) -> Tensor:
        """The weight at strength 1; `base` is float32 and stays as it is."""
        raise NotImplementedError


class ChangedNormDoRA(_Adapter):
    """DoRA as it is trained: over the norms of the changed rows, where the host takes the base's.

    weights: the host's adapter without DoRA, and the magnitude (out, 1).
    """

    name = "pixart_dora"

    def changed(self, base: Tensor, key: str, original_weight: Any) -> Tensor:
        inner, magnitude = self.weights
        out = inner.calculate_weight(base.clone(), key, 1.0, 1.0, None, lambda change: change,
                                     torch.float32, original_weight)
        return normalised(out, magnitude.to(out), out)


class ReplacedValue(_Adapter):
    """A weight that was trained as a whole; weights: its value. Strength blends towards it."""

    name = "pixart_value"

    def changed(self, base: Tensor, key: str, original_weight: Any) -> Tensor:
        return self.weights[0].to(base).reshape(base.shape)


def apply_lora(model: comfy.model_patcher.ModelPatcher, lora: LoRA,
               strength: float) -> tuple[comfy.model_patcher.ModelPatcher, list[str]]:
    """A clone of MODEL with the LoRA's patches, and what a user should know about them.

    Works on MODELs of ours and of the host's own loader, which have the same names. Raises
    ValueError for other models, CheckpointError for a LoRA that does not fit.
    """
    if not isinstance(model.model, comfy.model_base.PixArt):
        raise ValueError(f"the model is a {type(model.model).__name__}, not a PixArt; wire the "
                         "model from PixArt Model Loader, or use the host's LoRA loader")
    shapes = weight_shapes(model.model.diffusion_model)
    notes = [*lora.notes, *check_fit(lora, shapes)]
    patched = model.clone()
    layers = [layer for layer in lora.layers if layer.target in shapes]
    for wave in _waves(layers):
        patched.add_patches(_patches(wave, shapes), strength)
    return patched, notes


def load_lora(path: str, alpha: float | None = None) -> LoRA:
    """The LoRA of a file or folder; read again only when one of its files has changed.

    The last one alone is kept, for changes of strength: each may be hundreds of megabytes.
    """
    return _load_once(path, lora_fingerprint(path), alpha)


def check_lora(path: str) -> None:
    """Raise CheckpointError when `path` is no LoRA for PixArt."""
    _check_once(path, lora_fingerprint(path))


def lora_fingerprint(path: str) -> str:
    """Changes when the LoRA or the PEFT config beside it does."""
    config = find_config(Path(path))
    return fingerprint(path) + ("" if config is None else "|" + fingerprint(str(config)))


def report_lora(lora: LoRA, notes: list[str], node_id: str | None) -> str:
    """Show on the node how much is used, and the notes; returns the text."""
    text = "\n".join([f"{len(lora.layers)} layers", *notes])
    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, node_id)
    return text


@functools.lru_cache(maxsize=32)
def _check_once(path: str, version: str) -> None:
    _load_once(path, version, None)


@functools.lru_cache(maxsize=1)
def _load_once(path: str, _fingerprint: str, alpha: float | None) -> LoRA:
    return read_lora(path, alpha=alpha)


def _waves(layers: list[LoRALayer]) -> Iterator[list[LoRALayer]]:
    """The layers in groups that change nothing twice, as one call of add_patches needs them."""
    while layers:
        wave: dict[tuple[str, int], LoRALayer] = {}
        later = []
        for layer in layers:
            if wave.setdefault((layer.target, layer.part), layer) is not layer:
                later.append(layer)
        yield list(wave.values())
        layers = later


def _patches(layers: list[LoRALayer], shapes: dict[str, torch.Size]) -> dict[PatchKey, Any]:
    """What add_patches takes: the host's adapters, or ours around them, by key and rows."""
    keys = {f"{layer.target}:{layer.part}": _patch_key(layer, shapes) for layer in layers}
    tensors: dict[str, Tensor] = {}
    for name, layer in zip(keys, layers, strict=True):
        if layer.kind == "value":
            continue
        leaves = host_leaves(layer)
        if layer.magnitude is not None and not has_changed_row_norms(layer):
            leaves["dora_scale"] = host_magnitude(layer, layer.magnitude)
        tensors.update((f"{name}.{leaf}", tensor) for leaf, tensor in leaves.items())
    patches = comfy.lora.load_lora(tensors, keys)
    for name, layer in zip(keys, layers, strict=True):
        key = keys[name]
        if layer.kind == "value":
            patches[key] = ReplacedValue(set(), (layer.tensors["value"],))
        elif has_changed_row_norms(layer):
            patches[key] = ChangedNormDoRA(set(), (patches[key], layer.magnitude))
    return patches


def _patch_key(layer: LoRALayer, shapes: dict[str, torch.Size]) -> PatchKey:
    if layer.parts == 1:
        return PREFIX + layer.target
    rows = shapes[layer.target][0] // layer.parts
    return PREFIX + layer.target, (0, layer.part * rows, rows)
