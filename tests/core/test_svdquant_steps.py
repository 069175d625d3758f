"""The steps of the SVDQuant solver: smoothing search, truncated SVD, refinement, GPTQ."""

import pytest
import torch
from svdquant_problems import correlated_problem, normal, outlier_problem

from pixart_core.quant.svdquant import int4, lowrank
from pixart_core.quant.svdquant.gptq import gptq, inverse_factor, residual_codes
from pixart_core.quant.svdquant.lowrank import first_branch, no_branch, refine, truncated_svd
from pixart_core.quant.svdquant.smooth import (
    NO_SMOOTHING,
    SMOOTH_GRID,
    input_spans,
    search_smooth,
    smooth_factor,
)
from pixart_core.quant.svdquant.smoothed import Smoothed
from pixart_core.quant.svdquant.solve import calibrate


def calibration(problem=outlier_problem, act_unsigned=False, **arguments):
    weight, x, bias = problem(**arguments)
    x = torch.nn.functional.gelu(x) if act_unsigned else x
    return calibrate(weight, x, bias, act_unsigned, torch.bfloat16)


def generator():
    return torch.Generator().manual_seed(0)


def test_smooth_factor_is_the_ratio_of_powers():
    x_span, w_span = [4.0, 1.0, 9.0], [0.5, 2.0, 1.0]
    raw = [x ** 0.3 / w ** 0.7 for x, w in zip(x_span, w_span, strict=True)]
    mean = (raw[0] * raw[1] * raw[2]) ** (1 / 3)
    found = smooth_factor(torch.tensor(x_span), torch.tensor(w_span), 0.3, 0.7)
    assert found.tolist() == pytest.approx([value / mean for value in raw], rel=1e-5)


def test_no_smoothing_is_a_factor_of_one():
    spans = normal(64).exp()
    assert torch.equal(smooth_factor(spans, spans, *NO_SMOOTHING), torch.ones(64))


def test_channels_of_zeros_are_smoothed_as_average_ones():
    x_span, w_span = torch.tensor([0.0, 2.0, 8.0]), torch.tensor([1.0, 0.0, 4.0])
    found = smooth_factor(x_span, w_span, 0.5, 0.5)
    expected = smooth_factor(torch.tensor([4.0, 2.0, 8.0]), torch.tensor([1.0, 2.0, 4.0]), 0.5, 0.5)
    assert torch.allclose(found, expected)
    assert torch.equal(smooth_factor(torch.zeros(3), w_span, 0.5, 0), torch.ones(3))


def test_spans_of_shifted_inputs():
    x = torch.tensor([[-0.125, 1.0], [0.0, -0.1]])
    assert input_spans(x).tolist() == [0.125, 1.0]
    assert input_spans(x, act_unsigned=True).tolist() == [0.171875, 1.171875]


def test_the_grid_has_twenty_points_and_one_is_no_smoothing():
    assert len(set(SMOOTH_GRID)) == 20 and NO_SMOOTHING in SMOOTH_GRID


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_smoothing_is_the_best_of_the_grid(act_unsigned):
    """By the output error with the branch present, worked out here from what would be stored."""
    layer = calibration(act_unsigned=act_unsigned)
    grid = [(0.3, 0.0), (0.5, 0.5), (0.9, 0.1)]
    search = search_smooth(layer, rank=8, grid=grid)
    expected = {}
    for pair in [NO_SMOOTHING, *grid]:
        spans = input_spans(layer.x, act_unsigned), layer.weight.abs().amax(0)
        smooth = smooth_factor(*spans, *pair).bfloat16().float()
        left, values, right = torch.linalg.svd(layer.weight * smooth, full_matrices=False)
        up = (left[:, :8] * values[:8].sqrt()).bfloat16().float()
        down = (right[:8].T * values[:8].sqrt() / smooth.unsqueeze(1)).bfloat16().float()
        residual = layer.weight * smooth - up @ (down * smooth.unsqueeze(1)).T
        residual = int4.fake_quantize_weight(residual, torch.bfloat16)
        inputs = int4.fake_quantize_activations(layer.x, smooth, act_unsigned)
        y = inputs @ residual.T + layer.x @ down @ up.T
        if act_unsigned:
            y -= residual @ (0.171875 / smooth)
        expected[pair] = ((y - layer.target).norm() / layer.target.norm()).item()
    assert search.errors == pytest.approx(expected, rel=1e-3)
    assert search.exponents == min(expected, key=expected.get) != NO_SMOOTHING


def test_smoothing_is_never_worse_than_none():
    """A grid of nothing but harmful factors leaves the layer as it is."""
    search = search_smooth(calibration(), rank=8, grid=[(-1.0, 0.0)])
    assert search.errors[(-1.0, 0.0)] > search.errors[NO_SMOOTHING]
    assert search.exponents == NO_SMOOTHING
    assert torch.equal(search.smoothed.smooth, torch.ones(128))


def test_the_search_is_seeded(monkeypatch):
    monkeypatch.setattr(lowrank, "EXACT_UP_TO", 0)
    first, again, other = (search_smooth(calibration(), 8, seed, [(0.5, 0.5)]).errors
                           for seed in (0, 0, 1))
    assert first == again != other


def test_exact_svd_is_the_best_of_its_rank():
    matrix = normal(160, 128)
    factors = truncated_svd(matrix, 8, generator())
    tail = torch.linalg.svdvals(matrix)[8:].norm()
    assert (matrix - factors.up @ factors.down.T).norm() == pytest.approx(tail.item(), rel=1e-4)
    assert torch.allclose(factors.up.norm(dim=0), factors.down.norm(dim=0), rtol=1e-3)


@pytest.mark.parametrize("start", [False, True], ids=["random start", "start nearby"])
def test_randomised_svd_is_nearly_as_good(monkeypatch, start):
    matrix = 0.05 * normal(160, 128) + normal(160, 8, seed=1) @ normal(8, 128, seed=2) / 8
    basis = truncated_svd(matrix + 0.01 * normal(160, 128, seed=3), 8, generator()).basis
    best = (matrix - _product(truncated_svd(matrix, 8, generator()))).norm()
    monkeypatch.setattr(lowrank, "EXACT_UP_TO", 0)
    factors = truncated_svd(matrix, 8, generator(), basis if start else None)
    assert factors.up.shape == (160, 8) and factors.down.shape == (128, 8)
    assert factors.basis.shape == (128, 24)
    assert (matrix - _product(factors)).norm() <= 1.01 * best
    again = truncated_svd(matrix, 8, generator(), basis if start else None)
    assert torch.equal(factors.up, again.up)


def _product(factors):
    return factors.up @ factors.down.T


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_refinement_stops_at_the_first_worsening(act_unsigned):
    smoothed = search_smooth(calibration(act_unsigned=act_unsigned), rank=8).smoothed
    branch, errors = refine(smoothed, 8, rounds=100, generator=generator())
    improving = errors if len(errors) == 101 else errors[:-1]
    assert improving == sorted(improving, reverse=True) and len(improving) > 2
    assert len(errors) == 101 or errors[-1] >= errors[-2]
    kept = smoothed.error(branch, smoothed.rounded_residual(branch))
    assert kept == min(errors) < errors[0]


def test_refinement_starts_from_the_plain_svd_and_counts_its_rounds():
    smoothed = search_smooth(calibration(), rank=8).smoothed
    plain = first_branch(smoothed, 8, generator())
    branch, errors = refine(smoothed, 8, rounds=0, generator=generator())
    assert torch.equal(branch.up, plain.up) and len(errors) == 1
    assert len(refine(smoothed, 8, rounds=2, generator=generator()).errors) == 3


def test_refinement_ends_where_it_gains_too_little():
    smoothed = search_smooth(calibration(), rank=8).smoothed
    assert len(refine(smoothed, 8, 100, generator(), tolerance=0.5).errors) == 2


def test_inverse_factor():
    inputs = normal(64, 32).double()
    upper = inverse_factor(inputs, damping=0.1)
    hessian = inputs.T @ inputs
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(32).double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ hessian, torch.eye(32).double(), atol=1e-9)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_gptq_is_its_plain_loop(block):
    """Column after column, the error spread over the columns left by the Hessian's inverse."""
    weight, inputs = normal(5, 192).double(), normal(400, 192, seed=1).double()
    inputs += normal(400, 1, seed=2).double()
    codes, scales = gptq(weight, inputs, torch.float32, block=block)
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(192).double()
    left = weight.clone()
    for k in range(192):
        if k % 64 == 0:
            scale = left[:, k: k + 64].abs().amax(1) / 7
        inverse = torch.linalg.inv(hessian[k:, k:])
        code = (left[:, k] / scale).round().clamp(-7, 7)
        error = (left[:, k] - code * scale) / inverse[0, 0]
        left[:, k:] -= error.unsqueeze(1) * inverse[0]
        assert torch.allclose(scales[:, k // 64], scale, rtol=1e-5)
        assert torch.equal(codes[:, k], code)


def test_gptq_without_inputs_rounds_to_nearest():
    weight = normal(8, 128)
    codes, scales = gptq(weight, torch.zeros(4, 128), torch.bfloat16)
    assert torch.equal(int4.scale_codes(codes, scales),
                       int4.fake_quantize_weight(weight, torch.bfloat16))


def test_gptq_lowers_the_error_of_other_correlated_inputs():
    layer = calibration(correlated_problem)
    smoothed = Smoothed(layer, torch.ones(128))
    branch = first_branch(smoothed, 8, generator())
    _, x, bias = correlated_problem(seed=50)
    others = Smoothed(calibrate(layer.weight, x, bias, False, torch.bfloat16), torch.ones(128))
    nearest = others.error(branch, int4.scale_codes(*residual_codes(smoothed, branch)))
    better = others.error(branch, int4.scale_codes(*residual_codes(smoothed, branch, [0.01])))
    assert better < 0.95 * nearest


def test_gptq_is_not_used_where_it_only_fits_noise():
    """Few and independent rows: worse on rows held back, so the residual is rounded to nearest."""
    smoothed = Smoothed(calibration(rows=24), torch.ones(128))
    branch = no_branch(smoothed)
    codes, scales = residual_codes(smoothed, branch, [1e-6])
    nearest = smoothed.rounded_residual(branch)
    fitted = int4.scale_codes(*gptq(smoothed.weight, smoothed.inputs, torch.bfloat16, 1e-6))
    assert smoothed.error(branch, fitted) < smoothed.error(branch, nearest)  # where it was fitted
    assert torch.equal(int4.scale_codes(codes, scales), nearest)
