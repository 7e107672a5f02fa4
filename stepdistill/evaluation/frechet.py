"""The Frechet distance between two sets of features, from float64 moments that can be accumulated and merged.

    moments = Moments.empty(1280)
    for features in batches: moments = moments + Moments.of(features)
    frechet_distance(moments, reference)

FD = |m - m_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2)          (Dowson & Landau 1982; Heusel et al. 2017, eq. 6)

The root's trace is the sum of the roots of a symmetric matrix's eigenvalues: no general matrix root is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of features. `a + b` gives the moments of the union (Chan et al. 1979).

    Attributes:
        count: n. mean: (D,) float64. scatter: (D, D) float64, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """The moments of no features."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Computes the moments of features (N, D).

        Raises:
            InputError: a feature is not finite, or the shape is not (N, D).
        """
        x = _finite(features)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        n = self.count + other.count
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.count * other.count / n)
        return Moments(n, self.mean + gap * (other.count / n), scatter)

    @cached_property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D).

        Raises:
            InputError: there are fewer than two features.
        """
        if self.count < 2:
            raise InputError(f"features for a covariance: got {self.count}; allowed: 2 or more")
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root (D, D) of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(moments: Moments, reference: Moments) -> float:
    """Computes the Frechet distance between two sets, clamped at 0.

    Raises:
        InputError: the features have different lengths, or a set has fewer than two.
    """
    root = _checked(reference, len(moments.mean)).root
    values = torch.linalg.eigvalsh(root @ moments.covariance @ root)
    gap = (moments.mean - reference.mean).square().sum()
    traces = moments.covariance.trace() + reference.covariance.trace()
    return max(0.0, float(gap + traces - 2 * values.clamp_min(0).sqrt().sum()))


def frechet_figure(features: Tensor, reference: Moments) -> Figure:
    """Computes the distance of features (N, D) to a reference, with the influence of each of them.

    By the infinitesimal jackknife (Jaeckel 1972; Efron 1982), the bootstrap's limit, sample i moves the distance by
    IF_i / N, IF_i = 2 (m - m_r).z_i + |z_i|^2 - tr S - (z_i^T T z_i - tr T S), where z_i = x_i - m and
    T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2 is the optimal transport. This takes one eigendecomposition,
    resampling one per resample. The interval is for the estimate at this N: it covers neither the distance's bias,
    which falls as 1/N, nor the reference's own sampling error.
    """
    x = _finite(features)
    reference = _checked(reference, x.shape[1])
    n = len(x)
    if n < 2:
        raise InputError(f"features for a covariance: got {n}; allowed: 2 or more")
    mean = x.mean(0)
    z_i = x - mean
    roots, carried = _transported(x, z_i, reference)
    gap, lengths = mean - reference.mean, z_i.square().sum(1)
    distance = gap.square().sum() + lengths.sum() / (n - 1) + reference.covariance.trace() - 2 * roots.sum()
    # tr S and tr T S are the means of their own terms, so centring removes them.
    influence = 2 * z_i @ gap + lengths - (n - 1) * carried
    return Figure(max(0.0, distance.item()), influence - influence.mean())


def _transported(x: Tensor, z_i: Tensor, reference: Moments) -> tuple[Tensor, Tensor]:
    """Of x (N, D) and z_i = x_i - m: the roots of the eigenvalues of S_r^1/2 S S_r^1/2; z_i^T T z_i / (N - 1), (N,).

    The eigenvalues are those of the smaller of A^T A and A A^T, A = z S_r^1/2 / sqrt(N - 1); A A^T needs no root.
    """
    n, dim = x.shape
    if n < dim:
        values, vectors = torch.linalg.eigh(z_i @ reference.covariance @ z_i.T / (n - 1))
        roots = values.clamp_min(0).sqrt()
        return roots, vectors.square() @ roots
    rooted = x @ reference.root
    a = (rooted - rooted.mean(0)) / math.sqrt(n - 1)
    values, vectors = torch.linalg.eigh(a.T @ a)
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(values > values[-1].clamp_min(0) * 1e-10, 1 / roots, 0.0)
    return roots, (a @ vectors).square() @ inverse


def _finite(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise InputError(f"features: got shape {tuple(features.shape)}; allowed: (N, D)")
    x = features.to(torch.float64)
    if not torch.isfinite(x).all():
        raise InputError("features: got NaN or infinity; allowed: finite numbers; look at the pictures they come from")
    return x


def _checked(reference: Moments, length: int) -> Moments:
    if len(reference.mean) != length:
        raise InputError(
            f"features: got length {length} against a reference of {len(reference.mean)}; allowed: both from one "
            "extractor"
        )
    return reference
