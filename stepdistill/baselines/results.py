"""The results of a baseline's run: a row each for teacher, control and student, as a table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from stepdistill.errors import InputError

Role = Literal["teacher", "before", "control", "student"]
ROLES: tuple[Role, ...] = ("teacher", "before", "control", "student")


@dataclass(frozen=True)
class Row:
    """A measured network.

    Attributes:
        role: teacher; before (the untrained student); control (trained for as long without the teacher); student.
        name: of the network, or of the loss it was trained with.
        figures: measured values by name; those with an interval have its ends too, as NAME_low and NAME_high.
        seconds: of training; None if it was not trained here.
        seed: of its training; None if there is none.
    """

    role: Role
    name: str
    figures: Mapping[str, float]
    parameters: int
    seconds: float | None = None
    seed: int | None = None


@dataclass
class Results:
    """The rows of a run.

    Attributes:
        method: a name in BASELINES. figure: the name of the primary figure. higher: whether higher is better.
        n: what each figure was measured over, in words: "2,500 pictures".
        note: remarks printed below the table.
    """

    method: str
    figure: str
    higher: bool
    n: str
    rows: list[Row] = field(default_factory=list)
    note: str = ""

    @classmethod
    def of(cls, record: Mapping) -> Results:
        """The inverse of `record`.

        Raises:
            KeyError, TypeError, ValueError: these are other data.
        """
        rows = [
            Row(**row | {"figures": {name: float(value) for name, value in dict(row["figures"]).items()}})
            for row in record["rows"]
        ]
        names = ("method", "figure", "higher_is_better", "n")
        return cls(*(record[name] for name in names), rows, record["note"])

    def mean(self, role: Role, name: str | None = None) -> float | None:
        """The primary figure of a role (and name), averaged over seeds; None if not measured."""
        found = [r.figures[self.figure] for r in self.rows if r.role == role and name in (None, r.name)]
        return statistics.fmean(found) if found else None

    def gaps(self) -> dict[str, float | None]:
        """By student's name, see `gap_closed`; None if it is not reported."""
        found = {row.name: self.gap(row.name) for row in self.rows if row.role == "student"}
        return {name: None if isinstance(gap, str) else gap for name, gap in found.items()}

    def gap(self, name: str) -> float | str:
        """The share of the gap that a student closed, or why it is not reported. The controls are those of its name, or
        all if none has it."""
        teacher, control = self.mean("teacher"), self.mean("control", name)
        control = self.mean("control") if control is None else control
        if teacher is None or control is None:
            return "no teacher or no control"
        closed = gap_closed(teacher, control, self.mean("student", name))
        if closed is None:
            return "teacher and control are too close"
        return closed if (teacher > control) == self.higher else "the control is better than the teacher"

    def record(self) -> dict:
        """The results as JSON-serialisable data."""
        rows = [asdict(row) for row in sorted(self.rows, key=lambda row: ROLES.index(row.role))]
        common = {"method": self.method, "figure": self.figure, "higher_is_better": self.higher, "n": self.n}
        return {**common, "rows": rows, "gap_closed": self.gaps(), "note": self.note}

    def write(self, out: Path, config: Mapping | None = None) -> Path:
        """Writes results.json with the device, commit, versions and command; returns its path."""
        from stepdistill.evaluation.records import write_record
        from stepdistill.training.processes import on_cpu

        file = out / "results.json"
        write_record(file, self.record() | {"config": dict(config or {})}, "cpu" if on_cpu() else "cuda")
        return file


def count_parameters(network: nn.Module) -> int:
    """The number of parameters; shared ones count once."""
    return sum(p.numel() for p in network.parameters())


def gap_closed(teacher: float, control: float, student: float, least: float = 0.02) -> float | None:
    """(student - control) / (teacher - control): 0 if nothing was learnt from the teacher, 1 if as good as it.

    None if teacher and control differ by at most `least` of the control's value: the ratio would be noise.
    """
    if abs(teacher - control) <= least * abs(control):
        return None
    return (student - control) / (teacher - control)


def read(out: Path) -> dict:
    """Reads a run's results.json.

    Raises:
        InputError: it is missing, cannot be read, or is not of a baseline.
    """
    fix = "allowed: a finished run's folder; run it first"
    try:
        record = json.loads((Path(out) / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"results: got {out} ({error}); {fix}") from error
    try:
        hash(Results.of(record).method)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"results: got {out}, whose results.json is not a baseline's; {fix}") from error
    return record
