"""One quantised linear layer: what is stored, and what it computes."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4

RANK_MULTIPLE = 16  # kernels read the low-rank branch in tiles of 16


@dataclasses.dataclass(frozen=True)
class SVDQuantLayer:
    """A linear layer N <- K in 4 bits with a low-rank branch of rank r in 16 bits.

    y = q4(x / smooth_factor) deq(qweight)^T + (x proj_down) proj_up^T + bias

    qweight (N, K/2) int8: two codes -7..7 per byte, the low nibble the even column
    weight_scale (K/64, N), smooth_factor (K,), proj_down (K, r), proj_up (N, r), bias (N,) or
    None: all of one 16-bit dtype. `proj_down` multiplies x itself, neither smoothed nor shifted.
    act_unsigned: x is shifted by 0.171875 before q4, whose codes are 0..15; `bias` already takes
    the shift out again.
    """

    qweight: Tensor
    weight_scale: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    bias: Tensor | None
    act_unsigned: bool = False

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        return self.smooth_factor.shape[0]

    @property
    def rank(self) -> int:
        return self.proj_down.shape[1]

    def residual(self) -> Tensor:
        """The weight (N, K) float32 that the 4-bit codes stand for; its input is smoothed."""
        return int4.scale_codes(int4.unpack(self.qweight).float(), self.weight_scale.float().T)


@torch.no_grad()
def layer_output(layer: SVDQuantLayer, x: Tensor) -> Tensor:
    """The layer applied to x (..., K): (..., N) in float32, from what is stored."""
    x = x.float()
    quantized = int4.fake_quantize_activations(x, layer.smooth_factor, layer.act_unsigned)
    bias = None if layer.bias is None else layer.bias.float()
    low_rank = (x @ layer.proj_down.float()) @ layer.proj_up.float().T
    return F.linear(quantized, layer.residual(), bias) + low_rank


@torch.no_grad()
def output_error(weight: Tensor, bias: Tensor | None, layer: SVDQuantLayer, x: Tensor) -> float:
    """|layer(x) - (x weight^T + bias)| / |x weight^T + bias| in the Frobenius norm, in float32."""
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return relative_error(layer_output(layer, x), exact)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, 0 where both are zero; infinite where that is not a number."""
    distance, size = (found - exact).norm().item(), exact.norm().item()
    if distance == 0:
        return 0.0
    return distance / size if size and math.isfinite(distance) else math.inf
