"""Classifier-free guidance in one forward (Ho & Salimans 2022, on Imagen's scale: 1 means none).

    y = y_uncond + scale (y_cond - y_uncond)

The weights sum to one and conversions are affine in y, so guiding the raw output and converting once is equivalent to
guiding x0 or eps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.conditioning.base import Cond
from stepdistill.errors import InputError
from stepdistill.prediction import Kind, convert
from stepdistill.schedules import Time, match
from stepdistill.solvers import Denoise

if TYPE_CHECKING:
    from stepdistill.denoiser.base import Denoiser


def stack(cond: Cond | None, uncond: Cond | None) -> Cond:
    """Concatenates two conditions to one of batch size 2B. Their keys and shapes must be the same.

    Raises:
        InputError: a condition is missing, or their keys or shapes differ.
    """
    if cond is None or uncond is None:
        missing = "cond" if cond is None else "uncond"
        raise InputError(f"guidance: got {missing}=None; allowed: a condition each; pass {missing} or use scale=1.0")
    shapes, others = ({k: tuple(v.shape) for k, v in c.items()} for c in (cond, uncond))
    if shapes != others:
        raise InputError(
            f"guidance: got cond {shapes} and uncond {others}; allowed: the same keys and shapes; encode both with one "
            "conditioner and repeat uncond to the batch"
        )
    return {key: torch.cat([cond[key], uncond[key]]) for key in cond}


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Time,
    cond: Cond | None,
    uncond: Cond | None,
    scale: float | Tensor,
    *,
    kind: Kind = "x0",
) -> Tensor:
    """The guided prediction at (x_t, t): one forward on a batch of 2B, guidance on the raw output, one conversion.

    Args:
        x_t: (B, ...). t: a float, () or (B,). cond, uncond: conditions of batch size B.
        scale: a float or (B,). The float 1.0 means a plain forward on a batch of B, without `uncond`. A
            guidance-conditioned network needs no `uncond` either: it is called once with the scale as an input.
        kind: prediction type of the result.

    Returns:
        (B, ...), float32 (float64 if x_t is).

    Raises:
        InputError: a scale other than 1.0 without both conditions, or conditions that differ in keys or shapes.
    """
    if denoiser.takes_guidance:
        w = torch.as_tensor(scale, dtype=torch.float32, device=x_t.device).expand(len(x_t)) - 1
        return denoiser(x_t, t, (cond or {}) | {"guidance": w}, kind=kind)
    if isinstance(scale, int | float) and scale == 1:
        return denoiser(x_t, t, cond, kind=kind)
    both = stack(cond, uncond)
    t_both = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
    y_cond, y_uncond = denoiser.raw(torch.cat([x_t, x_t]), t_both, both).chunk(2)
    weight = match(scale, y_cond) if isinstance(scale, Tensor) else scale
    y = y_uncond + weight * (y_cond - y_uncond)
    return convert(y, x_t, t, denoiser.schedule, src=denoiser.kind, dst=kind)


def bind(
    denoiser: Denoiser, cond: Cond | None = None, uncond: Cond | None = None, scale: float | Tensor = 1.0
) -> Denoise:
    """Binds a denoiser to its conditions and guidance scale, as solvers require: denoise(x_t, t) -> x0."""
    return Denoise(lambda x_t, t: guided(denoiser, x_t, t, cond, uncond, scale), denoiser.schedule)
