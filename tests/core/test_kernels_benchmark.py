"""What the benchmark of kernels compares them with."""

import torch
import torch.nn.functional as F
from quant_layers import quantized, weight_and_bias

from benchmarks.kernels import eager_linear
from pixart_core.quant.eight_bit import Float8E4M3


def test_float8_products_are_compared_with_one_of_rounded_numbers(monkeypatch):
    """Not with themselves: the product of the card is no operation of comfy-kitchen."""
    weight, bias = weight_and_bias()
    stored = quantized("fp8", weight)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Float8E4M3, "runs_on", lambda *_: True)
    monkeypatch.setattr(Float8E4M3, "product", None)
    found = eager_linear(stored, x, bias)
    unrounded = F.linear(x, stored.dense(), bias)
    error = (found - unrounded).norm() / unrounded.norm()
    assert 0.01 < error < 0.05
