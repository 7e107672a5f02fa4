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
