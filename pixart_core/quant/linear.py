"""Linear layers whose weight stays as it is stored: what it stands for is made for each call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .branch import Branch, branched_linear, side_by_side
from .stored import StoredWeight, WeightFormat


class PackedWeight:
    """Mixed into a Linear class: after `pack`, the layer holds a stored weight's own tensors.

    They are parameters under the names that files give them, `weight` among them, and its format
    runs the layer. Until then, and where a file leaves a weight dense, the layer is what it was.
    """

    format: WeightFormat | None = None
    branch: Branch | None = None  # of LoRAs, beside what is stored
    names: tuple[str, ...] = ("weight",)
    compute_dtype: torch.dtype | None = None  # that of the input, unless a layer needs a wider one

    @property
    def packing(self) -> str | None:
        """The name of the format, None while the weight is a dense one."""
        return None if self.format is None else self.format.name

    @property
    def dense_shape(self) -> torch.Size:
        """The shape of the weight (out, in), however it is stored."""
        return self.weight.shape if self.format is None else self.format.shape

    def pack(self, weight: StoredWeight) -> None:
        """Take over the tensors of a stored weight; they are not copied."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"a packed weight of shape {tuple(weight.shape)} given for a layer of "
                             f"{(self.out_features, self.in_features)}")
        self.format, self.names = weight.format, tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def unpack(self, weight: Tensor) -> None:
        """Become an ordinary layer with `weight` (out, in), in the dtype that the bias has."""
        stored = self.stored()
        if self.bias is not None:
            self.bias.data = self.format.dense_bias(stored.tensors, self.bias.data)
        for name in self.names[1:]:
            delattr(self, name)
        self.format, self.branch, self.names = None, None, ("weight",)
        self.weight = nn.Parameter(weight if self.bias is None else weight.to(self.bias.dtype),
                                   requires_grad=False)

    def add_branch(self, branch: Branch) -> None:
        """Add a low-rank change of the weight beside what is stored."""
        self.branch = branch if self.branch is None else side_by_side([self.branch.to(branch.up),
                                                                       branch])

    def effective(self) -> Tensor:
        """The weight (out, in) in float32 with its branch in it."""
        weight = self.stored().dense()
        if self.branch is None:
            return weight
        return weight + self.branch.up.to(weight) @ self.branch.down.to(weight).t()

    def effective_bias(self) -> Tensor:
        """The bias (out,) in float32 that belongs to `effective`, whatever is stored for it."""
        bias = self.bias.detach().float()
        return bias if self.format is None else self.format.dense_bias(self.stored().tensors, bias)

    def change_bias(self, bias: Tensor) -> None:
        """Store what makes `bias` the one of `effective`."""
        if self.format is not None:
            bias = self.format.stored_bias(self.stored().tensors, bias)
        self.bias.data = bias.to(self.bias.dtype)

    def stored(self) -> StoredWeight:
        """The weight as it is stored, without a branch."""
        return StoredWeight(self.format, {name: getattr(self, name).detach()
                                          for name in self.names})

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None:
            return super().forward(x)
        x = x.to(self.compute_dtype or x.dtype)
        tensors = {name: getattr(self, name) for name in self.names}
        if self.branch is None:
            return self.format.linear(x, tensors, self.bias)
        self.branch = self.branch.to(x)
        return branched_linear(self.format, x, tensors, self.bias, self.branch)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", packing={self.packing}" if self.packing else "")


class PackedLinear(PackedWeight, nn.Linear):
    """torch.nn.Linear that can hold a packed weight."""

    @classmethod
    def holding(cls, weight: StoredWeight, compute_dtype: torch.dtype | None = None,
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


def pack_linears(model: nn.Module, weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """Hand packed weights ("blocks.0.attn.qkv.weight") to the layers they belong to.

    Returns the parameters that these layers have now, by name, without biases. Raises ValueError
    where there is no such layer, or it cannot hold a packed weight.
    """
    held: dict[str, Tensor] = {}
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, PackedWeight):
            raise ValueError(f"{name} is packed, but its layer is a {type(layer).__name__}")
        layer.pack(weight)
        held |= {f"{path}.{leaf}": getattr(layer, leaf) for leaf in layer.names}
    return held


