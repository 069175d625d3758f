"""Plain LoRAs of the host as a branch beside a quantised layer, without quantising again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from torch import Tensor

from ...pixart_core.quant.branch import Branch, rows_of, side_by_side

try:
    from comfy.weight_adapter.lora import LoRAAdapter
except ImportError:  # a host without adapters: everything goes through the unpacked weight
    LoRAAdapter = ()


class Patches:
    """The host's patches of one weight: a function of it, or a branch where they are plain LoRAs.
    """

    def __init__(self, key: str, patches: list) -> None:
        self.key, self.patches = key, list(patches)
        self._branch: tuple[Any, Branch | None] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self.patches, weight, self.key,
                                           intermediate_dtype=weight.dtype)

    def branch(self, shape: torch.Size, x: Tensor) -> Branch | None:
        """The change as factors in the dtype and on the device of x; None where it is no LoRA."""
        where = (x.device, x.dtype)
        if self._branch is None or self._branch[0] != where:
            self._branch = where, branch_of(self.patches, shape, *where)
        return self._branch[1]


def branch_of(patches: Sequence[tuple], shape: torch.Size, device: torch.device,
              dtype: torch.dtype) -> Branch | None:
    """The factors of all `patches`, side by side; parts of a fused weight are block-diagonal."""
    branches = []
    for strength, adapter, strength_model, offset, function in patches:
        factors = _plain_factors(adapter)
        if factors is None or strength_model != 1.0 or function is not None:
            return None
        up, down, scale = factors
        start, length = 0, shape[0]
        if offset is not None:
            dimension, start, length = offset
            if dimension != 0:
                return None
        if (up.shape[0], down.shape[1]) != (length, shape[1]):
            return None
        up = rows_of(_to(up, device) * (strength * scale), shape[0], start)
        branches.append(Branch(_to(down, device).t(), up))
    branch = side_by_side(branches)
    return Branch(branch.down.to(dtype), branch.up.to(dtype))


def _plain_factors(adapter: Any) -> tuple[Tensor, Tensor, float] | None:
    """up (out, r), down (r, in) and the scale of a LoRA without anything more, else None."""
    if not LoRAAdapter or not isinstance(adapter, LoRAAdapter):
        return None
    up, down, alpha, *rest = adapter.weights
    if any(part is not None for part in rest) or up.ndim != 2 or down.ndim != 2:
        return None
    return up, down, 1.0 if alpha is None else float(alpha) / down.shape[0]


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return comfy.model_management.cast_to_device(tensor, device, torch.float32)
