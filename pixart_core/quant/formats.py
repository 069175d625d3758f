"""The formats of quantised layers by the name that a file gives them, and how files say it.

A quantised layer of a safetensors file has, beside its tensors, `<layer>.comfy_quant`: JSON as
bytes, with "format" and what belongs to it. ComfyUI and comfy-kitchen made the convention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .eight_bit import MXFP8, Float8E4M3, Float8E5M2, Int8
from .four_bit import NVFP4, Int4
from .kitchen_format import KitchenFormat
from .stored import StoredWeight
from .svdquant_format import SVDQuant

FORMATS: dict[str, type[KitchenFormat]] = {f.name: f for f in (
    Int8, Float8E4M3, Float8E5M2, MXFP8, NVFP4, Int4, SVDQuant,
)}
LEAF = "comfy_quant"
_JSON_LIMIT = 1 << 16
# of quantised activations, which are quantised anew for each token here
_IGNORED = ("input_scale",)


def split_stored(state_dict: Mapping[str, Tensor],
                 ) -> tuple[dict[str, Tensor], dict[str, StoredWeight]]:
    """The plain tensors of a file, and its quantised weights by name ("<layer>.weight").

    Raises ValueError for a format that is not known, tensors that are missing, of another dtype or
    shape, and for scales that belong to no quantised layer.
    """
    layers = [name.removesuffix(f".{LEAF}") for name in state_dict if name.endswith(f".{LEAF}")]
    if not layers:
        return dict(state_dict), {}
    plain, stored = dict(state_dict), {}
    for layer in layers:
        said = read_comfy_quant(layer, plain.pop(f"{layer}.{LEAF}"))
        form = FORMATS.get(said["format"])
        if form is None:
            raise ValueError(f"{layer} is quantised as {said['format']!r}; what can be read: "
                             f"{', '.join(FORMATS)}")
        names = ("weight", *form.parts)
        tensors = {n: plain.pop(f"{layer}.{n}") for n in names if f"{layer}.{n}" in plain}
        for name in _IGNORED:
            plain.pop(f"{layer}.{name}", None)
        stored[f"{layer}.weight"] = form.read(layer, tensors, said)
    return plain, stored


def read_comfy_quant(layer: str, data: Tensor) -> dict[str, Any]:
    """What `<layer>.comfy_quant` says; ValueError for what is no such text."""
    try:
        if data.ndim != 1 or not 0 < data.numel() <= _JSON_LIMIT:
            raise ValueError(f"{data.numel()} values")
        said = json.loads(bytes(data.to(torch.uint8).tolist()).decode("utf-8"))
        if not isinstance(said, dict) or not isinstance(said.get("format"), str):
            raise ValueError(f"it says {said!r:.80}")
    except ValueError as error:
        raise ValueError(f"{layer}.{LEAF} does not say how the layer is quantised: "
                         f"{error}") from error
    params = said.pop("params", None)
    return {**(params if isinstance(params, dict) else {}), **said}


def unpacked(stored: Mapping[str, StoredWeight],
             tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense float32 weights of `stored`, and the biases of `tensors` that belong to those.

    A format may keep part of what its activations need in the bias, see `dense_bias`.
    """
    out: dict[str, Tensor] = {}
    for name, weight in stored.items():
        out[name] = weight.dense()
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in tensors:
            out[bias] = weight.format.dense_bias(weight.tensors, tensors[bias])
    return out


def file_tensors(stored: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """What a file holds for quantised weights: their tensors and `comfy_quant`, by name."""
    tensors: dict[str, Tensor] = {}
    for name, weight in stored.items():
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{leaf}": t.contiguous() for leaf, t in weight.tensors.items()}
        text = json.dumps(weight.format.comfy_quant(), separators=(",", ":"))
        tensors[f"{layer}.{LEAF}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return tensors
