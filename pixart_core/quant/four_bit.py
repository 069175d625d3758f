"""Four bits per weight without a low-rank branch: int4 in groups (weights only), and nvfp4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .eight_bit import layout_product, require_blocks, require_scales
from .kitchen_format import FLOATS, HALVES, KitchenFormat, card_has, require_shape, require_weight
from .stored import StoredWeight, Tensors

GROUP = 64
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
PIECE = 1 << 22  # numbers of a weight that are unpacked at once where no kernel takes them


class Int4(KitchenFormat):
    """Groups of 64 inputs with 16 levels between their extremes; activations stay as they are.

    comfy-kitchen's W4A16: weight = (code - 8) * scale + zero, two codes in a byte, the even column
    in the low half; `weight_scale` and `weight_zero` are (in / 64, out).
    """

    name = "awq_w4a16"
    functions = ("gemv_awq_w4a16",)
    kernel_dtypes = HALVES
    parts: ClassVar = {"weight_scale": FLOATS, "weight_zero": FLOATS}
    row_sides: ClassVar = {"weight": 0, "weight_scale": 1, "weight_zero": 1}
    known_options = ("group_size",)

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        group = options.get("group_size", GROUP)
        require_weight(layer, tensors["weight"], torch.int8, cls.name)
        rows, columns = tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]
        if not isinstance(group, int) or isinstance(group, bool) or group < 2 or columns % group:
            raise ValueError(f"{layer} says group_size {group!r}; its {columns} inputs do not "
                             "divide into such groups, 64 is usual")
        for name in cls.parts:
            require_shape(layer, name, tensors[name], [(columns // group, rows)],
                          f"a weight of {rows} x {columns} in groups of {group}")
        return StoredWeight(cls(torch.Size((rows, columns)), {**options, "group_size": group}),
                            tensors)

    @classmethod
    def quantize(cls, weight: Tensor, options: Mapping[str, Any] | None = None, *,
                 dtype: torch.dtype = torch.float16) -> StoredWeight:
        """A weight (out, in), in divisible by 64; each group is clipped where that helps most.

        `dtype` is that of scales and zeros. Raises ValueError for another width.
        """
        rows, columns = weight.shape
        if columns % GROUP:
            raise ValueError(f"the layer has {columns} inputs; {cls.name} needs a multiple of "
                             f"{GROUP}")
        groups = weight.float().reshape(rows, -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        best = best_error = None
        for clip in _CLIPS:
            scale = ((high - low) * (clip / 15)).to(dtype).float()
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            zero = ((high + low) / 2 + scale / 2).to(dtype).float()  # the middle level is code 7.5
            codes = ((groups - zero) / scale).round_().add_(8).clamp_(0, 15)
            error = ((codes - 8) * scale + zero - groups).square_().sum(-1, keepdim=True)
            if best is None:
                best, best_error = [codes, scale, zero], error
                continue
            better = error < best_error
            best = [torch.where(better, new, old)
                    for new, old in zip((codes, scale, zero), best, strict=True)]
            best_error = torch.where(better, error, best_error)
        codes, scale, zero = best
        pairs = codes.to(torch.uint8).reshape(rows, -1, 2)
        packed = (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int8)
        tensors = {"weight": packed, "weight_scale": scale[..., 0].t().contiguous().to(dtype),
                   "weight_zero": zero[..., 0].t().contiguous().to(dtype)}
        return StoredWeight(cls(weight.shape, {**(options or {}), "group_size": GROUP}), tensors)

    @property
    def group(self) -> int:
        return int(self.options.get("group_size", GROUP))

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        data = tensors["weight"].view(torch.uint8)
        codes = torch.stack([data & 15, data >> 4], -1).reshape(rows, -1, self.group)
        scale, zero = (tensors[n].float().t().unsqueeze(-1) for n in ("weight_scale",
                                                                     "weight_zero"))
        return torch.addcmul(zero, codes.float() - 8, scale).reshape(rows, columns).to(dtype)

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        if x.dtype not in self.kernel_dtypes:  # comfy-kitchen would unpack all at once
            return self._in_pieces(x, tensors, bias)
        return self.kitchen().gemv_awq_w4a16(
            x, tensors["weight"], tensors["weight_scale"].to(x.dtype),
            tensors["weight_zero"].to(x.dtype), bias=bias, group_size=self.group)

    def _in_pieces(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        """x through some rows of the unpacked weight after the other."""
        rows, columns = self.shape
        out = x.new_empty(*x.shape[:-1], rows)
        step = max(PIECE // columns, 1)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            part = {name: t.narrow(self.row_sides[name], start, count)
                    for name, t in tensors.items()}
            weight = replace(self, shape=torch.Size((count, columns))).dense(part, x.dtype)
            out[..., start: start + count] = F.linear(
                x, weight, None if bias is None else bias[start: start + count])
        return out


class NVFP4(KitchenFormat):
    """NVIDIA's four-bit floats: e2m1, float8 scales of 16 inputs, one float32 scale of all."""

    name = "nvfp4"
    functions = ("quantize_nvfp4", "dequantize_nvfp4")
    parts: ClassVar = {"weight_scale": (torch.float8_e4m3fn, torch.uint8), "weight_scale_2": FLOATS}
    block = 16
    capability = (10, 0)
    kernel_dtypes = HALVES

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        require_weight(layer, tensors["weight"], torch.uint8, cls.name)
        shape = torch.Size((tensors["weight"].shape[0], 2 * tensors["weight"].shape[1]))
        require_blocks(layer, shape, cls.block, cls.name)
        require_scales(layer, tensors["weight_scale"], shape, cls.block, cls.name)
        require_shape(layer, "weight_scale_2", tensors["weight_scale_2"], [(), (1,)], cls.name)
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        tensors["weight_scale_2"] = tensors["weight_scale_2"].reshape(())
        return StoredWeight(cls(shape, options), tensors)

    @classmethod
    def quantize(cls, weight: Tensor, options: Mapping[str, Any] | None = None) -> StoredWeight:
        """A weight (out, in), both divisible by 16; ValueError for another."""
        require_blocks("the layer", weight.shape, cls.block, cls.name)
        form = cls(weight.shape, dict(options or {}))
        weight = weight.float()
        largest = torch.finfo(torch.float8_e4m3fn).max * 6  # of a block scale, and of e2m1
        scale = (weight.abs().amax() / largest).clamp(min=1e-12)
        codes, blocks = form.kitchen().quantize_nvfp4(weight, scale)
        return StoredWeight(form, {"weight": codes, "weight_scale": blocks,
                                   "weight_scale_2": scale})

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return self.kitchen().dequantize_nvfp4(
            tensors["weight"].view(torch.uint8), tensors["weight_scale_2"].float(),
            tensors["weight_scale"], dtype)

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        return card_has(self.name, device, dtype, self.capability)

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        return layout_product(self, "TensorCoreNVFP4Layout", x, tensors["weight"].view(torch.uint8),
                              bias, scale=tensors["weight_scale_2"].float(),
                              block_scale=tensors["weight_scale"])
