"""The unbiased maximum mean discrepancy between two sets of features (Gretton et al. 2012, eq. 3).

    mmd_figure(features, real, polynomial, within(real, polynomial))

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), each mean over all pairs of different samples: its expectation is exact
at any number of images, so it is about as often negative as not if the two distributions are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)
BLOCK = 1 << 24  # matrix entries in memory at a time


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Computes (x.y / D + 1)^3, KID's kernel (Binkowski et al. 2018, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """Computes exp(-|x - y|^2 / (2 sigma^2)); CMMD's kernel has sigma = 10 (Jayasumana et al. 2024, section 4)."""
    return (squared_distances(x, y) / (-2 * sigma**2)).exp_()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Computes |x_i - y_j|^2, clamped at 0: (N, D), (M, D) -> (N, M). In float64 the cancellation is harmless."""
    return torch.addmm(x.square().sum(1, keepdim=True) + y.square().sum(1), x, y.T, alpha=-2).clamp_min_(0)


def blocks(x: Tensor, width: int) -> Iterator[slice]:
    """Yields slices of x's rows, each such that its matrix against `width` others has about BLOCK entries at most."""
    rows = max(1, BLOCK // max(width, 1))
    for first in range(0, len(x), rows):
        yield slice(first, min(first + rows, len(x)))


def row_means(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Computes the mean of k(x_i, y) over y, (N,)."""
    return torch.cat([kernel(x[rows], y).mean(1) for rows in blocks(x, len(y))])


def row_means_within(x: Tensor, kernel: Kernel) -> Tensor:
    """Computes the mean of k(x_i, x) over all other x, (N,).

    Raises:
        InputError: there are fewer than two samples.
    """
    if len(x) < 2:
        raise InputError(f"features for a kernel distance: got {len(x)}; allowed: 2 or more")
    means = []
    for rows in blocks(x, len(x)):
        pairs = kernel(x[rows], x)
        pairs[torch.arange(len(pairs)), torch.arange(rows.start, rows.stop)] = 0
        means.append(pairs.sum(1) / (len(x) - 1))
    return torch.cat(means)


def within(x: Tensor, kernel: Kernel) -> float:
    """Computes E k(x, x') over pairs of different samples of (N, D)."""
    return row_means_within(x.double(), kernel).mean().item()


def mmd_figure(features: Tensor, real: Tensor, kernel: Kernel, real_within: float, scale: float = 1.0) -> Figure:
    """Computes MMD^2 between features (N, D) and those of real images (M, D), times `scale`.

    The influence is the Hajek projection of the U-statistic (Hajek 1968): sample i moves it by 2 / N times the mean of
    k(x_i, .) over the other samples minus that over the real ones. The real images are fixed.

    Args:
        real_within: `within(real, kernel)`, the same for everything compared with them.
    """
    x, y = features.double(), real.double()
    own, cross = row_means_within(x, kernel), row_means(x, y, kernel)
    influence = 2 * (own - cross)
    value = own.mean() + real_within - 2 * cross.mean()
    return Figure(scale * value.item(), scale * (influence - influence.mean()))
