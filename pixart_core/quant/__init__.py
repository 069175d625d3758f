"""Quantised weights that stay packed in memory and are unpacked where they are used."""

from .blocks import PACKINGS, Packing, dequantize
from .linear import PackedWeight, pack_linears, packed_operations
from .packed import PackedTensor

__all__ = ["PACKINGS", "PackedTensor", "PackedWeight", "Packing", "dequantize", "pack_linears",
           "packed_operations"]
