"""FD_inf: the Frechet distance at infinitely many images, extrapolated from subsets of those available.

whole = frechet_figure(features, reference)
frechet_limit(features, reference, whole)
"""

from __future__ import annotations

import math
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
    interval widens by it. An image's influence is that on the parabola: the sum of those on the sets that it is in,
    each weighted as its distance is. The bias due to the reference's own size remains.

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
    fifths = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tensor_split(GROUPS)
    curve, influences = [(1.0, whole.value)], [whole.influence.to(torch.float64)]
    for out in (1, 2):
        sets = [torch.cat(left) for left in combinations(fifths, GROUPS - out)]
        inverse_counts, distance, influence = 0.0, 0.0, torch.zeros(n, dtype=torch.float64)
        for rows in sets:
            part, share = frechet_figure(features[rows], reference), n / len(rows) / len(sets)
            inverse_counts += share
            distance += part.value / len(sets)
            influence[rows] += share * part.influence
        curve.append((inverse_counts, distance))
        influences.append(influence)
    u, y = torch.tensor(curve, dtype=torch.float64).T
    # the first row of the inverse: how the value at 1 / n = 0 weighs the points
    line, parabola = (torch.linalg.inv(torch.vander(u[:k], increasing=True))[0] for k in (2, 3))
    value = (parabola @ y).item()
    influence = parabola @ torch.stack(influences)
    fit = tuple((x / n, distance) for x, distance in curve)
    return Figure(value, influence, bend=value - (line @ y[:2]).item(), fit=fit)
