"""Guided sampling outside a pipeline: generates the images of prompt-only caches, and is checked against diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.conditioning.base import Cond
from stepdistill.denoiser.base import Denoiser
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.solvers import SOLVERS, Denoise, integrate


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Cond,
    uncond: Cond | None = None,
    *,
    steps: int,
    solver: str = "ddim",
    guidance: float = 1.0,
) -> Tensor:
    """Samples the guided probability-flow ODE on the pipeline's time grid; trailing (Lin et al. 2023) on AlphaBar.

    Args:
        x_T: (B, C, H, W) noise at the schedule's noisy end: unit normal, times sigma_max on EDM.
        solver: ddim, heun or dpmpp_2m.

    Returns:
        x0 (B, C, H, W) float32.
    """
    if solver not in SOLVERS:
        allowed = f"{', '.join(SOLVERS)}; for a consistency model use stepdistill.sample_lcm"
        raise InputError(f"solver: got {solver!r}; allowed: {allowed}")
    denoise = Denoise(lambda x, t: guided(denoiser, x, t, cond, uncond, guidance), denoiser.schedule)
    times = denoiser.grid.times(denoiser.schedule, steps)
    return integrate(SOLVERS[solver], denoise, x_T, times)
