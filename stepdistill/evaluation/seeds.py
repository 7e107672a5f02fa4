"""Figures pooled over several seeds: the same prompts, each with the noise of every seed.

    pooled([figure of seed 0, figure of seed 1, ...])

The uncertainty of the mean has two parts. Within seeds: other prompts and noise could have been drawn. Between seeds:
if a seed changes more than noise (a model trained anew for each, say), figures differ by more than that explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.evaluation.figures import Figure, Z
from stepdistill.evaluation.records import read_units


def figures_of(folder: Path | None, row: dict[str, Any]) -> dict[str, Figure]:
    """Returns a row's figures with each unit's influence on them; none if the influences were not stored.

    Raises:
        InputError: the file is damaged.
    """
    if folder is None:
        return {}
    metrics, figures = row.get("metrics") or {}, {}
    for name, (influence, unit) in read_units(folder, row).items():
        if name in metrics:
            saved = metrics[name]
            figures[name] = Figure(saved["value"], influence, unit, saved.get("trials"), saved.get("bend", 0.0))
    return figures


def alike(figures: Sequence[Figure | None]) -> bool:
    """Whether no figure is missing and all are over the same units."""
    return None not in figures and len({(f.unit, len(f.influence)) for f in figures}) == 1


def pooled(figures: Sequence[Figure]) -> Figure:
    """Returns the mean over seeds of figures that are `alike`.

    A unit is a prompt with the noise of every seed, so its influence is the mean over seeds: the variance due to noise
    is divided by their number, that due to prompts is not.
    """
    first, count = figures[0], len(figures)
    if count == 1:
        return first
    values = [figure.value for figure in figures]
    influences = torch.stack([figure.influence.double() for figure in figures])
    mean = influences.mean(0)
    noise = sum(Figure(0.0, own).error ** 2 for own in influences - mean) / (count - 1)
    bend = sum(figure.bend for figure in figures) / count
    return Figure(sum(values) / count, mean, first.unit, first.trials, bend, between(values, noise))


def between(values: Sequence[float], noise: float) -> float:
    """Returns the half-width of the interval for differences between seeds beyond chance; Student's, as seeds are few.

    Args:
        values: one per seed. noise: the variance between them that chance explains.
    """
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return student(count - 1) * math.sqrt(max(0.0, variance - noise) / count)


def student(degrees: int) -> float:
    """Student's 97.5 % quantile: closed forms for 1 and 2 degrees of freedom, else Fisher and Cornish's expansion
    (Abramowitz and Stegun 26.7.5), accurate to 1 %."""
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / degrees**i for i, term in enumerate(terms, 1))
