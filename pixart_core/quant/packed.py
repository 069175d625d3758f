"""One packed weight: its bytes, its block format and the shape it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import PACKINGS, dequantize, finite_scales


@dataclass(frozen=True)
class PackedTensor:
    """`data` of 8-bit integers in the block format `packing`; `shape` that of the weight."""

    data: Tensor
    packing: str
    shape: torch.Size

    def __post_init__(self) -> None:
        kind = PACKINGS[self.packing]
        count = math.prod(self.shape)
        if count % kind.size or self.data.numel() != count // kind.size * kind.nbytes:
            raise ValueError(f"{self.data.numel()} bytes of {self.packing} cannot be a weight of "
                             f"shape {tuple(self.shape)}")

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight itself; computed in float32, rounded once."""
        return dequantize(self.data, self.packing, self.shape, dtype)

    def placeholder(self) -> Tensor:
        """A tensor of the weight's shape that holds no memory, for code that looks at shapes."""
        return torch.empty(self.shape, device="meta")

    def to(self, device: torch.device | str | None, *, copy: bool = False) -> PackedTensor:
        return PackedTensor(self.data.to(device, copy=copy), self.packing, self.shape)

    def viewed_as(self, dtype: torch.dtype) -> PackedTensor:
        """The same bytes as another 8-bit dtype."""
        return PackedTensor(self.data.view(dtype), self.packing, self.shape)

    def is_finite(self) -> bool:
        return bool(finite_scales(self.data, self.packing))

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
