"""Figures of several seeds: the pooled interval covers the truth, whether seeds add only noise or more than that."""

from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.seeds import alike, pooled, student


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeds(trial: int, prompts: float, effect: float, count: int = 3) -> list[Figure]:
    """Scores of 60 prompts at each seed: a prompt effect, noise of variance 1, and a seed effect."""
    shared = prompts * draws(3 * trial, 60)
    own, offsets = draws(3 * trial + 1, count, 60), effect * draws(3 * trial + 2, count)
    return [Figure.mean(shared + noise + offset) for noise, offset in zip(own, offsets, strict=True)]


@pytest.mark.parametrize(("prompts", "effect"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, 0.2), (0.0, 0.5)])
def test_pooled_intervals_cover_the_truth_whatever_seeds_and_prompts_do(prompts, effect):
    found = [pooled(seeds(trial, prompts, effect)) for trial in range(300)]
    assert sum(low <= 0 <= high for low, high in (f.interval() for f in found)) >= 270


def test_seeds_of_noise_narrow_the_interval_and_what_prompts_do_stays():
    ratios = []
    for prompts in (0.0, 3.0):
        own = seeds(0, prompts, 0.0)
        one = sum(figure.error for figure in own) / 3
        ratios.append(pooled(own).error / one)
    assert ratios[0] == pytest.approx(3**-0.5, rel=0.1) and ratios[1] == pytest.approx((28 / 30) ** 0.5, rel=0.05)


def test_the_pooled_figure_is_the_mean_prompt_by_prompt():
    own = seeds(1, 1.0, 0.0)
    values = torch.stack([figure.value + figure.influence for figure in own]).mean(0)
    found, want = pooled(own), Figure.mean(values)
    assert found.value == pytest.approx(want.value, abs=1e-12) and torch.allclose(found.influence, want.influence)
    assert pooled(own[:1]) is own[0]


def test_seeds_that_differ_by_more_than_chance_are_as_far_apart_as_students_t_has_it():
    influence = torch.zeros(50, dtype=torch.float64)
    found = pooled([Figure(value, influence) for value in (1.0, 2.0, 6.0)])
    assert found.interval() == pytest.approx((3 - 4.302653 * (7 / 3) ** 0.5, 3 + 4.302653 * (7 / 3) ** 0.5), rel=1e-5)


def test_only_figures_of_the_same_units_are_alike():
    one, other = Figure.mean(draws(0, 5)), Figure.mean(draws(1, 6))
    assert alike([one, one]) and not alike([one, other]) and not alike([one, None])
    assert not alike([one, Figure.mean(draws(0, 5), "prompts")])


def test_students_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 12), 30, 1000):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01 if degrees > 2 else 1e-9)
