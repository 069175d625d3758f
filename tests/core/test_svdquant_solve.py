"""SVDQuant layers as a whole: closer than the simpler methods, and clear about bad input."""

import dataclasses

import pytest
import torch
from svdquant_problems import correlated_problem, gaussian_problem, normal, outlier_problem

from pixart_core.quant.svdquant import (
    SVDQuantSettings,
    layer_output,
    lowrank,
    output_error,
    round_to_nearest,
    smooth_only,
    solve_layer,
    solve_shared,
)

SETTINGS = SVDQuantSettings(rank=16, rounds=10)


def errors(problem, act_unsigned=False):
    """Output error of plain rounding, smoothing alone and SVDQuant, on inputs not solved for."""
    weight, x, bias = problem()
    _, others, _ = problem(seed=100)
    if act_unsigned:
        x, others = torch.nn.functional.gelu(x), torch.nn.functional.gelu(others)
    layers = (round_to_nearest(weight, bias, act_unsigned=act_unsigned),
              smooth_only(weight, x, bias, act_unsigned=act_unsigned),
              solve_layer(weight, x, bias, act_unsigned=act_unsigned, settings=SETTINGS))
    return [output_error(weight, bias, layer, others) for layer in layers]


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_outlier_channels(act_unsigned):
    nearest, smoothed, svdquant = errors(outlier_problem, act_unsigned)
    assert svdquant <= 0.5 * nearest
    assert svdquant < 0.9 * smoothed


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_gaussian_weights(act_unsigned):
    nearest, smoothed, svdquant = errors(gaussian_problem, act_unsigned)
    assert svdquant < nearest and svdquant < smoothed


def test_smoothing_alone_helps_against_outliers_in_the_inputs():
    weight, _, bias = gaussian_problem()
    _, x, _ = outlier_problem()
    plain = output_error(weight, bias, round_to_nearest(weight, bias), x)
    assert output_error(weight, bias, smooth_only(weight, x, bias), x) < 0.7 * plain


def test_plain_rounding_has_no_smoothing_and_no_branch():
    weight, _, bias = outlier_problem()
    layer = round_to_nearest(weight, bias, dtype=torch.float16)
    assert torch.equal(layer.smooth_factor, torch.ones(128, dtype=torch.float16))
    assert layer.rank == 0 and layer.proj_up.shape == (160, 0)
    step = layer.weight_scale.float().T.repeat_interleave(64, dim=1)
    assert torch.all((layer.residual() - weight).abs() <= 0.51 * step)


def test_simpler_methods_name_bad_input():
    with pytest.raises(ValueError, match="multiple of 64"):
        round_to_nearest(normal(64, 96))
    with pytest.raises(ValueError, match=r"weight_scale.*too large for torch.float16"):
        round_to_nearest(WEIGHT * 1e6, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"calibration inputs.* finite"):
        smooth_only(WEIGHT, infinite(X))


def test_every_setting_matters():
    """No option is ignored: each changes the layer."""
    weight, x, bias = correlated_problem()
    default = layer_output(solve_layer(weight, x, bias, settings=SETTINGS), x)
    changes = {"rank": 32, "grid": ((0.1, 0.0),), "rounds": 0, "tolerance": 0.5, "gptq": True,
               "dtype": torch.float16}
    for name, value in changes.items():
        settings = dataclasses.replace(SETTINGS, **{name: value})
        found = layer_output(solve_layer(weight, x, bias, settings=settings), x)
        assert not torch.equal(found, default), name


def test_gptq_settings():
    weight, x, bias = correlated_problem()
    outputs = [layer_output(solve_layer(weight, x, bias, settings=dataclasses.replace(
        SETTINGS, gptq=True, gptq_dampings=dampings)), x) for dampings in [(0.01,), (1.0,), ()]]
    assert not torch.equal(outputs[0], outputs[1])
    plain = layer_output(solve_layer(weight, x, bias, settings=SETTINGS), x)
    assert torch.equal(outputs[2], plain)


def test_large_layers_depend_on_the_seed_alone(monkeypatch):
    """A randomised SVD, so the same seed must give the same layer whatever ran before."""
    monkeypatch.setattr(lowrank, "EXACT_UP_TO", 0)
    weight, x, bias = gaussian_problem()
    first, again, other = (
        solve_layer(weight, x, bias, settings=dataclasses.replace(SETTINGS, seed=seed))
        for seed in (0, 0, 1))
    assert torch.equal(first.proj_up, again.proj_up) and torch.equal(first.qweight, again.qweight)
    assert not torch.equal(first.proj_up, other.proj_up)


def test_layers_with_one_input_share_smoothing_and_down_projection():
    weight, x, bias = outlier_problem()
    sizes = (64, 32, 64)
    layers = solve_shared(weight.split(sizes), x, bias.split(sizes), settings=SETTINGS)
    fused = solve_layer(weight, x, bias, settings=SETTINGS)
    for layer, size in zip(layers, sizes, strict=True):
        assert layer.out_features == size and layer.weight_scale.is_contiguous()
        assert torch.equal(layer.proj_down, fused.proj_down)
        assert torch.equal(layer.smooth_factor, fused.smooth_factor)
    outputs = torch.cat([layer_output(layer, x) for layer in layers], dim=1)
    assert torch.allclose(outputs, layer_output(fused, x), rtol=1e-5, atol=1e-3)


def test_shared_layers_with_and_without_bias():
    weight, x, bias = outlier_problem()
    parts = weight.split(80)
    first, second = solve_shared(parts, x, [bias[:80], None], settings=SETTINGS)
    assert torch.equal(first.bias, bias[:80].bfloat16()) and not second.bias.any()
    assert solve_shared(parts, x, settings=SETTINGS)[0].bias is None
    with pytest.raises(ValueError, match="2 weights and 1 biases"):
        solve_shared(parts, x, [bias])
    with pytest.raises(ValueError, match="at least one weight"):
        solve_shared([], x)


def test_silent_channels_and_rows_of_zeros():
    """Nothing becomes infinite where an input channel, an input group or a weight row is zero."""
    weight, x, bias = outlier_problem()
    x[:, :64], x[0], x[:, 70] = 0, 0, 0
    weight[3], weight[:, 80] = 0, 0
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, gptq=True)):
        layer = solve_layer(weight, x, bias, settings=settings)
        assert layer.smooth_factor.min() > 0
        assert output_error(weight, bias, layer, x) < 0.2
        assert layer_output(layer, normal(8, 128)).isfinite().all()


def test_a_weight_of_zeros():
    layer = solve_layer(torch.zeros(64, 128), normal(32, 128), settings=SETTINGS)
    assert not layer_output(layer, normal(4, 128)).any()


def test_parameters_and_16_bit_weights_are_taken():
    weight, x, bias = outlier_problem()
    parameter = torch.nn.Parameter(weight.bfloat16())
    layer = solve_layer(parameter, x.bfloat16(), bias.bfloat16(), settings=SETTINGS)
    same = solve_layer(weight.bfloat16().float(), x.bfloat16().float(), bias, settings=SETTINGS)
    assert torch.equal(layer.qweight, same.qweight) and not layer.proj_up.requires_grad


def infinite(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[7] = float("inf")
    return tensor


WEIGHT, X, BIAS = gaussian_problem()


@pytest.mark.parametrize("change, message", [
    ({"weight": normal(64, 96)}, r"\(64, 96\).* multiple of 64"),
    ({"weight": normal(128)}, r"\(128,\)"),
    ({"x": normal(8, 64)}, r"\(8, 64\) .*\(160, 128\).*\(rows, 128\)"),
    ({"x": normal(0, 128)}, r"\(0, 128\)"),
    ({"bias": normal(128)}, r"bias of shape \(128,\).*\(160,\)"),
    ({"weight": infinite(WEIGHT)}, "weight.* finite"),
    ({"x": infinite(X)}, "calibration inputs.* finite"),
    ({"bias": infinite(BIAS)}, "bias.* finite"),
    ({"rank": 0}, "rank 0 .*1 to 128"),
    ({"rank": 129}, "rank 129 .*1 to 128"),
    ({"dtype": torch.int8}, r"torch\.int8"),
    ({"weight": WEIGHT * 1e6, "dtype": torch.float16}, "weight.*too large for torch.float16"),
    ({"bias": BIAS * 1e6, "dtype": torch.float16}, "bias.*too large for torch.float16"),
])
def test_bad_input_is_named(change, message):
    arguments = {"weight": WEIGHT, "x": X, "bias": BIAS} | change
    fields = {name: arguments.pop(name) for name in ("rank", "dtype") if name in arguments}
    with pytest.raises(ValueError, match=message):
        solve_layer(**arguments, settings=dataclasses.replace(SETTINGS, **fields))
