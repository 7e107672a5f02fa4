"""Prediction types, and one formula that converts any type to any other.

Each type (`Kind`) is a row (p, q) with y = p x0 + q eps:

    x0   (1, 0)
    eps  (0, 1)
    v    (-sigma, alpha)                    Salimans & Ho 2022, appendix D
    flow (d alpha/dt, d sigma/dt)           Lipman et al. 2022; eps - x0 on RectifiedFlow

With x_t = alpha x0 + sigma eps, the pair (x_t, y) is a linear system in (x0, eps) with determinant
delta = alpha q - sigma p. Solving it and taking the row (p', q') gives

    y' = [(p' q - q' p) x_t + (q' alpha - p' sigma) y] / delta.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.schedules import Schedule, Time, match, visible, working_dtype

Kind = Literal["x0", "eps", "v", "flow"]
KINDS: tuple[str, ...] = get_args(Kind)


def check_kind(kind: str) -> None:
    """Raises InputError if `kind` is not one of KINDS."""
    if kind not in KINDS:
        raise InputError(f"prediction kind: got {kind!r}; allowed: {', '.join(KINDS)}")


def row(kind: Kind, t: Time, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Returns (p, q) of y = p x0 + q eps, float64, each of t's shape."""
    alpha, sigma = schedule.coeffs(t)
    if kind == "v":
        return -sigma, alpha
    if kind == "flow":
        return schedule.rates(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return (one, zero) if kind == "x0" else (zero, one)


def convert(y: Tensor, x_t: Tensor, t: Time, schedule: Schedule, *, src: Kind, dst: Kind) -> Tensor:
    """Converts a prediction y of kind `src` at (x_t, t) to kind `dst`.

    Args:
        y, x_t: (B, ...).
        t: a float, () or (B,), in the schedule's unit.

    Returns:
        (B, ...) in the dtype of x_t, at least float32. Coefficients are float64.

    Raises:
        InputError: an unknown kind; or delta = 0, where y and x_t do not determine `dst` (src eps at alpha = 0, src x0
            at sigma = 0). Checked for Python floats and CPU tensors; elsewhere the result is not finite.
    """
    check_kind(src)
    check_kind(dst)
    dtype = working_dtype(x_t)
    y = y.to(dtype)
    if src == dst:
        return y
    alpha, sigma = schedule.coeffs(t)
    p, q = row(src, t, schedule)
    p_dst, q_dst = row(dst, t, schedule)
    delta = alpha * q - sigma * p
    on_x, on_y = (p_dst * q - q_dst * p) / delta, (q_dst * alpha - p_dst * sigma) / delta
    _check_finite(on_x, on_y, t, schedule, src, dst)
    return match(on_x, x_t) * x_t.to(dtype) + match(on_y, x_t) * y


def _check_finite(on_x: Tensor, on_y: Tensor, t: Time, schedule: Schedule, src: str, dst: str) -> None:
    if not visible(on_x):
        return
    bad = ~(on_x.isfinite() & on_y.isfinite())
    if bad.any():
        got = torch.as_tensor(t, dtype=torch.float64).expand(bad.shape)[bad].flatten()[0].item()
        raise InputError(
            f"convert {src} to {dst}: got t={got:g} on {schedule}, where {src} does not determine {dst} (delta = 0); "
            "allowed: any other t; move t off the end or predict v"
        )
