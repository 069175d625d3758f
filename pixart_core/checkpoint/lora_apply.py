"""Merging LoRAs into a model, once it is known that they fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant.branch import Branch, rows_of, side_by_side
from .header import CheckpointError
from .lora import read_lora
from .lora_layer import LoRA, LoRALayer, change_shape, changed

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def apply_lora(target: nn.Module | Mapping[str, Tensor], lora: LoRA | str | Path,
               strength: float = 1.0) -> nn.Module | dict[str, Tensor]:
    """Merge one LoRA into a transformer, or into weights under native names; see `apply_loras`."""
    return apply_loras(target, [(lora, strength)])


@torch.no_grad()
def apply_loras(target: nn.Module | Mapping[str, Tensor],
                loras: Sequence[tuple[LoRA | str | Path, float]],
                ) -> nn.Module | dict[str, Tensor]:
    """Merge LoRAs with their strengths, one after the other, as ComfyUI does.

    A module (PixArtTransformer) is changed in place and returned; of a state dict in native names
    a changed copy is returned. Sums are taken in float32 and cast back to each weight's dtype once;
    layers with quantised weights keep them and get plain LoRAs as a low-rank branch beside them;
    those that GGUF packs, or that a LoRA of another kind changes, become ordinary ones.

    Raises CheckpointError, before anything is changed, when a LoRA does not fit.
    """
    if isinstance(target, nn.Module):
        weights, packed = dict(target.named_parameters()), packed_layers(target)
        shapes = weight_shapes(target)
    else:
        weights, packed = dict(target.items()), {}
        shapes = {name: tensor.shape for name, tensor in weights.items()}
    opened = [(lora if isinstance(lora, LoRA) else read_lora(lora), strength)
              for lora, strength in loras]
    biases = {f"{name.removesuffix('weight')}bias": layer for name, layer in packed.items()}
    todo: dict[str, list[tuple[LoRALayer, float]]] = {}
    for lora, strength in opened:
        for note in (*lora.notes, *check_fit(lora, shapes)):
            logger.warning(note)
        for layer in lora.layers:
            if layer.target in weights:
                todo.setdefault(layer.target, []).append((layer, strength))
    for name, layers in todo.items():
        weight = weights[name]
        if name in packed and (branch := _branch(packed[name], layers)) is not None:
            packed[name].add_branch(branch)
            continue
        if name in packed:
            dense = packed[name].effective()
        elif name in biases:
            dense = biases[name].effective_bias()
        else:
            dense = weight.detach().float()
        merged = dense.clone()
        for layer, strength in layers:
            rows = merged.chunk(layer.parts)[layer.part]
            rows += strength * (changed(rows, layer) - rows)
        if name in packed:
            packed[name].unpack(merged)
        elif name in biases:
            biases[name].change_bias(merged)
        elif isinstance(target, nn.Module):
            weight.data = merged.to(weight.dtype)
        else:
            weights[name] = merged.to(weight.dtype)
    return target if isinstance(target, nn.Module) else weights


def _branch(packed: nn.Module, layers: Sequence[tuple[LoRALayer, float]]) -> Branch | None:
    """Plain LoRAs of a quantised layer as one branch; None where they must go into the weight."""
    if not hasattr(packed.format, "product"):
        return None
    if any(la.kind != "lora" or "mid" in la.tensors or la.magnitude is not None
           for la, _ in layers):
        return None
    rows, device = packed.dense_shape[0], packed.weight.device
    branches = []
    for layer, strength in layers:
        up = layer.tensors["up"].flatten(1).to(device).float() * (layer.scale * strength)
        down = layer.tensors["down"].flatten(1).to(device).float().t()
        branches.append(Branch(down, rows_of(up, rows, layer.part * (rows // layer.parts))))
    return side_by_side(branches)


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` whose weight is packed, by the weight's name."""
    return {f"{name}.weight": layer for name, layer in model.named_modules()
            if getattr(layer, "packing", None) is not None}


def weight_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of every weight of a model by its name; of packed ones that of the weight inside."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes | {name: layer.dense_shape for name, layer in packed_layers(model).items()}


def check_fit(lora: LoRA, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Sentences about layers that the model has not; `shapes` of its weights in native names.

    Raises CheckpointError when the LoRA was trained on a model of another width or depth, or has
    nothing that this model has.
    """
    depth = max((int(m[1]) + 1 for m in map(_BLOCK.match, shapes) if m), default=0)
    needed = max((int(m[1]) + 1 for m in (_BLOCK.match(la.target) for la in lora.layers) if m),
                 default=0)
    if needed > depth:
        raise CheckpointError(f"{lora.source} was trained on a model of {needed} blocks or more, "
                              f"this one has {depth}; load the model that it was trained on")
    absent = []
    for layer in lora.layers:
        if layer.target not in shapes:
            absent.append(layer.target)
            continue
        rows, columns = change_shape(layer, lora.source)
        shape = torch.Size(shapes[layer.target])
        if (rows * layer.parts, columns) != (shape[0], shape[1:].numel()):
            rest = f" of {layer.parts} parts" if layer.parts > 1 else ""
            raise CheckpointError(
                f"{lora.source} changes {rows} x {columns} values{rest} of {layer.target}, which "
                f"has {shape[0]} x {shape[1:].numel()} in this model; it was trained on a model "
                "of another width")
        if layer.magnitude is not None and layer.magnitude.shape not in (
                (rows, 1), (1, shape[1:2].numel())):
            raise CheckpointError(f"{lora.source}: the DoRA magnitude of {layer.target} has shape "
                                  f"{tuple(layer.magnitude.shape)}; it was trained on another "
                                  "model")
    if len(absent) == len(lora.layers):
        raise CheckpointError(f"{lora.source}: this model has none of the weights that it changes "
                              f"({', '.join(absent[:3])}, ...)")
    if not absent:
        return []
    shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return [f"{lora.source}: {len(absent)} of its {len(lora.layers)} layers change weights that "
            f"this model has not and are left out: {shown}"]
