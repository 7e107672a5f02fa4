"""A measured figure, how far it can be trusted, and whether two of them differ.

    figure = Figure(value, influence)
    figure.interval()                         # where it would fall for another set as large
    difference(student, teacher)              # the gap and its interval: of the same seeds, pair by pair

Every figure knows how far each of its units, a picture say, moved it. All intervals follow from that one vector (the
infinitesimal jackknife: Jaeckel 1972; Efron 1982), and so does that of a difference: what both models owe to a prompt
that is hard for both cancels.
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
        unit: what is counted: pictures drawn, or real pictures.
    """

    value: float
    influence: Tensor
    unit: str = "pictures"

    @classmethod
    def mean(cls, values: Tensor, unit: str = "pictures") -> Figure:
        """The mean of (N,) values."""
        values = values.to(torch.float64)
        return cls(values.mean().item(), values - values.mean(), unit)

    @property
    def error(self) -> float:
        """The standard error."""
        n = len(self.influence)
        return math.sqrt(self.influence.double().square().sum().item() / max(n - 1, 1) / n)

    def interval(self, z: float = Z) -> tuple[float, float]:
        """The bounds in which 95 of 100 such figures fall, for another set of units as large."""
        return self.value - z * self.error, self.value + z * self.error


@dataclass(frozen=True)
class Difference:
    """What one figure is above another: value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    paired: bool

    @property
    def equal(self) -> bool:
        """Whether the interval holds 0, so that the two are not told apart."""
        return self.low <= 0 <= self.high


def difference(a: Figure, b: Figure, *, paired: bool, z: float = Z) -> Difference:
    """a - b with its interval.

    Args:
        paired: unit i of both is the same prompt and the same noise, or the same real picture.
    """
    if paired:
        gap = Figure(a.value - b.value, a.influence.double() - b.influence.double())
        return Difference(gap.value, *gap.interval(z), paired=True)
    error = math.hypot(a.error, b.error)
    value = a.value - b.value
    return Difference(value, value - z * error, value + z * error, paired=False)
