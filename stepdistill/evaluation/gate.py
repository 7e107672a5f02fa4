"""A gate: bounds that a model's figures must meet, for use in CI; from a YAML file or from flags.

gate = load_gate("mlperf-sdxl")              # benchmarks/gates/mlperf-sdxl.yaml, or a path to a file
judgements = judge(cells, gate)              # all(j.met for j in judgements)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation import shipped
from stepdistill.evaluation.cells import Cell, Measured
from stepdistill.evaluation.conditions import timed_as
from stepdistill.evaluation.summary import calls, digits, percent
from stepdistill.typed import read_yaml

SHORT = {"clip": "clip_score", "attributes": "attribute_accuracy"}
LATENCY = "ms"  # median per image, bounded like a figure; shown with how it was taken in place of an interval


@dataclass(frozen=True)
class Bound:
    """A bound on a figure: low <= value <= high."""

    figure: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "figure", SHORT.get(self.figure, self.figure))
        if not self.low <= self.high:
            raise InputError(f"{self.figure}: got a window from {self.low:g} to {self.high:g}; allowed: low up to high")

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:.12g}"
        return f"at least {self.low:.12g}" if math.isinf(self.high) else f"within {self.low:.12g} and {self.high:.12g}"


@dataclass(frozen=True)
class Gate:
    """Bounds, and the cells they apply to.

    Attributes:
        bounds: all must be met. steps: the step counts they apply to; all if empty.
        rows: the value that each row must have, by field: bounds of one protocol mean nothing under another.
        description: for the reader.
    """

    bounds: tuple[Bound, ...] = ()
    steps: tuple[int, ...] = ()
    rows: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    description: str = ""


@dataclass(frozen=True)
class Judgement:
    """A bound applied to a cell's figure."""

    cell: Cell
    bound: Bound
    figure: Measured

    @property
    def met(self) -> bool:
        """Whether the value, not its whole interval, meets the bound; NaN never does."""
        return self.bound.low <= self.figure.value <= self.bound.high

    def __str__(self) -> str:
        name, found = self.bound.figure, self.figure
        places = digits(name, [self.cell]) + 2 * percent(name)  # shares are shown as fractions here
        ends = ""
        if name == LATENCY:
            ends = calls(self.cell, timed_as(self.cell))
        elif found.half is not None:
            of = "" if found.n is None else f", n = {found.n:,}"
            ends = f" (95 %: {found.low:.{places}f} to {found.high:.{places}f}{of})"
        at = f"{self.cell.steps} step{'s' * (self.cell.steps > 1)}"
        word = "met   " if self.met else "missed"
        return f"{word} {self.cell.model}, {at}: {name} {found.value:.10g}{ends}, {self.bound}"


def load_gate(name: str | Path) -> Gate:
    """Loads a gate by the name it ships under, or from a .yaml file.

    Raises:
        InputError: there is no such gate, the file is not YAML, or a field is unknown or malformed.
    """
    file = shipped.find("gates", name)
    if not file.is_file():
        raise InputError(f"--gate: got {name}; allowed: {', '.join(shipped.names('gates'))}, or a path to a .yaml file")
    content = read_yaml(file, "--gate")
    allowed = ("description", "rows", "steps", "figures")
    if not isinstance(content, dict) or set(content) - set(allowed) or not isinstance(content.get("figures"), dict):
        raise InputError(f"--gate: got {file}, which is no gate; allowed: figures, and {', '.join(allowed[:3])}; see "
                         "benchmarks/gates")  # fmt: skip
    bounds = []
    for name, ends in content["figures"].items():
        if not isinstance(ends, dict) or not ends or set(ends) - {"min", "max"}:
            raise InputError(f"--gate {file}: got {name}: {ends}; allowed: min and max, or one of them")
        try:
            bounds.append(Bound(name, float(ends.get("min", -math.inf)), float(ends.get("max", math.inf))))
        except (TypeError, ValueError) as error:
            raise InputError(f"--gate {file}: got {name}: {ends}; allowed: numbers, min up to max") from error
    try:
        steps = tuple(int(count) for count in content.get("steps") or ())
        return Gate(tuple(bounds), steps, dict(content.get("rows") or {}), str(content.get("description") or ""))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--gate {file}: got steps or rows of another kind ({error}); allowed: a list, a map"
        ) from error


def judge(found: Sequence[Cell], gate: Gate, model: str | None = None) -> list[Judgement]:
    """Applies every bound of a gate to every cell it is for.

    Raises:
        InputError: there are no bounds or no such cell, a figure was not measured, or a row does not match the gate's.
    """
    if not gate.bounds:
        raise InputError("gate: got no bounds; allowed: --max-fd, --min-clip, --max NAME=VALUE, ...; give one")
    drawn = [cell for cell in found if cell.steps > 0]
    names = list(dict.fromkeys(cell.model for cell in drawn))
    if model is not None and model not in names:
        raise InputError(f"--model: got {model}; allowed: {', '.join(names)}")
    own = [cell for cell in drawn if model in (None, cell.model)]
    for cell in own:
        for name, value in gate.rows.items():
            if cell.row.get(name) != value:
                raise InputError(
                    f"gate: got {cell.model} with {name} {cell.row.get(name)}; allowed: {name} {value}, which the "
                    "bounds are of; measure by that"
                )
    counts = sorted({cell.steps for cell in own})
    if missing := [count for count in gate.steps if count not in counts]:
        raise InputError(
            f"steps: got bounds of {missing[0]}, and a run of {', '.join(map(str, counts)) or 'none'}; allowed: what "
            f"was measured; name that with --steps, or measure at {missing[0]}"
        )
    own = [cell for cell in own if not gate.steps or cell.steps in gate.steps]
    if not own:
        raise InputError("gate: got a run without models; allowed: one that measured some; run stepdistill bench first")
    return [Judgement(cell, bound, _figure(cell, bound.figure)) for cell in own for bound in gate.bounds]


def _figure(cell: Cell, name: str) -> Measured:
    if name == LATENCY and cell.latency is not None:
        return Measured(cell.latency)
    if name in cell.figures:
        return cell.figures[name]
    known = [*cell.figures, *([LATENCY] if cell.latency is not None else [])]
    at = f"{cell.steps} step{'s' * (cell.steps > 1)}"
    raise InputError(f"gate: got {name}; allowed: {', '.join(known)}, which {cell.model} has at {at}")
