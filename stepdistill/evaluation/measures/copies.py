"""Are pictures copies of training pictures? The share of them that lies nearer to one than such pictures lie.

One training picture in a hundred has another as near as some distance, in pixels at 32 x 32. A model that copies
nothing comes as near to a training picture with one of its pictures in a hundred; one that copies, with more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import blocks
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.real import RealPictures, small

SHARE = 0.01  # of the training pictures


class Copies(Metric):
    """`copies`: 0.01 is what is to be expected, 1 a model that learnt by heart."""

    name, keeps, better, needs = "copies", "pixels", {"copies": "lower"}, ("pixels",)

    @staticmethod
    def see(view: View) -> Tensor:
        return small(view.pictures)

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        near = nearest(kept, tools.real.pixels) <= threshold(tools.real)
        return {"copies": Figure.mean(near)}


def threshold(real: RealPictures) -> float:
    """The squared distance within which SHARE of the real pictures have another one."""
    what = f"spacing-1 {real.count}"
    spacing = real.kept("spacing", what, lambda: nearest(real.pixels, real.pixels, but_itself=True))
    return spacing.sort().values[max(math.ceil(SHARE * len(spacing)), 1) - 1].item()


def nearest(x: Tensor, y: Tensor, *, but_itself: bool = False) -> Tensor:
    """(N,) squared distance of each row of x (N, D) uint8 to the nearest of y (M, D) uint8, exact.

    Args:
        but_itself: x is y, and no row counts as its own neighbour.
    """
    x_f, y_f = x.float() - 128, y.float() - 128
    lengths, found = y_f.square().sum(1), []
    for rows in blocks(x, len(y)):
        order = torch.addmm(lengths, x_f[rows], y_f.T, alpha=-2)  # the distance, less |x|^2
        if but_itself:
            order[torch.arange(len(order)), torch.arange(rows.start, rows.stop)] = torch.inf
        # Which is nearest is found in float32; how near it is, anew: of a copy it is exactly 0.
        found.append((x[rows].double() - y[order.argmin(1)].double()).square().sum(1))
    return torch.cat(found)
