"""A weight that is stored in fewer bits: the tensors it consists of, and the format of them.

Every stored weight, of a GGUF file or of comfy-kitchen's formats, is a `WeightFormat` and its
tensors by the names they have in a file ("weight", "weight_scale", ...).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


class WeightFormat(ABC):
    """How the tensors of one weight of `shape` (out, in) are read; it holds none itself."""

    name: ClassVar[str]
    shape: torch.Size
    # the side of each tensor that goes along the rows; the others belong to the whole weight.
    # Only formats that have it can be quantised some rows at a time
    row_sides: ClassVar[Mapping[str, int]]

    @abstractmethod
    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the tensors stand for, in `dtype`."""

    def dense_bias(self, tensors: Tensors, bias: Tensor | None) -> Tensor | None:
        """The bias that belongs to the dense weight, where it differs from the stored one."""
        return bias

    def stored_bias(self, tensors: Tensors, bias: Tensor) -> Tensor:
        """The way back of `dense_bias`: what is stored for the `bias` of the dense weight."""
        return bias

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """x (..., in) through the layer: (..., out), in the dtype of x."""
        return F.linear(x, self.dense(tensors, x.dtype), self.dense_bias(tensors, bias))

    def runner(self, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
        """What multiplies activations of `dtype`, None for any, on a device and why, or what is
        in the way, in words."""
        return "unpacked for each product"

    def is_finite(self, tensors: Tensors) -> bool:
        """Whether every number that the tensors hold is finite."""
        floats = [t for t in tensors.values() if t.is_floating_point()]
        return all(bool(t.float().isfinite().all()) for t in floats)

    def comfy_quant(self) -> dict[str, Any] | None:
        """What a file says of the layer, None for formats that are written otherwise."""
        return None


@dataclass(frozen=True)
class StoredWeight:
    """The tensors of one weight and their format; nothing is copied."""

    format: WeightFormat
    tensors: dict[str, Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.format.shape

    @property
    def packing(self) -> str:
        """The name of the format."""
        return self.format.name

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight itself, (out, in)."""
        return self.format.dense(self.tensors, dtype)

    def placeholder(self) -> Tensor:
        """A tensor of the weight's shape that holds no memory, for code that looks at shapes."""
        return torch.empty(self.shape, device="meta")

    def to(self, device: torch.device | str | None, *, copy: bool = False) -> StoredWeight:
        moved = {name: t.to(device, copy=copy) for name, t in self.tensors.items()}
        return StoredWeight(self.format, moved)

    def viewed_as(self, dtype: torch.dtype) -> StoredWeight:
        """The same bytes of "weight" as another 8-bit dtype, which formats look through."""
        return StoredWeight(self.format,
                            {**self.tensors, "weight": self.tensors["weight"].view(dtype)})

    @staticmethod
    def joined(pieces: Sequence[StoredWeight]) -> StoredWeight:
        """All pieces' rows as one weight; what belongs to the whole of it is that of the first."""
        first = pieces[0]
        if len(pieces) == 1:
            return first
        sides = first.format.row_sides
        shape = torch.Size((sum(piece.shape[0] for piece in pieces), first.shape[1]))
        tensors = {name: torch.cat([piece.tensors[name] for piece in pieces], sides[name])
                   if name in sides else tensor for name, tensor in first.tensors.items()}
        return StoredWeight(replace(first.format, shape=shape), tensors)

    def is_finite(self) -> bool:
        return self.format.is_finite(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
