"""Metrics equal their closed forms and brute force, and their intervals cover the truth."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepdistill.errors import InputError
from stepdistill.evaluation import measures
from stepdistill.evaluation.figures import difference
from stepdistill.evaluation.kernel import gaussian, mmd_figure, polynomial, within
from stepdistill.evaluation.manifold import prdc_figures, radii
from stepdistill.evaluation.measures import copies, diversity

MEAN, SPREAD = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64), 1.3  # of the images; the real ones are N(0, I)


def test_a_metric_is_one_file(tmp_path, monkeypatch):
    lines = (
        "from stepdistill.evaluation.measures.base import Metric",
        "from stepdistill.evaluation.measures.kid import KernelDistance",
        "class Odd(Metric):",
        "    name, keeps, better = 'odd', 'features', {'odd': 'lower'}",
    )
    (tmp_path / "odd.py").write_text("\n".join(lines))
    monkeypatch.setattr(measures, "__path__", [*measures.__path__, str(tmp_path)])
    found = measures._listed()
    assert set(found) == {*measures.METRICS, "odd"}
    assert found["odd"].__name__ == "Odd" and found["kid"] is measures.METRICS["kid"]


def test_the_metric_of_the_readme_is_one(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text()
    (code,) = re.findall(r"^(    from torch import Tensor\n.*?)^`needs`", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "sharpness.py").write_text(textwrap.dedent(code))
    monkeypatch.setattr(measures, "__path__", [*measures.__path__, str(tmp_path)])
    metric = measures._listed()["sharpness"]
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pictures[1, ..., 2:] = 90  # one edge in three
    kept = metric.see(SimpleNamespace(pictures=pictures))
    assert kept.tolist() == [0, 30] and metric.figures(kept, None)["sharpness"].value == 15


def draws(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mmd(x: torch.Tensor, y: torch.Tensor, kernel, scale: float = 1.0):
    return mmd_figure(x, y, kernel, within(y, kernel), scale)


def expected_polynomial(m1, s1, m2, s2) -> float:
    """E (x.y / D + 1)^3 for x ~ N(m1, s1^2 I), y ~ N(m2, s2^2 I), from their first three moments."""
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
    """The mean over y of E (x.y / D + 1)^3 for x ~ N(m, s^2 I), where x.y is normal."""
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
    """Also for images like the real ones, where the distance has no first-order term and the interval still holds."""
    y = scale * draws(400, 3, 999)
    own = within(y, kernel)
    for mean, spread in ((scale * MEAN, scale * SPREAD), (0 * MEAN, scale)):
        truth = expected(mean, spread, mean, spread) + own - 2 * given(mean, spread, y)
        found = [mmd_figure(mean + spread * draws(300, 3, i), y, kernel, own) for i in range(100)]
        assert sum(low <= truth <= high for low, high in (f.interval() for f in found)) >= 90
        assert abs(sum(f.value for f in found) / 100 - truth) < 0.3 * found[0].error  # unbiased: 3 standard errors
        pairs = zip(found[::2], found[1::2], strict=True)
        assert sum(difference(a, b, paired=False).contains_zero for a, b in pairs) >= 45


@KERNELS
def test_the_kernel_distance_of_many_gaussian_samples_is_the_closed_form(kernel, expected, given, scale):
    zero, x_is = (0 * MEAN, scale), (scale * MEAN, scale * SPREAD)
    truth = expected(*x_is, *x_is) + expected(*zero, *zero) - 2 * expected(*x_is, *zero)
    found = mmd(x_is[0] + x_is[1] * draws(3000, 3, 5), scale * draws(3000, 3, 6), kernel)
    assert abs(found.value - truth) < 2 * 1.96 * found.error and found.error < 0.1 * truth


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
    assert all((len(f.influence), f.unit) == (40, "pictures") for f in found.values())
    assert {n: f.trials for n, f in found.items()} == {"precision": 40, "recall": 30, "density": None, "coverage": 30}


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.2), (1.3, 0.8), (0.8, 1.0)])
def test_what_a_picture_does_to_recall_and_coverage_is_what_they_lose_without_it(scale, shift, monkeypatch):
    monkeypatch.setattr("stepdistill.evaluation.kernel.BLOCK", 70)
    x, y = scale * draws(40, 3, 2) + shift, draws(30, 3, 3)
    found = prdc_figures(x, y, radii(y))
    without = [prdc_figures(torch.cat([x[:i], x[i + 1 :]]), y, radii(y)) for i in range(40)]
    for name in ("recall", "coverage"):
        lost = torch.tensor([found[name].value - each[name].value for each in without], dtype=torch.float64)
        assert torch.allclose(found[name].influence, 39 * (lost - lost.mean()), atol=1e-12), name
    assert found["recall"].influence.any()


@pytest.mark.parametrize(("d", "scale"), [(4, 1.0), (4, 0.6), (16, 1.0), (16, 0.8), (64, 1.0)])
def test_intervals_of_precision_recall_density_and_coverage_are_about_other_pictures_of_the_model(d, scale):
    """For fixed real images, the truth is the mean over many sets of images; two sets of one model are equal.
    The jackknife's intervals of recall and coverage may be up to about twice as wide as necessary."""
    y = draws(200, d, 999)
    bounds = radii(y)
    found = [prdc_figures(scale * draws(200, d, i), y, bounds) for i in range(200)]
    for name in ("precision", "recall", "density", "coverage"):
        own = [figures[name] for figures in found]
        values = torch.tensor([f.value for f in own], dtype=torch.float64)
        truth, spread = values.mean().item(), values.std().item()
        assert sum(low <= truth <= high for low, high in (f.interval() for f in own)) >= 180, name
        equal = sum(difference(a, b, paired=False).contains_zero for a, b in zip(own[::2], own[1::2], strict=True))
        assert equal >= 90, (name, equal)
        claimed = torch.tensor([f.error for f in own]).square().mean().sqrt().item()
        if name in ("precision", "density"):
            assert claimed == pytest.approx(spread, rel=0.2), name
        elif spread > 0.5 / 200:  # half a real image
            assert 0.9 < claimed / spread < 2.2, name


@pytest.mark.parametrize(("d", "a", "b"), [(4, 1.0, 0.9), (16, 0.6, 0.7), (64, 1.0, 0.9)])
def test_paired_differences_of_precision_recall_density_and_coverage_cover_the_truth(d, a, b):
    """Two models of the same noise; in 16 dimensions precision and coverage of both are near 1."""
    y, found = draws(200, d, 999), []
    bounds = radii(y)
    for seed in range(100):
        noise = draws(200, d, seed)
        found.append([prdc_figures(scale * noise, y, bounds) for scale in (a, b)])
    for name in ("precision", "recall", "density", "coverage"):
        truth = sum(one[name].value - other[name].value for one, other in found) / 100
        gaps = [difference(one[name], other[name], paired=True) for one, other in found]
        assert sum(gap.low <= truth <= gap.high for gap in gaps) >= 90, name


@pytest.mark.parametrize(("kernel", "scale"), [(polynomial, 1.0), (gaussian, 5.0)], ids=["kid", "cmmd"])
def test_paired_differences_of_the_kernel_distance_cover_the_truth_and_runs_of_one_model_are_equal(kernel, scale):
    """The truth is the mean over many draws of the noise, which both models share. Two runs of one share half of it.
    In 8 dimensions: in 3 the cubic kernel's skewness leaves 92 to 94 % of 600 trials."""
    y = scale * draws(300, 8, 999)
    own, pairs, runs = within(y, kernel), [], []
    for seed in range(200):
        z, other = draws(200, 8, seed), draws(200, 8, seed + 1000)
        samples = (0.2 + z, 0.9 * z, 0.2 + 0.7 * z + 0.51**0.5 * other)
        first, second, again = (mmd_figure(scale * x, y, kernel, own) for x in samples)
        pairs.append((first, second))
        runs.append(difference(first, again, paired=True).contains_zero)
    truth = sum(one.value - other.value for one, other in pairs) / 200
    gaps = [difference(one, other, paired=True) for one, other in pairs]
    assert sum(gap.low <= truth <= gap.high for gap in gaps) >= 180 and sum(runs) >= 180


def test_a_model_that_draws_one_kind_of_picture_is_precise_and_covers_little():
    y = torch.cat([draws(60, 3, 0), draws(60, 3, 1) + 20])
    found = prdc_figures(draws(120, 3, 2), y, radii(y))
    assert found["precision"].value > 0.85 and found["coverage"].value < 0.55 and found["recall"].value < 0.55


def test_too_few_pictures_are_said_to_be():
    with pytest.raises(InputError, match="6 or more"):
        radii(draws(5, 2, 0))
    with pytest.raises(InputError, match="2 or more"):
        within(draws(1, 2, 0), polynomial)
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
    net = module._NoTrainLpips(net="alex", pnet_rand=True)  # the trunk's weights are not available: a random one
    a, b = (noise(3, seed).view(3, 3, 32, 32) for seed in (0, 1))
    with torch.no_grad():
        want = net(a / 255, b / 255, normalize=True).flatten()
    found = diversity.lpips(net, batch=2)(a, b)
    assert torch.allclose(found, want, rtol=1e-4) and (found > 0).all()
    assert (diversity.lpips(net)(a, a) == 0).all()
