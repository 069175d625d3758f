"""Quantised weights that stay as they are stored and are used where they are needed."""

from .blocks import PACKINGS, Packing, dequantize
from .formats import FORMATS, file_tensors, split_stored, unpacked
from .linear import PackedWeight, pack_linears, packed_operations
from .packed import PackedTensor
from .stored import StoredWeight, WeightFormat

__all__ = ["FORMATS", "PACKINGS", "PackedTensor", "PackedWeight", "Packing", "StoredWeight",
           "WeightFormat", "dequantize", "file_tensors", "pack_linears", "packed_operations",
           "split_stored", "unpacked"]
