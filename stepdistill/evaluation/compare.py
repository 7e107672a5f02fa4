"""Compares two models under one protocol, figure by figure: difference, 95 % interval, and a verdict.

    for cell_a, cell_b in pairs(read_run("out/new"), read_run("out/old")):
        compare(cell_a, cell_b)          # a Comparison per figure that both have

Images are compared prompt by prompt, and noise by noise if both models had the same: difficulty common to both cancels,
and the interval is narrower than two separate ones would suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation.cells import ATTRIBUTE, BETTER, Cell, Measured
from stepdistill.evaluation.figures import (
    Difference,
    Figure,
    Ratio,
    gap,
    log_ratio,
    paired_difference,
    unpaired_difference,
)
from stepdistill.evaluation.records import check_same_protocol
from stepdistill.evaluation.seeds import alike, pooled

OPEN = "no difference found"  # the verdict if the interval contains 0: not that the two are equal


@dataclass(frozen=True)
class Comparison:
    """A figure of two cells.

    Attributes:
        name: the figure's. cell_a, cell_b: the cells. gap: cell_a's - cell_b's.
    """

    name: str
    cell_a: Cell
    cell_b: Cell
    gap: Difference

    @property
    def a(self) -> Measured:
        """The figure of cell_a."""
        return self.cell_a.figures[self.name]

    @property
    def b(self) -> Measured:
        """The figure of cell_b."""
        return self.cell_b.figures[self.name]

    @property
    def word(self) -> str:
        """The verdict on a against b: better, worse, or OPEN; higher or lower if the figure has no preferred
        direction."""
        if self.gap.contains_zero:
            return OPEN
        above = self.gap.value > 0
        way = BETTER.get(self.name)
        if way is None:
            return "higher" if above else "lower"
        return "better" if above == (way == "higher") else "worse"

    def row(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "metric": self.name, "steps_a": self.cell_a.steps, "steps_b": self.cell_b.steps,
            "a": self.a.value, "a_low": self.a.low, "a_high": self.a.high,
            "b": self.b.value, "b_low": self.b.low, "b_high": self.b.high,
            "difference": self.gap.value, "low": self.gap.low, "high": self.gap.high,
            "paired": self.gap.paired, "n": self.a.n, "of": self.a.of,
            "seeds_a": self.a.seeds, "seeds_b": self.b.seeds, "verdict": self.word,
        }  # fmt: skip


def compare(a: Cell, b: Cell, only: Sequence[str] = ()) -> list[Comparison]:
    """Compares each figure that both cells have with an interval, or those in `only`; single attributes only by name.

    Raises:
        InputError: the cells are of different protocols, or an influence file is damaged.
    """
    check_same_protocol(a.row, b.row, f"{a.folder}", f"{b.folder}")
    both = [name for name in a.figures if name in b.figures]
    names = [name for name in both if (name in only if only else not name.startswith(ATTRIBUTE))]
    gaps = {name: _difference(a, b, name) for name in names}
    return [Comparison(name, a, b, found) for name, found in gaps.items() if found is not None]


def ratio(a: Cell, b: Cell, name: str) -> Ratio | None:
    """Returns the ratio of a's figure to b's; None unless both are above 0.

    Its interval is that of the logarithm by the delta method: unit by unit if the influences of both are stored, else
    from the two intervals.
    """
    one, other = a.figures.get(name), b.figures.get(name)
    if one is None or other is None or min(one.value, other.value) <= 0:
        return None
    above = all(figure.value > 0 for cell in (a, b) for figure in cell.by_seed.get(name, {}).values())
    both = _together(a, b, name, log_ratio) if above else None
    known = one.half is not None and other.half is not None
    half = math.hypot(one.half / one.value, other.half / other.value) if known else None
    return Ratio.of(one.value / other.value, half if both is None else both.half)


def _difference(a: Cell, b: Cell, name: str) -> Difference | None:
    """The difference of the cells' figures: paired if both store influences for the same units, else from the two
    intervals; None if one has none."""
    one, other = a.figures[name], b.figures[name]
    both = _together(a, b, name, gap)
    if both is not None:
        return paired_difference(*(pooled(list(cell.by_seed[name].values())) for cell in (a, b)), both)
    if one.half is None or other.half is None:
        return None
    return unpaired_difference((one.value, one.low, one.high), (other.value, other.low, other.high))


def _together(a: Cell, b: Cell, name: str, of: Callable[[Figure, Figure], Figure]) -> Figure | None:
    """Returns `of` (gap, log_ratio) of two cells' figures over the same units, which are prompts.

    If both have the same seeds, it is pooled over them, so that what the noise of a seed does to both cancels. Else
    each side is pooled over its own: prompts remain paired, and the differences between seeds add in quadrature.
    """
    ours, theirs = a.by_seed.get(name, {}), b.by_seed.get(name, {})
    if not (ours and theirs and alike([*ours.values(), *theirs.values()])):
        return None
    if ours.keys() == theirs.keys():
        return pooled([of(ours[seed], theirs[seed]) for seed in ours])
    return of(pooled(list(ours.values())), pooled(list(theirs.values())))


def pairs(
    found_a: Sequence[Cell], found_b: Sequence[Cell], model_a: str | None = None, model_b: str | None = None,
    steps_a: int | None = None, steps_b: int | None = None,
) -> list[tuple[Cell, Cell]]:  # fmt: skip
    """Pairs the cells of two runs: one model of each, at the step counts that both have.

    Args:
        model_a, model_b: needed if a run has several models; if only one is given, it names the model in both runs.
        steps_a, steps_b: one step count of each, which may differ; if only one is given, it applies to both.

    Raises:
        InputError: a name or step count does not exist, a model must be chosen, both sides are the same, or the runs
            share no step count.
    """
    ours, theirs = _models(found_a), _models(found_b)
    if model_b is None and model_a in theirs and found_a is not found_b:
        model_b = model_a
    if model_a is None and model_b in ours and found_a is not found_b:
        model_a = model_b
    a = _pick(ours, model_a, "a")
    b = _pick(theirs, model_b, "b")
    one, other = (steps_b if steps_a is None else steps_a), (steps_a if steps_b is None else steps_b)
    if found_a is found_b and a == b and one == other:
        raise InputError(
            f"compare: got {a} twice; allowed: two models, runs or step counts; name another by --model-b or --steps-b"
        )
    if one is not None:
        return [(_at(ours[a], one, "a"), _at(theirs[b], other, "b"))]
    at = {cell.steps: cell for cell in theirs[b]}
    common = [(cell, at[cell.steps]) for cell in ours[a] if cell.steps in at]
    if not common:
        raise InputError(
            f"steps: got {_counts(ours[a])} of {a} and {_counts(theirs[b])} of {b}; allowed: a step count of both; "
            "name one of each with --steps-a and --steps-b"
        )
    return common


def _models(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    by_name: dict[str, list[Cell]] = {}
    for cell in found:
        by_name.setdefault(cell.model, []).append(cell)
    return by_name


def _pick(models: dict[str, list[Cell]], name: str | None, side: str) -> str:
    drawn = [model for model, own in models.items() if own[0].steps > 0]
    if name is None and len(drawn) == 1:
        return drawn[0]
    if name not in models:
        raise InputError(f"--model-{side}: got {name or 'none'}; allowed: {', '.join(models)}; name the one to compare")
    return name


def _at(own: Sequence[Cell], steps: int, side: str) -> Cell:
    for cell in own:
        if cell.steps == steps:
            return cell
    raise InputError(f"--steps-{side}: got {steps}; allowed: {_counts(own)} of {own[0].model}")


def _counts(own: Sequence[Cell]) -> str:
    return ", ".join(str(cell.steps) for cell in own)
