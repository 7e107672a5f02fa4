"""A benchmark's rows as cells: seeds pooled, every figure with its interval; mixed protocols are rejected.

found = cells(read_folder("out/bench"), folder)
found[0].figures["fd"]        # Measured(value, low, high, n, of, seeds)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation.figures import Figure, Z
from stepdistill.evaluation.measures import METRICS
from stepdistill.evaluation.records import FIELDS, TIMES, cell_of, check_same_protocol, read_rows, same_figures
from stepdistill.evaluation.seeds import alike, between, figures_of, pooled
from stepdistill.evaluation.sound import sound

Row = dict[str, Any]
BETTER = {figure: way for metric in METRICS.values() for figure, way in metric.better.items()}
MAIN = ("fd", "clip_score", "attribute_accuracy")  # shown first; rows older than `metrics` have only these
AVERAGED = ("fd", "clip_score", "attribute_accuracy", "nfe")
ATTRIBUTE = "attribute:"  # prefix of the figures of single attributes


def of_run(folder: str | Path) -> Path:
    """Returns the folder that holds results.jsonl: a benchmark's, or bench/ within a demo's.

    Raises:
        InputError: neither holds one.
    """
    for place in (Path(folder), Path(folder) / "bench"):
        if (place / "results.jsonl").is_file():
            return place
    raise InputError(
        f"results: got {folder}, which holds no results.jsonl; allowed: a folder of stepdistill bench or demo"
    )


def read_folder(folder: str | Path) -> list[Row]:
    """Reads the rows of a benchmark's or a demo's folder.

    Raises:
        InputError: the folder holds no results, broken ones, or rows of several protocols.
    """
    file = of_run(folder) / "results.jsonl"
    rows = [sound(row, f"{file} line {number}") for number, row in enumerate(read_rows(file), 1)]
    if not rows:
        raise InputError(f"results: got {file}, which is empty; run stepdistill bench first")
    for row in rows:
        check_same_protocol(rows[0], row, f"{file}, line 1", "a later line")
    return rows


@dataclass(frozen=True)
class Measured:
    """A figure of a cell.

    Attributes:
        value, low, high: the value and its 95 % interval, which old rows may lack.
        n, of: number and kind of the units measured. seeds: number of seeds averaged.
        bend: signed systematic error that an extrapolated figure may have; its interval includes it.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    of: str = "pictures"
    seeds: int = 1
    bend: float = 0.0

    @classmethod
    def by(cls, figure: Figure, seeds: int = 1) -> Measured:
        """Builds it from a `Figure`."""
        return cls(figure.value, *figure.interval(), len(figure.influence), figure.unit, seeds, figure.bend)

    @property
    def half(self) -> float | None:
        """Half the interval's width; None if there is no interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def measured(row: Row) -> dict[str, Measured]:
    """Returns a row's figures by name; also for old rows without `metrics`."""
    if row.get("metrics"):
        known = [field.name for field in fields(Measured)]
        return {name: Measured(**{k: f[k] for k in known if k in f}) for name, f in row["metrics"].items()}
    found = {}
    for name in MAIN:
        if row.get(name) is not None:
            found[name] = Measured(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"), row.get("n"))
    return found


@dataclass(frozen=True)
class Cell:
    """A model at one step count: a row, or the mean of the rows of several seeds.

    Attributes:
        row: a row with the means. rows: as measured. folder: the benchmark folder they come from.
    """

    model: str
    steps: int
    row: Row
    rows: tuple[Row, ...]
    folder: Path | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in FIELDS:
            raise AttributeError(name)
        return self.row.get(name)

    @cached_property
    def figures(self) -> dict[str, Measured]:
        """All figures by name."""
        return measured(self.row)

    @cached_property
    def by_seed(self) -> dict[str, dict[int | None, Figure]]:
        """The figures whose influences are stored, by name and seed: see the function."""
        return by_seed(self.rows, self.folder)

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len({row.get("seed") for row in self.rows})

    @property
    def latency(self) -> float | None:
        """Median milliseconds per image, from prompt to pixels."""
        timing = self.row.get("latency_ms")
        return timing["total_p50"] / timing.get("batch", 1) if timing else None


def cells(rows: Sequence[Row], folder: Path | None = None) -> list[Cell]:
    """Returns one cell per model and step count, models in order of first appearance.

    If a seed was measured again under the same name, for example with other weights or timing, its newest row counts.
    Seeds whose figures depend on something else than the newest row's are left out. Times are the newest of any seed.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    newest: dict[tuple[str, int, int | None], Row] = {}
    for row in rows:
        newest.pop(cell_of(row), None)
        newest[cell_of(row)] = row
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in newest.values():
        groups.setdefault((row["model"], row["steps"]), []).append(row)
    found = []
    for (model, steps), same in sorted(groups.items(), key=lambda item: (models.index(item[0][0]), item[0][1])):
        same = [r for r in same if same_figures(r | {"seed": None}, same[-1] | {"seed": None})]
        timed = next((r for r in reversed(same) if r.get("latency_ms")), {})
        same.sort(key=lambda r: (r.get("seed") is not None, r.get("seed") or 0))
        row = same[0] | {name: timed.get(name) for name in TIMES}
        for name in AVERAGED:
            row[name] = _mean([r.get(name) for r in same])
        figures = _over_seeds(same, folder)
        row["metrics"] = {name: asdict(figure) for name, figure in figures.items()}
        if "fd" in figures:
            row["fd_low"], row["fd_high"] = figures["fd"].low, figures["fd"].high
        found.append(Cell(model, steps, row, tuple(same), folder))
    return found


def read_run(folder: str | Path) -> list[Cell]:
    """Reads the cells of a benchmark's or a demo's folder.

    Raises:
        InputError: see `read_folder`.
    """
    return cells(read_folder(folder), of_run(folder))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _over_seeds(rows: Sequence[Row], folder: Path | None) -> dict[str, Measured]:
    """The figures of one cell from its rows, one per seed: pooled by the units' influences if these were stored."""
    per_row = [measured(row) for row in rows]
    if len(rows) == 1:
        return per_row[0]
    stored, averaged = by_seed(rows, folder), {}
    for name in dict.fromkeys(name for figures in per_row for name in figures):
        if name in stored:
            averaged[name] = Measured.by(pooled(list(stored[name].values())), len(stored[name]))
        else:
            averaged[name] = _by_intervals([figures[name] for figures in per_row if name in figures])
    return averaged


def by_seed(rows: Sequence[Row], folder: Path | None) -> dict[str, dict[int | None, Figure]]:
    """Returns the figures of one cell by name and seed, with each unit's influence; only those whose influences are
    stored, for the same units, by all rows that have the figure.

    Raises:
        InputError: an influence file is damaged.
    """
    found: dict[str, dict[int | None, Figure | None]] = {}
    for row in rows:
        kept = figures_of(folder, row)
        for name in measured(row):
            found.setdefault(name, {})[row.get("seed")] = kept.get(name)
    return {name: own for name, own in found.items() if alike(list(own.values()))}


def _by_intervals(figures: Sequence[Measured]) -> Measured:
    """The mean over seeds. Its interval is as wide as one seed's, whose error all may share, plus the excess spread."""
    values, halves = ([getattr(f, name) for f in figures] for name in ("value", "half"))
    bend = sum(figure.bend for figure in figures) / len(figures)
    mean, one = sum(values) / len(values), replace(figures[0], seeds=len(figures), bend=bend)
    if None in halves:
        return replace(one, value=mean, low=None, high=None)
    within = math.sqrt(sum(half**2 for half in halves) / len(halves))
    half = math.hypot(within, between(values, (within / Z) ** 2)) if len(values) > 1 else within
    return replace(one, value=mean, low=mean - half, high=mean + half)


def floors(found: Sequence[Cell]) -> list[Cell]:
    """The cells of real images and reconstructions, for reference."""
    return [cell for cell in found if cell.steps == 0]


def names(found: Sequence[Cell]) -> list[str]:
    """The names of all figures that any cell has, the main ones first, without those of single attributes."""
    present = dict.fromkeys(n for cell in found for n in cell.figures if not n.startswith(ATTRIBUTE))
    return [n for n in MAIN if n in present] + [n for n in present if n not in MAIN]
