"""The papers' time-uniform schedules and SA-Solver against diffusers' schedulers."""

import itertools

import pytest
import torch

from pixart_core import sampling

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def dpm_scheduler(diffusers):
    return diffusers.DPMSolverMultistepScheduler(**BETAS)


def sa_scheduler(diffusers, eta=1.0):
    """As PixArt-alpha's demo sets it; `eta` 0 makes it deterministic."""
    return diffusers.SASolverScheduler(
        **BETAS, algorithm_type="data_prediction", predictor_order=2, corrector_order=2,
        tau_func=lambda t: eta if 200 <= t <= 800 else 0)


@pytest.mark.parametrize("steps", [1, 2, 4, 14, 20, 25, 27, 50, 137, 500, 999])
@pytest.mark.parametrize("solver", sampling.SOLVERS)
def test_timesteps_and_sigmas_are_those_of_diffusers(diffusers, solver, steps):
    """The absolute bound is for diffusers' alpha-bar in float32, next to 1 at the last sigmas."""
    make = {"dpm-solver++": dpm_scheduler, "sa-solver": sa_scheduler}[solver]
    scheduler = make(diffusers)
    scheduler.set_timesteps(steps)
    timesteps = sampling.uniform_timesteps(steps)
    assert timesteps == scheduler.timesteps.tolist()
    sigmas = sampling.solver_sigmas(timesteps, solver)
    assert sigmas.shape == (steps + 1,)
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=1e-5, atol=2e-6)


def test_timesteps_fall_for_every_number_of_steps():
    """Two equal ones would divide by zero in every multistep solver."""
    for steps in range(1, 1000):
        timesteps = sampling.uniform_timesteps(steps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 1
        assert all(a > b for a, b in itertools.pairwise(timesteps))


def test_strength_keeps_the_end_of_a_longer_run():
    """ComfyUI's denoise: 10 steps at 0.5 are the last 10 of 20."""
    assert sampling.uniform_timesteps(10, 0.5) == sampling.uniform_timesteps(20)[-10:]
    assert sampling.uniform_timesteps(7, 1.0) == sampling.uniform_timesteps(7)


@pytest.mark.parametrize(("arguments", "words"), [
    ((0,), "steps is 0"), ((1000,), "1 to 999"), ((20, 0.0), "strength is 0.0"),
    ((20, 1.5), "at most 1"), ((500, 0.3), "at most 299 steps"),
])
def test_schedules_that_do_not_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        sampling.uniform_timesteps(*arguments)


def test_an_unknown_solver():
    with pytest.raises(ValueError, match="solver is 'euler'"):
        sampling.solver_sigmas([999], "euler")


def network(x, t):
    """A smooth prediction of the noise, for x (B, 4, H, W) variance preserving."""
    return torch.sin(x + t / 700) + 0.5 * x


def diffusers_sa(scheduler, x, steps, seed):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t)), t, x, generator=generator).prev_sample
    return x


def our_sa(x, steps, seed, eta):
    """The engine, on the noise that diffusers draws: one tensor a step, used or not."""
    timesteps = sampling.uniform_timesteps(steps)
    taus = sampling.sa_taus(timesteps, eta)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in timesteps]
    sigmas = sampling.solver_sigmas(timesteps, "sa-solver").tolist()

    def denoise(x, i):
        scale = (1 + sigmas[i] ** 2) ** 0.5
        return x - sigmas[i] * network(x / scale, timesteps[i])

    noise = iter([n for n, tau in zip(drawn, taus, strict=True) if tau > 0])
    end = sampling.sample_sa_solver(denoise, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas, taus, noise)
    return end / (1 + sigmas[-1] ** 2) ** 0.5


@pytest.mark.parametrize("eta", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
def test_sa_solver_is_diffusers(diffusers, steps, eta):
    """Protects orders, corrector, appendix D's weights, the window of tau and the noise."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = diffusers_sa(sa_scheduler(diffusers, eta), x, steps, seed=5)
    ours = our_sa(x, steps, 5, eta)
    error = ((ours - expected).norm() / expected.norm()).item()
    assert error < 1e-4, f"relative error {error:.2e}"


def test_sa_solver_that_ends_at_zero_returns_its_last_prediction():
    """Sigmas of other schedulers end at 0, where the logarithm has no value."""
    calls = []

    def denoise(x, i):
        calls.append(i)
        return torch.full_like(x, float(i))

    end = sampling.sample_sa_solver(denoise, torch.ones(1, 4, 2, 2), [9.0, 3.0, 1.0, 0.0],
                                    [0.0] * 3, iter(()))
    assert calls == [0, 1, 2] and torch.equal(end, torch.full((1, 4, 2, 2), 2.0))


def test_noise_is_drawn_inside_the_window_only():
    taus = sampling.sa_taus([999, 801, 800, 500, 200, 199], eta=0.7)
    assert taus == [0.0, 0.0, 0.7, 0.7, 0.7, 0.0]
    drawn = []

    def noise():
        while True:
            drawn.append(1)
            yield torch.zeros(1, 4, 2, 2)

    sampling.sample_sa_solver(lambda x, i: 0 * x, torch.ones(1, 4, 2, 2),
                              [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0], taus, noise())
    assert len(drawn) == 3


def test_sa_solver_says_what_does_not_fit():
    with pytest.raises(ValueError, match="eta is -1"):
        sampling.sa_taus([999], eta=-1.0)
    with pytest.raises(ValueError, match="2 steps need 3 sigmas, 2 were given"):
        sampling.sample_sa_solver(None, torch.zeros(1), [2.0, 1.0], [0.0, 0.0], iter(()))
    with pytest.raises(ValueError, match="fall from step to step"):
        sampling.sample_sa_solver(None, torch.zeros(1), [2.0, 2.0, 1.0], [0.0, 0.0], iter(()))
