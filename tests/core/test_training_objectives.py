"""What training minimises: against the official tensors, against textbook formulas."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from pixart_core.sampling.lcm import boundary_scalings
from pixart_core.sampling.schedule import add_noise, alphas_cumprod, betas
from pixart_core.training.batch import NullCaption
from pixart_core.training.consistency import (
    ddim_hop,
    guided_noise,
    hop_timesteps,
    pseudo_huber,
)
from pixart_core.training.diffusion import focused_timesteps, noise_loss, variance_loss
from pixart_core.training.draws import Draws, mix_seed
from pixart_core.training.ema import averaged_copy, update_average, warmed_decay
from pixart_core.training.recipes import recipe_settings
from pixart_core.training.recipes.base import Base

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "lcd_targets.safetensors")


def _difference(value, wanted):
    return ((value - wanted).norm() / wanted.norm()).item()


def test_hops_start_and_end_where_the_official_ones_do():
    start, target = hop_timesteps(GOLDEN["index"])
    assert torch.equal(start, GOLDEN["start_timestep"])
    assert torch.equal(target, GOLDEN["target_timestep"])


def test_a_hop_of_the_guided_teacher_is_the_official_one():
    """Guidance, DDIM and schedule of the distillation target in one: relative error < 1e-5."""
    start, target = hop_timesteps(GOLDEN["index"])
    eps = guided_noise(GOLDEN["eps_cond"], GOLDEN["eps_uncond"], 4.5)
    x = ddim_hop(GOLDEN["x_t"], eps, start, target)
    for mine, wanted in zip(x, GOLDEN["x_prev"], strict=True):
        assert _difference(mine, wanted) < 1e-5


@pytest.mark.parametrize("end", ["start", "target"])
def test_boundary_scalings_are_the_official_ones(end):
    c_skip, c_out = boundary_scalings(GOLDEN[f"{end}_timestep"])
    assert torch.allclose(c_skip.float(), GOLDEN[f"c_skip_{end}"], atol=1e-7)
    assert torch.allclose(c_out.float(), GOLDEN[f"c_out_{end}"], atol=1e-7)


def test_pseudo_huber_is_the_official_one():
    loss = pseudo_huber(GOLDEN["huber_a"], GOLDEN["huber_b"])
    assert abs(loss - GOLDEN["huber_loss"]) < 1e-5 * GOLDEN["huber_loss"]


def test_anchors_must_divide_the_schedule():
    with pytest.raises(ValueError, match="anchors is 30"):
        hop_timesteps(torch.zeros(1), anchors=30)


def test_noise_loss_weighs_timesteps():
    """Protects the weightings: plain, 1 + 1 / SNR up to the clip, and 1 / SNR, the picture's."""
    eps, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0, 500, 999])
    plain = noise_loss(eps, noise, t)
    assert torch.allclose(plain, ((eps - noise) ** 2).mean((1, 2, 3)))
    factor = noise_loss(eps, noise, t, weight_clip=30.0) / plain
    wanted = [1 / alphas_cumprod()[0], 1 / alphas_cumprod()[500], torch.tensor(30.0)]
    assert torch.allclose(factor, torch.stack([w.double() for w in wanted]))
    signal = alphas_cumprod()[t].double()[:, None, None, None]
    pictures = (add_noise(torch.zeros_like(noise), noise, t) - (1 - signal).sqrt() * eps
                ) / signal.sqrt()  # what eps makes of noise over nothing
    of_pictures = noise_loss(eps, noise, t, weight_clip=1e9, weight_floor=0.0)
    assert torch.allclose(of_pictures, (pictures**2).mean((1, 2, 3)), rtol=1e-4)


def test_focused_timesteps_are_logit_normal():
    """Protects where training looks: quantiles of t / 1000 are those of sigmoid(mean + deviation
    z) with the standard normal's z, ends stay timesteps."""
    z = torch.tensor([-1.6449, -0.6745, 0.0, 0.6745, 1.6449], dtype=torch.float64)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    wanted = 1000 / (1 + torch.exp(-(0.2 + 0.8 * z)))
    found = focused_timesteps(quantiles, 0.2, 0.8)
    assert found.dtype == torch.int64
    assert ((found + 0.5) - wanted).abs().max() < 1
    ends = focused_timesteps(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 0.2, 3.0)
    assert ends.tolist() == [0, 999]


def test_a_run_draws_the_timesteps_it_is_told_to(tmp_path):
    """Protects the setting: with it and without, from the same draws."""
    class Bare(Base):
        def __init__(self, focus):
            self.settings = recipe_settings("base", {
                "out": tmp_path, "data": tmp_path, "model": {}, "timestep_focus": focus})

    draws = [Draws(0, range(2000)) for _ in range(2)]
    focused, plain = (Bare(focus)._timesteps(own).double()
                      for focus, own in zip(([0.1, 0.5], None), draws, strict=True))
    assert 0.6 < ((focused > 350) & (focused < 700)).double().mean() < 0.9
    assert 0.3 < ((plain > 350) & (plain < 700)).double().mean() < 0.4
    with pytest.raises(ValueError, match=r"timestep_focus is \[0.1, 0.0\]; its second number"):
        Bare([0.1, 0.0])


@pytest.mark.parametrize("weights", [{"weight_floor": 0.0},
                                     {"weight_floor": -1.0, "weight_clip": 30.0}])
def test_a_floor_that_does_nothing_or_harm_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="weight_floor is"):
        recipe_settings("base", {"data": tmp_path, "out": tmp_path, "model": {}, "steps": 1,
                                 **weights})


def _posterior(x0, x_t, t):
    """q(x_{t-1} | x_t, x_0) of DDPM, equations 6 and 7."""
    beta, alpha_bar = betas()[t], alphas_cumprod()[t]
    before = alphas_cumprod()[t - 1]
    mean = (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - alpha_bar)
    return Normal(mean, (beta * (1 - before) / (1 - alpha_bar)).sqrt()), beta


@pytest.mark.parametrize("t", [1, 30, 999])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_variance_loss_is_the_divergence_of_textbook_normals(t, share):
    """Protects equation 15 of IDDPM and the posterior, against torch.distributions."""
    g = torch.Generator().manual_seed(1)
    x0, noise, eps = torch.randn(3, 1, 4, 3, 2, generator=g, dtype=torch.float64)
    x_t = add_noise(x0, noise, t)
    out = torch.cat([eps, torch.full_like(eps, 2 * share - 1)], dim=1)
    true, beta = _posterior(x0, x_t, t)
    alpha_bar = alphas_cumprod()[t]
    predicted = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    scale = beta.sqrt() ** share * true.scale ** (1 - share)
    wanted = kl_divergence(true, Normal(_posterior(predicted, x_t, t)[0].mean, scale))
    loss = variance_loss(out, x0, x_t, torch.tensor([t]))
    assert torch.allclose(loss, wanted.mean((1, 2, 3)) / math.log(2), rtol=1e-9)


def test_the_last_decoder_step_is_a_likelihood_of_pixels():
    """Protects timestep 0: bits of the bin around x0, against the exact normal distribution."""
    g = torch.Generator().manual_seed(2)
    x0 = torch.rand(1, 4, 3, 2, generator=g, dtype=torch.float64) - 0.5
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    x_t = add_noise(x0, noise, 0)
    out = torch.cat([noise, torch.ones_like(noise)], dim=1)  # the right noise, variance beta
    wanted = Normal(x0, betas()[0].sqrt())
    bits = -(wanted.cdf(x0 + 1 / 255) - wanted.cdf(x0 - 1 / 255)).log2()
    loss = variance_loss(out, x0, x_t, torch.tensor([0]))
    assert torch.allclose(loss, bits.mean((1, 2, 3)), atol=2e-3)


def test_the_variance_loss_leaves_the_noise_prediction_alone():
    """Protects the stop-gradient of IDDPM: the bound must not disturb epsilon."""
    x = torch.randn(2, 4, 2, 2)
    out = torch.randn(2, 8, 2, 2, requires_grad=True)
    variance_loss(out, x, x, torch.tensor([5, 700])).sum().backward()
    assert out.grad[:, :4].abs().max() == 0
    assert out.grad[:, 4:].abs().min() > 0


def test_draws_follow_the_sample_alone():
    """Protects exact resuming and equal losses on any number of processes."""
    whole = Draws(7, range(6))
    parts = Draws(7, range(3)), Draws(7, range(3, 6))
    for name, argument in (("integers", 1000), ("noise", torch.zeros(3, 4, 2, 2)), ("uniform",
                                                                                    None)):
        arguments = [] if argument is None else [argument]
        both = [getattr(part, name)(*arguments) for part in parts]
        if name == "noise":
            mine = whole.noise(torch.zeros(6, 4, 2, 2))
        else:
            mine = getattr(whole, name)(*arguments)
        assert torch.equal(mine, torch.cat(both))
    again = Draws(8, range(6)).integers(1000)
    assert not torch.equal(again, Draws(7, range(6)).integers(1000))


def test_seeds_of_neighbours_are_unrelated():
    seeds = {mix_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_average_moves_by_its_decay():
    model = torch.nn.Linear(2, 2)
    average = averaged_copy(model)
    before = average.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    update_average(average, model, 0.9)
    assert torch.allclose(average.weight, before + 0.1)
    assert not average.weight.requires_grad
    assert warmed_decay(0.999, 0) == 0.1 and warmed_decay(0.999, 10**6) == 0.999


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, False, False])])
def test_the_null_caption_takes_the_place_of_captions(mask):
    """Protects both kinds: a learned one under the prompt's mask, T5("") under its own."""
    caption, states = torch.randn(2, 3, 5), torch.randn(4, 5)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    rows = torch.tensor([True, False])
    out, out_mask = NullCaption(states, mask).replace(caption, valid, rows)
    length = 3 if mask is None else 4
    assert torch.equal(out[0], states[:length]) and torch.equal(out[1, :3], caption[1])
    assert out_mask[0].tolist() == (valid[0].tolist() if mask is None else mask.tolist())
    assert out_mask[1].tolist() == valid[1].tolist() + [False] * (length - 3)
