"""Metrics equal their closed forms and brute force, and their intervals cover the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation.frechet import Moments, frechet_distance, frechet_figure, frechet_limit
from stepdistill.evaluation.kernel import gaussian, mmd_figure, polynomial, within
from stepdistill.evaluation.manifold import prdc_figures, radii
from stepdistill.evaluation.measures import copies, diversity

MEAN, SPREAD = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64), 1.3  # of the pictures; the real ones are N(0, I)


def draws(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mmd(x: torch.Tensor, y: torch.Tensor, kernel, scale: float = 1.0):
    return mmd_figure(x, y, kernel, within(y, kernel), scale)


def expected_polynomial(m1, s1, m2, s2) -> float:
    """E (x.y / D + 1)^3 of x ~ N(m1, s1^2 I), y ~ N(m2, s2^2 I), from their first three moments."""
    eye, d = torch.eye(len(m1), dtype=torch.float64), len(m1)

    def moments(m, s):
        second = torch.outer(m, m) + s**2 * eye
        mixed = torch.einsum("ij,k->ijk", s**2 * eye, m)
        third = torch.einsum("i,j,k->ijk", m, m, m) + mixed + mixed.permute(0, 2, 1) + mixed.permute(2, 0, 1)
        return m, second, third

    of_x, of_y = moments(m1, s1), moments(m2, s2)
    first, second, third = ((of_x[i] * of_y[i]).sum().item() / d ** (i + 1) for i in range(3))
    return 1 + 3 * first + 3 * second + third


def expected_gaussian(m1, s1, m2, s2, sigma: float = 10.0) -> float:
    """E exp(-|x - y|^2 / 2 sigma^2): x - y is normal too, so it is a Gaussian integral."""
    total = sigma**2 + s1**2 + s2**2
    return (sigma**2 / total) ** (len(m1) / 2) * math.exp(-(m1 - m2).square().sum().item() / (2 * total))


@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_the_kernel_distance_is_that_of_all_pairs_of_different_samples(kernel):
    x, y = draws(9, 4, 0) + 0.3, draws(7, 4, 1)

    def k(a, b):
        return kernel(a[None], b[None]).item()

    pairs = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / len(z) / (len(z) - 1) for z in (x, y)]
    want = sum(pairs) - 2 * sum(k(a, b) for a in x for b in y) / 63
    assert mmd(x, y, kernel).value == pytest.approx(want, rel=1e-10)
    assert mmd(x, y, kernel, 1000.0).value == pytest.approx(1000 * want, rel=1e-10)


@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_the_kernel_distance_is_the_same_in_blocks(kernel, monkeypatch):
    x, y = draws(50, 3, 0), draws(40, 3, 1)
    whole = mmd(x, y, kernel)
    monkeypatch.setattr("stepdistill.evaluation.kernel.BLOCK", 120)
    parts = mmd(x, y, kernel)
    assert parts.value == pytest.approx(whole.value, rel=1e-10)
    assert torch.allclose(parts.influence, whole.influence, atol=1e-12)


def given_polynomial(m, s, y) -> float:
    """The mean over y of E (x.y / D + 1)^3 of x ~ N(m, s^2 I), where x.y is normal."""
    a, variance = 1 + y @ m / y.shape[1], s**2 * y.square().sum(1) / y.shape[1] ** 2
    return (a**3 + 3 * a * variance).mean().item()


def given_gaussian(m, s, y) -> float:
    return sum(expected_gaussian(m, s, row, 0.0) for row in y) / len(y)


KERNELS = pytest.mark.parametrize(
    ("kernel", "expected", "given", "scale"),
    [(polynomial, expected_polynomial, given_polynomial, 1.0), (gaussian, expected_gaussian, given_gaussian, 10.0)],
    ids=["kid", "cmmd"],
)


@KERNELS
def test_intervals_of_the_kernel_distance_to_given_real_pictures_cover_its_closed_form(kernel, expected, given, scale):
    """Of pictures like the real ones too: there the distance has no first-order term, and the interval holds still."""
    y = scale * draws(400, 3, 999)
    own = within(y, kernel)
    for mean, spread in ((scale * MEAN, scale * SPREAD), (0 * MEAN, scale)):
        truth = expected(mean, spread, mean, spread) + own - 2 * given(mean, spread, y)
        found = [mmd_figure(mean + spread * draws(300, 3, i), y, kernel, own) for i in range(100)]
        assert sum(low <= truth <= high for low, high in (f.interval() for f in found)) >= 90
        assert abs(sum(f.value for f in found) / 100 - truth) < 0.3 * found[0].error  # no bias: three errors of a mean


@KERNELS
def test_the_kernel_distance_of_many_gaussian_samples_is_the_closed_form(kernel, expected, given, scale):
    zero, x_is = (0 * MEAN, scale), (scale * MEAN, scale * SPREAD)
    truth = expected(*x_is, *x_is) + expected(*zero, *zero) - 2 * expected(*x_is, *zero)
    found = mmd(x_is[0] + x_is[1] * draws(3000, 3, 5), scale * draws(3000, 3, 6), kernel)
    assert abs(found.value - truth) < 2 * 1.96 * found.error and found.error < 0.1 * truth


def limits(n: int, trials: int):
    """The truth, and FD_inf of Gaussians against exactly known moments."""
    reference = Moments(10_001, torch.zeros(3, dtype=torch.float64), 10_000 * torch.eye(3, dtype=torch.float64))
    truth = MEAN.square().sum().item() + 3 * (SPREAD - 1) ** 2
    return truth, [(MEAN + SPREAD * draws(n, 3, i), reference) for i in range(trials)]


def test_fd_inf_has_no_bias_to_speak_of_and_its_interval_covers_the_truth():
    truth, trials = limits(150, 100)
    found = [frechet_limit(*trial)[0] for trial in trials]
    assert 90 <= sum(low <= truth <= high for low, high in (f.interval() for f in found)) < 100
    bias = sum(f.value for f in found) / 100 - truth
    plain = sum(frechet_figure(*trial).value for trial in trials) / 100 - truth
    assert plain > 0.02 and abs(bias) < plain / 3


def test_the_interval_of_r2_is_not_narrower_than_it_really_spreads():
    _, trials = limits(400, 60)
    found = [frechet_limit(*trial)[1] for trial in trials]
    assert all(f.value <= 1 for f in found)
    spread = torch.tensor([f.value for f in found]).std().item()
    assert 1 < torch.tensor([f.error for f in found]).median().item() / spread < 2  # it hangs on second-order terms


def test_fd_inf_is_the_line_through_the_distances_of_parts(monkeypatch):
    """With one order for all, its parts are known."""
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    x, reference = draws(60, 4, 0) + 0.2, Moments.of(draws(500, 4, 1))
    y = [sum(frechet_distance(Moments.of(p), reference) for p in x.tensor_split(k)) / k for k in range(1, 6)]
    slope, at_zero = np.polyfit(np.arange(1, 6) / 60, y, 1)
    limit, r2 = frechet_limit(x, reference)
    assert slope > 0 and limit.value == pytest.approx(at_zero, rel=1e-9)
    assert r2.value == pytest.approx(np.corrcoef(np.arange(1, 6), y)[0, 1] ** 2, rel=1e-9)


def test_with_fewer_pictures_than_features_the_distance_and_its_influence_are_the_same():
    x, reference = draws(30, 50, 0) @ draws(50, 50, 1) / 7, Moments.of(draws(400, 50, 2))
    figure, moments = frechet_figure(x, reference), Moments.of(x)
    assert figure.value == pytest.approx(frechet_distance(moments, reference), rel=1e-7)
    root = reference.root
    values, vectors = torch.linalg.eigh(root @ moments.covariance @ root)
    inverse = torch.where(values > 1e-9, values.clamp_min(1e-12).rsqrt(), 0.0)
    transport = root @ vectors @ inverse.diag() @ vectors.T @ root
    z_i = x - moments.mean
    want = 2 * z_i @ (moments.mean - reference.mean) + ((z_i - z_i @ transport) * z_i).sum(1)
    assert torch.allclose(figure.influence, want - want.mean(), rtol=1e-6, atol=1e-7)


def brute_prdc(x, y) -> dict[str, float]:
    def distance(a, b):
        return (a - b).square().sum().item()

    def balls(z, k):
        return [(a, sorted(distance(a, b) for j, b in enumerate(z) if j != i)[k - 1]) for i, a in enumerate(z)]

    def held(a, of) -> int:
        return sum(distance(a, centre) <= radius for centre, radius in of)

    real3, real5, own3 = balls(y, 3), balls(y, 5), balls(x, 3)
    return {
        "precision": sum(held(a, real3) > 0 for a in x) / len(x),
        "recall": sum(held(b, own3) > 0 for b in y) / len(y),
        "density": sum(held(a, real5) for a in x) / 5 / len(x),
        "coverage": sum(any(held(a, [ball]) for a in x) for ball in real5) / len(y),
    }


def test_precision_recall_density_and_coverage_are_those_of_brute_force(monkeypatch):
    x, y = 0.8 * draws(40, 4, 0) + torch.tensor([1.2, 0, 0, 0]), draws(30, 4, 1)
    want = brute_prdc(x, y)
    assert 1.0 not in want.values() and 0.0 not in want.values()
    for block in (1 << 24, 70):
        monkeypatch.setattr("stepdistill.evaluation.kernel.BLOCK", block)
        found = prdc_figures(x, y, radii(y))
        assert {name: f.value for name, f in found.items()} == pytest.approx(want, rel=1e-12)
    assert {n: (len(f.influence), f.unit) for n, f in found.items()} == {
        "precision": (40, "pictures"), "density": (40, "pictures"),
        "recall": (30, "real pictures"), "coverage": (30, "real pictures"),
    }  # fmt: skip


def test_a_model_that_draws_one_kind_of_picture_is_precise_and_covers_little():
    y = torch.cat([draws(60, 3, 0), draws(60, 3, 1) + 20])
    found = prdc_figures(draws(120, 3, 2), y, radii(y))
    assert found["precision"].value > 0.85 and found["coverage"].value < 0.55 and found["recall"].value < 0.55


def test_too_few_pictures_are_said_to_be():
    with pytest.raises(InputError, match="6 or more"):
        radii(draws(5, 2, 0))
    with pytest.raises(InputError, match="2 or more"):
        within(draws(1, 2, 0), polynomial)
    with pytest.raises(InputError, match="10 or more"):
        frechet_limit(draws(9, 2, 0), Moments.of(draws(9, 2, 0)))
    with pytest.raises(InputError, match="2 or more"):
        diversity.diversity_figure(draws(4, 1, 0)[:, None], diversity.cosine)


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3072), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_nearness_is_that_of_brute_force_and_zero_for_a_copy(monkeypatch):
    monkeypatch.setattr("stepdistill.evaluation.kernel.BLOCK", 60)
    monkeypatch.setattr(copies, "NEIGHBOURS", 5)
    x, y = noise(20, 0), noise(15, 1)
    x[3] = y[7]
    near = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").sort().values[:, :5]
    found = copies.nearness(x, y)
    assert torch.allclose(found, near[:, 0] / near.mean(1), rtol=1e-5) and found[3] == 0
    own = torch.cdist(y.double(), y.double()).fill_diagonal_(torch.inf).sort().values[:, :5]
    assert torch.allclose(copies.nearness(y, y, but_itself=True), own[:, 0] / own.mean(1), rtol=1e-5)


def test_the_distance_between_prompts_pictures_is_the_mean_over_their_pairs():
    groups = draws(5 * 4, 6, 0).view(5, 4, 6)
    figure = diversity.diversity_figure(groups, diversity.cosine)
    pairs = [[1 - torch.cosine_similarity(g[i], g[j], dim=0) for i in range(4) for j in range(i)] for g in groups]
    assert figure.value == pytest.approx(torch.tensor(pairs).mean().item(), rel=1e-6)
    assert figure.unit == "prompts" and len(figure.influence) == 5
    same = groups[:, :1].expand(-1, 4, -1)
    assert diversity.diversity_figure(same, diversity.cosine).value == pytest.approx(0, abs=1e-12)


def test_lpips_is_torchmetrics():
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    net = module._NoTrainLpips(net="alex", pnet_rand=True)  # its trunk is not here: a random one
    a, b = (noise(3, seed).view(3, 3, 32, 32) for seed in (0, 1))
    with torch.no_grad():
        want = net(a / 255, b / 255, normalize=True).flatten()
    found = diversity.lpips(net, batch=2)(a, b)
    assert torch.allclose(found, want, rtol=1e-4) and (found > 0).all()
    assert (diversity.lpips(net)(a, a) == 0).all()
