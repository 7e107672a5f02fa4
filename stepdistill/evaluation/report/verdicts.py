"""The students' gains, their remaining gaps to their teachers, and the cost of training them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.evaluation.cells import MAIN, Cell, Measured
from stepdistill.evaluation.compare import Comparison, compare, ratio
from stepdistill.evaluation.conditions import unlike
from stepdistill.evaluation.figures import Ratio
from stepdistill.evaluation.report.families import Model, over_seeds
from stepdistill.evaluation.summary import calls, digits, figure, number, spread

FEW = 8  # largest step count of the headline
COST = {"clip_score": "CLIP score", "attribute_accuracy": "points of attribute accuracy"}


@dataclass(frozen=True)
class Gain:
    """A student's cell next to its teacher's.

    Attributes:
        same: the teacher's at the same step count; None if not measured. last: at its largest step count.
        gaps: student - last by figure, of the main ones with intervals. of_last, of_same: FD / that of last or same.
        own: whether it is known to be the student's teacher; otherwise it is a baseline, the first teacher measured.
    """

    cell: Cell
    same: Cell | None
    last: Cell
    gaps: Mapping[str, Comparison]
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
    gained = []
    for cell in measured:
        if not teachers or cell.method == "teacher":
            continue
        own_teacher = next((c for c in teachers if cell.teacher and _path_of(c.spec) == _path_of(cell.teacher)), None)
        if own_teacher is None and cell.teacher:
            continue
        name = (own_teacher or teachers[0]).model
        baseline = [c for c in teachers if c.model == name]
        same = next((c for c in baseline if c.steps == cell.steps), None)
        last = baseline[-1]
        gaps = {comparison.name: comparison for comparison in compare(cell, last, MAIN)}
        of_same = ratio(cell, same, "fd") if same is not None else None
        gained.append(Gain(cell, same, last, gaps, ratio(cell, last, "fd"), of_same, own_teacher is not None))
    return gained


def _path_of(spec: str | None) -> str:
    """Returns the path of a SPEC; a training run's folder and the export in it are the same."""
    return str(spec).split(",")[0].rstrip("/").removesuffix("/export")


def beside(gained: Sequence[Gain]) -> str:
    """Returns what students are compared with: "teacher", or "baseline" if the teacher of one is unknown."""
    return "teacher" if all(gain.own for gain in gained) else "baseline"


def verdicts(gained: Sequence[Gain], models: Sequence[Model]) -> list[dict[str, Any]]:
    """Compares each student at few steps with its teacher at its largest step count: the page's headline.

    All are at the same step count, the one up to FEW that most students have, the largest of several; a student
    without it is at its own largest one up to FEW. Of a student of several training seeds, means and ranges are given.

    Returns:
        cell (of the seed with the best FD), model, steps, against (the teacher, and over what), and stats: (figure,
        what it is) pairs.
    """
    few = {
        model.name: model_gains
        for model in models
        if (model_gains := [gain for gain in gained if gain.cell.model in model.members and gain.cell.steps <= FEW])
    }
    having = Counter(steps for model_gains in few.values() for steps in {gain.cell.steps for gain in model_gains})
    common = max(having, key=lambda steps: (having[steps], steps), default=0)
    several = len({gain.last.model for gain in gained}) > 1
    places = {name: digits(name, [gain.cell for gain in gained]) for name in COST}
    headlines = []
    for model, model_gains in few.items():
        counts = {gain.cell.steps for gain in model_gains}
        steps = common if common in counts else max(counts)
        compared = [gain for gain in model_gains if gain.cell.steps == steps]
        last = compared[0].last
        who = last.model if several else "the teacher"
        who = who if compared[0].own else f"the baseline {last.model}"
        over = f"; mean and range of {len(compared)} training seeds" if len(compared) > 1 else ""
        headlines.append({
            "cell": min((gain.cell for gain in compared), key=lambda cell: cell.fd),
            "model": model, "steps": _at(steps),
            "against": f"against {who} at {_at(last.steps)}{over}",
            "stats": [*_distances(compared, who), *_costs(compared, places), *_speed(compared)],
        })  # fmt: skip
    return headlines


def _distances(of: Sequence[Gain], who: str) -> list[tuple[str, str]]:
    """FD, and its ratios to the teacher's."""
    last, own = of[0].last, [gain.cell.figures["fd"] for gain in of]
    fd = over_seeds(own)
    ends = spread("fd", fd, 1) if len(own) == 1 else f"({ends_of(fd, 1)})"
    theirs = f"{figure(last.fd, 1)} {spread('fd', last.figures['fd'], 1)}".rstrip()
    stats = [(figure(fd.value, 1), f"FD {ends}".rstrip() + f", {who}’s {theirs}")]
    for ratios, steps, words in (
        ([gain.of_last for gain in of], last.steps, _words(of, "fd")),
        ([gain.of_same for gain in of], of[0].cell.steps, ""),
    ):
        if None not in ratios:
            found = over_seeds(ratios)
            ends = f" ({ends_of(found, 2)})" if found.low is not None else ""
            stats.append((f"{figure(found.value, 2)}×", f"{who}’s FD at {_at(steps)}{ends}{words}"))
    return stats


def _costs(of: Sequence[Gain], places: Mapping[str, int]) -> list[tuple[str, str]]:
    """CLIP score and attribute accuracy minus the teacher's."""
    stats = []
    for name, what in COST.items():
        if all(name in gain.gaps for gain in of):
            found = over_seeds([gain.gaps[name].gap for gain in of])
            value, low, high = (number(name, each, places[name]) for each in (found.value, found.low, found.high))
            stats.append(("+" * (found.value > 0) + value, f"{what} ({low} to {high}){_words(of, name)}"))
    return stats


def _speed(of: Sequence[Gain]) -> list[tuple[str, str]]:
    """How much faster than the teacher, if all were timed alike."""
    last, cells = of[0].last, [gain.cell for gain in of if gain.cell.latency]
    if not cells or not last.latency:
        return []
    if differ := next(filter(None, (unlike(cell, last) for cell in cells)), ""):
        return [("–", f"faster: {differ}")]
    ms = sum(cell.latency for cell in cells) / len(cells)
    own = f"{figure(ms, 1)} ms" + (calls(cells[0]) if len(cells) == 1 else "")
    return [(f"{figure(last.latency / ms, 1)}×", f"faster: {own} against {figure(last.latency, 1)} ms{calls(last)}")]


def _words(of: Sequence[Gain], name: str) -> str:
    """Returns the verdict on a figure; of several training seeds all of them, with the number of seeds."""
    words = Counter(gain.gaps[name].word for gain in of if name in gain.gaps)
    parts = words if len(of) == 1 else [f"{word} ({count} of {len(of)})" for word, count in words.items()]
    return f": {', '.join(parts)}" if words else ""


def _at(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def ends_of(found: Measured | Ratio, places: int) -> str:
    """Formats an interval; empty if there is none."""
    return "" if found.low is None else f"{figure(found.low, places)}–{figure(found.high, places)}"


def duration(seconds: float | None) -> str:
    """Formats a training time for readers."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
