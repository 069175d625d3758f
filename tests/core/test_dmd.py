"""DMD's one step against diffusers' DDPM scheduler, as the published recipe drives it."""

import math

import pytest
import torch

from pixart_core import sampling


def published_recipe(predict, noise):
    """PixArtAlphaPipeline with DDPMScheduler, timesteps [400], no guidance: x0 of the step."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                                        clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predict(model_input, int(t)), t, latents,
                                 return_dict=False)[1]
    return latents


def network(x, t):
    """A prediction that depends on the scale of x and on t."""
    return torch.tanh(1.3 * x + t / 1000) - 0.2 * x.roll(1, -1)


def test_the_run_is_the_published_one():
    """Protects the timestep, the start at unit variance and the formula."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = published_recipe(network, noise)
    assert (sampling.sample_dmd(network, noise) - expected).abs().max() < 1e-5 * expected.std()


def test_the_network_sees_unit_variance_noise_once():
    """A start at sigma 2.041 would show it 0.898 of the noise: a darker, flatter picture."""
    seen = []
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    sampling.sample_dmd(lambda x, t: seen.append((x, t)) or torch.zeros_like(x), noise)
    assert len(seen) == 1 and seen[0][1] == 400
    assert torch.equal(seen[0][0], noise)


def test_the_formula_in_numbers():
    x, eps = torch.full((1, 4, 1, 1), 2.0), torch.full((1, 4, 1, 1), 0.5)
    expected = (2.0 - 0.898013 * 0.5) / math.sqrt(0.193572)
    assert sampling.dmd_step(eps, x) == pytest.approx(torch.full_like(x, expected), rel=1e-5)


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    generator = torch.Generator().manual_seed(2)
    x, eps = torch.randn(2, 1, 4, 8, 8, generator=generator).half()
    step = sampling.dmd_step(eps, x, torch.tensor([400]))
    assert step.dtype == torch.float16
    assert torch.equal(step, sampling.dmd_step(eps.float(), x.float(), 400).half())


def test_the_callback_gets_the_picture():
    calls = []
    latents = sampling.sample_dmd(network, torch.ones(1, 4, 2, 2), lambda *a: calls.append(a))
    assert [i for i, _ in calls] == [0] and calls[0][1] is latents
