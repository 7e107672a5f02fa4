"""Noise schedules: every process is x_t = alpha(t) x0 + sigma(t) eps, with noise growing in t.

A schedule defines its two coefficients and their inverse, independently of networks, grids and solvers. Coefficients
are float64, have the shape and device of t, and need no device-to-host copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stepdistill.errors import InputError

Time = Tensor | float


def visible(value: Tensor) -> bool:
    """Whether a tensor may be read in Python without a device sync: on the CPU and not under torch.compile."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def working_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype for arithmetic on x: float32, or float64 if x is float64."""
    return torch.promote_types(x.dtype, torch.float32)


def match(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshapes a coefficient, () or (B,), to multiply x (B, ...), in the working dtype of x."""
    coefficient = coefficient.to(working_dtype(x))
    if coefficient.ndim == 0:  # a scalar on the CPU multiplies a tensor on any device without a copy
        return coefficient
    return coefficient.to(x.device).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def from_noise(schedule: Schedule, eps: Tensor, t: Time) -> Tensor:
    """Scales noise (B, ...) to the start of sampling at the noisiest t: unit noise, on EDM the standard deviation of
    x_t for data of unit variance. On a flow that starts just below 1 it is unit noise too, as in diffusers."""
    return match(torch.hypot(*schedule.coeffs(t)).clamp(min=1), eps) * eps


class Schedule(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps.

    Attributes:
        t_min: the clean end, where sigma is 0.
        t_max: the noisy end.
        straight: the fixed row (p, q) such that second-order steps average y = p x0 + q eps, which moves x along
            straight lines in x / (alpha q - sigma p): (0, 1) is sigma/alpha space (Karras et al. 2022, section 4),
            (-1, 1) is rectified flow's own time.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    straight: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _time_at(self, log_snr_half: Tensor) -> Tensor: ...

    def _time(self, t: Time) -> Tensor:
        """Returns t as float64; raises on values outside [t_min, t_max] if they can be read without a device sync."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if visible(t):
            slack = 1e-5 * (self.t_max - self.t_min)
            bad = ~((t >= self.t_min - slack) & (t <= self.t_max + slack))
            if bad.any():
                got = t[bad].flatten()[0].item()
                allowed = f"{self.t_min:g} to {self.t_max:g}"
                raise InputError(f"t: got {got:g}; allowed: {allowed} on {self}; check the time grid")
        return t

    def coeffs(self, t: Time) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), float64, same shape and device as t.

        Raises:
            InputError: t outside [t_min, t_max] (checked for Python floats and CPU tensors only).
        """
        return self._coeffs(self._time(t))

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """d alpha/dt and d sigma/dt, float64, same shape and device as t."""
        return self._rates(self._time(t))

    def log_snr_half(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha/sigma), float64; +inf at a clean end, -inf where alpha is 0."""
        alpha, sigma = self.coeffs(t)
        return alpha.log() - sigma.log()

    def time_at(self, log_snr_half: Time) -> Tensor:
        """Returns the t at which log(alpha/sigma) has this value, float64, clamped to [t_min, t_max]."""
        value = torch.as_tensor(log_snr_half, dtype=torch.float64)
        return self._time_at(value).clamp(self.t_min, self.t_max)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps for x0, eps (B, ...) and t () or (B,); float32, or float64 if x0 is."""
        alpha, sigma = self.coeffs(t)
        dtype = working_dtype(x0)
        return match(alpha, x0) * x0.to(dtype) + match(sigma, x0) * eps.to(dtype)

    def __repr__(self) -> str:
        return type(self).__name__


class AlphaBar(Schedule):
    """The discrete variance-preserving process (Ho et al. 2020): alpha² = alpha_bar, sigma² = 1 - alpha_bar.

    t is the diffusers timestep index as a float, 0 to N-1; t = -1 is the clean end, alpha_bar = 1. At integers the
    table's own values are returned, bit for bit; between them alpha_bar is linear in t. Rates are those of the segment
    to the right of t (to the left at t_max).

    Args:
        alphas_cumprod: (N,) decreasing values in [0, 1]; the last may be 0 (zero terminal SNR).
    """

    t_min = -1.0

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().cpu().to(torch.float64)
        if table.ndim != 1 or len(table) == 0 or table.max() > 1 or table.min() < 0 or (table.diff() > 0).any():
            raise InputError(
                f"alphas_cumprod: got shape {tuple(table.shape)}; allowed: (N,), falling, within [0, 1]; pass "
                "scheduler.alphas_cumprod"
            )
        self.t_max = len(table) - 1.0
        self._tables = {torch.device("cpu"): torch.cat([table.new_ones(1), table])}  # index i holds alpha_bar(i - 1)

    @classmethod
    def from_scheduler(cls, scheduler) -> AlphaBar:
        """Builds the process of a diffusers scheduler with betas; honours `rescale_betas_zero_snr`.

        Raises:
            InputError: the scheduler has no `alphas_cumprod` (flow matching: use RectifiedFlow()).
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            name = type(scheduler).__name__
            raise InputError(
                f"scheduler: got {name}, which has no alphas_cumprod; allowed: DDIM, DDPM, Euler, …; use "
                "RectifiedFlow() for flow matching, EDM() for EDM"
            )
        table = scheduler.alphas_cumprod
        if getattr(scheduler.config, "rescale_betas_zero_snr", False):
            table = table.clone()
            table[-1] = 0.0  # some schedulers put 2**-24 here so that their sigma/alpha stays finite
        return cls(table)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns alpha_bar at both ends of the segment that contains t, and the fraction of it at which t lies."""
        table = self._table(t.device)
        left = t.floor().clamp(-1, self.t_max - 1)
        index = left.long() + 1
        return table[index], table[index + 1], (t - left).clamp(0, 1)

    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        left, right, share = self._segment(t)
        alpha_bar = torch.where(share == 1, right, left + share * (right - left))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        left, right, _ = self._segment(t)
        alpha, sigma = self._coeffs(t)
        slope = right - left
        return slope / (2 * alpha), -slope / (2 * sigma)

    def _time_at(self, log_snr_half: Tensor) -> Tensor:
        noise = torch.sigmoid(-2 * log_snr_half)  # sigma² = 1 - alpha_bar, precise near the clean end
        table = 1 - self._table(noise.device)
        index = torch.searchsorted(table, noise).clamp(1, len(table) - 1)
        left, right = table[index - 1], table[index]
        share = torch.where(right > left, (noise - left) / (right - left), torch.zeros_like(noise))
        return index - 2 + share.clamp(0, 1)


class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) for t in [0, 1] (Salimans & Ho 2022)."""

    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)  # both exact at both ends

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._coeffs(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def _time_at(self, log_snr_half: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr_half)) * (2 / math.pi)


class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t for t in [0, 1] (Liu et al. 2022; SD3, Flux). Its flow is eps - x0."""

    straight = (-1.0, 1.0)

    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def _time_at(self, log_snr_half: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr_half)


class EDM(Schedule):
    """alpha = 1, sigma = t (Karras et al. 2022). The clean end is t = 0; grids run from sigma_max to sigma_min, then 0.

    Args:
        sigma_min, sigma_max: the range of noise levels the network was trained on.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            got = f"sigma_min={sigma_min}, sigma_max={sigma_max}"
            raise InputError(f"EDM: got {got}; allowed: 0 < sigma_min < sigma_max; swap or raise them")
        self.sigma_min = sigma_min
        self.t_max = sigma_max

    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def _time_at(self, log_snr_half: Tensor) -> Tensor:
        return torch.exp(-log_snr_half)
