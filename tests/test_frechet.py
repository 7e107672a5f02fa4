"""The Frechet distance equals its closed forms and scipy's, its moments merge, and its interval has the right width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import difference
from stepdistill.evaluation.frechet import Moments, frechet_distance, frechet_figure
from stepdistill.evaluation.frechet_limit import frechet_limit
from stepdistill.evaluation.kernel import mmd_figure, polynomial, within


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


def test_interval_is_around_the_distance():
    x, reference = draws(100, 6) + 0.5, Moments.of(draws(400, 6, 1))
    figure = frechet_figure(x, reference)
    assert figure.value == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    low, high = figure.interval()
    assert low < figure.value < high and abs(figure.influence.sum()) < 1e-9


@pytest.mark.parametrize(("n", "d"), [(30, 50), (60, 8)])  # fewer and more samples than features
def test_the_distance_and_each_pictures_influence_are_those_of_the_optimal_transport(n, d):
    x, reference = draws(n, d, 0) @ draws(d, d, 1) / d**0.5, Moments.of(draws(400, d, 2))
    figure, moments = frechet_figure(x, reference), Moments.of(x)
    assert figure.value == pytest.approx(frechet_distance(moments, reference), rel=1e-7)
    root = reference.root
    values, vectors = torch.linalg.eigh(root @ moments.covariance @ root)
    inverse = torch.where(values > 1e-9, values.clamp_min(1e-12).rsqrt(), 0.0)
    transport = root @ vectors @ inverse.diag() @ vectors.T @ root
    z_i = x - moments.mean
    want = 2 * z_i @ (moments.mean - reference.mean) + ((z_i - z_i @ transport) * z_i).sum(1)
    assert torch.allclose(figure.influence, want - want.mean(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [30, 60])
def test_a_reference_of_fewer_pictures_than_features_has_the_distance_of_the_general_matrix_root(n):
    x, y = draws(n, 50, 0), draws(20, 50, 1) + 0.5
    roots = np.sqrt(np.linalg.eigvals(np.cov(x.numpy().T) @ np.cov(y.numpy().T)).astype(complex)).real
    want = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * roots.sum()
    assert frechet_figure(x, Moments.of(y)).value == pytest.approx(want.item(), rel=1e-6)


def known(d: int, spectrum: str, shift: float, scale: float):
    """Exact moments of N(0, S), the root of the covariance of N(m, scale^2 S), its mean m, and their distance."""
    eigenvalues = torch.ones(d, dtype=torch.float64)
    if spectrum == "decaying":  # as 1 / i, close to the features of networks
        eigenvalues = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    eigenvalues *= d / eigenvalues.sum()
    axes = torch.linalg.qr(draws(d, d, 5))[0]
    mean = axes @ (shift * (eigenvalues / d).sqrt())
    reference = gaussian(torch.zeros(d), (axes * eigenvalues) @ axes.T, 10**6)
    truth = mean.square().sum() + (scale - 1) ** 2 * eigenvalues.sum()
    return reference, scale * axes * eigenvalues.sqrt(), mean, truth.item()


MODELS = pytest.mark.parametrize(
    ("spectrum", "shift", "scale"),
    [(s, *of) for s in ("flat", "decaying") for of in ((0.0, 1.0), (0.5, 1.1), (1.0, 1.3))],
)


@MODELS
@pytest.mark.parametrize(("n", "d"), [(200, 8), (1000, 64), (40, 64)])
def test_intervals_of_the_distance_cover_its_mean_over_other_pictures_and_two_runs_are_equal(
    n, d, spectrum, shift, scale
):
    """The mean is at this n, where the distance exceeds that of the distributions. Includes models as good as the real
    images, for which the distance has no first-order term, and n below the number of features: there intervals are
    wider than necessary. Nowhere are they narrower."""
    reference, root, mean, truth = known(d, spectrum, shift, scale)
    found = [frechet_figure(mean + draws(n, d, seed) @ root.T, reference) for seed in range(200)]
    expected = sum(f.value for f in found) / 200
    assert expected > truth
    assert sum(low <= expected <= high for low, high in (f.interval() for f in found)) >= 180
    spread = torch.tensor([f.value for f in found], dtype=torch.float64).std().item()
    claimed = torch.tensor([f.error for f in found], dtype=torch.float64).square().mean().sqrt().item()
    assert 1 <= claimed / spread < 1.65
    pairs = [difference(a, b, paired=False).contains_zero for a, b in zip(found[::2], found[1::2], strict=True)]
    assert sum(pairs) >= 90


@pytest.mark.parametrize(("n", "d"), [(200, 8), (300, 64), (40, 64)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_paired_differences_of_the_distance_cover_the_truth_and_runs_of_one_model_are_equal(n, d, spectrum):
    """The truth is the mean over many draws of the noise, which both models share. Two runs of one share half of it."""
    (reference, root, mean, _), (_, less, *_) = known(d, spectrum, 0.5, 1.1), known(d, spectrum, 0.5, 0.9)
    pairs, runs = [], []
    for seed in range(100):
        z, other = draws(n, d, seed), draws(n, d, seed + 1000)
        samples = (mean + z @ root.T, z @ less.T, mean + (0.7 * z + 0.51**0.5 * other) @ root.T)
        first, second, again = (frechet_figure(x, reference) for x in samples)
        pairs.append((first, second))
        runs.append(difference(first, again, paired=True).contains_zero)
    truth = sum(one.value - other.value for one, other in pairs) / 100
    gaps = [difference(one, other, paired=True) for one, other in pairs]
    assert sum(gap.low <= truth <= gap.high for gap in gaps) >= 90 and sum(runs) >= 90


def test_below_the_feature_dimension_the_distance_may_order_two_models_wrongly():
    """A model that draws the real distribution and one with 0.93 of its spread, in 64 dimensions: with 50 images the
    worse one has the lower mean distance, with 1,000 the higher one, as has its kernel distance with 50."""
    reference, root, _, _ = known(64, "flat", 0.0, 1.0)
    y = draws(500, 64, 999) @ root.T
    own = within(y, polynomial)
    means = {}
    for n in (50, 1000):
        each = [draws(n, 64, seed) @ root.T for seed in range(40)]
        means[n] = [sum(frechet_figure(s * x, reference).value for x in each) / 40 for s in (1.0, 0.93)]
        means[n] += [sum(mmd_figure(s * x, y, polynomial, own).value for x in each) / 40 for s in (1.0, 0.93)]
    assert means[50][0] > 1.02 * means[50][1] and means[1000][0] < means[1000][1]
    assert means[50][2] < means[50][3] and means[1000][2] < means[1000][3]


@MODELS
@pytest.mark.parametrize(("n", "d"), [(200, 8), (1000, 64), (200, 64), (96, 64)])
def test_intervals_of_fd_inf_cover_the_known_distance_and_two_runs_are_equal(n, d, spectrum, shift, scale):
    """Down to 1.5 images per feature, the fewest allowed."""
    reference, root, mean, truth = known(d, spectrum, shift, scale)
    samples = (mean + draws(n, d, seed) @ root.T for seed in range(100))
    found = [frechet_limit(x, reference) for x in samples]
    assert sum(low <= truth <= high for low, high in (f.interval() for f in found)) >= 90
    pairs = [difference(a, b, paired=False).contains_zero for a, b in zip(found[::2], found[1::2], strict=True)]
    assert sum(pairs) >= 45


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_fd_inf_has_next_to_none_of_the_distances_bias_and_is_no_wider_where_pictures_are_many(spectrum):
    reference, root, mean, truth = known(64, spectrum, 0.5, 1.1)
    samples = [mean + draws(1000, 64, seed) @ root.T for seed in range(60)]
    plain = [frechet_figure(x, reference) for x in samples]
    limit = [frechet_limit(x, reference, whole) for x, whole in zip(samples, plain, strict=True)]
    biases = [sum(f.value for f in side) / 60 - truth for side in (plain, limit)]
    assert biases[0] > 0.5 and abs(biases[1]) < 0.1 * biases[0]
    assert all(a.half < 1.05 * b.half for a, b in zip(limit, plain, strict=True))


def test_fd_inf_is_the_parabola_through_sets_that_leave_none_one_and_two_fifths_out(monkeypatch):
    """With a fixed order, the fifths are known."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    x, reference = draws(60, 4, 0) + 0.2, Moments.of(draws(500, 4, 1))
    fifths, y = x.tensor_split(5), []
    for leave in range(3):
        sets = [torch.cat(left) for left in itertools.combinations(fifths, 5 - leave)]
        y.append(sum(frechet_distance(Moments.of(part), reference) for part in sets) / len(sets))
    u = [1 / 60, 1 / 48, 1 / 36]
    limit = frechet_limit(x, reference)
    assert limit.value == pytest.approx(np.polyfit(u, y, 2)[-1], rel=1e-9)
    assert limit.bend == pytest.approx(limit.value - np.polyfit(u[:2], y[:2], 1)[-1], rel=1e-6)
    assert np.array(limit.fit) == pytest.approx(np.array([u, y]).T, rel=1e-9)
    weights, want = np.linalg.inv(np.vander(u, 3))[-1], torch.zeros(60, dtype=torch.float64)
    for leave, weight in enumerate(weights):
        for left in (sets := list(itertools.combinations(range(5), 5 - leave))):
            rows = torch.cat([torch.arange(60).tensor_split(5)[i] for i in left])
            want[rows] += weight * 60 / len(rows) * frechet_figure(x[rows], reference).influence / len(sets)
    assert torch.allclose(limit.influence, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
@pytest.mark.parametrize("common", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("n", [96, 128, 200])
def test_two_runs_of_one_model_have_one_fd_inf_with_the_same_noise_or_another(n, common, spectrum):
    """Paired, for runs whose features share part of their noise; down to 1.5 images per feature."""
    reference, root, _, _ = known(64, spectrum, 0.0, 1.0)
    equal = 0
    for seed in range(100):
        z, one, other = (draws(n, 64, seed + 1000 * k) for k in range(3))
        runs = [(common**0.5 * z + (1 - common) ** 0.5 * own) @ root.T for own in (one, other)]
        first, second = (frechet_limit(x, reference) for x in runs)
        equal += difference(first, second, paired=True).contains_zero
    assert equal >= 90


def test_bad_features_are_refused():
    with pytest.raises(InputError, match="NaN"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match="2 or more"):
        frechet_distance(Moments.of(draws(1, 3)), Moments.of(draws(5, 3)))
    with pytest.raises(InputError, match="one extractor"):
        frechet_distance(Moments.of(draws(5, 3)), Moments.of(draws(5, 4)))


def test_features_that_are_all_alike_have_a_limit_too():
    limit = frechet_limit(torch.ones(20, 3), Moments.of(draws(50, 3)))
    assert limit.value == pytest.approx(frechet_distance(Moments.of(torch.ones(20, 3)), Moments.of(draws(50, 3))))
    assert limit.half == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "d", "least"), [(9, 2, 10), (14, 10, 15)])
def test_too_few_pictures_for_fd_inf_are_said_to_be(n, d, least):
    with pytest.raises(InputError, match=f"got {n} of {d} features; allowed: {least} or more"):
        frechet_limit(draws(n, d), Moments.of(draws(50, d)))
