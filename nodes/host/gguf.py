"""Packed weights of GGUF files in the host: its layers, its memory management, its patches.

A packed weight is an ordinary uint8 parameter, which the host moves like any other. What it would
change in a weight (LoRAs, merges, hooks) is applied to the unpacked one, in each call: the bytes
stay as they are in the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...pixart_core.quant import PackedWeight

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
_PART = ".weight"


class HostPackedWeight(PackedWeight):
    """PackedWeight behind the host's casting.

    `patch` and `hook_patch` change the unpacked weight; PackedPatcher sets them.
    """

    patch: Callable[[Tensor], Tensor] | None = None
    hook_patch: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packing is None:
            return super().forward(x)
        getattr(comfy.ops, "run_every_op", _nothing)()
        bias = None if self.bias is None else _here(self.bias, x.device, x.dtype)
        for function in self.bias_function:
            bias = function(bias)
        return F.linear(x, self.patched_weight(x.device, x.dtype), bias)

    def patched_weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The unpacked weight (out, in) with everything applied to it, rounded once."""
        # the host's own low-memory patches are those of `patch`, which is there in any case
        others = [f for f in self.weight_function
                  if not isinstance(f, comfy.model_patcher.LowVramPatch)]
        functions = [f for f in (self.patch, self.hook_patch, *others) if f is not None]
        data = _here(self.weight, device, torch.uint8)
        weight = self.unpacked(data, torch.float32 if functions else dtype)
        for function in functions:
            weight = function(weight)
        return weight.to(dtype)

    def convert_weight(self, weight: Tensor, **_: Any) -> Tensor:
        """The host's name for unpacking: bytes, which it may have cast to floats, to a weight.

        It merges models with it. What has been unpacked already comes back as it is.
        """
        if self.packing is None or weight.shape == self.dense_shape:
            return weight
        return self.unpacked(weight.to(torch.uint8), torch.float32)


class GGUFOperations(comfy.ops.manual_cast):
    """The host's casting layers, of which Linear can hold a packed weight."""

    class Linear(HostPackedWeight, comfy.ops.manual_cast.Linear):
        pass


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher that leaves packed weights alone and hands their patches to the layers."""

    def load(self, *args: Any, **kwargs: Any) -> Any:
        for key, layer in packed_layers(self.model):
            layer.patch = _Patches(key, self.patches[key]) if key in self.patches else None
        return super().load(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for _, layer in packed_layers(self.model):
                layer.patch = None
        super().unpatch_model(device_to, unpatch_weights)

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if packed_layer(self.model, key) is None:
            return super().patch_weight_to_device(key, *args, **kwargs)
        return None

    def set_hook_mode(self, hook_mode: comfy.hooks.EnumHookMode) -> None:
        """The mode that keeps patched weights at hand has none to keep here."""
        super().set_hook_mode(comfy.hooks.EnumHookMode.MinVram)

    def patch_hook_weight_to_device(self, hooks: Any, combined_patches: dict, key: str,
                                    original_weights: dict, memory_counter: Any) -> None:
        layer = packed_layer(self.model, key)
        if layer is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights,
                                                memory_counter)
        elif key in combined_patches:
            layer.hook_patch = _Patches(key, combined_patches[key])

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for key, layer in packed_layers(self.model):
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer.hook_patch = None
        super().unpatch_hooks(whitelist_keys_set)


def managed_packed(patcher: comfy.model_patcher.ModelPatcher) -> PackedPatcher:
    """A PackedPatcher in place of one that the host made for a text encoder."""
    own = PackedPatcher(patcher.model, load_device=patcher.load_device,
                        offload_device=patcher.offload_device)
    own.hook_mode, own.is_clip = patcher.hook_mode, patcher.is_clip
    own.object_patches = dict(patcher.object_patches)
    own.model_options, own.force_cast_weights = patcher.model_options, patcher.force_cast_weights
    return own


class _Patches:
    """The host's patches of one weight, as a function of it."""

    def __init__(self, key: str, patches: list) -> None:
        self.key, self.patches = key, list(patches)

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self.patches, weight, self.key,
                                           intermediate_dtype=weight.dtype)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, HostPackedWeight]]:
    """The layers that hold packed weights, under the names of these weights."""
    for name, layer in model.named_modules():
        if isinstance(layer, HostPackedWeight) and layer.packing is not None:
            yield name + _PART, layer


def packed_layer(model: nn.Module, key: str) -> HostPackedWeight | None:
    """The layer whose packed weight is called `key`, None for any other weight."""
    if not key.endswith(_PART):
        return None
    layer = comfy.utils.get_attr(model, key.removesuffix(_PART))
    return layer if isinstance(layer, HostPackedWeight) and layer.packing is not None else None


def refuse_saving(model: nn.Module) -> None:
    """Raise ValueError for a model with packed weights, which save nodes cannot write."""
    if any(True for _ in packed_layers(model)):
        raise ValueError("this model was loaded from a GGUF file and its weights are packed; save "
                         "the model from its original file, or unpack the file first: "
                         "pixart convert IN.gguf OUT.safetensors")


def gguf_names(key: str) -> list[str]:
    """GGUF files under a folder key, which the host's own lists leave out; names as in those."""
    found: set[str] = set()
    for root in folder_paths.get_folder_paths(key):
        for folder, _, files in os.walk(root, followlinks=True):
            found |= {os.path.relpath(Path(folder, name), root) for name in files
                      if name.lower().endswith(SUFFIX)}
    return sorted(found)


def _here(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    management = comfy.model_management
    return management.cast_to(tensor, dtype, device,
                              non_blocking=management.device_supports_non_blocking(device))


def _nothing() -> None:
    """Stands for what an older host does not have."""
