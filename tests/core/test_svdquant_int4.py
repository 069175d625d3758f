"""4-bit arithmetic of SVDQuant against plain loops over single numbers."""

import pytest
import torch
from svdquant_problems import normal

from pixart_core.quant.svdquant import int4


def rounded(value, dtype):
    """A Python number as `dtype` holds it."""
    return torch.tensor(value).to(dtype).item()


def test_packing_keeps_every_code():
    codes = torch.arange(-8, 8).repeat(3, 8)
    codes[1] = codes[1].flip(0)
    packed = int4.pack(codes)
    assert packed.dtype == torch.int8 and packed.shape == (3, 64)
    assert torch.equal(int4.unpack(packed), codes.to(torch.int8))


def test_low_nibble_is_the_even_column():
    packed = int4.pack(torch.tensor([[1, 2, -1, 7, -7, 0]]))
    assert [byte & 0xFF for byte in packed[0].tolist()] == [0x21, 0x7F, 0x09]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_in_groups_of_64(dtype):
    """Scale max/7 of 64 neighbours in a row, rounded before it is used; codes within -7..7."""
    weight = normal(3, 128) * torch.tensor([[1.0], [50.0], [0.01]])
    scales = int4.group_scales(weight, dtype)
    codes = int4.weight_codes(weight, scales)
    fake = int4.fake_quantize_weight(weight, dtype)
    for n in range(3):
        for k in range(128):
            group = weight[n, k // 64 * 64: (k // 64 + 1) * 64].tolist()
            scale = rounded(max(abs(v) for v in group) / 7, dtype)
            code = max(-7, min(7, round(weight[n, k].item() / scale)))
            assert scales[n, k // 64].item() == scale
            assert codes[n, k].item() == code
            assert fake[n, k].item() == pytest.approx(code * scale, rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_group_too_small_for_the_dtype_becomes_zero(size):
    weight = normal(2, 128)
    weight[:, :64] *= size
    scales = int4.group_scales(weight, torch.float16)
    assert torch.equal(scales[:, 0], torch.ones(2))
    assert torch.equal(int4.weight_codes(weight, scales)[:, :64], torch.zeros(2, 64))


def test_signed_activations_per_token_and_group():
    x, smooth = normal(4, 128), normal(128, seed=1).exp()
    codes, scales = int4.quantize_activations(x, smooth)
    for m in range(4):
        for k in range(128):
            group = [(x[m, i] / smooth[i]).item() for i in range(k // 64 * 64, (k // 64 + 1) * 64)]
            scale = max(abs(v) for v in group) / 7
            assert scales[m, k // 64].item() == pytest.approx(scale, rel=1e-6)
            assert codes[m, k].item() == round(group[k % 64] / scale)


def test_unsigned_activations_are_shifted_and_use_fifteen_steps():
    x, smooth = torch.nn.functional.gelu(normal(4, 128)), normal(128, seed=1).exp()
    codes, scales = int4.quantize_activations(x, smooth, act_unsigned=True)
    assert codes.min() == 0 and codes.max() == 15
    for m in range(4):
        for k in range(128):
            group = [((x[m, i] + 0.171875) / smooth[i]).item()
                     for i in range(k // 64 * 64, (k // 64 + 1) * 64)]
            scale = max(group) / 15
            assert scales[m, k // 64].item() == pytest.approx(scale, rel=1e-6)
            assert codes[m, k].item() == round(group[k % 64] / scale)
    fake = int4.fake_quantize_activations(x, smooth, act_unsigned=True)
    assert ((x + 0.171875) / smooth - fake).abs().max() <= scales.max() / 2 * 1.001


def test_the_shift_keeps_every_gelu_output_above_zero():
    lowest = torch.nn.functional.gelu(torch.linspace(-5, 0, 10001)).min()
    assert lowest + int4.GELU_SHIFT > 0


def test_a_token_of_zeros_is_zero():
    fake = int4.fake_quantize_activations(torch.zeros(1, 64), torch.ones(64))
    assert torch.equal(fake, torch.zeros(1, 64))
