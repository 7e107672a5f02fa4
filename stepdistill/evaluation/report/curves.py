"""The report's curves: which cells go into which plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stepdistill.evaluation.cells import BETTER, MAIN, Cell, floors, names
from stepdistill.evaluation.report import plots
from stepdistill.evaluation.report.verdicts import Gain
from stepdistill.evaluation.summary import label

Make = Callable[[], Any]  # draws a matplotlib figure
LOGARITHMIC = ("fd", "fd_inf")


def by_model(found: Sequence[Cell]) -> list[tuple[str, int, list[Cell]]]:
    """(model, its colour's number from 1, its cells), floors left out."""
    models = list(dict.fromkeys(cell.model for cell in found if cell.steps > 0))
    return [(name, i % plots.SERIES + 1, [c for c in found if c.model == name]) for i, name in enumerate(models)]


def curves(found: Sequence[Cell]) -> dict[str, Make]:
    """title -> what draws it; only what was measured. The main figures first, then the others."""
    made: dict[str, Make] = {}
    for name in names(found):
        if not _lines(found, name, "steps"):
            continue
        made[f"{label(name)} by steps"] = lambda name=name: plots.quality_by_steps(
            _lines(found, name, "steps", interval=True), _axis(found, name), _levels(found, name),
            log=name in LOGARITHMIC, better=BETTER.get(name),
        )  # fmt: skip
        if name == "fd" and _lines(found, name, "latency"):
            batch = next(c.latency_ms for c in found if c.latency_ms).get("batch", 1)
            made["FD by latency"] = lambda batch=batch: plots.quality_by_cost(
                _lines(found, "fd", "latency"), _axis(found, "fd"), _levels(found, "fd"),
                f"ms a picture, batch {batch}; numbers are steps", front=True,
            )  # fmt: skip
    return made


def main_curves() -> set[str]:
    """The titles of the curves that are shown at once."""
    return {f"{label(name)} by steps" for name in MAIN} | {"FD by latency"}


def cost_curves(found: Sequence[Cell], gained: Sequence[Gain]) -> dict[str, Make]:
    """The distance by time of training, where students took unlike times, and the gaps that are left to the teacher."""
    made: dict[str, Make] = {}
    students = [cell for cell in found if cell.train_seconds and cell.method != "teacher"]
    if len({cell.train_seconds for cell in students}) > 1:
        longest = {(gain.last.model, gain.last.steps): gain.last.fd for gain in gained}
        made["FD by training time"] = lambda: plots.quality_by_cost(
            _lines(students, "fd", "minutes", found), _axis(found, "fd"),
            [(f"{model}, {steps} steps", fd) for (model, steps), fd in longest.items()],
            "minutes of training; numbers are steps", front=False,
        )  # fmt: skip
    if gaps := _gaps(found, gained):
        made["Gap to the teacher by steps"] = lambda: plots.quality_by_steps(
            gaps, "Distance above the teacher’s longest", [("the teacher’s longest", 0)], log=False, better="lower"
        )
    return made


def _gaps(found: Sequence[Cell], gained: Sequence[Gain]) -> list[plots.Curve]:
    lines = []
    for i, (model, _, _) in enumerate(by_model(found)):
        gaps = [(gain.cell.steps, gain.gap.gap) for gain in gained if gain.cell.model == model and gain.gap]
        points = [plots.Point(steps, gap.value, gap.low, gap.high, steps) for steps, gap in gaps]
        lines.append(plots.Curve(model, points, i))
    return [line for line in lines if line.points]


def _lines(
    found: Sequence[Cell], name: str, x: str, of: Sequence[Cell] | None = None, *, interval: bool = False
) -> list[plots.Curve]:
    """A curve a model. of: all cells of the page, which the models' colours go by, where `found` is some of them."""
    places = {"steps": lambda c: c.steps, "latency": lambda c: c.latency, "minutes": lambda c: c.train_seconds / 60}
    lines = []
    for i, (model, _, _) in enumerate(by_model(of or found)):
        points = []
        for cell in (c for c in found if c.model == model):
            at = places[x](cell)
            if name not in cell.figures or at is None:
                continue
            figure = cell.figures[name]
            ends = (figure.low, figure.high) if interval else (None, None)
            points.append(plots.Point(at, figure.value, *ends, cell.steps))
        lines.append(plots.Curve(model, points, i))
    return [line for line in lines if line.points]


def _levels(found: Sequence[Cell], name: str) -> list[tuple[str, float]]:
    return [(c.model, c.figures[name].value) for c in floors(found) if name in c.figures]


def _axis(found: Sequence[Cell], name: str) -> str:
    if name == "fd":
        return f"FD-{found[0].fd_extractor}"
    return {"clip_score": "CLIP score", "attribute_accuracy": "Attribute accuracy"}.get(name, label(name))
