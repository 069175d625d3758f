"""Eight-bit weights of ComfyUI's text encoder files, turned back into plain weights.

Two layouts are read here: a plain cast to float8, and "scaled fp8", where a `scaled_fp8` marker
tensor says that `<layer>.scale_weight` multiplies the weight. Its successor, with
`<layer>.comfy_quant`, is one of the formats of `quant`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint.read import CheckpointError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_MARKER = "scaled_fp8"
_WEIGHT_SCALES = ("scale_weight", "weight_scale")
# scales of activations belong to fp8 matrix products, which are not used here
_SIDE_TENSORS = (*_WEIGHT_SCALES, "scale_input", "input_scale")


def split_side_tensors(
    tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights, and the scale of each scaled weight under that weight's name.

    Raises CheckpointError for a scale without a weight.
    """
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in _WEIGHT_SCALES:
            scales[f"{layer}.weight"] = tensor
        elif leaf != _MARKER and leaf not in _SIDE_TENSORS:
            weights[name] = tensor
    stray = sorted(set(scales) - set(weights))
    if stray:
        raise CheckpointError(f"there is a scale for {stray[0]}, but no such weight; the T5 file "
                              "is incomplete")
    return weights, scales


def plain_weight(name: str, tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`tensor` times `scale`, in `dtype`; the product is formed in float32 and rounded once.

    A weight that needs no work is handed back as it is, still mapped to its file. Raises
    CheckpointError unless the scale is one number, or one per row.
    """
    if scale is None:
        return tensor.to(dtype)
    rows = tensor.shape[0] if tensor.ndim else 1
    if scale.numel() not in (1, rows):
        raise CheckpointError(f"{name} of shape {tuple(tensor.shape)} has a scale of shape "
                              f"{tuple(scale.shape)}; one number, or one per row, was expected")
    scale = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
    return (tensor.float() * scale).to(dtype)
