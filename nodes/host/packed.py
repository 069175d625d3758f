"""Quantised weights in the host: its layers, its memory management, its patches.

The tensors of such a weight are ordinary parameters, which the host moves like any other. What it
would change in a weight (LoRAs, merges, hooks) never touches them: plain LoRAs run beside the
layer as a low-rank branch where the format gains from it, everything else is applied to the
unpacked weight in each call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from server import PromptServer
from torch import Tensor, nn

from ...pixart_core.quant import PackedWeight
from ...pixart_core.quant.branch import branched_linear, side_by_side
from .low_rank import Patches

logger = logging.getLogger(__name__)

_PART = ".weight"
_MODEL_AS_LORA = "model_as_lora"  # the host's name for such patches


class HostPackedWeight(PackedWeight):
    """PackedWeight behind the host's casting.

    `patch` and `hook_patch` change the weight; PackedPatcher sets them.
    """

    patch: Patches | None = None
    hook_patch: Patches | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None:
            return super().forward(x)
        getattr(comfy.ops, "run_every_op", _nothing)()
        tensors = self._tensors(x.device)
        bias = None if self.bias is None else _here(self.bias, x.device, x.dtype)
        for function in self.bias_function:
            bias = self._changed_bias(function, bias, tensors)
        # the host's own low-memory patches are those of `patch`, which is there in any case
        others = [f for f in self.weight_function
                  if not isinstance(f, comfy.model_patcher.LowVramPatch)]
        patches = [p for p in (self.patch, self.hook_patch) if p is not None]
        if not others and hasattr(self.format, "product"):
            branches = [p.branch(self.format.shape, x) for p in patches]
            if not branches:
                return self.format.linear(x, tensors, bias)
            if None not in branches:
                return branched_linear(self.format, x, tensors, bias, side_by_side(branches))
        functions = [*patches, *others]
        weight = self.format.dense(tensors, torch.float32 if functions else x.dtype)
        for function in functions:
            weight = function(weight)
        return F.linear(x, weight.to(x.dtype), self.format.dense_bias(tensors, bias))

    def convert_weight(self, weight: Tensor, **_: Any) -> Tensor:
        """The host's name for unpacking, used for merges: the weight that this layer stands for.

        It hands over the parameter, which it may have cast to floats; the other parts are here.
        """
        if self.format is None:
            return weight
        return self.format.dense(self._tensors(weight.device), torch.float32)

    @property
    def convert_bias(self) -> Callable[..., Tensor]:
        """As `convert_weight`, where the stored bias also undoes what activations are shifted by.

        The host takes the lack of it for a bias that is what it seems.
        """
        if not self._shifts_bias():
            raise AttributeError("convert_bias")
        return lambda bias, **_: self.format.dense_bias(self._tensors(bias.device), bias)

    @property
    def set_bias(self) -> Callable[..., Tensor | None]:
        """The way back of `convert_bias`: the host hands over what it made of the bias."""
        if not self._shifts_bias():
            raise AttributeError("set_bias")
        return self._set_bias

    def _set_bias(self, bias: Tensor, inplace_update: bool = False, return_weight: bool = False,
                  **_: Any) -> Tensor | None:
        stored = self.format.stored_bias(self._tensors(bias.device), bias)
        if return_weight:
            return stored
        stored = stored.to(self.bias.dtype)
        if inplace_update:
            self.bias.data.copy_(stored)
        else:
            self.bias = nn.Parameter(stored, requires_grad=False)
        return None

    def _changed_bias(self, function: Callable[[Tensor], Tensor], bias: Tensor,
                      tensors: dict[str, Tensor]) -> Tensor:
        """The bias after one of the host's functions of it, which are meant for the dense one."""
        if not isinstance(function, comfy.model_patcher.LowVramPatch) or not self._shifts_bias():
            return function(bias)
        # some hosts' own call of it knows of the shift, and others' does not
        dense = self.format.dense_bias(tensors, bias.float())
        changed = comfy.lora.calculate_weight(function.patches[function.key], dense, function.key)
        return self.format.stored_bias(tensors, changed).to(bias.dtype)

    def _shifts_bias(self) -> bool:
        return self.bias is not None and getattr(self.format, "act_unsigned", False)

    def _tensors(self, device: torch.device) -> dict[str, Tensor]:
        return {name: _here(getattr(self, name), device) for name in self.names}


class PackedOperations(comfy.ops.manual_cast):
    """The host's casting layers, of which Linear can hold a quantised weight."""

    class Linear(HostPackedWeight, comfy.ops.manual_cast.Linear):
        pass


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher that leaves packed weights alone and hands their patches to the layers."""

    def load(self, *args: Any, **kwargs: Any) -> Any:
        for key, layer in packed_layers(self.model):
            layer.patch = Patches(key, self.patches[key]) if key in self.patches else None
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

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        """What merges take of this model: its dense weights, not what those are stored as."""
        parts = {key.removesuffix(_PART) + f".{name}"
                 for key, layer in packed_layers(self.model) for name in layer.names[1:]}
        return {key: patch for key, patch in super().get_key_patches(filter_prefix).items()
                if key not in parts}

    def set_hook_mode(self, hook_mode: comfy.hooks.EnumHookMode) -> None:
        """The mode that keeps patched weights at hand has none to keep here."""
        super().set_hook_mode(comfy.hooks.EnumHookMode.MinVram)

    def add_hook_patches(self, hook: comfy.hooks.WeightHook, patches: dict, *args: Any,
                         **kwargs: Any) -> Any:
        """Of a whole model in place of a LoRA, the host hands over stored tensors by their names:
        nothing that could be compared with what this model's are stored as."""
        changed = [(patches or {}).get(key) for key, _ in packed_layers(self.model)]
        if any(isinstance(value, tuple) and value[0] == _MODEL_AS_LORA for value in changed):
            raise ValueError("this model was loaded from a quantised file, and Create Hook Model "
                             "as LoRA needs one in 16 or 32 bits: load its original file, or "
                             "unpack the file first: pixart convert IN OUT.safetensors; hooks of "
                             "LoRA files (Create Hook LoRA) work as they are")
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def patch_hook_weight_to_device(self, hooks: Any, combined_patches: dict, key: str,
                                    original_weights: dict, memory_counter: Any) -> None:
        layer = packed_layer(self.model, key)
        if layer is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights,
                                                memory_counter)
        elif key in combined_patches:
            layer.hook_patch = Patches(key, combined_patches[key])

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


def report_packed(model: nn.Module, device: torch.device, dtype: torch.dtype | None,
                  node_id: str | None) -> str | None:
    """Log, and show on the node, what runs the quantised layers where the model computes in
    `dtype`, None for any; None where there are no such layers."""
    counts: dict[str, int] = {}
    for _, layer in packed_layers(model):
        line = f"{layer.format.name}: {layer.format.runner(device, dtype)}"
        counts[line] = counts.get(line, 0) + 1
    if not counts:
        return None
    text = "\n".join(f"{count} layers in {line}" for line, count in counts.items())
    logger.info(text)
    if node_id is not None and PromptServer.instance is not None:
        PromptServer.instance.send_progress_text(text, node_id)
    return text


def refuse_saving(model: nn.Module) -> None:
    """Raise ValueError for a model with packed weights, which save nodes cannot write."""
    if any(True for _ in packed_layers(model)):
        raise ValueError("this model was loaded from a quantised file and its weights are as they "
                         "are stored there; save the model from its original file, or unpack the "
                         "file first: pixart convert IN OUT.safetensors")


def _here(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    management = comfy.model_management
    return management.cast_to(tensor, dtype, device,
                              non_blocking=management.device_supports_non_blocking(device))


def _nothing() -> None:
    """Stands for what an older host does not have."""
