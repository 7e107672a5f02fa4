"""The contents of each of the eight modes in the plane, and whether they could pass as the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from plane import MODES, STD, ring
from torch import Tensor

from stepdistill.schedules import Cosine

# Bounds for passing as the data, see Modes: largest relative error of a share, least within, widths, largest off
SHARES, WITHIN, WIDTHS, OFF = 0.3, 0.9, (0.7, 1.3), 0.7


@dataclass(frozen=True)
class Modes:
    """Statistics of points by mode; a point belongs to the nearest mode.

    Attributes:
        shares: share of the points in each mode, (MODES,).
        within: share of all points within 3 STD of a mode; 0.989 for the data.
        widths: standard deviation of a mode's points about their mean, over STD, (MODES,).
        off: distance of that mean from the mode's true mean, over STD, (MODES,).
    """

    shares: Tensor
    within: float
    widths: Tensor
    off: Tensor

    @property
    def faults(self) -> list[str]:
        """The names of the statistics outside their bounds."""
        low, high = WIDTHS
        found = {
            "shares": (self.shares * MODES - 1).abs().max() > SHARES, "within": self.within < WITHIN,
            "widths": not (low < self.widths.min() and self.widths.max() < high), "off": not self.off.max() < OFF,
        }  # fmt: skip
        return [name for name, wrong in found.items() if wrong]

    def record(self) -> dict:
        """Returns the statistics for JSON, rounded."""
        lists = {name: [round(v, 4) for v in getattr(self, name).tolist()] for name in ("shares", "widths", "off")}
        return lists | {"within": round(self.within, 4), "faults": self.faults}


def in_modes(points: Tensor) -> Modes:
    """Computes the statistics of points (n, 2). An empty mode has width and offset NaN, which counts as a fault."""
    means = ring(Cosine()).means.to(points.dtype)
    far, mode = (points[:, None] - means).norm(dim=2).min(1)
    own = [points[mode == k] for k in range(MODES)]
    return Modes(
        shares=mode.bincount(minlength=MODES) / len(points), within=(far < 3 * STD).float().mean().item(),
        widths=torch.stack([(each - each.mean(0)).square().mean().sqrt() for each in own]) / STD,
        off=torch.stack([(each.mean(0) - mean).norm() for each, mean in zip(own, means, strict=True)]) / STD,
    )  # fmt: skip
