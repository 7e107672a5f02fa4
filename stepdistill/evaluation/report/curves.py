"""The report's curves: which cells go into which plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.evaluation.cells import BETTER, MAIN, Cell, floors, names
from stepdistill.evaluation.report import plots
from stepdistill.evaluation.report.plots import Axis, Curve, Level, Point
from stepdistill.evaluation.report.verdicts import Gain, beside
from stepdistill.evaluation.summary import label, percent

Make = Callable[[], Any]  # draws a matplotlib figure
APART = 1.5  # plot FD by training time only if the longest is at least this multiple of the shortest
LOGARITHMIC = ("fd", "fd_inf")
TITLES = {"clip_score": "CLIP score", "attribute_accuracy": "Attribute accuracy"}
BY_LATENCY = "FD by latency"


@dataclass(frozen=True)
class Model:
    """A model of the page.

    Attributes:
        number: its index on the page, which determines colour and mark.
    """

    name: str
    number: int

    @property
    def colour(self) -> int:
        """The number of its CSS variable, from 1; 0 is for floors."""
        return self.number % plots.SERIES + 1

    @property
    def mark(self) -> str:
        """The CSS class of its mark in legends and tables."""
        return f"m{self.number // plots.SERIES % len(plots.MARKS)}"


def models_of(found: Sequence[Cell]) -> list[Model]:
    """Returns the models in order of appearance, without floors."""
    names = dict.fromkeys(cell.model for cell in found if cell.steps > 0)
    return [Model(name, number) for number, name in enumerate(names)]


def curves(found: Sequence[Cell]) -> dict[str, Make]:
    """Returns title -> function that draws the plot, for all measured figures, the main ones first."""
    made: dict[str, Make] = {}
    for name in names(found):
        if not _lines(found, name, "steps"):
            continue
        made[f"{label(name)} by steps"] = lambda name=name: plots.quality_by_steps(
            _lines(found, name, "steps", interval=True), _axis(found, name, "by steps"), _levels(found, name)
        )
        if name == "fd" and _lines(found, name, "latency"):
            batch = next(c.latency_ms for c in found if c.latency is not None).get("batch", 1)
            made[BY_LATENCY] = lambda batch=batch: plots.quality_by_cost(
                _lines(found, "fd", "latency"), _axis(found, "fd", "by latency", "lower left is better"),
                _levels(found, "fd"), f"ms per image, batch size {batch:g}", front=True,
            )  # fmt: skip
    return made


def main_curves() -> set[str]:
    """Returns the titles of the curves shown outside the expandable section."""
    return {f"{label(name)} by steps" for name in MAIN} | {BY_LATENCY}


def cost_curves(found: Sequence[Cell], gained: Sequence[Gain]) -> dict[str, Make]:
    """Returns FD by training time, if students' training times differ enough, and the remaining gaps to the teacher."""
    made: dict[str, Make] = {}
    students = [cell for cell in found if cell.train_seconds and cell.method != "teacher"]
    seconds = [cell.train_seconds for cell in students]
    if seconds and max(seconds) >= APART * min(seconds) and _lines(students, "fd", "minutes", found):
        unit = "hours" if max(seconds) > 7200 else "minutes"
        longest = {(gain.last.model, gain.last.steps): gain.last.fd for gain in gained}
        made["FD by training time"] = lambda: plots.quality_by_cost(
            _lines(students, "fd", unit, found),
            _axis(found, "fd", "by training time", "lower left is better"),
            [(f"{model}, {steps} steps", fd) for (model, steps), fd in longest.items()],
            f"{unit} of training", front=False,
        )  # fmt: skip
    if gaps := _gaps(found, gained):
        other = beside(gained)
        axis = Axis(f"Gap to the {other} by steps", f"FD minus {other}’s at largest step count, {_n(found, 'fd')}")
        made[axis.title] = lambda: plots.quality_by_steps(gaps, axis, [(f"{other}, most steps", 0)])
    return made


def _gaps(found: Sequence[Cell], gained: Sequence[Gain]) -> list[Curve]:
    lines = []
    for model in models_of(found):
        gaps = [(gain.cell.steps, gain.gap.gap) for gain in gained if gain.cell.model == model.name and gain.gap]
        points = [Point(steps, gap.value, gap.low, gap.high, steps) for steps, gap in gaps]
        lines.append(Curve(model.name, points, model.number))
    return [line for line in lines if line.points]


def _lines(
    found: Sequence[Cell], name: str, x: str, of: Sequence[Cell] | None = None, *, interval: bool = False
) -> list[Curve]:
    """Returns one curve per model. of: all cells of the page, which fix the models' colours, if `found` is a subset."""
    places = {"steps": lambda c: c.steps, "latency": lambda c: c.latency, "minutes": lambda c: c.train_seconds / 60,
              "hours": lambda c: c.train_seconds / 3600}  # fmt: skip
    lines = []
    for model in models_of(of or found):
        points = []
        for cell in (c for c in found if c.model == model.name and c.steps > 0):
            at = places[x](cell)
            if name not in cell.figures or at is None:
                continue
            figure = cell.figures[name]
            ends = (figure.low, figure.high) if interval else (None, None)
            points.append(Point(at, figure.value, *ends, cell.steps))
        lines.append(Curve(model.name, points, model.number))
    return [line for line in lines if line.points]


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
