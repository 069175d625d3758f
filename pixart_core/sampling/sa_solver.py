"""SA-Solver (arXiv 2309.05019): a stochastic Adams predictor and corrector, one call a step.

The recipe of PixArt-alpha: data prediction, order 2 for both in the few-step form of appendix D,
first order at the two ends. Inside, x is variance exploding, x0 + sigma noise, so that the
weights of the predictions depend on h = log(sigma / sigma_next) and tau alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from torch import Tensor

from .schedule import noise_levels
from .uniform import solver_sigmas

TAU_WINDOW = (200, 800)  # timesteps between which the run is stochastic


def sa_taus(timesteps: list[int], eta: float = 1.0) -> list[float]:
    """tau of the step that starts at each timestep: `eta` from 800 to 200, else 0.

    eta 1 is the diffusion SDE, 0 the ODE (deterministic). Raises ValueError when it is negative.
    """
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"eta is {eta}; use 0 (deterministic) or more, 1 is usual")
    low, high = TAU_WINDOW
    return [eta if low <= t <= high else 0.0 for t in timesteps]


def sample_sa_solver(
    denoise: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: list[float],
    taus: list[float],
    noise: Iterator[Tensor],
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """A whole run: `denoise(x, i)` predicts the clean latents at sigmas[i]; returns x at the last.

    x (B, 4, H, W) is at sigmas[0]; sigmas fall, len(taus) + 1 of them, the last may be 0. `noise`
    is read once for every step with tau above 0. `callback(i, x, denoised)` follows step i's
    prediction. Raises ValueError when the lengths do not fit or the sigmas do not fall.
    """
    steps = len(taus)
    if len(sigmas) != steps + 1:
        raise ValueError(f"{steps} steps need {steps + 1} sigmas, {len(sigmas)} were given")
    if any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise ValueError(f"SA-Solver needs sigmas that fall from step to step; these are {sigmas}")
    predicted, start, fresh, last = x, x, None, None
    for i in range(steps):
        denoised = denoise(predicted, i)
        if callback is not None:
            callback(i, predicted, denoised)
        if i == 0:
            corrected = predicted
        else:
            h, tau = _log_ratio(sigmas[i - 1], sigmas[i]), taus[i - 1]
            newest = 0.5 * (1 + tau**2) * h
            terms = [(newest, denoised), (_total_weight(h, tau) - newest, last)]
            corrected = _advance(start, sigmas[i - 1], sigmas[i], tau, terms, fresh)
        if sigmas[i + 1] == 0:
            return denoised
        h, tau = _log_ratio(sigmas[i], sigmas[i + 1]), taus[i]
        fresh = next(noise).to(x) if tau > 0 else None
        older = 0.0
        if 0 < i < steps - 1:
            older = -0.5 * (1 + tau**2) * h**2 / _log_ratio(sigmas[i - 1], sigmas[i])
        terms = [(_total_weight(h, tau) - older, denoised)]
        if older:
            terms.append((older, last))
        predicted = _advance(corrected, sigmas[i], sigmas[i + 1], tau, terms, fresh)
        start, last = corrected, denoised
    return predicted


def sample_sa(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    timesteps: list[int],
    noise: Iterator[Tensor],
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The recipe's run: `predict(x, t)` gives eps; returns latents (B, 4, H, W) at timestep 0.

    x (B, 4, H, W) is variance preserving and at the noise level of timesteps[0], for `predict`
    too. `callback(i, denoised)` follows step i.
    """
    sigmas = solver_sigmas(timesteps, "sa-solver").tolist()
    signals = [float(noise_levels(t)[0]) for t in [*timesteps, 0]]

    def denoise(x: Tensor, i: int) -> Tensor:
        return x - sigmas[i] * predict(x * signals[i], timesteps[i])

    def report(i: int, _: Tensor, denoised: Tensor) -> None:
        if callback is not None:
            callback(i, denoised)

    end = sample_sa_solver(denoise, x / signals[0], sigmas, sa_taus(timesteps), noise, report)
    return end * signals[-1]


def _log_ratio(sigma: float, sigma_next: float) -> float:
    """h, the step in half log-SNR."""
    return math.log(sigma / sigma_next)


def _total_weight(h: float, tau: float) -> float:
    return -math.expm1(-(1 + tau**2) * h)


def _advance(x: Tensor, sigma: float, sigma_next: float, tau: float,
             terms: list[tuple[float, Tensor]], noise: Tensor | None) -> Tensor:
    """Predictor and corrector alike: what is left of x, weighted predictions, new noise."""
    h = _log_ratio(sigma, sigma_next)
    x = sigma_next / sigma * math.exp(-(tau**2) * h) * x
    for weight, prediction in terms:
        x = x + weight * prediction
    if noise is not None:
        x = x + sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise
    return x
