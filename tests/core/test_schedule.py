"""The noise schedule's constants and the timesteps of a DPM-Solver run."""

import math

import pytest
import torch

from pixart_core import sampling


@pytest.mark.parametrize(
    ("t", "alpha_bar", "sigma"), [(400, 0.193572, 2.041087), (999, 4.0358e-5, 157.407)]
)
def test_published_constants(t, alpha_bar, sigma):
    """Protects the beta range and its linear shape: another schedule gives other constants."""
    assert sampling.alphas_cumprod()[t].item() == pytest.approx(alpha_bar, rel=1e-5)
    assert sampling.sigmas()[t].item() == pytest.approx(sigma, rel=1e-5)
    signal, noise = sampling.noise_levels(t)
    assert signal.item() ** 2 + noise.item() ** 2 == pytest.approx(1.0, abs=1e-12)
    assert noise.item() / signal.item() == pytest.approx(sigma, rel=1e-5)


def test_first_sigma_and_one_step_start():
    """Protects both ends: sigma at t = 0, and sqrt(1 + sigma^2) at 400 (start of a DMD student)."""
    assert sampling.sigmas()[0].item() == pytest.approx(0.0100005, rel=1e-5)
    assert math.sqrt(1 + sampling.sigmas()[400].item() ** 2) == pytest.approx(2.272892, rel=1e-6)


def test_noise_levels_of_a_tensor_equal_those_of_ints():
    """Protects the batched path used in training and by nodes."""
    t = torch.tensor([0, 400, 999])
    signal, noise = sampling.noise_levels(t)
    for i, step in enumerate(t.tolist()):
        assert (signal[i], noise[i]) == sampling.noise_levels(step)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timesteps_past_the_ends_are_refused(t):
    """Protects against Python's negative index silently meaning the noisiest step."""
    with pytest.raises(ValueError, match="0 to 999"):
        sampling.noise_levels(t)


def test_tables_are_copies():
    """Protects the cached table from a caller that writes into what it got."""
    sampling.alphas_cumprod().zero_()
    assert sampling.alphas_cumprod()[999] > 0


def test_add_noise_mixes_per_sample_and_keeps_dtype():
    """Protects image-to-image: each sample has its own level, float64 does not leak out."""
    x0, noise = torch.ones(2, 4, 3, 5), torch.full((2, 4, 3, 5), 2.0)
    mixed = sampling.add_noise(x0, noise, torch.tensor([400, 999]))
    assert mixed.dtype == torch.float32
    for i, t in enumerate((400, 999)):
        assert torch.allclose(mixed[i], sampling.add_noise(x0[i], noise[i], t), atol=1e-6)
        signal, sigma = sampling.noise_levels(t)
        assert mixed[i, 0, 0, 0].item() == pytest.approx((signal + 2 * sigma).item(), rel=1e-6)
    half = sampling.add_noise(x0.bfloat16(), noise.bfloat16(), 400)
    assert half.dtype == torch.bfloat16


def test_dpm_timesteps_are_the_hosts_simple_scheduler():
    """Protects agreement with ComfyUI: the same rule written from its sigma table's end."""
    for n in (1, 2, 3, 7, 14, 20, 33, 1000):
        spacing = 1000 / n
        wanted = [1000 - (1 + int(x * spacing)) for x in range(n)]
        assert sampling.dpm_timesteps(n) == wanted
    assert sampling.dpm_timesteps(4) == [999, 749, 499, 249]


def test_dpm_strength_takes_the_end_of_a_longer_run():
    """Protects image-to-image with the full number of steps, as ComfyUI's denoise does it."""
    assert sampling.dpm_timesteps(4, strength=0.5) == sampling.dpm_timesteps(8)[-4:]
    assert sampling.dpm_timesteps(10, strength=0.3) == sampling.dpm_timesteps(33)[-10:]
    assert sampling.dpm_timesteps(5, strength=1.0) == sampling.dpm_timesteps(5)


@pytest.mark.parametrize(
    "arguments", [(0,), (-3,), (1001,), (20, 0.0), (20, 1.5), (20, -0.1), (20, 0.01)]
)
def test_dpm_timesteps_refuse_impossible_runs(arguments):
    """Protects against empty or repeating timestep lists."""
    with pytest.raises(ValueError, match=r"steps|strength"):
        sampling.dpm_timesteps(*arguments)
