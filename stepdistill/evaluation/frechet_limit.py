"""FD_inf: the Frechet distance at infinitely many images, extrapolated from subsets of those available.

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

GROUPS = 5  # of images, of which none, one and two are left out
PER_FEATURE = 1.5  # images needed per feature dimension


def frechet_limit(features: Tensor, reference: Moments, whole: Figure | None = None, seed: int = 0) -> Figure:
    """Computes FD_inf, the distance at infinitely many images: a curve through the distances of subsets, extrapolated
    to 1 / n = 0 (Chong and Forsyth 2020, section 3).

    The distance at n images exceeds the limit by b / n + c / n^2 + ... For small subsets, such as those of the paper's
    line, the second term is not small. So the subsets here are large, the curve is a parabola, and the subsets are
    balanced: images are divided into fifths at random (seeded), and distances are means over all sets that leave none,
    one and two fifths out (the second-order jackknife: Schucany, Gray and Owen 1971). `bend` is the parabola's excess
    over the line through the first two points: they diverge if n is not far above the feature dimension, and the
    interval widens by it. The influence is that of the whole set, as the terms in 1 / n have hardly any. The bias due
    to the reference's own size remains.

    Args:
        whole: `frechet_figure` of the same images, if already computed.

    Raises:
        InputError: there are fewer than 1.5 images per feature dimension, or fewer than two per fifth.
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
    fit = tuple((x / n, distance) for x, distance in curve)
    return Figure(parabola, whole.influence, bend=parabola - line, fit=fit)


@dataclass(frozen=True)
class _Sums:
    """Sums over images z (n, D) and a = z S_r^1/2, from which the distance of any union of sets follows."""

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
        """Computes the distance to the reference. shift: what was subtracted from the features."""
        n, mean = self.count, self.z / self.count
        carried = mean @ reference.root
        values = torch.linalg.eigvalsh((self.products - n * torch.outer(carried, carried)) / (n - 1))
        trace = (self.lengths - n * mean.square().sum()) / (n - 1) + reference.covariance.trace()
        gap = (shift + mean - reference.mean).square().sum()
        return (gap + trace - 2 * values.clamp_min(0).sqrt().sum()).item()
