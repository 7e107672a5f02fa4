"""The Frechet distance equals its closed forms and scipy's, its moments merge, and its interval is the right width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation.frechet import Moments, frechet_distance, frechet_figure, frechet_limit


def draws(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 101) -> Moments:
    return Moments(count, mean.double(), covariance.double() * (count - 1))


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.0])
    mean = torch.tensor([1.0, -2.0, 0.5])
    want = 1 + 4 + 0.25 + ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    found = frechet_distance(gaussian(mean, a.diag()), gaussian(torch.zeros(3), b.diag()))
    assert found == pytest.approx(want, rel=1e-12)


def test_distance_to_a_scaled_copy_is_the_closed_form():
    x = draws(300, 6) @ draws(6, 6, 1)
    moments = Moments.of(x)
    want = moments.covariance.trace().item() * (3 - 1) ** 2 + (3 - 1) ** 2 * moments.mean.square().sum().item()
    assert frechet_distance(Moments.of(3 * x), moments) == pytest.approx(want, rel=1e-10)


def test_distance_to_itself_is_zero_and_it_is_symmetric():
    a, b = Moments.of(draws(50, 8)), Moments.of(draws(60, 8, 1) * 2 + 1)
    assert frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


@pytest.mark.parametrize("n", [40, 500])  # fewer and more samples than features
def test_distance_equals_scipys_matrix_root(n):
    linalg = pytest.importorskip("scipy.linalg")
    d = 64
    x, y = draws(n, d) @ draws(d, d, 1) / 8, draws(700, d, 2) @ draws(d, d, 3) / 8 + 0.2
    s1, s2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    if n < d:  # scipy's root needs full rank; both get the same ridge
        s1 = s1 + 1e-3 * np.eye(d)
    root = linalg.sqrtm(s1 @ s2)
    gap = x.numpy().mean(0) - y.numpy().mean(0)
    want = gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)
    ours = gaussian(torch.from_numpy(x.numpy().mean(0)), torch.from_numpy(s1))
    assert frechet_distance(ours, Moments.of(y)) == pytest.approx(want, rel=1e-7)


def test_moments_of_parts_add_to_the_moments_of_the_whole():
    x = draws(97, 5) * 3 + 100
    parts = Moments.empty(5)
    for part in x.split([1, 40, 56]):
        parts = parts + Moments.of(part)
    whole = Moments.of(x)
    assert parts.count == 97
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(parts.scatter, whole.scatter, rtol=1e-10)
    assert np.allclose(parts.covariance.numpy(), np.cov(x.numpy().T), rtol=1e-10)


def test_interval_is_as_wide_as_the_distance_really_spreads():
    d, n = 12, 200
    reference = Moments.of(draws(5000, d, 99))
    mix = draws(d, d, 7) / d**0.5
    found = [frechet_figure(draws(n, d, seed) @ mix + 0.3, reference) for seed in range(60)]
    spread = torch.tensor([f.value for f in found]).std().item()
    claimed = torch.tensor([f.error for f in found]).median().item()
    assert claimed == pytest.approx(spread, rel=0.25)


def test_interval_is_around_the_distance():
    x, reference = draws(100, 6) + 0.5, Moments.of(draws(400, 6, 1))
    figure = frechet_figure(x, reference)
    assert figure.value == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    low, high = figure.interval()
    assert low < figure.value < high and abs(figure.influence.sum()) < 1e-9


def test_bad_features_are_refused():
    with pytest.raises(InputError, match="NaN"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match="2 or more"):
        frechet_distance(Moments.of(draws(1, 3)), Moments.of(draws(5, 3)))
    with pytest.raises(InputError, match="one extractor"):
        frechet_distance(Moments.of(draws(5, 3)), Moments.of(draws(5, 4)))


def test_features_that_are_all_alike_have_a_limit_too():
    limit, r2 = frechet_limit(torch.ones(20, 3), Moments.of(draws(50, 3)))
    assert limit.value == pytest.approx(frechet_distance(Moments.of(torch.ones(20, 3)), Moments.of(draws(50, 3))))
    assert (r2.value, r2.error) == (1.0, 0.0)
