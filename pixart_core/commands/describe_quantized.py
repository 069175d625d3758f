"""The rows of `pixart inspect` about quantised layers: formats, bits, ranks, and what runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..quant import StoredWeight
from ..quant.kitchen_format import KitchenFormat
from ..quant.svdquant_format import SVDQuant
from .rows import Row

_SOURCE = "comfy_quant of each layer"


def describe_quantized(packed: Mapping[str, StoredWeight]) -> list[Row]:
    """For each of comfy-kitchen's formats: layers, bits per weight, rank, and its back end here."""
    groups: dict[str, list[StoredWeight]] = {}
    for weight in packed.values():
        if isinstance(weight.format, KitchenFormat):
            groups.setdefault(weight.packing, []).append(weight)
    rows = []
    for name, weights in groups.items():
        bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)
        count = f"{len(weights)} layer{'s' if len(weights) > 1 else ''}"
        rows.append(Row("quantised", f"{name} in {count}, {bits:.3g} bits per weight", _SOURCE))
        if isinstance(weights[0].format, SVDQuant):
            rows.append(Row("rank", _ranks(weights), "shapes"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows.append(Row(f"{name} on {device}", weights[0].format.runner(device),
                        "comfy-kitchen on this machine"))
    return rows


def _ranks(weights: Sequence[StoredWeight]) -> str:
    ranks = sorted({weight.tensors["proj_down"].shape[1] for weight in weights})
    return " and ".join(map(str, ranks))
