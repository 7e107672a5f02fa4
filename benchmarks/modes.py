"""What is in each of the eight modes of the plane, and whether it could be the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from plane import MODES, STD, ring
from torch import Tensor

from stepdistill.schedules import Cosine

# Bounds of what may be taken for the data, see Modes: most that a share may be off, least within, widths, most off
SHARES, WITHIN, WIDTHS, OFF = 0.3, 0.9, (0.7, 1.3), 0.7


@dataclass(frozen=True)
class Modes:
    """What points are, mode by mode; a point belongs to the mode it is nearest to.

    Attributes:
        shares: of the points, (MODES,).
        within: the share of all points that are no farther than 3 STD from a mode; 0.989 of the data.
        widths: the std of a mode's points about their mean, over STD, (MODES,).
        off: how far that mean is from the mode's own, over STD, (MODES,).
    """

    shares: Tensor
    within: float
    widths: Tensor
    off: Tensor

    @property
    def faults(self) -> list[str]:
        """What keeps the points from being taken for the data's."""
        low, high = WIDTHS
        found = {
            "shares": (self.shares * MODES - 1).abs().max() > SHARES, "within": self.within < WITHIN,
            "widths": not (low < self.widths.min() and self.widths.max() < high), "off": not self.off.max() < OFF,
        }  # fmt: skip
        return [name for name, wrong in found.items() if wrong]

    def record(self) -> dict:
        """As JSON holds it, rounded."""
        lists = {name: [round(v, 4) for v in getattr(self, name).tolist()] for name in ("shares", "widths", "off")}
        return lists | {"within": round(self.within, 4), "faults": self.faults}


def in_modes(points: Tensor) -> Modes:
    """Points (n, 2), mode by mode. Of an empty mode, width and offset are not a number, and a fault."""
    means = ring(Cosine()).means.to(points.dtype)
    far, mode = (points[:, None] - means).norm(dim=2).min(1)
    own = [points[mode == k] for k in range(MODES)]
    return Modes(
        shares=mode.bincount(minlength=MODES) / len(points), within=(far < 3 * STD).float().mean().item(),
        widths=torch.stack([(each - each.mean(0)).square().mean().sqrt() for each in own]) / STD,
        off=torch.stack([(each.mean(0) - mean).norm() for each, mean in zip(own, means, strict=True)]) / STD,
    )  # fmt: skip
