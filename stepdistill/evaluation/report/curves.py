"""The report's curves: which cells go into which plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepdistill.evaluation.cells import BETTER, MAIN, Cell, Measured, floors, names
from stepdistill.evaluation.conditions import conditions
from stepdistill.evaluation.figures import Difference
from stepdistill.evaluation.report import plots
from stepdistill.evaluation.report.families import models_of, over_seeds
from stepdistill.evaluation.report.plots import Axis, Curve, Level, Point
from stepdistill.evaluation.report.verdicts import Gain, beside
from stepdistill.evaluation.summary import label, percent

Make = Callable[[], Any]  # draws a matplotlib figure
APART = 1.5  # plot FD by training time only if the longest is at least this multiple of the shortest
LOGARITHMIC = ("fd", "fd_inf")
TITLES = {"clip_score": "CLIP score", "attribute_accuracy": "Attribute accuracy"}
BY_LATENCY = "FD by latency"


def curves(found: Sequence[Cell]) -> dict[str, Make]:
    """Returns title -> function that draws the plot, for all measured figures, the main ones first."""
    made: dict[str, Make] = {}
    for name in names(found):
        lines = _by_steps(found, {(c.model, c.steps): c.figures[name] for c in found if name in c.figures})
        if not lines:
            continue
        made[f"{label(name)} by steps"] = lambda name=name, lines=lines: plots.quality_by_steps(
            lines, _axis(found, name, "by steps"), _levels(found, name)
        )
        if name == "fd" and (lines := _by_cost(found, lambda cell: cell.latency)):
            batch = next(c.latency_ms for c in found if c.latency is not None).get("batch", 1)
            better = "lower left is better" + ", timed differently: a front each" * timed_apart(found)
            made[BY_LATENCY] = lambda lines=lines, batch=batch, better=better: plots.quality_by_cost(
                lines, _axis(found, "fd", "by latency", better), _levels(found, "fd"),
                f"ms per image, batch size {batch:g}", front=True,
            )  # fmt: skip
    return made


def timed_apart(found: Sequence[Cell]) -> bool:
    """Whether not all cells were timed alike."""
    return len({_timing(cell) for cell in found if cell.latency is not None}) > 1


def main_curves() -> set[str]:
    """Returns the titles of the curves shown outside the expandable section."""
    return {f"{label(name)} by steps" for name in MAIN} | {BY_LATENCY}


def cost_curves(found: Sequence[Cell], gained: Sequence[Gain]) -> dict[str, Make]:
    """Returns FD by training time, if students' training times differ enough, and the remaining gaps to the teacher."""
    made: dict[str, Make] = {}
    students = [cell for cell in found if cell.train_seconds and cell.method != "teacher"]
    seconds = [cell.train_seconds for cell in students]
    if seconds and max(seconds) >= APART * min(seconds) and any("fd" in cell.figures for cell in students):
        unit, scale = ("hours", 3600) if max(seconds) > 7200 else ("minutes", 60)
        longest = {(gain.last.model, gain.last.steps): gain.last.fd for gain in gained}
        made["FD by training time"] = lambda: plots.quality_by_cost(
            _by_cost(students, lambda cell: cell.train_seconds / scale, found),
            _axis(found, "fd", "by training time", "lower left is better"),
            [(f"{model}, {steps} steps", fd) for (model, steps), fd in longest.items()],
            f"{unit} of training", front=False,
        )  # fmt: skip
    gap_by_cell = {(gain.cell.model, gain.cell.steps): gain.gaps["fd"].gap for gain in gained if "fd" in gain.gaps}
    if gaps := _by_steps(found, gap_by_cell):
        other = beside(gained)
        axis = Axis(f"Gap to the {other} by steps", f"FD minus {other}’s at largest step count, {_n(found, 'fd')}")
        made[axis.title] = lambda: plots.quality_by_steps(gaps, axis, [(f"{other}, most steps", 0)])
    return made


def _by_steps(found: Sequence[Cell], by_cell: Mapping[tuple[str, int], Measured | Difference]) -> list[Curve]:
    """Returns one curve per model of figures by model and step count, with their intervals; of a model of several
    training seeds the mean and the range."""
    lines = []
    for model in models_of(found):
        points = []
        for steps in sorted({steps for name, steps in by_cell if name in model.members and steps > 0}):
            summary = over_seeds([by_cell[name, steps] for name in model.members if (name, steps) in by_cell])
            points.append(Point(steps, summary.value, summary.low, summary.high, steps))
        lines.append(Curve(model.name, points, model.number))
    return [line for line in lines if line.points]


def _by_cost(
    found: Sequence[Cell], cost: Callable[[Cell], float | None], of: Sequence[Cell] | None = None
) -> list[Curve]:
    """Returns FD by a cell's cost, one curve per member of a model, all in its colour and the first under its name.

    Args:
        of: all cells of the page, which determine colours, if `found` is a subset.
    """
    lines = []
    for model in models_of(of or found):
        for i, member in enumerate(model.members):
            own = [(cost(c), c) for c in found if c.model == member and c.steps > 0 and "fd" in c.figures]
            points = [Point(x, c.figures["fd"].value, None, None, c.steps, _timing(c)) for x, c in own if x is not None]
            lines.append(Curve("" if i else model.name, points, model.number))
    return [line for line in lines if line.points]


def _timing(cell: Cell) -> str:
    return "" if cell.latency is None else ", ".join(conditions(cell))


def _levels(found: Sequence[Cell], name: str) -> list[Level]:
    return [(c.model, c.figures[name].value) for c in floors(found) if name in c.figures]


def _axis(found: Sequence[Cell], name: str, by: str, better: str | None = None) -> Axis:
    own = f"FD-{found[0].fd_extractor}" if name == "fd" and found[0].fd_extractor else None
    title = own or TITLES.get(name) or label(name)
    way = better or (f"{BETTER[name]} is better" if name in BETTER else "")
    note = ", ".join(filter(None, (way, _n(found, name))))
    return Axis(f"{title[:1].upper()}{title[1:]} {by}", note, name in LOGARITHMIC, percent(name))


def _n(found: Sequence[Cell], name: str) -> str:
    """Describes the number of units that a figure is over."""
    own = next((cell.figures[name] for cell in found if name in cell.figures), None)
    if own is None or own.n is None:
        return ""
    return f"n = {own.n:,}" + f" {own.of}" * (own.of != "pictures")
