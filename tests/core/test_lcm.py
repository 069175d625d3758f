"""LCM timesteps and steps against the official scheduler (golden) and diffusers' (live)."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pixart_core import sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "lcm_schedule.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["meta"])


@pytest.fixture
def scheduler():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize("grid", ["diffusers", "official"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_every_step_matches_the_golden_run(golden, steps, grid):
    """Protects timesteps, re-noising and boundary scalings at every step, in both grids.

    The golden tensors ran in float32, where x0 at t = 999 is a difference divided by 0.0064: the
    bound is 1e-5 of each tensor's own spread.
    """
    tensors, meta = golden
    timesteps = sampling.lcm_timesteps(steps, grid=grid)
    assert timesteps == meta["steps"][str(steps)][grid]
    x = tensors[f"{steps}.x_init"]
    for i, t in enumerate(timesteps):
        t_next = timesteps[i + 1] if i + 1 < steps else None
        eps, noise = tensors[f"{steps}.eps"][i], tensors[f"{steps}.noise"][i]
        x, denoised = sampling.lcm_step(eps, x, t, t_next, noise)
        wanted = tensors[f"{steps}.{grid}.denoised.{i}"]
        assert (denoised - wanted).abs().max() < 1e-5 * wanted.std()
        if t_next is None:
            assert torch.equal(x, denoised)
        else:
            wanted = tensors[f"{steps}.{grid}.x.{i + 1}"]
            assert (x - wanted).abs().max() < 1e-5 * wanted.std()


@pytest.mark.parametrize("strength", [1.0, 0.9, 0.8, 0.75, 0.58, 0.5, 0.3, 0.14, 0.02])
def test_timesteps_match_diffusers_at_every_strength(scheduler, strength):
    """Protects image-to-image and step counts above 8 against diffusers' own list."""
    for steps in range(1, 51):
        try:
            scheduler.set_timesteps(steps, strength=strength)
        except ValueError:
            with pytest.raises(ValueError, match="smallest strength"):
                sampling.lcm_timesteps(steps, strength=strength)
        else:
            assert sampling.lcm_timesteps(steps, strength=strength) == scheduler.timesteps.tolist()


def test_official_grid_with_strength_starts_where_diffusers_does():
    """Protects the official grid's image-to-image: same first anchor, steps of equal size."""
    assert sampling.lcm_timesteps(4, grid="official", strength=0.5) == [499, 379, 259, 139]
    for strength in (1.0, 0.7, 0.4):
        official = sampling.lcm_timesteps(6, grid="official", strength=strength)
        assert official[0] == sampling.lcm_timesteps(6, strength=strength)[0]
        assert len({a - b for a, b in itertools.pairwise(official)}) == 1


def test_the_smallest_strength_in_the_message_works():
    """Protects the advice in the error from rounding: what it names must be accepted."""
    for steps in range(1, 51):
        with pytest.raises(ValueError, match="smallest strength") as error:
            sampling.lcm_timesteps(steps, strength=steps / 50 - 0.01)
        smallest = float(str(error.value).rsplit(" ", 1)[1])
        assert len(sampling.lcm_timesteps(steps, strength=smallest)) == steps
    with pytest.raises(ValueError, match=r"smallest strength for 4 is 0\.08"):
        sampling.lcm_timesteps(4, strength=0.07)


@pytest.mark.parametrize(
    "arguments",
    [{"steps": 0}, {"steps": 51}, {"steps": 4, "strength": 0.0}, {"steps": 4, "strength": 1.1},
     {"steps": 4, "grid": "karras"}],
)
def test_impossible_runs_are_refused(arguments):
    """Protects against a silent fallback for values outside the published grids."""
    with pytest.raises(ValueError, match=r"steps|strength|grid"):
        sampling.lcm_timesteps(**arguments)


def test_steps_match_diffusers_live(scheduler):
    """Protects lcm_step against the installed diffusers, with a generator it controls."""
    timesteps = sampling.lcm_timesteps(4)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    theirs = ours = x
    noise = torch.Generator().manual_seed(3)
    their_noise = torch.Generator().manual_seed(3)
    for i, t in enumerate(timesteps):
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + i))
        step = scheduler.step(eps, torch.tensor(t), theirs, generator=their_noise)
        last = i == 3
        fresh = None if last else torch.randn(x.shape, generator=noise)
        t_next = None if last else timesteps[i + 1]
        ours, denoised = sampling.lcm_step(eps, ours, t, t_next, fresh)
        theirs = step.prev_sample
        assert (denoised - step.denoised).abs().max() < 1e-5 * denoised.std()
        assert (ours - theirs).abs().max() < 1e-5 * ours.std()


def test_tensor_timesteps_equal_int_timesteps():
    """Protects the batched form, where every sample has a timestep of its own."""
    x, eps, noise = torch.randn(3, 2, 4, 6, 5).unbind(0)
    t, t_next = torch.tensor([999, 259]), torch.tensor([759, 19])
    x_next, denoised = sampling.lcm_step(eps, x, t, t_next, noise)
    for i in range(2):
        one = slice(i, i + 1)
        wanted = sampling.lcm_step(eps[one], x[one], int(t[i]), int(t_next[i]), noise[one])
        assert torch.allclose(x_next[one], wanted[0], rtol=1e-5, atol=1e-5)
        assert torch.allclose(denoised[one], wanted[1], rtol=1e-5, atol=1e-4)
    assert x_next.dtype == denoised.dtype == torch.float32


def test_the_function_is_the_identity_at_zero():
    """Protects the boundary condition that makes it a consistency function."""
    x, eps = torch.randn(2, 1, 4, 3, 3).unbind(0)
    _, denoised = sampling.lcm_step(eps, x, 0, None)
    assert torch.equal(denoised, x)


def test_half_precision_keeps_its_dtype_and_stays_finite():
    """Protects fp16 runs: the division by 0.0064 happens in float32, the result is fp16 again."""
    x, eps, noise = torch.randn(3, 1, 4, 4, 4).half().unbind(0)
    x_next, denoised = sampling.lcm_step(eps, x, 999, 499, noise)
    assert x_next.dtype == denoised.dtype == torch.float16
    assert x_next.isfinite().all() and denoised.isfinite().all()


def test_a_step_that_goes_on_needs_noise():
    """Protects against a run that silently continues without re-noising."""
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="needs noise"):
        sampling.lcm_step(x, x, 999, 499)


def test_step_noise_is_repeatable_and_not_the_starting_noise():
    """Protects reproducible pictures, and the re-noising from undoing the start."""
    shape = (1, 4, 8, 8)
    first, second = sampling.step_noise(shape, 7), sampling.step_noise(shape, 7)
    drawn = next(first)
    assert torch.equal(drawn, next(second))
    assert not torch.equal(drawn, next(first))
    start = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(drawn, start)
    assert next(sampling.step_noise(shape, 2**64 - 1)).shape == shape


def test_sample_lcm_ends_at_the_last_prediction():
    """Protects the loop: n predictions, n callbacks, n - 1 draws of noise, no noise at the end."""
    clean = torch.full((1, 4, 2, 2), 0.5)
    seen, drawn = [], []

    def predict(x, t):
        signal, sigma = sampling.noise_levels(t)
        return (x - signal * clean) / sigma

    def noise():
        while True:
            drawn.append(1)
            yield torch.randn(clean.shape)

    out = sampling.sample_lcm(
        predict, torch.randn(clean.shape), sampling.lcm_timesteps(4), noise(),
        lambda i, denoised: seen.append(i),
    )
    assert seen == [0, 1, 2, 3] and len(drawn) == 3
    assert torch.allclose(out, clean, atol=1e-4)
