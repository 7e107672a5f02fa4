"""Compares two models under one protocol, figure by figure: difference, 95 % interval, and better, worse or equal.

    for cell_a, cell_b in pairs(read_run("out/new"), read_run("out/old")):
        compare(cell_a, cell_b)          # a Comparison per figure that both have

Images of the same prompts and noise are compared one by one: difficulty common to both models cancels, and the interval
is narrower than two separate ones would suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation.cells import ATTRIBUTE, BETTER, Cell, Measured
from stepdistill.evaluation.figures import Difference, Figure, Ratio, gap, log_ratio
from stepdistill.evaluation.records import check_same_protocol
from stepdistill.evaluation.seeds import alike, figures_of, pooled

Pairs = dict[str, list[tuple[Figure, Figure]]]  # figures of two cells by name, a pair per seed that both have


@dataclass(frozen=True)
class Comparison:
    """A figure of two cells.

    Attributes:
        name: the figure's. cell_a, cell_b: the cells. a, b: their values. gap: a - b.
    """

    name: str
    cell_a: Cell
    cell_b: Cell
    a: Measured
    b: Measured
    gap: Difference

    @property
    def word(self) -> str:
        """The verdict on a against b: better, worse, or equal (within the interval); higher or lower if the figure has
        no preferred direction."""
        if self.gap.equal:
            return "equal"
        above = self.gap.value > 0
        way = BETTER.get(self.name)
        if way is None:
            return "higher" if above else "lower"
        return "better" if above == (way == "higher") else "worse"

    def row(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "metric": self.name, "steps_a": self.cell_a.steps, "steps_b": self.cell_b.steps,
            "a": self.a.value, "b": self.b.value, "difference": self.gap.value, "low": self.gap.low,
            "high": self.gap.high, "paired": self.gap.paired, "n": self.a.n, "of": self.a.of, "seeds": self.a.seeds,
            "verdict": self.word,
        }  # fmt: skip


def compare(a: Cell, b: Cell, only: Sequence[str] = ()) -> list[Comparison]:
    """Compares each figure that both cells have with an interval, or those in `only`; single attributes only by name.

    Raises:
        InputError: the cells are of different protocols, or an influence file is damaged.
    """
    check_same_protocol(a.row, b.row, f"{a.folder}", f"{b.folder}")
    both = [name for name in a.figures if name in b.figures]
    names = [name for name in both if (name in only if only else not name.startswith(ATTRIBUTE))]
    of_seeds, found = _of_seeds(a, b), []
    for name in names:
        one, other = a.figures[name], b.figures[name]
        if name in of_seeds:
            found.append(_paired(name, a, b, of_seeds[name]))
        elif one.half is not None and other.half is not None:
            found.append(Comparison(name, a, b, one, other, _apart(one, other)))
    return found


def ratio(a: Cell, b: Cell, name: str) -> Ratio | None:
    """Returns the ratio of a's figure to b's; None unless both are above 0.

    Its interval is that of the logarithm by the delta method: image by image if both were generated from the same
    noise, else from the two intervals.
    """
    one, other = a.figures.get(name), b.figures.get(name)
    if one is None or other is None or min(one.value, other.value) <= 0:
        return None
    both = _of_seeds(a, b).get(name, [])
    if both and all(min(ours.value, theirs.value) > 0 for ours, theirs in both):
        half = pooled([log_ratio(ours, theirs) for ours, theirs in both]).half
        ours, theirs = (sum(figure.value for figure in side) for side in zip(*both, strict=True))
        return Ratio.of(ours / theirs, half)
    known = one.half is not None and other.half is not None
    half = math.hypot(one.half / one.value, other.half / other.value) if known else None
    return Ratio.of(one.value / other.value, half)


def _apart(a: Measured, b: Measured) -> Difference:
    """The difference of figures that share no noise: their errors add in quadrature."""
    return Difference.of(a.value - b.value, math.hypot(a.half, b.half), paired=False)


def _paired(name: str, a: Cell, b: Cell, both: Sequence[tuple[Figure, Figure]]) -> Comparison:
    """The comparison of figures over the same units: the differences of the seeds are pooled."""
    ours, theirs = (pooled(side) for side in zip(*both, strict=True))
    between = pooled([gap(one, other) for one, other in both])
    told = (Measured.by(side, len(both)) for side in (ours, theirs))
    return Comparison(name, a, b, *told, Difference.of(between.value, between.half, paired=True))


def _of_seeds(a: Cell, b: Cell) -> Pairs:
    """Returns the figures whose influences both cells store for the same units at the same seeds."""
    rows_a, rows_b = ({row["seed"]: row for row in cell.rows if row.get("seed") is not None} for cell in (a, b))
    kept = [
        (figures_of(a.folder, rows_a[seed]), figures_of(b.folder, rows_b[seed])) for seed in rows_a if seed in rows_b
    ]
    found = {}
    for name in kept[0][0] if kept else ():
        both = [(ours.get(name), theirs.get(name)) for ours, theirs in kept]
        if alike([figure for pair in both for figure in pair]):
            found[name] = both
    return found


def pairs(
    found_a: Sequence[Cell], found_b: Sequence[Cell], model_a: str | None = None, model_b: str | None = None,
    steps_a: int | None = None, steps_b: int | None = None,
) -> list[tuple[Cell, Cell]]:  # fmt: skip
    """Pairs the cells of two runs: one model of each, at the step counts that both have.

    Args:
        model_a, model_b: needed if a run has several models; if only one is given, it names the model in both runs.
        steps_a, steps_b: one step count of each, which may differ; if only one is given, it applies to both.

    Raises:
        InputError: a name or step count does not exist, a model must be chosen, or the runs share no step count.
    """
    ours, theirs = _models(found_a), _models(found_b)
    if model_b is None and model_a in theirs and found_a is not found_b:
        model_b = model_a
    if model_a is None and model_b in ours and found_a is not found_b:
        model_a = model_b
    a = _pick(ours, model_a, "a")
    b = _pick(theirs, model_b, "b")
    if steps_a is not None or steps_b is not None:
        first = _at(ours[a], steps_a if steps_a is not None else steps_b, "a")
        return [(first, _at(theirs[b], steps_b if steps_b is not None else steps_a, "b"))]
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
