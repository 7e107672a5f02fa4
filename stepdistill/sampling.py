"""Few-step sampling outside a pipeline: what the trainer shows, and what tests hold against diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.conditioning.base import Cond
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.schedules import AlphaBar
from stepdistill.solvers import SOLVERS, Denoise, integrate
from stepdistill.timegrid import inference_times


def lcm_times(schedule: AlphaBar, steps: int, original_steps: int = 50) -> list[int]:
    """The times of diffusers' LCMScheduler: of the `original_steps` points, `steps` even ones from the noisy end."""
    count = int(schedule.t_max) + 1
    if not 1 <= steps <= original_steps:
        raise InputError(f"steps: got {steps}; allowed: 1 to {original_steps}, the points the student was trained at; try 4")
    k = count // original_steps
    origin = [(i + 1) * k - 1 for i in range(original_steps)][::-1]
    return [origin[int(i * len(origin) / steps)] for i in range(steps)]


@torch.no_grad()
def sample_lcm(
    denoiser: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws | None = None, noises: list[Tensor] | None = None
) -> Tensor:
    """Multistep consistency sampling (Luo et al. 2023a, algorithm 3): to the clean end, noise again, repeat.

    Args:
        x_T: (B, C, H, W) unit normal.
        draws: the samples' own random numbers for re-noising; or `noises`, one (B, C, H, W) for each step but the last.

    Returns:
        x0 (B, C, H, W) float32.
    """
    from stepdistill.methods.consistency import consistency

    schedule = denoiser.schedule
    times = lcm_times(schedule, steps)
    x = x_T
    for i, t in enumerate(times):
        x0 = consistency(denoiser, x, torch.full((len(x),), float(t), device=x.device), cond, 10.0)
        if i + 1 == len(times):
            return x0
        eps = noises[i] if noises is not None else draws.normal(*x.shape[1:])
        x = schedule.add_noise(x0, eps, float(times[i + 1]))
    raise AssertionError("unreachable: steps >= 1")


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
    """Guided sampling of the probability-flow ODE on the trailing grid (Lin et al. 2023).

    Args:
        x_T: (B, C, H, W) noise at the schedule's noisy end: unit normal, times sigma_max on EDM.
        solver: ddim, heun or dpmpp_2m.

    Returns:
        x0 (B, C, H, W) float32.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver: got {solver!r}; allowed: {', '.join(SOLVERS)}; for a consistency model use sample_lcm")
    denoise = Denoise(lambda x, t: guided(denoiser, x, t, cond, uncond, guidance), denoiser.schedule)
    times = inference_times(denoiser.schedule, steps)
    return integrate(SOLVERS[solver], denoise, x_T, times)
