"""One weight in a block format of GGML: its bytes, the format and the shape it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import PACKINGS, dequantize, finite_scales
from .stored import StoredWeight, Tensors, WeightFormat


@dataclass(frozen=True)
class BlockFormat(WeightFormat):
    """A block format of GGML; the one tensor is bytes."""

    name: str
    shape: torch.Size

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return dequantize(tensors["weight"], self.name, self.shape, dtype)

    def is_finite(self, tensors: Tensors) -> bool:
        return bool(finite_scales(tensors["weight"], self.name))


@dataclass(frozen=True, init=False)
class PackedTensor(StoredWeight):
    """`data` of 8-bit integers in the block format `packing`; `shape` that of the weight."""

    def __init__(self, data: Tensor, packing: str, shape: torch.Size) -> None:
        super().__init__(BlockFormat(packing, shape), {"weight": data})
        kind = PACKINGS[packing]
        count = math.prod(shape)
        if count % kind.size or data.numel() != count // kind.size * kind.nbytes:
            raise ValueError(f"{data.numel()} bytes of {packing} cannot be a weight of "
                             f"shape {tuple(shape)}")

    @property
    def data(self) -> Tensor:
        return self.tensors["weight"]

    def to(self, device: torch.device | str | None, *, copy: bool = False) -> PackedTensor:
        return PackedTensor(self.data.to(device, copy=copy), self.packing, self.shape)

    def viewed_as(self, dtype: torch.dtype) -> PackedTensor:
        """The same bytes as another 8-bit dtype."""
        return PackedTensor(self.data.view(dtype), self.packing, self.shape)

    @staticmethod
    def stack(parts: Sequence[PackedTensor]) -> PackedTensor:
        """The rows of several weights of one packing, one after the other; nothing is unpacked.

        Every row is whole blocks, or every part is: either way the blocks just follow each other.
        """
        first = parts[0]
        nbytes = PACKINGS[first.packing].nbytes
        shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
        data = torch.cat([p.data.reshape(-1, nbytes) for p in parts])
        return PackedTensor(data, first.packing, torch.Size(shape))
