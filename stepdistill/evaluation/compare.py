"""Two models of one protocol, figure by figure: the difference, its 95 % interval, and better, worse or equal.

    for cell_a, cell_b in pairs(read_run("out/new"), read_run("out/old")):
        compare(cell_a, cell_b)          # a Comparison for each figure that both have

Pictures of the same prompts and noise are compared one by one: what is hard for both models cancels, and the interval
is narrower than two separate ones would suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation.cells import BETTER, Cell, Measured, Row
from stepdistill.evaluation.figures import Difference, Figure, Z, difference
from stepdistill.evaluation.records import check_same_protocol, read_units


@dataclass(frozen=True)
class Comparison:
    """A figure of two cells.

    Attributes:
        name: of the figure. cell_a, cell_b: whose. a, b: what they have. gap: a - b.
    """

    name: str
    cell_a: Cell
    cell_b: Cell
    a: Measured
    b: Measured
    gap: Difference

    @property
    def word(self) -> str:
        """What a is against b: better, worse, or equal (within the interval); higher or lower where neither is known
        to be better."""
        if self.gap.equal:
            return "equal"
        above = self.gap.value > 0
        way = BETTER.get(self.name)
        if way is None:
            return "higher" if above else "lower"
        return "better" if above == (way == "higher") else "worse"

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.name, "steps_a": self.cell_a.steps, "steps_b": self.cell_b.steps,
            "a": self.a.value, "b": self.b.value, "difference": self.gap.value, "low": self.gap.low,
            "high": self.gap.high, "paired": self.gap.paired, "n": self.a.n, "of": self.a.of, "verdict": self.word,
        }  # fmt: skip


def compare(a: Cell, b: Cell, only: Sequence[str] = ()) -> list[Comparison]:
    """Each figure that both cells have with an interval, or those named in `only`.

    Raises:
        InputError: the cells are of different protocols, or an influence file is damaged.
    """
    check_same_protocol(a.row, b.row, f"{a.folder}", f"{b.folder}")
    names = [name for name in a.figures if name in b.figures and (not only or name in only)]
    paired = _paired(a, b, names)
    found = []
    for name in names:
        one, other = a.figures[name], b.figures[name]
        if name in paired:
            found.append(Comparison(name, a, b, *paired[name]))
        elif one.half is not None and other.half is not None:
            found.append(Comparison(name, a, b, one, other, _apart(one, other)))
    return found


def _apart(a: Measured, b: Measured) -> Difference:
    """Of figures that share no noise: their errors add as squares."""
    value, half = a.value - b.value, math.hypot(a.half, b.half)
    return Difference(value, value - half, value + half, paired=False)


def _paired(a: Cell, b: Cell, names: Sequence[str]) -> dict[str, tuple[Measured, Measured, Difference]]:
    """Those figures whose influences both cells keep for the same units at the same seeds."""
    if a.folder is None or b.folder is None:
        return {}
    rows_a, rows_b = ({row["seed"]: row for row in cell.rows if row.get("seed") is not None} for cell in (a, b))
    seeds = [seed for seed in rows_a if seed in rows_b]
    if not seeds:
        return {}
    one, other = ([read_units(cell.folder, rows[seed]) for seed in seeds] for cell, rows in ((a, rows_a), (b, rows_b)))
    found = {}
    for name in names:
        kept = [units.get(name) for units in (*one, *other)]
        if any(k is None for k in kept) or len({(k[1], len(k[0])) for k in kept}) > 1:
            continue
        ours, theirs = (
            _pooled(name, [rows[seed] for seed in seeds], units) for rows, units in ((rows_a, one), (rows_b, other))
        )
        gap = difference(ours, theirs, paired=True)
        found[name] = (_measured(ours), _measured(theirs), gap)
    return found


def _pooled(name: str, rows: Sequence[Row], units: Sequence[dict[str, tuple[Tensor, str]]]) -> Figure:
    """The mean over seeds. A unit is a prompt then, with a noise for each seed, so its influences are averaged too."""
    values = [row["metrics"][name]["value"] for row in rows]
    influence = torch.stack([each[name][0] for each in units]).mean(0)
    return Figure(sum(values) / len(values), influence, units[0][name][1])


def _measured(figure: Figure) -> Measured:
    return Measured(figure.value, *figure.interval(Z), len(figure.influence), figure.unit)


def pairs(
    found_a: Sequence[Cell], found_b: Sequence[Cell], model_a: str | None = None, model_b: str | None = None,
    steps_a: int | None = None, steps_b: int | None = None,
) -> list[tuple[Cell, Cell]]:  # fmt: skip
    """The cells of two runs that belong together: a model each, at the step counts that both have.

    Args:
        model_a, model_b: where a run has several; of the same name in both where only one is given.
        steps_a, steps_b: one step count of each, which need not be the same.

    Raises:
        InputError: a name or step count that is not there, several models to choose from, or nothing in common.
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
