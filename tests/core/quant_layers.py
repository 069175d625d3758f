"""Weights in every quantised format, for the tests of them."""

import torch

from pixart_core.quant.policy import METHODS
from pixart_core.quant.svdquant_format import SVDQuant

ROUNDED = [name for name, method in METHODS.items() if not method.calibrated]
FORMATS = [*ROUNDED, "svdquant"]


def weight_and_bias(rows=256, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) / columns**0.5,
            torch.randn(rows, generator=generator))


def quantized(name, weight, *, unsigned=False, rank=16):
    """`weight` in a format; svdquant without calibration: its leading rank, the rest rounded."""
    if name != "svdquant":
        return METHODS[name].format.quantize(weight)
    rows, columns = weight.shape
    smooth = torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.5
    u, s, v = torch.linalg.svd(weight * smooth, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], v[:rank].t() / smooth[:, None]
    groups = (weight * smooth - up @ v[:rank]).reshape(rows, -1, 64)
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round().clamp(-7, 7).to(torch.int32).reshape(rows, -1)
    packed = (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).to(torch.int8)
    return SVDQuant.from_layer(packed, scale.t().contiguous(), smooth, down, up, unsigned)
