"""Few-step sampling outside a pipeline: what the trainer shows, and what tests hold against diffusers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.conditioning.base import Cond
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.schedules import AlphaBar, Schedule
from stepdistill.solvers import SOLVERS, Denoise, integrate
from stepdistill.timegrid import inference_times


def lcm_times(schedule: Schedule, steps: int, original_steps: int = 50) -> list[float]:
    """The times of diffusers' LCMScheduler: of the `original_steps` points, `steps` even ones from the noisy end.

    Args:
        original_steps: the points on the teacher's path the student was trained at.

    Raises:
        InputError: more steps than points, or more points than AlphaBar has timesteps.
    """
    if isinstance(schedule, AlphaBar) and not 1 <= original_steps <= schedule.t_max + 1:
        count = int(schedule.t_max) + 1
        raise InputError(f"original_steps: got {original_steps}; allowed: 1 to {count} on {schedule}; try 50")
    if not 1 <= steps <= original_steps:
        points = f"1 to {original_steps}, the points the student was trained at"
        raise InputError(f"steps: got {steps}; allowed: {points}; try 4")
    if isinstance(schedule, AlphaBar):
        k = (int(schedule.t_max) + 1) // original_steps
        origin = [(i + 1) * k - 1 for i in range(original_steps)]
    else:
        span = schedule.t_max - schedule.t_min
        origin = [schedule.t_min + (i + 1) * span / original_steps for i in range(original_steps)]
    return [origin[::-1][i * original_steps // steps] for i in range(steps)]


@torch.no_grad()
def sample_lcm(
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Cond,
    *,
    steps: int,
    draws: Draws | None = None,
    noises: Sequence[Tensor] | None = None,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Tensor:
    """Multistep consistency sampling (Luo et al. 2023a, algorithm 3): to the clean end, noise again, repeat.

    Args:
        x_T: (B, C, H, W) unit normal.
        cond: of batch B; with `guidance` (B,) = scale - 1 for a w-conditioned student.
        draws: the samples' own random numbers for re-noising; or `noises`, one (B, C, H, W) for each step but the last.
        original_steps, timestep_scaling: as the student was trained (`solver_steps`, `timestep_scaling`).

    Returns:
        x0 (B, C, H, W) float32.

    Raises:
        InputError: steps out of range, or several steps and nothing to noise again with.
    """
    from stepdistill.methods.consistency import consistency

    schedule = denoiser.schedule
    times = lcm_times(schedule, steps, original_steps)
    if steps > 1 and draws is None and (noises is None or len(noises) < steps - 1):
        got = f"{len(noises or ())} noises for {steps} steps"
        raise InputError(f"noise: got {got}; allowed: {steps - 1}, or draws; pass draws")
    x = x_T
    for i, t in enumerate(times):
        t_batch = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
        x0 = consistency(denoiser, x, t_batch, cond, timestep_scaling)
        if i + 1 == steps:
            break
        eps = noises[i] if noises is not None else draws.normal(*x.shape[1:])
        x = schedule.add_noise(x0, eps, float(times[i + 1]))
    return x0


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
        allowed = ", ".join(SOLVERS)
        raise InputError(f"solver: got {solver!r}; allowed: {allowed}; for a consistency model use sample_lcm")
    denoise = Denoise(lambda x, t: guided(denoiser, x, t, cond, uncond, guidance), denoiser.schedule)
    times = inference_times(denoiser.schedule, steps)
    return integrate(SOLVERS[solver], denoise, x_T, times)
