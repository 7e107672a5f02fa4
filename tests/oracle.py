"""Exact answers to check against, each from a source other than the code under test.

Gaussian data have a closed-form probability-flow ODE; in one dimension that of any mixture follows from conservation of
probability; diffusers' schedulers are the reference for steps and grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow, Schedule
from stepdistill.solvers import Denoise, integrate

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
STEPS = (1, 2, 4, 8, 50)


def schedules() -> dict[str, Schedule]:
    """Every schedule, the discrete one with and without zero terminal SNR."""
    return {
        "alpha_bar": AlphaBar.from_scheduler(DDIMScheduler(**BETAS)),
        "zero_snr": AlphaBar.from_scheduler(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True)),
        "cosine": Cosine(),
        "flow": RectifiedFlow(),
        "edm": EDM(),
    }


def inner_times(schedule: Schedule, n: int = 9) -> Tensor:
    """n times spread over a schedule, without its singular ends."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * torch.linspace(0.01, 0.99, n, dtype=torch.float64)


def gaussian_denoise(schedule: Schedule, mean: float, std: float) -> Denoise:
    """E[x0 | x_t] for data Normal(mean, std²): mean + alpha std² (x_t - alpha mean) / (alpha² std² + sigma²)."""

    def x0(x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = (c.item() for c in schedule.coeffs(t))
        return mean + alpha * std**2 * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return Denoise(x0, schedule)


def gaussian_flow(schedule: Schedule, mean: float, std: float, x_t: Tensor, t: float, s: float) -> Tensor:
    """The exact ODE map: x_s = alpha_s mean + (x_t - alpha_t mean) sqrt(V_s / V_t), V = alpha² std² + sigma²."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([c.item() for c in schedule.coeffs(time)] for time in (t, s))
    ratio = math.hypot(alpha_s * std, sigma_s) / math.hypot(alpha_t * std, sigma_t)
    return alpha_s * mean + (x_t - alpha_t * mean) * ratio


def measured_order(step, schedule: Schedule, t: float, s: float, counts: Sequence[int] = (128, 256)) -> float:
    """Measured order of accuracy on the Gaussian flow: log2 of the error's ratio as steps uniform in t are halved."""
    mean, std = 0.7, 0.5
    x = torch.linspace(-2, 2, 7, dtype=torch.float64) * math.hypot(*(c.item() for c in schedule.coeffs(t)))
    exact = gaussian_flow(schedule, mean, std, x, t, s)
    denoise = gaussian_denoise(schedule, mean, std)
    errors = [
        (integrate(step, denoise, x, torch.linspace(t, s, n + 1, dtype=torch.float64)) - exact).abs().max().item()
        for n in counts
    ]
    return math.log2(errors[-2] / errors[-1])


def mixture_cdf(x: Tensor, means: Tensor, stds: Tensor, weights: Tensor, alpha: float, sigma: float) -> Tensor:
    """P(x_t <= x) for one-dimensional mixture data."""
    scale = ((alpha * stds) ** 2 + sigma**2).sqrt()
    return (weights * torch.special.ndtr((x[:, None] - alpha * means) / scale)).sum(-1)


def mixture_flow_1d(
    schedule: Schedule, means: Tensor, stds: Tensor, weights: Tensor, x_t: Tensor, t: float, s: float
) -> Tensor:
    """The ODE map in one dimension: paths do not cross, so P(x_s <= .) = P(x_t <= .); found by bisection."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([c.item() for c in schedule.coeffs(time)] for time in (t, s))
    target = mixture_cdf(x_t, means, stds, weights, alpha_t, sigma_t)
    low, high = torch.full_like(x_t, -1e3), torch.full_like(x_t, 1e3)
    for _ in range(80):
        middle = (low + high) / 2
        below = mixture_cdf(middle, means, stds, weights, alpha_s, sigma_s) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def mixture_x0_1d(x_t: float, alpha: float, sigma: float, means: Tensor, stds: Tensor, weights: Tensor) -> float:
    """E[x0 | x_t] of a one-dimensional mixture by summing Bayes' rule over a fine grid of x0."""
    x0 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    prior = (weights * torch.exp(-0.5 * ((x0[:, None] - means) / stds) ** 2) / stds).sum(-1)
    posterior = prior * torch.exp(-0.5 * ((x_t - alpha * x0) / sigma) ** 2)
    return ((x0 * posterior).sum() / posterior.sum()).item()


def diffusers_sample(scheduler, model: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    """Runs a diffusers scheduler's loop, after set_timesteps. model(x, timestep) -> output of its prediction type."""
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep), timestep, x).prev_sample
    return x
