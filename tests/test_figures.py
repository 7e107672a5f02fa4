"""Intervals of figures and of their differences, held against simulation."""

from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.figures import Figure, difference


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


def test_the_intervals_of_means_and_of_their_differences_cover_the_truth():
    """Of 200 trials of 95 %, fewer than 183 would happen once in 5,000."""
    covered = {"mean": 0, "paired": 0, "unpaired": 0}
    for seed in range(200):
        common, a, b = (draws(100, 3 * seed + i) for i in range(3))
        first, second = Figure.mean(0.3 + common + 0.2 * a), Figure.mean(common + 0.2 * b)
        low, high = first.interval()
        covered["mean"] += low <= 0.3 <= high
        gap = difference(first, second, paired=True)
        covered["paired"] += gap.low <= 0.3 <= gap.high
        gap = difference(first, Figure.mean(a), paired=False)
        covered["unpaired"] += gap.low <= 0.3 <= gap.high
    assert all(183 <= count < 200 for count in covered.values()), covered


def test_a_paired_difference_sees_what_an_unpaired_one_cannot():
    common, a = draws(100, 1), draws(100, 2)
    first, second = Figure.mean(common + 0.1 + 0.05 * a), Figure.mean(common)
    paired, unpaired = (difference(first, second, paired=p) for p in (True, False))
    assert paired.value == pytest.approx(unpaired.value)
    assert not paired.equal and unpaired.equal and paired.paired and not unpaired.paired
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


def test_a_figure_is_equal_to_itself():
    figure = Figure.mean(draws(30, 4))
    assert difference(figure, figure, paired=True).equal
