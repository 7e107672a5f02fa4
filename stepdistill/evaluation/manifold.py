"""Precision, recall, density and coverage: which pictures lie where the others of their kind lie.

    prdc_figures(features, real, radii(real))

Around every sample is a ball that reaches to its k-th nearest neighbour of the same set. Precision is the share of
pictures inside the ball of any real one, recall the share of real ones inside that of any picture (Kynkaanniemi et al.
2019, eq. 1-2); density counts the balls, coverage the real balls that hold a picture (Naeem et al. 2020, eq. 3-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.kernel import blocks, squared_distances

K_PRECISION_RECALL = 3  # as Kynkaanniemi et al. and torch-fidelity have it
K_DENSITY_COVERAGE = 5  # as Naeem et al. have it
LARGEST = max(K_PRECISION_RECALL + 1, K_DENSITY_COVERAGE)  # a ball whose neighbour is left out reaches to the next


def radii(x: Tensor) -> Tensor:
    """(N, LARGEST) squared distances of samples (N, D) to their 1st, 2nd, ... nearest neighbour but themselves.

    Raises:
        InputError: too few samples.
    """
    return neighbours(x)[0]


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """`radii`, and which samples these neighbours are, (N, LARGEST) each.

    Raises:
        InputError: too few samples.
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
    """The four figures of features (N, D) against those of real pictures (M, D), whose `radii` are (M, LARGEST).

    The real pictures are held. So precision and density are means over independent pictures. Recall and coverage hang
    on all pictures at once, and what one does to them is what they lose without it (the jackknife: Quenouille 1956,
    Tukey 1958), exactly: without it balls of recall that it bounded reach further. A bootstrap would draw pictures
    twice, which makes balls of no width. The jackknife's error is never too small on average (Efron and Stein 1981);
    of these two it is up to twice the truth.

    Raises:
        InputError: too few samples.
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
    """Of each of M real pictures: by how many pictures it is held, and by which, where it is by one."""

    def __init__(self, size: int) -> None:
        self.count, self.by = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)

    def add(self, within: Tensor, first: int) -> None:
        """Pictures number `first` and on, (B, M), whether they hold each."""
        count = within.sum(0)
        self.by = torch.where(count > 0, within.byte().argmax(0) + first, self.by)
        self.count += count


def _lost(holders: _Holders, n: int, kept: Tensor | None = None) -> Tensor:
    """(n,) how many real pictures are held no more without each picture; `kept` (M,) are held by another then."""
    alone = holders.count == 1
    return -torch.bincount(holders.by[alone if kept is None else alone & ~kept], minlength=n)


def _gains(holders: _Holders, shells: Tensor, bounds: Tensor) -> Tensor:
    """(N,) by how many real pictures more are held without each picture.

    Args:
        shells: (S, 2), picture and real picture that its ball holds if it reaches to one neighbour more.
        bounds: (N, k), the neighbours whose absence has it do so.
    """
    n, size = len(bounds), len(holders.count)
    picture, other = shells[holders.count[shells[:, 1]] <= 1].T
    absent, other = bounds[picture].flatten(), other.repeat_interleave(bounds.shape[1])
    kept = torch.zeros(size, dtype=torch.bool)
    kept[other[(holders.count[other] == 1) & (holders.by[other] == absent)]] = True
    new = torch.unique((absent * size + other)[holders.count[other] == 0]) // size
    return torch.bincount(new, minlength=n) + _lost(holders, n, kept)


def _share_of_real(holders: _Holders, n: int, gains: Tensor) -> Figure:
    """The share of the real pictures that are held. gains: (n,) by how many it is more without each picture."""
    size = len(holders.count)
    influence = -(n - 1) * gains.double() / size
    share = (holders.count > 0).double().mean().item()
    return Figure(share, influence - influence.mean(), trials=min(n, size))
