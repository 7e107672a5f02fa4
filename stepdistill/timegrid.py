"""Time grids for sampling, and the distributions (`Law`) of training times.

A resolution shift (SD3, Flux) is a shift in log-SNR, so it is defined here and works on every schedule:
shift(t) is the time at which log(alpha/sigma) is lower by log(shift). On RectifiedFlow that is
shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.schedules import EDM, AlphaBar, RectifiedFlow, Schedule

SPACINGS = ("trailing", "leading", "linspace", "karras", "logsnr")
Law = Callable[[Draws], Tensor]


def shifted(schedule: Schedule, t: Tensor | float, shift: float) -> Tensor:
    """Moves t to `shift` times its noise-to-signal ratio sigma/alpha; shift > 1 puts more of a grid at high noise.

    Returns:
        float64, the shape of t, clamped to the schedule's range.
    """
    if not shift > 0:
        raise InputError(f"shift: got {shift}; allowed: above 0; 1.0 means none, SD3 uses 3.0")
    if shift == 1:
        return torch.as_tensor(t, dtype=torch.float64)
    return schedule.time_at(schedule.log_snr_half(t) - math.log(shift))


@dataclass(frozen=True)
class Grid:
    """Spacing and shift of the times a pipeline visits; see `inference_times`."""

    spacing: str | None = None
    shift: float = 1.0

    def times(self, schedule: Schedule, steps: int) -> Tensor:
        """Returns (steps + 1,) float64 on the CPU, decreasing to the clean end."""
        return inference_times(schedule, steps, spacing=self.spacing, shift=self.shift)


def inference_times(
    schedule: Schedule,
    steps: int,
    *,
    spacing: str | None = None,
    shift: float = 1.0,
    steps_offset: int = 0,
    clean_end: bool = True,
    rho: float = 7.0,
) -> Tensor:
    """Returns the times that a sampler of `steps` steps visits.

    On AlphaBar, `trailing`, `leading` and `linspace` are the integer timesteps of diffusers' DDIMScheduler (Lin et al.
    2023, table 2); at one step the latter two start at the clean end, as there: prefer trailing. Elsewhere `trailing`
    is uniform in t from t_max to t_min; on RectifiedFlow `linspace` is FlowMatchEulerDiscreteScheduler's default grid,
    from 1 to 1/1000 and then 0. `karras` (Karras et al. 2022, equation 5) and `logsnr` (its limit for large rho) are
    uniform in (sigma/alpha)^(1/rho) and in log(sigma/alpha).

    Args:
        steps: 1 or more; at most N on AlphaBar.
        spacing: one of SPACINGS; None means karras on EDM and trailing elsewhere.
        shift: resolution shift; 1.0 means none.
        steps_offset: added to the `leading` timesteps of AlphaBar, as `DDIMScheduler.steps_offset`.
        clean_end: whether the last step ends at the clean end (t = -1 on AlphaBar, `set_alpha_to_one`); False, for
            AlphaBar only, means the smallest noise in the table (t = 0).
        rho: the exponent of `karras`.

    Returns:
        (steps + 1,) float64 on the CPU, decreasing; the last step ends at the last entry.

    Raises:
        InputError: steps or spacing that this schedule does not support, or a shift that makes times coincide.
    """
    spacing = spacing or ("karras" if isinstance(schedule, EDM) else "trailing")
    if spacing not in SPACINGS:
        raise InputError(f"spacing: got {spacing!r}; allowed: {', '.join(SPACINGS)}")
    if steps < 1:
        raise InputError(f"steps: got {steps}; allowed: 1 or more; try 4")
    if spacing in ("karras", "logsnr"):
        times = _even_in_noise(schedule, steps, rho if spacing == "karras" else math.inf)
    elif isinstance(schedule, AlphaBar):
        times = _timesteps(schedule, steps, spacing, steps_offset)
    else:
        times = _continuous(schedule, steps, spacing, shift)
    times = shifted(schedule, times, shift)
    end = schedule.t_min if clean_end else 0.0
    times = torch.cat([times, torch.tensor([end], dtype=torch.float64)])
    if (times[:-1].diff() >= 0).any():
        raise InputError(
            f"time grid: got shift={shift:g} on {schedule}, whose noisy end has too little noise for it; allowed: "
            "shift=1.0 here, or a schedule of zero terminal SNR"
        )
    return times


def _timesteps(schedule: AlphaBar, steps: int, spacing: str, offset: int) -> Tensor:
    n = int(schedule.t_max) + 1
    if steps > n:
        raise InputError(f"steps: got {steps}; allowed: 1 to {n} on {schedule}; take fewer")
    i = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        return (n - i * (n / steps)).round() - 1
    if spacing == "leading":
        times = (i * (n // steps)).flip(0)
        room = n - 1 - int(times[0])
        if not 0 <= offset <= room:
            raise InputError(f"steps_offset: got {offset}; allowed: 0 to {room} at {steps} steps; SD uses 1")
        return times + offset
    return torch.linspace(0, schedule.t_max, steps, dtype=torch.float64).round().flip(0)


def _continuous(schedule: Schedule, steps: int, spacing: str, shift: float) -> Tensor:
    if spacing == "trailing":
        return torch.linspace(schedule.t_max, schedule.t_min, steps + 1, dtype=torch.float64)[:-1]
    if spacing == "linspace" and isinstance(schedule, RectifiedFlow):
        last = shifted(schedule, 1e-3, shift).item()  # diffusers shifts its smallest sigma twice; so does this grid
        return torch.linspace(1.0, last, steps, dtype=torch.float64)
    raise InputError(
        f"spacing: got {spacing!r} on {schedule}; allowed: trailing, karras, logsnr"
        + (", linspace" if isinstance(schedule, RectifiedFlow) else "")
    )


def _even_in_noise(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """Times from the largest sigma/alpha to the smallest, uniform in its (1/rho)-th power, for rho = inf in its log."""
    first = schedule.sigma_min if isinstance(schedule, EDM) else 0.0
    ends = -schedule.log_snr_half(torch.tensor([schedule.t_max, first], dtype=torch.float64))
    if not ends.isfinite().all():
        raise InputError(
            f"spacing: got karras or logsnr on {schedule}, where sigma/alpha has no finite ends; allowed: EDM, "
            "AlphaBar without zero terminal SNR; use trailing"
        )
    high, low = ends.tolist()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if math.isinf(rho):
        log_noise = high + ramp * (low - high)
    else:
        log_noise = rho * torch.log(math.exp(high / rho) + ramp * (math.exp(low / rho) - math.exp(high / rho)))
    return schedule.time_at(-log_noise)


def uniform(schedule: Schedule) -> Law:
    """The uniform distribution over the integers 0 to N-1 on AlphaBar (Ho et al. 2020), over (t_min, t_max] elsewhere.

    Returns:
        A law: law(draws) -> (B,) float64.
    """
    if isinstance(schedule, AlphaBar):
        return lambda draws: draws.integers(int(schedule.t_max) + 1).double()
    return lambda draws: schedule.t_max - draws.uniform().double() * (schedule.t_max - schedule.t_min)


def logit_normal(schedule: Schedule, m: float = 0.0, s: float = 1.0) -> Law:
    """log(sigma/alpha) ~ Normal(m, s²), clamped to the schedule's range.

    On RectifiedFlow that is t = sigmoid(m + s n) (Esser et al. 2024, equation 19); on EDM, log sigma = m + s n (Karras
    et al. 2022, table 1: m = -1.2, s = 1.2). A resolution shift adds log(shift) to m.

    Returns:
        A law: law(draws) -> (B,) float64.
    """
    if not s > 0:
        raise InputError(f"logit_normal: got s={s}; allowed: above 0; try 1.0")
    return lambda draws: schedule.time_at(-(m + s * draws.normal().double()))


def discrete(times: Sequence[float] | Tensor) -> Law:
    """The uniform distribution over these times.

    Returns:
        A law: law(draws) -> (B,) float64.
    """
    table = torch.as_tensor(times, dtype=torch.float64)
    if table.ndim != 1 or len(table) == 0:
        raise InputError(f"discrete: got times of shape {tuple(table.shape)}; allowed: a list of one or more times")

    def law(draws: Draws) -> Tensor:
        index = draws.integers(len(table))
        return table.to(index.device)[index]

    return law
