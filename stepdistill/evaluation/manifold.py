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
LARGEST = max(K_PRECISION_RECALL, K_DENSITY_COVERAGE)


def radii(x: Tensor) -> Tensor:
    """(N, LARGEST) squared distances of samples (N, D) to their 1st, 2nd, ... nearest neighbour but themselves.

    Raises:
        InputError: too few samples.
    """
    if len(x) <= LARGEST:
        raise InputError(f"pictures for precision and coverage: got {len(x)}; allowed: {LARGEST + 1} or more")
    x, found = x.double(), []
    for rows in blocks(x, len(x)):
        distances = squared_distances(x[rows], x)
        distances[torch.arange(len(distances)), torch.arange(rows.start, rows.stop)] = torch.inf
        found.append(distances.topk(LARGEST, largest=False).values)
    return torch.cat(found)


def prdc_figures(features: Tensor, real: Tensor, real_radii: Tensor) -> dict[str, Figure]:
    """The four figures of features (N, D) against those of real pictures (M, D), whose `radii` are (M, LARGEST).

    Each is a mean: of precision and density over the pictures, of recall and coverage over the real ones, so an
    interval of these two is about other real pictures.

    Raises:
        InputError: too few samples.
    """
    near, dense = (real_radii[:, k - 1] for k in (K_PRECISION_RECALL, K_DENSITY_COVERAGE))
    own = radii(features)[:, K_PRECISION_RECALL - 1 : K_PRECISION_RECALL]
    x, y = features.double(), real.double()
    inside, balls = [], []
    reached = torch.zeros(len(y), dtype=torch.bool)
    nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
    for rows in blocks(x, len(y)):
        distances = squared_distances(x[rows], y)
        inside.append((distances <= near).any(1))
        balls.append((distances <= dense).sum(1).double() / K_DENSITY_COVERAGE)
        reached |= (distances <= own[rows]).any(0)
        nearest = torch.minimum(nearest, distances.amin(0))
    return {
        "precision": Figure.mean(torch.cat(inside)),
        "recall": Figure.mean(reached, "real pictures"),
        "density": Figure.mean(torch.cat(balls)),
        "coverage": Figure.mean(nearest <= dense, "real pictures"),
    }
