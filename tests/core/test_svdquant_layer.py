"""A stored SVDQuant layer: its output, its bias, and a LoRA added to it."""

import dataclasses

import pytest
import torch
from svdquant_problems import gaussian_problem, normal, outlier_problem

from pixart_core.quant.svdquant import (
    GELU_SHIFT,
    SVDQuantSettings,
    int4,
    layer_output,
    output_error,
    solve_layer,
)
from pixart_core.quant.svdquant_format import SVDQuant

SETTINGS = SVDQuantSettings(rank=16, rounds=2)


def solved(act_unsigned=False, **fields):
    weight, x, bias = outlier_problem()
    if act_unsigned:
        x = torch.nn.functional.gelu(x)
    settings = dataclasses.replace(SETTINGS, **fields)
    return weight, x, bias, solve_layer(weight, x, bias, act_unsigned=act_unsigned,
                                        settings=settings)


@pytest.mark.parametrize("act_unsigned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored(act_unsigned, dtype):
    weight, _, _, layer = solved(act_unsigned, dtype=dtype)
    (n, k), r = weight.shape, 16
    expected = {"qweight": (n, k // 2), "weight_scale": (k // 64, n), "smooth_factor": (k,),
                "proj_down": (k, r), "proj_up": (n, r), "bias": (n,)}
    for name, shape in expected.items():
        tensor = getattr(layer, name)
        assert tensor.shape == shape and tensor.is_contiguous(), name
        assert tensor.dtype == (torch.int8 if name == "qweight" else dtype), name
    assert layer.act_unsigned is act_unsigned
    assert int4.unpack(layer.qweight).min() == -7  # -8 is never used


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_output_is_the_formula(act_unsigned):
    """Smoothed 4-bit product, low-rank branch on x itself, bias: in float64 and one by one."""
    _, x, _, layer = solved(act_unsigned)
    smooth, scale = layer.smooth_factor.double(), layer.weight_scale.double()
    codes = int4.unpack(layer.qweight).double()
    shift = GELU_SHIFT if act_unsigned else 0
    low, high = (0, 15) if act_unsigned else (-7, 7)
    y = x.double() @ layer.proj_down.double() @ layer.proj_up.double().T + layer.bias.double()
    for g in range(2):
        k = slice(64 * g, 64 * g + 64)
        part = (x[:, k] + shift) / layer.smooth_factor.float()[k]
        steps = part.abs().amax(1, keepdim=True) / high
        part = (part / steps).round().clamp(low, high).double() * steps.double()
        assert smooth[k].min() > 0
        y += part @ (codes[:, k] * scale[g].unsqueeze(1)).T
    assert torch.allclose(layer_output(layer, x).double(), y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_comfy_kitchen_computes_the_same(act_unsigned):
    """The host's kernel library, in its plain PyTorch form, reads the layer as we do."""
    kitchen = pytest.importorskip("comfy_kitchen")
    _, x, _, layer = solved(act_unsigned)
    main = x + GELU_SHIFT if act_unsigned else x
    codes, scales, low_rank = kitchen.quantize_svdquant_w4a4(
        main, layer.smooth_factor.float(), layer.proj_down.float(), act_unsigned=act_unsigned,
        lora_x=x)
    found = kitchen.scaled_mm_svdquant_w4a4(
        codes, layer.qweight, scales, layer.weight_scale.float(), low_rank, layer.proj_up.float(),
        layer.bias.float(), act_unsigned)[: len(x)]
    expected = layer_output(layer, x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_output_of_any_number_of_dimensions():
    _, x, _, layer = solved()
    found = layer_output(layer, x.reshape(4, 24, 128))
    assert torch.allclose(found.reshape(96, -1), layer_output(layer, x), atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_takes_the_shift_out_exactly(with_bias):
    """With exact activations in place of 4-bit ones nothing of the shift is left."""
    weight, x, bias = gaussian_problem()
    x = torch.nn.functional.gelu(x)
    bias = bias if with_bias else None
    settings = dataclasses.replace(SETTINGS, dtype=torch.float32)
    layer = solve_layer(weight, x, bias, act_unsigned=True, settings=settings)
    residual, smooth = layer.residual().double(), layer.smooth_factor.double()
    shifted = (x.double() + GELU_SHIFT) / smooth @ residual.T + layer.bias.double()
    plain = x.double() / smooth @ residual.T + (0 if bias is None else bias.double())
    assert torch.allclose(shifted, plain, rtol=0, atol=1e-5)


def test_bias_is_corrected_for_the_rounded_weight():
    """In bfloat16 too: one rounding, of the bias minus what the stored codes make of the shift."""
    _, _, bias, layer = solved(act_unsigned=True)
    shift = layer.residual().double() @ (GELU_SHIFT / layer.smooth_factor.double())
    exact = bias.double() - shift
    assert torch.all((layer.bias.double() - exact).abs() <= exact.abs() * 2 ** -8 * 1.001)


def test_signed_layers_keep_their_bias():
    _, _, bias, layer = solved()
    assert torch.equal(layer.bias, bias.bfloat16())


def test_output_error_is_relative_to_the_output():
    weight, x, bias, layer = solved()
    exact = x @ weight.T + bias
    expected = (layer_output(layer, x) - exact).norm() / exact.norm()
    assert output_error(weight, bias, layer, x) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_widened_adds_exactly_the_lora(act_unsigned):
    _, x, _, layer = solved(act_unsigned)
    stored = SVDQuant.from_layer(layer.qweight, layer.weight_scale, layer.smooth_factor,
                                 layer.proj_down, layer.proj_up, act_unsigned)
    assert not stored.format.tiled  # 160 outputs: tensors are as the solver has them
    down, up = normal(128, 4, seed=7).bfloat16(), normal(160, 4, seed=8).bfloat16()
    tensors = stored.format.widened(stored.tensors, down, 0.5 * up)
    wide = dataclasses.replace(layer, proj_down=tensors["proj_down"], proj_up=tensors["proj_up"])
    assert wide.rank == 32  # 16 + 4, then a multiple of 16
    assert tensors["weight"] is stored.tensors["weight"]
    expected = layer_output(layer, x) + 0.5 * (x @ down.float()) @ up.float().T
    assert torch.allclose(layer_output(wide, x), expected, rtol=1e-5, atol=1e-3)
    assert not wide.proj_down[:, 20:].any() and not wide.proj_up[:, 20:].any()
