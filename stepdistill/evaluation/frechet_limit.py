"""FD_inf: the Frechet distance that endlessly many pictures would have, from subsets of those there are.

whole = frechet_figure(features, reference)
frechet_limit(features, reference, whole)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.frechet import Moments, frechet_figure

GROUPS = 5  # of pictures, of which none, one and two are left out
PER_FEATURE = 1.5  # pictures for each feature that it needs


def frechet_limit(features: Tensor, reference: Moments, whole: Figure | None = None, seed: int = 0) -> Figure:
    """FD_inf, the distance that endlessly many pictures would have: read at 1 / n = 0 off a curve through the distances
    of subsets (Chong and Forsyth 2020, section 3).

    The distance of n pictures is above that of all by b / n + c / n^2 + ... Of small subsets, as of the paper's line,
    the second term is not small. So the subsets are large, the curve is a parabola, and subsets are balanced: the
    pictures fall into fifths, seeded, and distances are means over all sets that leave none, one and two of them out
    (the jackknife of second order: Schucany, Gray and Owen 1971). `bend` is what the parabola has above the line
    through the first two: where n is not far above the length of the features they part, and the interval widens by
    that. The influence is the whole's, for the terms in 1 / n have next to none. The bias that the reference's own
    number brings stays.

    Args:
        whole: `frechet_figure` of the same, where it is known.

    Raises:
        InputError: fewer than 1.5 pictures a feature, or than two in a fifth.
    """
    whole = whole or frechet_figure(features, reference)
    n, dim = features.shape
    least = max(2 * GROUPS, math.ceil(PER_FEATURE * dim))
    if n < least:
        raise InputError(f"pictures for FD_inf: got {n} of {dim} features; allowed: {least} or more")
    x = features.to(torch.float64)
    shift, order = x.mean(0), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    groups = [_Sums.of(z, reference.root) for z in (x - shift)[order].tensor_split(GROUPS)]
    curve = [(1.0, whole.value)]
    for out in (1, 2):
        sets = (sum(left[1:], left[0]) for left in combinations(groups, GROUPS - out))
        counts, distances = zip(*((s.count, s.distance(reference, shift)) for s in sets), strict=True)
        curve.append((sum(n / count for count in counts) / len(counts), sum(distances) / len(distances)))
    u, y = torch.tensor(curve, dtype=torch.float64).T
    line, parabola = (torch.linalg.solve(torch.vander(u[:k], increasing=True), y[:k])[0].item() for k in (2, 3))
    return Figure(parabola, whole.influence, bend=parabola - line)


@dataclass(frozen=True)
class _Sums:
    """Sums over pictures z (n, D) and a = z S_r^1/2, from which the distance of any union of sets is had."""

    count: int
    z: Tensor
    lengths: float
    products: Tensor

    @classmethod
    def of(cls, z: Tensor, root: Tensor) -> _Sums:
        a = z @ root
        return cls(len(z), z.sum(0), z.square().sum().item(), a.T @ a)

    def __add__(self, other: _Sums) -> _Sums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Sums(*(one + another for one, another in pairs))

    def distance(self, reference: Moments, shift: Tensor) -> float:
        """To the reference. shift: what was taken off the features."""
        n, mean = self.count, self.z / self.count
        carried = mean @ reference.root
        values = torch.linalg.eigvalsh((self.products - n * torch.outer(carried, carried)) / (n - 1))
        trace = (self.lengths - n * mean.square().sum()) / (n - 1) + reference.covariance.trace()
        gap = (shift + mean - reference.mean).square().sum()
        return (gap + trace - 2 * values.clamp_min(0).sqrt().sum()).item()
