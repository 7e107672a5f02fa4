"""The students' gains, their remaining gaps to their teachers, and the cost of training them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.evaluation.cells import Cell
from stepdistill.evaluation.compare import Comparison, compare, ratio
from stepdistill.evaluation.figures import Ratio
from stepdistill.evaluation.summary import calls, figure, spread

FEW = 8  # largest step count of the cell in a student's headline


@dataclass(frozen=True)
class Gain:
    """A student's cell next to its teacher's.

    Attributes:
        same: the teacher's at the same step count; None if not measured. last: at its largest step count.
        gap: of the distances, student - last; None if one has no interval. of_last, of_same: student / last or same.
        own: whether it is known to be the student's teacher; otherwise it is a baseline, the first teacher measured.
    """

    cell: Cell
    same: Cell | None
    last: Cell
    gap: Comparison | None
    of_last: Ratio | None
    of_same: Ratio | None
    own: bool = True


def gains(found: Sequence[Cell]) -> list[Gain]:
    """Returns each cell of each student next to those of the teacher it was distilled from.

    If the teacher is unknown, the first teacher measured is the baseline; if it is known but not measured, the student
    is omitted.
    """
    measured = [cell for cell in found if cell.steps > 0 and cell.fd is not None]
    teachers = [cell for cell in measured if cell.method == "teacher"]
    said = []
    for cell in measured:
        if not teachers or cell.method == "teacher":
            continue
        own = next((c for c in teachers if cell.teacher and _place(c.spec) == _place(cell.teacher)), None)
        if own is None and cell.teacher:
            continue
        name = (own or teachers[0]).model
        baseline = [c for c in teachers if c.model == name]
        same = next((c for c in baseline if c.steps == cell.steps), None)
        last = baseline[-1]
        gap = next(iter(compare(cell, last, ("fd",))), None)
        of_same = ratio(cell, same, "fd") if same is not None else None
        said.append(Gain(cell, same, last, gap, ratio(cell, last, "fd"), of_same, own is not None))
    return said


def _place(spec: str | None) -> str:
    """Returns the path of a SPEC; a training run's folder and the export in it are the same."""
    return str(spec).split(",")[0].rstrip("/").removesuffix("/export")


def beside(gained: Sequence[Gain]) -> str:
    """Returns what students are compared with: "teacher", or "baseline" if the teacher of one is unknown."""
    return "teacher" if all(gain.own for gain in gained) else "baseline"


def verdicts(gained: Sequence[Gain]) -> list[dict[str, Any]]:
    """Compares each student's best few-step cell with its teacher at its largest step count: the page's headline.

    Returns:
        cell, model, steps, and stats: (figure, what it is) pairs.
    """
    several = len({gain.last.model for gain in gained}) > 1
    said = []
    for model in dict.fromkeys(gain.cell.model for gain in gained):
        few = [gain for gain in gained if gain.cell.model == model and gain.cell.steps <= FEW]
        if not few:
            continue
        best = min(few, key=lambda gain: gain.cell.fd)
        cell, last = best.cell, best.last
        who = last.model if several else "the teacher"
        who = who if best.own else f"the baseline {last.model}"
        at = f"{cell.steps} step{'s' * (cell.steps > 1)}"
        own, theirs = (spread("fd", c.figures["fd"], 1) for c in (cell, last))
        has = f"{figure(last.fd, 1)} {theirs}".rstrip()
        stats = [(figure(cell.fd, 1), f"FD {own}".rstrip() + f", against {who}’s {has} at {last.steps} steps")]
        if best.of_last is not None:
            word = f": {best.gap.word}" if best.gap else ""
            stats.append(_times(best.of_last, f"{who}’s FD at {last.steps} steps", word))
        if best.of_same is not None:
            stats.append(_times(best.of_same, f"{who}’s FD at {at}"))
        if cell.latency and last.latency:
            faster = figure(last.latency / cell.latency, 1)
            told = " against ".join(f"{figure(c.latency, 1)} ms{calls(c)}" for c in (cell, last))
            stats.append((f"{faster}×", f"faster than {who} at {last.steps} steps: {told}"))
        said.append({"cell": cell, "model": model, "steps": at, "stats": stats})
    return said


def _times(found: Ratio, what: str, word: str = "") -> tuple[str, str]:
    """Returns a ratio, and its description with its interval."""
    ends = f" ({ends_of(found, 2)})" if found.low is not None else ""
    return f"{figure(found.value, 2)}×", f"{what}{ends}{word}"


def ends_of(found: Ratio, places: int) -> str:
    """Formats a ratio's interval; empty if there is none."""
    return "" if found.low is None else f"{figure(found.low, places)}–{figure(found.high, places)}"


def duration(seconds: float | None) -> str:
    """Formats a training time for readers."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
