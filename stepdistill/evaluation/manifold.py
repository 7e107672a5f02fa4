"""Precision, recall, density and coverage: which images lie in the neighbourhoods of the other set's.

    prdc_figures(features, real, radii(real))

Around every sample is a ball that reaches to its k-th nearest neighbour in the same set. Precision is the share of
generated images inside the ball of any real one, recall the share of real images inside the ball of any generated one
(Kynkaanniemi et al. 2019, eq. 1-2); density counts the real balls that an image is in, coverage is the share of real
balls that contain an image (Naeem et al. 2020, eq. 3-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import blocks, squared_distances

K_PRECISION_RECALL = 3  # as in Kynkaanniemi et al. and torch-fidelity
K_DENSITY_COVERAGE = 5  # as in Naeem et al.
LARGEST = max(K_PRECISION_RECALL + 1, K_DENSITY_COVERAGE)  # without its k-th neighbour a ball reaches to the next


def radii(x: Tensor) -> Tensor:
    """Computes the squared distances (N, LARGEST) of samples (N, D) to their 1st, 2nd, ... nearest neighbour.

    Raises:
        InputError: there are too few samples.
    """
    return neighbours(x)[0]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `radii`, and the indices of these neighbours, (N, LARGEST) each.

    Raises:
        InputError: there are too few samples.
    """
    if len(x) <= LARGEST:
        raise InputError(f"pictures for precision and coverage: got {len(x)}; allowed: {LARGEST + 1} or more")
    x, found, which = x.double(), [], []
    for rows in blocks(x, len(x)):
        distances = squared_distances(x[rows], x)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        near = distances.topk(LARGEST, largest=False)
        found.append(near.values)
        which.append(near.indices)
    return torch.cat(found), torch.cat(which)


def prdc_figures(features: Tensor, real: Tensor, real_radii: Tensor) -> dict[str, Figure]:
    """Computes the four figures of features (N, D) against those of real images (M, D), whose `radii` are (M, LARGEST).

    The real images are fixed, so precision and density are means over independent images. Recall and coverage depend on
    all images at once; the influence of one is what they lose if it is left out (the jackknife: Quenouille 1956, Tukey
    1958), computed exactly: without it, recall's balls that it bounded reach further. A bootstrap would draw images
    twice, which gives balls of zero radius. The jackknife's error is never too small on average (Efron and Stein 1981);
    for these two it is up to twice the true one.

    Raises:
        InputError: there are too few samples.
    """
    near, dense = (real_radii[:, k - 1] for k in (K_PRECISION_RECALL, K_DENSITY_COVERAGE))
    own, bounds = neighbours(features)
    reach, further = (own[:, k : k + 1] for k in (K_PRECISION_RECALL - 1, K_PRECISION_RECALL))
    x, y = features.double(), real.double()
    inside, balls = [], []
    reached, held, shells = _Holders(len(y)), _Holders(len(y)), []
    for rows in blocks(x, len(y)):
        distances = squared_distances(x[rows], y)
        inside.append((distances <= near).any(1))
        within = distances <= dense
        balls.append(within.sum(1).double() / K_DENSITY_COVERAGE)
        held.add(within, rows.start)
        within = distances <= reach[rows]
        reached.add(within, rows.start)
        shell = ((distances <= further[rows]) & ~within & (reached.count <= 1)).nonzero()
        shells.append(shell + torch.tensor([rows.start, 0]))
    return {
        "precision": Figure.share(torch.cat(inside)),
        "recall": _share_of_real(reached, len(x), _gains(reached, torch.cat(shells), bounds[:, :K_PRECISION_RECALL])),
        "density": Figure.mean(torch.cat(balls)),
        "coverage": _share_of_real(held, len(x), _lost(held, len(x))),
    }


class _Holders:
    """For each of M real images: the number of generated images that hold it, and which one if it is only one."""

    def __init__(self, size: int) -> None:
        self.count, self.by = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)

    def add(self, within: Tensor, first: int) -> None:
        """Adds images from number `first` on: (B, M), whether each holds each real image."""
        count = within.sum(0)
        self.by = torch.where(count > 0, within.byte().argmax(0) + first, self.by)
        self.count += count


def _lost(holders: _Holders, n: int, kept: Tensor | None = None) -> Tensor:
    """(n,) minus the number of real images that only each image holds; without it, `kept` (M,) are held by another."""
    alone = holders.count == 1
    return -torch.bincount(holders.by[alone if kept is None else alone & ~kept], minlength=n)


def _gains(holders: _Holders, shells: Tensor, bounds: Tensor) -> Tensor:
    """(N,) the change in the number of held real images if each image is left out.

    Args:
        shells: (S, 2), an image and a real image that its ball holds only if it reaches one neighbour further.
        bounds: (N, k), the neighbours of each image whose absence makes its ball do so.
    """
    n, size = len(bounds), len(holders.count)
    picture, other = shells[holders.count[shells[:, 1]] <= 1].T
    absent, other = bounds[picture].flatten(), other.repeat_interleave(bounds.shape[1])
    kept = torch.zeros(size, dtype=torch.bool)
    kept[other[(holders.count[other] == 1) & (holders.by[other] == absent)]] = True
    new = torch.unique((absent * size + other)[holders.count[other] == 0]) // size
    return torch.bincount(new, minlength=n) + _lost(holders, n, kept)


def _share_of_real(holders: _Holders, n: int, gains: Tensor) -> Figure:
    """The share of real images that are held. gains: (n,) the change in their number if each image is left out."""
    size = len(holders.count)
    influence = -(n - 1) * gains.double() / size
    share = (holders.count > 0).double().mean().item()
    return Figure(share, influence - influence.mean(), trials=min(n, size))
