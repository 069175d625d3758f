"""Symmetric 4-bit integers in groups of 64 input channels: weights, activations, packed bytes.

Signed codes are -7..7 with scale max|v| / 7, so that the range is symmetric; a nibble could hold
-8 as well and unpacking accepts it. Activations behind a GELU are shifted to be non-negative and
use 0..15 with scale max / 15 (SVDQuant, arXiv 2411.05007, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
SIGNED_MAX, UNSIGNED_MAX = 7, 15
# GELU is never below -0.16997; 11/64 is the next short binary fraction and exact in bfloat16
GELU_SHIFT = 0.171875
_SMALLEST_MAX = 1e-10  # of an activation group, so that a group of zeros has a scale


def group_scales(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales (N, K/64) float32 of a weight (N, K), each a number that `dtype` can hold.

    A group of zeros, or one too small for `dtype`, gets scale 1 and therefore codes of zero.
    """
    largest = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    scales = (largest / SIGNED_MAX).to(dtype).float()
    return torch.where(scales > 0, scales, 1.0)


def weight_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Codes -7..7 of a weight (N, K) for its scales (N, K/64), as float32 (N, K)."""
    groups = weight.unflatten(-1, (-1, GROUP)) / scales.unsqueeze(-1)
    return groups.round_().clamp_(-SIGNED_MAX, SIGNED_MAX).flatten(-2)


def scale_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight (N, K) that codes (N, K) and scales (N, K/64) stand for."""
    return (codes.unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)).flatten(-2)


def fake_quantize_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (N, K) float32 as 4 bits hold it, rounded to nearest; scales are in `dtype`."""
    scales = group_scales(weight, dtype)
    return scale_codes(weight_codes(weight, scales), scales)


def quantize_activations(x: Tensor, smooth: Tensor, act_unsigned: bool = False,
                         ) -> tuple[Tensor, Tensor]:
    """Codes (..., K) and scales (..., K/64), float32, of x (..., K) divided by `smooth` (K,).

    Dynamic: one scale per token and group. With `act_unsigned` x is shifted by GELU_SHIFT first
    and the codes are 0..15; otherwise they are -7..7.
    """
    x = x.float() + GELU_SHIFT if act_unsigned else x.float()
    low, high = (0, UNSIGNED_MAX) if act_unsigned else (-SIGNED_MAX, SIGNED_MAX)
    groups = (x / smooth.float()).unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp_(min=_SMALLEST_MAX) / high
    codes = (groups / scales.unsqueeze(-1)).round_().clamp_(low, high)
    return codes.flatten(-2), scales


def fake_quantize_activations(x: Tensor, smooth: Tensor, act_unsigned: bool = False) -> Tensor:
    """What the integer product multiplies in place of x / smooth: (..., K) float32.

    With `act_unsigned` the shift is still in it; the bias of the layer takes it out again.
    """
    return scale_codes(*quantize_activations(x, smooth, act_unsigned))


def pack(codes: Tensor) -> Tensor:
    """Codes -8..7 (N, K) as bytes (N, K/2) int8; the low nibble is the even column."""
    nibbles = codes.to(torch.int8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Codes -8..7 (N, K) int8 of bytes (N, K/2) int8."""
    # a shift to the left and an arithmetic one back extend the sign of the low nibble
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(-2)
