"""A measured figure, its confidence interval, and whether two figures differ.

    figure = Figure(value, influence)
    figure.interval()                         # 95 %, for as many other images of the same model
    difference(student, teacher, paired=True) # the difference and its interval: same seeds, pair by pair

For every metric, the interval is for other images of the same model, at the same n and against the same real images.
Each figure stores the influence of each of its units, such as an image, and all intervals follow from that vector (the
jackknife: Quenouille 1956, Tukey 1958; by derivatives: Jaeckel 1972, Efron 1982), as does that of a difference, in
which difficulty common to both models cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Z = 1.959964  # quantile of the two-sided 95 % interval
Ends = tuple[float, float, float]  # a value and the ends of its interval


@dataclass(frozen=True)
class Figure:
    """A metric's value over N units.

    Attributes:
        value: the reported value.
        influence: (N,) float64, mean 0: counting unit i once more moves the value by influence_i / N. For a mean, the
            values minus their mean.
        unit: what the units are: generated images ("pictures"), or prompts.
        trials: for a share, a lower bound on its number of yes-or-no trials; None if the figure is not a share.
        bend: signed systematic error that the value may have; figures at the same n share part of it.
        apart: half-width due to differences between seeds beyond chance (see `seeds.pooled`).
        fit: of an extrapolated figure, the points (1 / n, distance) that the curve goes through.
    """

    value: float
    influence: Tensor
    unit: str = "pictures"
    trials: int | None = None
    bend: float = 0.0
    apart: float = 0.0
    fit: tuple[tuple[float, float], ...] = ()

    @classmethod
    def mean(cls, values: Tensor, unit: str = "pictures") -> Figure:
        """Returns the mean of (N,) values as a figure."""
        values = values.to(torch.float64)
        return cls(values.mean().item(), values - values.mean(), unit)

    @classmethod
    def share(cls, held: Tensor) -> Figure:
        """Returns the share of (N,) images for which `held` is true as a figure."""
        held = held.to(torch.float64)
        return cls(held.mean().item(), held - held.mean(), trials=len(held))

    @property
    def error(self) -> float:
        """The standard error."""
        n = len(self.influence)
        return math.sqrt(self.influence.double().square().sum().item() / max(n - 1, 1) / n)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval of a figure that is not a share."""
        return math.hypot(Z * self.error, self.bend, self.apart)

    def interval(self) -> tuple[float, float]:
        """Returns the ends of the 95 % interval; for a share they lie within 0 and 1."""
        if self.trials is not None:
            return score_interval(self.value, self.half / Z, self.trials)
        return self.value - self.half, self.value + self.half


def score_interval(share: float, error: float, trials: int) -> tuple[float, float]:
    """Returns Wilson's interval (1927) of a share, for as many independent trials as its standard error corresponds to.

    For N independent trials that is N. A share of 0 or 1 has no standard error, and `trials` is used; for any other the
    standard error is taken to be at least one trial's worth, 1 / `trials`.
    """
    spread = share * (1 - share)
    n = max(trials, 1 + spread * trials**2)
    if error > 0 and spread > 0:
        n = min(n, 1 + spread / error**2)
    centre, half = share + Z**2 / (2 * n), Z * math.sqrt(spread / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + Z**2 / n)), min(1.0, (centre + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Difference:
    """The difference of two figures: its value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    paired: bool

    @classmethod
    def of(cls, value: float, half: float, *, paired: bool) -> Difference:
        """Builds it from half the interval's width."""
        return cls(value, value - half, value + half, paired)

    @property
    def contains_zero(self) -> bool:
        """Whether the interval contains 0: which figure is higher is open, and they need not be equal."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Ratio:
    """The ratio of two figures, and the ends of its 95 % interval; None if either figure has no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, half: float | None) -> Ratio:
        """Builds it from half the width of the logarithm's interval."""
        return cls(value) if half is None else cls(value, value * math.exp(-half), value * math.exp(half))

    @property
    def inverse(self) -> Ratio:
        """The ratio of the second figure to the first."""
        return Ratio(1 / self.value, *(None if end is None else 1 / end for end in (self.high, self.low)))


def difference(a: Figure, b: Figure, *, paired: bool) -> Difference:
    """Returns a - b with its interval.

    Args:
        paired: unit i of both is the same prompt and the same noise.
    """
    if paired:
        return paired_difference(a, b, gap(a, b))
    return unpaired_difference((a.value, *a.interval()), (b.value, *b.interval()))


def gap(a: Figure, b: Figure) -> Figure:
    """Returns a - b of figures over the same units. It is no share; see `paired_difference` for shares' intervals."""
    influence, apart = a.influence.double() - b.influence.double(), math.hypot(a.apart, b.apart)
    return Figure(a.value - b.value, influence, a.unit, bend=a.bend - b.bend, apart=apart)


def paired_difference(a: Figure, b: Figure, between: Figure) -> Difference:
    """Returns a - b of figures over the same units.

    Of two shares the ends follow from those of Wilson's intervals (see `joined`): the influences alone would give a
    share of 0 or 1 no error at all.

    Args:
        between: gap(a, b); of several seeds those of each seed, pooled.
    """
    if a.trials is None or b.trials is None:
        return Difference.of(a.value - b.value, between.half, paired=True)
    one, other = ((f.value, *replace(f, apart=0.0).interval()) for f in (a, b))
    return joined(one, other, correlation(a, b), between.apart, paired=True)


def unpaired_difference(a: Ends, b: Ends) -> Difference:
    """Returns a - b of figures over different units, from the ends of their intervals."""
    return joined(a, b, 0.0, 0.0, paired=False)


def joined(a: Ends, b: Ends, r: float, more: float, *, paired: bool) -> Difference:
    """Returns a - b from the value and the two ends of each: Newcombe's square-and-add (1998, methods 10).

    The lower end is as far from a - b as a is from its lower and b from its upper end, added as errors with the
    correlation r are, and the other way round. Of symmetric intervals and r = 0 that is the usual sum of squares.

    Args:
        r: the correlation of a and b. more: a half-width to be added in quadrature.
    """
    (x, x_low, x_high), (y, y_low, y_high) = a, b
    below, above = ((x - x_low, y_high - y), (x_high - x, y - y_low))
    down, up = (math.sqrt(max(0.0, u * u - 2 * r * u * v + v * v) + more * more) for u, v in (below, above))
    return Difference(x - y, x - y - down, x - y + up, paired)


def correlation(a: Figure, b: Figure) -> float:
    """Returns the correlation of two shares over the same units, if positive less half a trial's worth of covariance
    (Newcombe's continuity correction): two equal rows of answers leave one open. It is 0 if either is always the same.
    """
    x, y = a.influence.double(), b.influence.double()
    spread = (x.square().mean() * y.square().mean()).sqrt().item()
    if not spread:
        return 0.0
    found = (x * y).mean().item() / spread
    return found if found < 0 else max(0.0, found - 0.5 / (min(a.trials, b.trials) * spread))


def log_ratio(a: Figure, b: Figure) -> Figure:
    """Returns log(a / b), for figures above 0 over the same units: the delta method divides influences by values."""
    influence = a.influence.double() / a.value - b.influence.double() / b.value
    bend, apart = a.bend / a.value - b.bend / b.value, math.hypot(a.apart / a.value, b.apart / b.value)
    return Figure(math.log(a.value / b.value), influence, a.unit, bend=bend, apart=apart)
