"""A measured figure, how far it can be trusted, and whether two of them differ.

    figure = Figure(value, influence)
    figure.interval()                         # where it would fall for other pictures of the same model, as many
    difference(student, teacher, paired=True) # the gap and its interval: of the same seeds, pair by pair

Every interval is about other pictures of the same model at the same n, against the same real pictures, whatever the
metric. Each figure knows how far each of its units, a picture say, moved it, and all intervals follow from that one
vector (the jackknife: Quenouille 1956, Tukey 1958; by derivatives: Jaeckel 1972, Efron 1982), as does that of a
difference: what both models owe to a prompt that is hard for both cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964  # of 95 %


@dataclass(frozen=True)
class Figure:
    """A metric's value over N units.

    Attributes:
        value: what is reported.
        influence: (N,) float64, mean 0: counting unit i once more moves the value by influence_i / N. Of a mean it is
            the values less their mean.
        unit: what is counted: pictures drawn, or prompts.
        trials: of a share, how often yes or no was asked at least; None where the figure is no share.
        bend: what besides chance the value may be off by, with its sign; two figures of the same n share some of it.
        apart: half the width of what its seeds differ by beyond chance (see `seeds.pooled`).
    """

    value: float
    influence: Tensor
    unit: str = "pictures"
    trials: int | None = None
    bend: float = 0.0
    apart: float = 0.0

    @classmethod
    def mean(cls, values: Tensor, unit: str = "pictures") -> Figure:
        """The mean of (N,) values."""
        values = values.to(torch.float64)
        return cls(values.mean().item(), values - values.mean(), unit)

    @classmethod
    def share(cls, held: Tensor) -> Figure:
        """The share of (N,) pictures of which something is true."""
        held = held.to(torch.float64)
        return cls(held.mean().item(), held - held.mean(), trials=len(held))

    @property
    def error(self) -> float:
        """The standard error."""
        n = len(self.influence)
        return math.sqrt(self.influence.double().square().sum().item() / max(n - 1, 1) / n)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval, of what is no share."""
        return math.hypot(Z * self.error, self.bend, self.apart)

    def interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval; within 0 and 1 of a share."""
        if self.trials is not None:
            return score_interval(self.value, self.half / Z, self.trials)
        return self.value - self.half, self.value + self.half


def score_interval(share: float, error: float, trials: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share in as many independent trials as its standard error amounts to.

    Of N independent trials these are N. A share of none or all has no error to go by, and takes `trials`; any other is
    known no better than by one of these.
    """
    spread = share * (1 - share)
    n = max(trials, 1 + spread * trials**2)
    if error > 0 and spread > 0:
        n = min(n, 1 + spread / error**2)
    centre, half = share + Z**2 / (2 * n), Z * math.sqrt(spread / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + Z**2 / n)), min(1.0, (centre + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Difference:
    """What one figure is above another: value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    paired: bool

    @classmethod
    def of(cls, value: float, half: float, *, paired: bool) -> Difference:
        """From half the interval's width."""
        return cls(value, value - half, value + half, paired)

    @property
    def equal(self) -> bool:
        """Whether the interval holds 0, so that the two are not told apart."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Ratio:
    """One figure over another, and the ends of its 95 % interval, None where an interval of theirs is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, half: float | None) -> Ratio:
        """From half the width of the logarithm's interval."""
        return cls(value) if half is None else cls(value, value * math.exp(-half), value * math.exp(half))

    @property
    def inverse(self) -> Ratio:
        """The other figure over this one."""
        return Ratio(1 / self.value, *(None if end is None else 1 / end for end in (self.high, self.low)))


def difference(a: Figure, b: Figure, *, paired: bool) -> Difference:
    """a - b with its interval.

    Args:
        paired: unit i of both is the same prompt and the same noise.
    """
    half = gap(a, b).half if paired else math.hypot(a.half, b.half)
    return Difference.of(a.value - b.value, half, paired=paired)


def gap(a: Figure, b: Figure) -> Figure:
    """a - b of the same units."""
    return Figure(a.value - b.value, a.influence.double() - b.influence.double(), a.unit, bend=a.bend - b.bend)


def log_ratio(a: Figure, b: Figure) -> Figure:
    """log(a / b) of the same units, both above 0: by the delta method each influence counts by 1 / its value."""
    influence = a.influence.double() / a.value - b.influence.double() / b.value
    return Figure(math.log(a.value / b.value), influence, a.unit, bend=a.bend / a.value - b.bend / b.value)
