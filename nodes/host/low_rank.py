"""Plain LoRAs of the host as a low-rank branch beside a quantised layer, without quantising again.

A LoRA's change is up down^T of a small rank. SVDQuant layers have such a branch already and it is
widened (arXiv 2411.05007, section 4.3); the other formats run it next to their product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import torch
from torch import Tensor

from ...pixart_core.quant import WeightFormat

try:
    from comfy.weight_adapter.lora import LoRAAdapter
except ImportError:  # a host without adapters: everything goes through the unpacked weight
    LoRAAdapter = ()


class Branch(NamedTuple):
    """down (in, r) and up (out, r): the weight gains up down^T."""

    down: Tensor
    up: Tensor


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
    downs, ups = [], []
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
        whole = torch.zeros(shape[0], up.shape[1], device=device, dtype=torch.float32)
        whole[start: start + length] = _to(up, device) * (strength * scale)
        ups.append(whole)
        downs.append(_to(down, device).t())
    return Branch(torch.cat(downs, 1).to(dtype), torch.cat(ups, 1).to(dtype))


def run_with_branches(form: WeightFormat, x: Tensor, tensors: dict[str, Tensor],
                      bias: Tensor | None, branches: Sequence[Branch]) -> Tensor:
    """x (..., in) through a quantised layer and the branches beside it."""
    widened = getattr(form, "widened", None)
    if widened is not None:
        for down, up in branches:
            tensors = widened(tensors, down, up)
        return form.linear(x, tensors, bias)
    out = form.linear(x, tensors, bias)
    for down, up in branches:
        out = out + (x @ down) @ up.t()
    return out


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
