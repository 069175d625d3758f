"""Packed weights of a PixArt transformer under native names, still packed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..quant.packed import PackedTensor
from ..quant.stored import StoredWeight
from .convert import (
    convert_state_dict,
    diffusers_module,
    layout_of,
    native_module,
    strip_prefix,
)

_WEIGHT = ".weight"


def native_packed(state_dict: Mapping[str, Tensor], packed: Mapping[str, StoredWeight],
                  ) -> tuple[dict[str, Tensor], dict[str, StoredWeight]]:
    """`state_dict` with its placeholders, and `packed`, both under native names.

    Where native layers are fused, parts of one block format of GGML are stacked as they are; others
    become a dense float32 weight. Raises ValueError as `convert_state_dict` does.
    """
    tensors = strip_prefix({**state_dict, **packed})
    parts = {name: t for name, t in tensors.items() if isinstance(t, StoredWeight)}
    plain = {name: t.placeholder() if name in parts else t for name, t in tensors.items()}
    if layout_of(plain) == "native":
        return convert_state_dict(plain, to="native"), parts
    stacked: dict[str, StoredWeight] = {}
    for native, names in _groups(parts).items():
        found = [tensors[name] for name in names if name in tensors]
        kinds = {t.packing if isinstance(t, PackedTensor) else None for t in found}
        if len(names) == len(found) == 1:
            stacked[native] = found[0]
            continue
        if len(kinds) == 1 and None not in kinds and len(found) == len(names):
            stacked[native] = PackedTensor.stack(found)
            continue
        for name in names:
            if name in tensors:
                tensor = tensors[name]
                plain[name] = tensor.dense() if name in parts else tensor.float()
    return convert_state_dict(plain, to="native"), stacked


def _groups(parts: Mapping[str, StoredWeight]) -> dict[str, tuple[str, ...]]:
    """Native weight -> the diffusers weights it is made of, where any of them is packed."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in parts:
        found = native_module(name.removesuffix(_WEIGHT))
        if found is not None:
            members = diffusers_module(found[0]) or ()
            groups[found[0] + _WEIGHT] = tuple(member + _WEIGHT for member in members)
    return groups
