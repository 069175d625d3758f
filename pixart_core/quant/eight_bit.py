"""Eight bits per weight: int8 with one scale per output, float8 with one per tensor, mxfp8.

These are ComfyUI's own formats (`comfy_quant` in a file), which its stock loader reads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .kitchen_format import (
    FLOATS,
    HALVES,
    KitchenFormat,
    card_has,
    require_shape,
    require_weight,
)
from .stored import StoredWeight, Tensors

E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # since torch 2.7
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # comfy-kitchen's, of a dtype


class Int8(KitchenFormat):
    """Signed 8-bit integers and a float32 scale for each output, or one for all.

    Activations become int8 with one scale per token, see `quantize_int8_rowwise` of comfy-kitchen.
    """

    name = "int8_tensorwise"
    functions = ("int8_linear", "quantize_int8_rowwise")
    parts: ClassVar = {"weight_scale": FLOATS}
    row_sides: ClassVar = {"weight": 0, "weight_scale": 0}

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        require_weight(layer, weight, torch.int8, cls.name)
        rows = weight.shape[0]
        require_shape(layer, "weight_scale", scale, [(), (1,), (rows,), (rows, 1)],
                      f"an int8 weight of {rows} rows")
        return StoredWeight(cls(weight.shape, options), tensors)

    @classmethod
    def quantize(cls, weight: Tensor, options: Mapping[str, Any] | None = None) -> StoredWeight:
        """A weight (out, in) rounded to nearest, one scale per row."""
        form = cls(weight.shape, dict(options or {}))
        codes, scale = form.kitchen().quantize_int8_rowwise(weight.float())
        return StoredWeight(form, {"weight": codes, "weight_scale": scale.float()})

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        scale = tensors["weight_scale"].float().reshape(-1, 1)
        return (tensors["weight"].float() * scale).to(dtype)

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        self.kitchen()
        return torch.ops.comfy_kitchen.int8_linear(
            x.contiguous(), tensors["weight"], tensors["weight_scale"].float(), bias,
            _CODES[x.dtype], False, 256)


class _Float8(KitchenFormat):
    """float8 and one float32 scale; on cards from compute capability 8.9 activations are too."""

    functions = ("quantize_per_tensor_fp8", "dequantize_per_tensor_fp8")
    parts: ClassVar = {"weight_scale": FLOATS}
    row_sides: ClassVar = {"weight": 0}
    capability = (8, 9)
    kernel_dtypes = HALVES
    dtype: torch.dtype
    layout: str

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        require_weight(layer, tensors["weight"], cls.dtype, cls.name)
        rows = tensors["weight"].shape[0]
        require_shape(layer, "weight_scale", tensors["weight_scale"],
                      [(), (1,), (rows,), (rows, 1)], f"a float8 weight of {rows} rows")
        return StoredWeight(cls(tensors["weight"].shape, options), tensors)

    @classmethod
    def quantize(cls, weight: Tensor, options: Mapping[str, Any] | None = None, *,
                 largest: Tensor | None = None) -> StoredWeight:
        """A weight (out, in) with its largest magnitude at float8's largest number.

        `largest` is that magnitude (a scalar) where the weight is some rows of a larger one.
        """
        form = cls(weight.shape, dict(options or {}))
        weight = weight.float()
        largest = weight.abs().amax() if largest is None else largest
        scale = (largest / torch.finfo(cls.dtype).max).clamp(min=1e-12)
        codes = form.kitchen().quantize_per_tensor_fp8(weight, scale, cls.dtype)
        return StoredWeight(form, {"weight": codes, "weight_scale": scale})

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        scale = tensors["weight_scale"].float().reshape(-1, 1)
        return (tensors["weight"].view(self.dtype).float() * scale).to(dtype)

    def is_finite(self, tensors: Tensors) -> bool:
        return super().is_finite({**tensors, "weight": tensors["weight"].view(self.dtype)})

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        return card_has(self.name, device, dtype, self.capability)

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        scale = tensors["weight_scale"].float()
        if scale.numel() > 1:  # the card's product has one scale for all rows
            return F.linear(x, self.dense(tensors, x.dtype), bias)
        return layout_product(self, self.layout, x, tensors["weight"].view(self.dtype), bias,
                              scale=scale.reshape(()))


class Float8E4M3(_Float8):
    name, dtype, layout = "float8_e4m3fn", torch.float8_e4m3fn, "TensorCoreFP8Layout"


class Float8E5M2(_Float8):
    """Read only: e4m3 has a bit more of precision and a range that scaled weights do not need."""

    name, dtype, layout = "float8_e5m2", torch.float8_e5m2, "TensorCoreFP8Layout"

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False  # there is no product of two e5m2 matrices


class MXFP8(KitchenFormat):
    """float8_e4m3fn with a power of two for every 32 inputs (OCP microscaling formats, 2023)."""

    name = "mxfp8"
    functions = ("quantize_mxfp8", "dequantize_mxfp8")
    parts: ClassVar = {"weight_scale": (E8M0, torch.uint8)}
    block = 32
    capability = (10, 0)
    kernel_dtypes = HALVES

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        weight = tensors["weight"]
        require_weight(layer, weight, torch.float8_e4m3fn, cls.name)
        require_blocks(layer, weight.shape, cls.block, cls.name)
        require_scales(layer, tensors["weight_scale"], weight.shape, cls.block, cls.name)
        tensors["weight_scale"] = tensors["weight_scale"].view(E8M0)
        return StoredWeight(cls(weight.shape, options), tensors)

    @classmethod
    def quantize(cls, weight: Tensor, options: Mapping[str, Any] | None = None) -> StoredWeight:
        """A weight (out, in), both divisible by 32; ValueError for another."""
        require_blocks("the layer", weight.shape, cls.block, cls.name)
        form = cls(weight.shape, dict(options or {}))
        codes, scales = form.kitchen().quantize_mxfp8(weight.float())
        return StoredWeight(form, {"weight": codes, "weight_scale": scales})

    def is_finite(self, tensors: Tensors) -> bool:
        return bool((tensors["weight_scale"].view(torch.uint8) != 255).all()) \
            and bool(self._codes(tensors).float().isfinite().all())

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return self.kitchen().dequantize_mxfp8(self._codes(tensors), tensors["weight_scale"],
                                               dtype)

    def _codes(self, tensors: Tensors) -> Tensor:
        return tensors["weight"].view(torch.float8_e4m3fn)

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        return card_has(self.name, device, dtype, self.capability)

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        return layout_product(self, "TensorCoreMXFP8Layout", x, self._codes(tensors), bias,
                              scale=tensors["weight_scale"])


def require_blocks(layer: str, shape: torch.Size, block: int, name: str) -> None:
    """ValueError unless both sides of a weight are whole blocks."""
    if any(side % block for side in shape):
        raise ValueError(f"{layer} has a weight of {tuple(shape)}; {name} needs sides divisible "
                         f"by {block}")


def require_scales(layer: str, scales: Tensor, shape: torch.Size, block: int, name: str) -> None:
    """ValueError unless there are as many block scales as the tiles of `shape` need.

    They lie in tiles of 128 rows by 4 blocks, as the matrix products of NVIDIA's cards want them.
    """
    rows, blocks = -(-shape[0] // 128) * 128, -(-shape[1] // block // 4) * 4
    if scales.numel() != rows * blocks:
        raise ValueError(f"{layer}.weight_scale has {scales.numel()} scales; a {name} weight of "
                         f"{tuple(shape)} in blocks of {block} has {rows * blocks}")


def layout_product(form: KitchenFormat, layout: str, x: Tensor, codes: Tensor,
                   bias: Tensor | None, **params: Tensor) -> Tensor:
    """x times a weight of one of comfy-kitchen's tensor layouts, x being quantised the same way."""
    form.kitchen()
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    described = get_layout_class(layout).Params(orig_dtype=x.dtype, orig_shape=tuple(form.shape),
                                                **params)
    weight = QuantizedTensor(codes, layout, described)
    flat = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), layout)
    out = F.linear(flat, weight, bias)
    return out.reshape(*x.shape[:-1], form.shape[0])
