"""Solvers of the probability-flow ODE: pure steps from t to s < t.

    ddim      x_s = alpha_s x0 + sigma_s eps           Song et al. 2021; also flow-Euler and EDM-Euler
    heun      averages the slope at both ends          Karras et al. 2022, algorithm 1
    dpmpp_2m  extrapolates x0 from the last step       Lu et al. 2022b, algorithm 2

A step is called as `ddim(denoise, x_t, t, s) -> x_s`. Solvers hold no state: the multistep's history is an input and an
output of `dpmpp_2m.advance(denoise, x_t, t, s, history) -> (x_s, history)`, and `integrate` passes it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.schedules import Schedule, Time, match, visible, working_dtype


@dataclass(frozen=True)
class Denoise:
    """A denoiser bound to its conditions: `denoise(x_t, t) -> x0`, with the schedule that defines t."""

    fn: Callable[[Tensor, Time], Tensor]
    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Time) -> Tensor:
        return self.fn(x_t, t)


class History(NamedTuple):
    """Time and denoised sample of the last step."""

    t: Time
    x0: Tensor


Step = Callable[[Denoise, Tensor, Time, Time], Tensor]
Advance = Callable[[Denoise, Tensor, Time, Time, History | None], tuple[Tensor, History | None]]


@dataclass(frozen=True)
class Solver:
    """A step with its order of accuracy and its number of network evaluations.

    `solver(denoise, x_t, t, s)` returns x_s without a history; `solver.advance` takes and returns the history.
    """

    name: str
    order: int
    evaluations: int
    advance: Advance

    def __call__(self, denoise: Denoise, x_t: Tensor, t: Time, s: Time) -> Tensor:
        return self.advance(denoise, x_t, t, s, None)[0]


def _fail(needs: str, where: Tensor, t: Time, schedule: Schedule, fix: str) -> None:
    """Raises InputError if the condition `where` does not hold and this can be read without a device sync."""
    if visible(where) and not where.all():
        got = torch.as_tensor(t, dtype=torch.float64).expand(where.shape)[~where].flatten()[0].item()
        raise InputError(f"{needs}, got t={got:g} on {schedule}; {fix}")


def ddim_step(schedule: Schedule, x_t: Tensor, x0: Tensor, t: Time, s: Time) -> Tensor:
    """One DDIM step from a given x0: x_s = alpha_s x0 + sigma_s eps, with eps = (x_t - alpha_t x0) / sigma_t.

    Exact if x0 is constant between t and s. With k = sigma_s / sigma_t, x_s = k x_t + (alpha_s - k alpha_t) x0.

    Args:
        x_t, x0: (B, ...). t, s: floats, () or (B,).

    Returns:
        (B, ...) in the dtype of x_t, at least float32; coefficients float64.

    Raises:
        InputError: sigma(t) = 0, checked for Python floats and CPU tensors.
    """
    alpha_t, sigma_t = schedule.coeffs(t)
    alpha_s, sigma_s = schedule.coeffs(s)
    _fail("ddim needs sigma(t) > 0", sigma_t > 0, t, schedule, "start above the clean end")
    k = sigma_s / sigma_t
    dtype = working_dtype(x_t)
    return match(k, x_t) * x_t.to(dtype) + match(alpha_s - k * alpha_t, x_t) * x0.to(dtype)


def _ddim(denoise: Denoise, x_t: Tensor, t: Time, s: Time, history: History | None) -> tuple[Tensor, None]:
    return ddim_step(denoise.schedule, x_t, denoise(x_t, t), t, s), None


def _heun(denoise: Denoise, x_t: Tensor, t: Time, s: Time, history: History | None) -> tuple[Tensor, None]:
    """With y = p x0 + q eps of the schedule's `straight` row and delta = alpha q - sigma p,

        x_s = [delta_s x_t + (sigma_s alpha_t - alpha_s sigma_t) y] / delta_t,

    which is DDIM for y at t and Heun for the mean of y at t and at DDIM's x_s.
    """
    schedule = denoise.schedule
    p, q = schedule.straight
    alpha_t, sigma_t = schedule.coeffs(t)
    alpha_s, sigma_s = schedule.coeffs(s)
    delta_t, delta_s = alpha_t * q - sigma_t * p, alpha_s * q - sigma_s * p
    _fail("heun needs alpha(t) > 0", delta_t > 0, t, schedule, f"start below {schedule.t_max:g} or use ddim")
    x0_t = denoise(x_t, t)
    x_ddim = ddim_step(schedule, x_t, x0_t, t, s)
    if visible(sigma_s) and not sigma_s.any():  # at the clean end y is unknown: DDIM's step is used
        return x_ddim, None
    x0_s = denoise(x_ddim, s)
    dtype = working_dtype(x_t)

    def y(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # p x0 + q (x - alpha x0) / sigma
        return match(q / sigma, x) * x.to(dtype) + match(p - q * alpha / sigma, x) * x0.to(dtype)

    mean = (y(x_t, x0_t, alpha_t, sigma_t) + y(x_ddim, x0_s, alpha_s, sigma_s)) / 2
    slope = (sigma_s * alpha_t - alpha_s * sigma_t) / delta_t
    x_heun = match(delta_s / delta_t, x_t) * x_t.to(dtype) + match(slope, x_t) * mean
    return torch.where(match(sigma_s, x_t) > 0, x_heun, x_ddim), None


def _dpmpp_2m(denoise: Denoise, x_t: Tensor, t: Time, s: Time, history: History | None) -> tuple[Tensor, History]:
    """x_s = ddim_step(D), D = x0 + (h / 2 h_last) (x0 - x0_last), h the step in lambda = log(alpha/sigma).

    The first step is DDIM, and so is a step to an infinite lambda or after a step from one.
    """
    schedule = denoise.schedule
    x0 = denoise(x_t, t)
    extrapolated = x0
    if history is not None:
        last, here, there = (schedule.log_snr_half(time) for time in (history.t, t, s))
        weight = (there - here) / (2 * (here - last))
        weight = torch.where(there.isfinite() & last.isfinite(), weight, torch.zeros_like(weight))
        extrapolated = x0 + match(weight, x0) * (x0 - history.x0)
    return ddim_step(schedule, x_t, extrapolated, t, s), History(t, x0)


ddim = Solver("ddim", order=1, evaluations=1, advance=_ddim)
heun = Solver("heun", order=2, evaluations=2, advance=_heun)
dpmpp_2m = Solver("dpmpp_2m", order=2, evaluations=1, advance=_dpmpp_2m)

SOLVERS = {solver.name: solver for solver in (ddim, heun, dpmpp_2m)}


def get(name: str) -> Solver:
    """Returns the solver of this name; raises InputError if there is none."""
    if name not in SOLVERS:
        raise InputError(f"solver: got {name!r}; allowed: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def integrate(
    step: Solver | Step,
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    callback: Callable[[int, Tensor, float], None] | None = None,
) -> Tensor:
    """Integrates x along a grid of times.

    Args:
        step: a Solver, or any function (denoise, x_t, t, s) -> x_s.
        x: (B, ...) at times[0].
        times: (n + 1,), decreasing, as `timegrid.inference_times` returns.
        callback: called after each step as callback(index, x_s, s).

    Returns:
        (B, ...) at times[-1].
    """
    advance = step.advance if isinstance(step, Solver) else lambda d, x, t, s, _: (step(d, x, t, s), None)
    history = None
    for index, (t, s) in enumerate(pairwise(times.tolist())):
        x, history = advance(denoise, x, t, s, history)
        if callback is not None:
            callback(index, x, s)
    return x
