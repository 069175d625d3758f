"""Linear layers whose weight stays packed: unpacked for each call, gone after it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import dequantize
from .packed import PackedTensor


class PackedWeight:
    """Mixed into a Linear class: after `pack`, `weight` holds packed bytes (uint8).

    The forward pass unpacks them to the dtype of its input. Until then, and where a file leaves
    a weight dense, the layer is what it was.
    """

    packing: str | None = None
    dense_shape: torch.Size
    compute_dtype: torch.dtype | None = None  # that of the input, unless a layer needs a wider one

    def pack(self, weight: PackedTensor) -> None:
        """Take over packed bytes as the weight; they are not copied."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"a packed weight of shape {tuple(weight.shape)} given for a layer of "
                             f"{(self.out_features, self.in_features)}")
        self.packing, self.dense_shape = weight.packing, weight.shape
        self.weight = nn.Parameter(weight.data, requires_grad=False)

    def unpacked(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) from its bytes, wherever these are now."""
        return dequantize(data, self.packing, self.dense_shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.packing is None:
            return super().forward(x)
        x = x.to(self.compute_dtype or x.dtype)
        return F.linear(x, self.unpacked(self.weight, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", packing={self.packing}" if self.packing else "")


class PackedLinear(PackedWeight, nn.Linear):
    """torch.nn.Linear that can hold a packed weight."""

    @classmethod
    def holding(cls, weight: PackedTensor, compute_dtype: torch.dtype | None = None,
                ) -> PackedLinear:
        """A layer without bias around a packed weight (out, in)."""
        rows, columns = weight.shape
        layer = cls(columns, rows, bias=False, device="meta")
        layer.compute_dtype = compute_dtype
        layer.pack(weight)
        return layer


class PackedOperations:
    """An operations namespace like `base`, whose Linear layers can hold packed weights."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self.Linear = _linear_class(base.Linear)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def packed_operations(base: Any = None) -> PackedOperations:
    """`base` (default torch.nn) with Linear layers that can hold packed weights.

    Raises TypeError where `base` has no Linear class to build on.
    """
    base = base or nn
    if not isinstance(base.Linear, type):
        raise TypeError("packed weights need an operations namespace whose Linear is a class; "
                        f"{base!r} has {base.Linear!r}")
    return PackedOperations(base)


@functools.lru_cache(maxsize=32)
def _linear_class(base: type[nn.Module]) -> type[nn.Module]:
    if issubclass(base, PackedWeight):
        return base
    return PackedLinear if base is nn.Linear else type("PackedLinear", (PackedWeight, base), {})


def pack_linears(model: nn.Module, weights: Mapping[str, PackedTensor]) -> None:
    """Hand packed weights ("blocks.0.attn.qkv.weight") to the layers they belong to.

    Raises ValueError where there is no such layer, or it cannot hold a packed weight.
    """
    for name, weight in weights.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(layer, PackedWeight):
            raise ValueError(f"{name} is packed, but its layer is a {type(layer).__name__}")
        layer.pack(weight)
