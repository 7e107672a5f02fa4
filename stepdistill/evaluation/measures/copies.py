"""Copies of training images: the share of images that are much nearer to one training image than to the next ones.

An image's distance to its nearest training image is divided by the mean distance to its 50 nearest (Carlini et al.
2023, equation 1), in pixels at 32 x 32: by distance alone a blurred image, near to everything, would count as a copy.
The threshold is the nearness within which one training image in a hundred has another; a model that copies nothing is
expected to have one image in a hundred within it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import blocks
from stepdistill.evaluation.measures.base import Metric, View
from stepdistill.evaluation.real import RealPictures, small

SHARE = 0.01  # of the training images
NEIGHBOURS = 50


class Copies(Metric):
    """`copies`: 0.01 is expected without copying, 1 means that all images are memorised. Less than expected is no
    better, so neither way is preferred."""

    name, keeps, better, needs = "copies", "pixels", {}, ("pixels",)

    @staticmethod
    def see(view: View) -> Tensor:
        return small(view.pictures)

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        near = nearness(kept, tools.real.pixels) <= threshold(tools.real)
        return {"copies": Figure.share(near)}


def threshold(real: RealPictures) -> float:
    """Returns the nearness within which SHARE of the real images have another one."""
    what = f"nearness-1 {real.count}"
    found = real.kept("nearness", what, lambda: nearness(real.pixels, real.pixels, but_itself=True))
    return found.sort().values[max(math.ceil(SHARE * len(found)), 1) - 1].item()


def nearness(x: Tensor, y: Tensor, *, but_itself: bool = False) -> Tensor:
    """Computes the distance of each row of x (N, D) uint8 to the nearest row of y (M, D) uint8, divided by the mean
    distance to the 50 nearest, (N,); exactly 0 for a copy.

    Args:
        but_itself: x is y, and no row counts as its own neighbour.
    """
    x_f, y_f = x.float() - 128, y.float() - 128
    lengths, found = y_f.square().sum(1), []
    for rows in blocks(x, len(y)):
        order = torch.addmm(lengths, x_f[rows], y_f.T, alpha=-2)  # squared distance minus |x|^2
        if but_itself:
            order[torch.arange(len(order)), torch.arange(rows.start, rows.stop)] = torch.inf
        near = order.topk(min(NEIGHBOURS, len(y) - but_itself), largest=False)
        away = (near.values.double() + x_f[rows].double().square().sum(1, keepdim=True)).clamp_min(0).sqrt()
        away[:, 0] = (x[rows].double() - y[near.indices[:, 0]].double()).square().sum(1).sqrt()
        found.append(away[:, 0] / away.mean(1).clamp_min(1e-12))
    return torch.cat(found)
