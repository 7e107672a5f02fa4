"""Intervals of figures, shares, differences and ratios, checked against simulation and closed forms."""

from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.figures import Figure, Ratio, difference, log_ratio, score_interval
from stepdistill.evaluation.measures.attributes import _share


def draws(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_the_textbooks():
    values = draws(50, 0)
    figure = Figure.mean(values)
    assert figure.error == pytest.approx(values.std().item() / 50**0.5, rel=1e-12)
    low, high = figure.interval()
    assert (low + high) / 2 == pytest.approx(values.mean().item()) and high - low == pytest.approx(
        3.919928 * figure.error
    )


def test_the_intervals_of_means_and_of_their_differences_and_ratios_cover_the_truth():
    """With 200 trials at 95 %, a count below 183 happens once in 5,000."""
    covered = {"mean": 0, "paired": 0, "unpaired": 0, "ratio": 0}
    for seed in range(200):
        common, a, b = (draws(100, 3 * seed + i) for i in range(3))
        first, second = Figure.mean(4.3 + common + 0.2 * a), Figure.mean(4 + common + 0.2 * b)
        low, high = first.interval()
        covered["mean"] += low <= 4.3 <= high
        gap = difference(first, second, paired=True)
        covered["paired"] += gap.low <= 0.3 <= gap.high
        gap = difference(first, Figure.mean(4 + a), paired=False)
        covered["unpaired"] += gap.low <= 0.3 <= gap.high
        found = Ratio.of(first.value / second.value, log_ratio(first, second).half)
        covered["ratio"] += found.low <= 4.3 / 4 <= found.high
    assert all(183 <= count < 200 for count in covered.values()), covered


def test_a_ratio_turned_over_has_the_ends_turned_over():
    found = Ratio.of(0.5, 0.1)
    assert found.low < 0.5 < found.high and found.low * found.high == pytest.approx(0.25)
    assert (found.inverse.low, found.inverse.value, found.inverse.high) == pytest.approx(
        (1 / found.high, 2.0, 1 / found.low)
    )
    assert Ratio.of(0.5, None).inverse == Ratio(2.0, None, None)


def test_a_paired_difference_sees_what_an_unpaired_one_cannot():
    common, a = draws(100, 1), draws(100, 2)
    first, second = Figure.mean(common + 0.1 + 0.05 * a), Figure.mean(common)
    paired, unpaired = (difference(first, second, paired=p) for p in (True, False))
    assert paired.value == pytest.approx(unpaired.value)
    assert not paired.contains_zero and unpaired.contains_zero and paired.paired and not unpaired.paired
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


def test_a_figure_is_equal_to_itself():
    figure = Figure.mean(draws(30, 4))
    assert difference(figure, figure, paired=True).contains_zero


def test_what_two_figures_are_off_by_alike_is_not_in_their_paired_difference():
    influence = draws(50, 5)
    influence -= influence.mean()
    a, b = Figure(3.0, influence, bend=0.8), Figure(2.5, influence, bend=0.7)
    assert a.half == pytest.approx((1.959964**2 * a.error**2 + 0.8**2) ** 0.5)
    assert difference(a, b, paired=True).high == pytest.approx(0.5 + 0.1)
    assert difference(a, b, paired=False).high == pytest.approx(0.5 + (a.half**2 + b.half**2) ** 0.5)


@pytest.mark.parametrize(("right", "of"), [(10, 10), (0, 10), (8, 10), (1, 30), (1999, 2000)])
def test_the_interval_of_a_share_is_scipys_wilson(right, of):
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert Figure.share(torch.arange(of) < right).interval() == pytest.approx((want.low, want.high), abs=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.98])
def test_intervals_of_shares_cover_the_truth_within_0_and_1(share):
    covered = 0
    for seed in range(400):
        low, high = Figure.share(torch.rand(60, generator=torch.Generator().manual_seed(seed)) < share).interval()
        assert 0 <= low < high <= 1
        covered += low <= share <= high
    assert 360 <= covered < 400


def test_the_interval_of_a_share_of_questions_is_as_wide_as_their_pictures_have_it():
    """Four fully correlated questions per image carry the information of one, and the interval reflects it."""

    def judged(seed: int, together: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        right = torch.rand(80, 1 if together else 4, generator=generator) < 0.93
        asked = torch.rand(80, 4, generator=generator) < 0.7
        return torch.where(asked, right.expand(80, 4).to(torch.int8), -1)

    for together in (True, False):
        ends = [_share(judged(seed, together)).interval() for seed in range(300)]
        covered = sum(low <= 0.93 <= high for low, high in ends)
        assert 270 <= covered < 300 and max(high for _, high in ends) <= 1, (together, covered)


@pytest.mark.parametrize(
    ("a", "b", "ends"),
    [((56, 70), (48, 80), (0.0524, 0.3339)), ((9, 10), (3, 10), (0.1705, 0.8090)),
     ((5, 56), (0, 29), (-0.0381, 0.1926)), ((0, 10), (0, 20), (-0.1611, 0.2775)),
     ((10, 10), (0, 20), (0.6791, 1.0))],
)  # fmt: skip
def test_the_difference_of_two_shares_is_newcombes(a, b, ends):
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10."""
    one, other = (Figure.share(torch.arange(of) < right) for right, of in (a, b))
    found = difference(one, other, paired=False)
    assert (found.low, found.high) == pytest.approx(ends, abs=6e-5)


@pytest.mark.parametrize(("both", "a", "b", "ends"), [(36, 12, 2, (0.0569, 0.3404)), (36, 14, 0, (0.1528, 0.4167))])
def test_the_difference_of_paired_shares_is_newcombes(both, a, b, ends):
    """Newcombe 1998, Statistics in Medicine 17, 2635-2650, table III, method 10. both, a, b: right in both, in a alone
    and in b alone, of 50."""
    one = torch.tensor([1] * (both + a) + [0] * (50 - both - a))
    other = torch.tensor([1] * both + [0] * a + [1] * b + [0] * (50 - both - a - b))
    found = difference(Figure.share(one), Figure.share(other), paired=True)
    assert (found.low, found.high) == pytest.approx(ends, abs=6e-5)


@pytest.mark.parametrize("alike", [None, 0.0, 0.5, 1.0])  # None: unpaired
@pytest.mark.parametrize(
    ("p", "q", "n"),
    [(1, 0.9995, 2000), (0.9995, 0.9995, 2000), (0.999, 0.995, 500), (0, 0.002, 500), (0.98, 0.9, 60), (0.5, 0.5, 60)],
)
def test_intervals_of_differences_of_shares_cover_the_truth_near_0_and_1_too(p, q, n, alike):
    """alike: the share of images of which one number decides both answers."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        u, v, same = torch.rand(3, n, generator=generator)
        one, other = Figure.share(u < p), Figure.share(torch.where(same < (alike or 0), u, v) < q)
        gap = difference(one, other, paired=alike is not None)
        assert gap.low < gap.high
        covered += gap.low <= p - q <= gap.high
    assert covered >= 180


@pytest.mark.parametrize("paired", [True, False])
def test_two_runs_that_get_everything_right_are_open_and_not_known_to_be_equal(paired):
    gap = difference(*(Figure.share(torch.ones(50)) for _ in range(2)), paired=paired)
    low, _ = Figure.share(torch.ones(50)).interval()
    assert gap.contains_zero and (gap.low, gap.high) == pytest.approx((low - 1, 1 - low))


def test_no_share_is_known_better_than_by_one_trial():
    low, high = score_interval(0.5, 0.0, 200)
    assert high - low == pytest.approx(2 * 1.96 / 200, rel=0.01)


def test_one_wrong_answer_of_several_a_picture_leaves_a_share_as_sure_as_so_many_pictures():
    judged = torch.ones(48, 3, dtype=torch.int8)
    judged[5, 1] = 0
    low, high = _share(judged).interval()
    n = 48  # Wilson's interval of a share of 143 / 144 at this n
    centre, half = 143 / 144 + 1.96**2 / (2 * n), 1.96 * (143 / 144**2 / n + 1.96**2 / (4 * n**2)) ** 0.5
    assert (low, high) == pytest.approx([(centre + end) / (1 + 1.96**2 / n) for end in (-half, half)], abs=1e-5)
