"""SVDQuant's int4 layers (arXiv 2411.05007) as comfy-kitchen stores and runs them.

y = q(x / smooth) deq(weight)^T + (x proj_down) proj_up^T + bias, q being int4 with one scale per
token and 64 channels. Behind a GELU, x + GELU_SHIFT is quantised, without a sign; the bias in the
file takes the shift back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .kitchen_format import FLOATS, FULL_PRECISION, KitchenFormat, require_shape
from .stored import StoredWeight, Tensors
from .svdquant.int4 import GELU_SHIFT, GROUP, scale_codes, unpack
from .svdquant.layer import RANK_MULTIPLE

TILED, NATURAL = "kitchen_tile_packed_w4a4", "natural"
_TILE = 128
_FOLDED, _BASIS = "proj_down_smooth_folded", "lowrank_branch_input_basis"
_RAW, _SMOOTHED = "raw", "post_smoothing"


class SVDQuant(KitchenFormat):
    """int4 weights and activations with a 16-bit low-rank branch that sees x as it comes."""

    name = "svdquant_w4a4"
    functions = ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4")
    parts: ClassVar = {"weight_scale": FLOATS, "smooth_factor": FLOATS, "proj_down": FLOATS,
             "proj_up": FLOATS}
    known_options = ("layout", "act_unsigned", "group_size", "rank", _FOLDED, _BASIS)

    @classmethod
    def opened(cls, layer: str, tensors: dict[str, Tensor],
               options: dict[str, Any]) -> StoredWeight:
        if options.get("group_size", GROUP) != GROUP:
            raise ValueError(f"{layer} says group_size {options['group_size']!r}; {cls.name} has "
                             f"groups of {GROUP}")
        weight, layout = tensors["weight"], options.get("layout", NATURAL)
        if layout not in (TILED, NATURAL):
            raise ValueError(f"{layer} says layout {layout!r}; {TILED} and {NATURAL} are known")
        if weight.dtype != torch.int8 or weight.ndim != (4 if layout == TILED else 2):
            raise ValueError(f"{layer}.weight is {weight.dtype} of shape {tuple(weight.shape)}, "
                             f"which is not what {cls.name} in the layout {layout} has")
        if layout == TILED:
            tiles, groups = weight.shape[:2]
            rows, columns = tiles * _TILE, groups * GROUP
            require_shape(layer, "weight", weight, [(tiles, groups, 32, 128)], layout)
        else:
            rows, columns = weight.shape[0], 2 * weight.shape[1]
            if columns % GROUP:
                raise ValueError(f"{layer} has {columns} inputs; {cls.name} needs a multiple of "
                                 f"{GROUP}")
        what = f"a weight of {rows} x {columns} in the layout {layout}"
        rank = tensors["proj_down"].shape[-1]
        if options.get("rank", rank) != rank:
            raise ValueError(f"{layer} says rank {options['rank']!r} and its proj_down has {rank}; "
                             "the file is damaged")
        tiled = layout == TILED
        shapes = {
            "weight_scale": (rows // _TILE, columns // GROUP, _TILE) if tiled
            else (columns // GROUP, rows),
            "smooth_factor": (columns,), "proj_down": (columns, rank),
            "proj_up": (rows // _TILE, rank, _TILE) if tiled else (rows, rank),
        }
        for name, shape in shapes.items():
            require_shape(layer, name, tensors[name], [shape], what)
        if _sees_smoothed(layer, options):
            smooth = tensors["smooth_factor"].float()[:, None]
            down = tensors["proj_down"]
            tensors["proj_down"] = (down.float() / smooth).to(down.dtype)
        return StoredWeight(cls(torch.Size((rows, columns)), {
            "layout": layout, _FOLDED: True, _BASIS: _RAW,
            **{key: True for key in ("act_unsigned", FULL_PRECISION) if options.get(key)}}),
            tensors)

    @classmethod
    def from_layer(cls, weight: Tensor, weight_scale: Tensor, smooth_factor: Tensor,
                   proj_down: Tensor, proj_up: Tensor, act_unsigned: bool) -> StoredWeight:
        """The parts of a solved layer in the natural layout (out, in / 2), tiled where they fit."""
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        options: dict[str, Any] = {"layout": NATURAL, _FOLDED: True, _BASIS: _RAW}
        if rows % _TILE == 0:
            options["layout"] = TILED
            weight = weight.reshape(rows // _TILE, 32, 4, columns // GROUP, GROUP // 2)
            weight = weight.permute(0, 3, 1, 2, 4).reshape(rows // _TILE, columns // GROUP, 32, 128)
            weight_scale = weight_scale.reshape(-1, rows // _TILE, _TILE).permute(1, 0, 2)
            proj_up = _tiled_up(proj_up)
        if act_unsigned:
            options["act_unsigned"] = True
        parts = {"weight": weight, "weight_scale": weight_scale, "smooth_factor": smooth_factor,
                 "proj_down": proj_down, "proj_up": proj_up}
        return StoredWeight(cls(torch.Size((rows, columns)), options),
                            {name: t.contiguous() for name, t in parts.items()})

    @property
    def tiled(self) -> bool:
        return self.options["layout"] == TILED

    @property
    def act_unsigned(self) -> bool:
        return bool(self.options.get("act_unsigned", False))

    def is_finite(self, tensors: Tensors) -> bool:
        return super().is_finite(tensors) and bool((tensors["smooth_factor"] != 0).all())

    def residual(self, tensors: Tensors) -> Tensor:
        """The int4 part as float32 (out, in), for smoothed activations."""
        rows, columns = self.shape
        weight, scale = tensors["weight"], tensors["weight_scale"].float()
        if self.tiled:
            weight = weight.reshape(rows // _TILE, columns // GROUP, 32, 4, GROUP // 2)
            weight = weight.permute(0, 2, 3, 1, 4).reshape(rows, columns // 2)
            scale = scale.permute(1, 0, 2).reshape(columns // GROUP, rows)
        return scale_codes(unpack(weight).float(), scale.t())

    def dense(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        up = tensors["proj_up"].float()
        up = up.permute(0, 2, 1).reshape(self.shape[0], -1) if self.tiled else up
        weight = self.residual(tensors) / tensors["smooth_factor"].float()
        return (weight + up @ tensors["proj_down"].float().t()).to(dtype)

    def dense_bias(self, tensors: Tensors, bias: Tensor | None) -> Tensor | None:
        if bias is None or not self.act_unsigned:
            return bias
        return (bias.float() + self._shift(tensors)).to(bias.dtype)

    def stored_bias(self, tensors: Tensors, bias: Tensor) -> Tensor:
        if not self.act_unsigned:
            return bias
        return (bias.float() - self._shift(tensors)).to(bias.dtype)

    def _shift(self, tensors: Tensors) -> Tensor:
        """What shifted activations add to every output, (out,)."""
        smoothed = self.residual(tensors) / tensors["smooth_factor"].float()
        return GELU_SHIFT * smoothed.sum(1)

    def widened(self, tensors: Tensors, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The tensors with down (in, r) and up (out, r) beside the low-rank branch.

        The weight gains up down^T and nothing is quantised again; the rank is filled up with
        zeros to a multiple of 16.
        """
        rank = tensors["proj_down"].shape[1] + down.shape[1]
        fill = -rank % RANK_MULTIPLE
        like = tensors["proj_down"]
        down = F.pad(down, (0, fill)).to(like)
        up = F.pad(up, (0, fill)).to(like)
        up = _tiled_up(up) if self.tiled else up
        return {**tensors, "proj_down": torch.cat([like, down], 1),
                "proj_up": torch.cat([tensors["proj_up"], up], 1)}

    def product(self, x: Tensor, tensors: Tensors, bias: Tensor | None) -> Tensor:
        kitchen = self.kitchen()
        flat = x.reshape(-1, x.shape[-1])
        floats = {name: t.to(x.dtype) for name, t in tensors.items() if name != "weight"}
        main = flat + GELU_SHIFT if self.act_unsigned else flat
        codes, scales, branch = kitchen.quantize_svdquant_w4a4(
            main.contiguous(), smooth=floats["smooth_factor"], lora_down=floats["proj_down"],
            act_unsigned=self.act_unsigned, lora_x=flat if self.act_unsigned else None)
        out = kitchen.scaled_mm_svdquant_w4a4(
            act=codes, wgt=tensors["weight"], ascales=scales, wscales=floats["weight_scale"],
            lora_act_in=branch, lora_up=floats["proj_up"], bias=bias,
            act_unsigned=self.act_unsigned)
        return out[: len(flat)].reshape(*x.shape[:-1], self.shape[0])


def _sees_smoothed(layer: str, options: dict[str, Any]) -> bool:
    """Whether proj_down multiplies x / smooth_factor; x itself, which kernels give it, unless the
    file says otherwise. ValueError where it contradicts itself."""
    folded = options.get(_FOLDED, options.get(_BASIS, _RAW) == _RAW)
    basis = options.get(_BASIS, _RAW if folded else _SMOOTHED)
    if (basis, folded) not in ((_RAW, True), (_SMOOTHED, False)):
        raise ValueError(f"{layer} says {_BASIS} {basis!r} and {_FOLDED} {folded!r}; {_RAW!r} with "
                         f"true and {_SMOOTHED!r} with false are known")
    return basis == _SMOOTHED


def _tiled_up(up: Tensor) -> Tensor:
    """proj_up (out, r) in tiles (out / 128, r, 128)."""
    return up.reshape(-1, _TILE, up.shape[1]).permute(0, 2, 1).contiguous()
