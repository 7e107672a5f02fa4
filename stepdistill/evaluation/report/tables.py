"""The report's tables as data, and all rows as one CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.evaluation.cells import ATTRIBUTE, BETTER, MAIN, Cell, Row, measured, names
from stepdistill.evaluation.conditions import conditions, timed_as
from stepdistill.evaluation.report.verdicts import Gain, beside, duration, ends_of
from stepdistill.evaluation.summary import digits, figure, label, number, percent, spread, units

FACTS = (
    "protocol", "protocol_hash", "model", "method", "teacher", "spec", "steps", "nfe", "guidance", "scheduler",
    "spacing", "sigmas", "call", "n", "seed", "fd_extractor", "clip_model",
)  # fmt: skip
COSTS = (
    "batch", "channels_last", "dtype", "device", "train_seconds", "train_seed", "train_settings", "train_commit",
    "commit", "command",
)  # fmt: skip
TIMES = ("latency_ms", "latency_ms_batch")  # for one image per call, and for several


@dataclass(frozen=True)
class Head:
    """A column: its name, a note below it, whether higher is better, and whether it is text."""

    name: str
    note: str = ""
    high: bool = False
    text: bool = False


@dataclass(frozen=True)
class Value:
    """A table entry: its text, the small text next to it, and its sort key; None sorts last."""

    text: str
    small: str = ""
    sort: float | str | None = None


@dataclass(frozen=True)
class Table:
    """Columns and, for each line, its benchmark cell and values."""

    title: str
    heads: list[Head]
    lines: list[tuple[Cell, list[Value]]]


def tables(found: Sequence[Cell]) -> list[Table]:
    """Returns the tables Overview, All metrics, Attributes and Latency, without empty ones."""
    made = [_overview(found), _everything(found), _attributes(found), _latency(found)]
    return [table for table in made if table.lines and len(table.heads) > 1]


def _overview(found: Sequence[Cell]) -> Table:
    main = [name for name in MAIN if name in names(found)]
    timed = any(cell.latency for cell in found)
    several = any(cell.seeds > 1 for cell in found)
    heads = [Head("steps"), Head("NFE"), *([Head("seeds")] if several else []), *(_head(name) for name in main),
             *([Head("ms")] if timed else []), Head("guidance"), Head("scheduler", text=True)]  # fmt: skip
    lines = []
    for cell in found:
        figures = [_figure(name, cell, found, ends=False) for name in main]
        times = [_plain(cell.latency, 1)] if timed else []
        scheduler = (cell.scheduler or "").removesuffix("Scheduler") + f", {cell.sigmas} sigmas" * bool(cell.sigmas)
        sampling = [_plain(cell.guidance), _text(scheduler)]
        seeds = [_plain(cell.seeds)] if several else []
        lines.append((cell, [*_steps(cell), *seeds, *figures, *times, *sampling]))
    return Table("Overview", heads, lines)


def _everything(found: Sequence[Cell]) -> Table:
    return _of_figures("All metrics", names(found), found)


def _attributes(found: Sequence[Cell]) -> Table:
    """Returns the accuracy for each attribute, with the number of images whose prompts name it."""
    asked = list(dict.fromkeys(name for cell in found for name in cell.figures if name.startswith(ATTRIBUTE)))
    return _of_figures("Attributes", asked, [cell for cell in found if any(name in cell.figures for name in asked)])


def _of_figures(title: str, shown: Sequence[str], found: Sequence[Cell]) -> Table:
    heads = [Head("steps")]
    for name in shown:
        of = next(cell.figures[name] for cell in found if name in cell.figures)
        seeds = f" × {of.seeds} seeds" if of.seeds > 1 else ""
        heads.append(_head(name, "" if of.n is None else f"{of.n:,} {units(of)}{seeds}"))
    lines = [(cell, [_steps(cell)[0], *(_figure(name, cell, found, ends=True) for name in shown)]) for cell in found]
    return Table(title, heads, lines)


def _latency(found: Sequence[Cell]) -> Table:
    """Returns one line per timing of a cell: one image per call, and several per call."""
    heads = [Head("steps"), Head("NFE"), Head("batch"), Head("ms", "median"), Head("ms", "p90"), Head("ms", "p99"),
             Head("ms", "first call"), Head("text"), Head("per step"), Head("decode"), Head("calls"),
             Head("peak MB", "of the pipeline"), Head("timing", text=True)]  # fmt: skip
    taken = [(cell, cell.row[name]) for cell in found for name in TIMES if cell.row.get(name)]
    several = len({conditions(cell)[0] for cell, _ in taken}) > 1
    lines = []
    for cell, times in taken:
        batch = times.get("batch", 1)
        whole = [times.get(name) for name in ("total_p50", "total_p90", "total_p99", "first")]
        stages = [_plain(times.get(name), 2) for name in ("text", "denoiser_step", "decode")]
        lines.append((cell, [
            *_steps(cell), _plain(batch, 0), *(_plain(None if ms is None else ms / batch, 1) for ms in whole), *stages,
            _plain(times.get("repeats"), 0), _plain(times.get("pipeline_memory_mb"), 0),
            _text(timed_as(cell, on=several)),
        ]))  # fmt: skip
    return _filled(Table("Latency", heads, lines))


def _filled(table: Table) -> Table:
    """Drops empty columns, such as a pipeline's memory on a CPU."""
    kept = [i for i in range(len(table.heads)) if any(values[i].text != "–" for _, values in table.lines)]
    lines = [(cell, [values[i] for i in kept]) for cell, values in table.lines]
    return Table(table.title, [table.heads[i] for i in kept], lines)


def machines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns ("on", device) for devices that generated images, and ("timed on", device) if timed on others."""
    drawn = dict.fromkeys(row["device"] for row in rows if row.get("device"))
    timed = dict.fromkeys(how["device"] for row in rows if (how := row.get("timing")))
    elsewhere = timed if set(timed) != set(drawn) else {}
    return [*(("on", device) for device in drawn), *(("timed on", device) for device in elsewhere)]


def cost_table(gained: Sequence[Gain]) -> Table:
    """Returns the cost of training, its gain at equal step count, and the gap to the teacher's largest step count."""
    other = beside(gained)
    heads = [
        Head("training"), Head("steps"), Head("FD"), Head(other, "same steps"), Head("teacher / student", high=True),
        Head(other, "most steps"), Head("gap", "95 % interval"), Head("verdict", text=True),
    ]  # fmt: skip
    lines = []
    found = [cell for gain in gained for cell in (gain.cell, gain.last)]
    for gain in gained:
        cell, gap = gain.cell, gain.gaps.get("fd")
        fd = [_figure("fd", c, found, ends=False) if c is not None else Value("–") for c in (cell, gain.same)]
        last, nearer = gain.last.figures["fd"], gain.of_same and gain.of_same.inverse
        details = (spread("fd", last, 1), f"{gain.last.steps} steps")
        left = Value("–")
        if gap is not None:
            ends = f"{figure(gap.gap.low, 1)} to {figure(gap.gap.high, 1)}"
            left = Value(figure(gap.gap.value, 1), ends, gap.gap.value)
        lines.append((cell, [
            Value(duration(cell.train_seconds), sort=cell.train_seconds), _steps(cell)[0], *fd,
            Value(f"{nearer.value:.1f}×", ends_of(nearer, 1), nearer.value) if nearer else Value("–"),
            Value(figure(last.value, 1), ", ".join(filter(None, details)), last.value), left,
            _text(gap.word if gap else ""),
        ]))  # fmt: skip
    return Table("Training cost", heads, lines)


def _head(name: str, note: str | None = None) -> Head:
    better = BETTER.get(name, "")
    return Head(label(name), f"{better} is better" if note is None and better else note or "", better == "higher")


def _steps(cell: Cell) -> list[Value]:
    if not cell.steps:
        return [Value("–"), Value("–")]
    return [Value(str(cell.steps), sort=cell.steps), _plain(cell.nfe)]


def _figure(name: str, cell: Cell, found: Sequence[Cell], *, ends: bool) -> Value:
    if name not in cell.figures:
        return Value("–")
    own, places = cell.figures[name], digits(name, found)
    unit = " %" if percent(name) else ""
    return Value(number(name, own.value, places) + unit, spread(name, own, places, ends=ends), own.value)


def _plain(value: float | None, places: int | None = None) -> Value:
    if value is None:
        return Value("–")
    return Value(f"{value:g}" if places is None else figure(value, places), sort=value)


def _text(value: str) -> Value:
    return Value(value or "–", sort=value or None)


def as_csv(rows: Sequence[Row]) -> str:
    """Returns every row with its figures, their intervals and counts, and its times: one line per model, step count,
    seed and timing. An extrapolated figure also has its NAME_bend."""
    figures = [measured(row) for row in rows]
    known = list(dict.fromkeys(name for each in figures for name in each))
    times = [timed_columns(row) for row in rows]
    clocks = list(dict.fromkeys(name for each in times for name in each))
    parts = [f"{name}{part}" for name in known for part in ("", "_low", "_high", "_n", "_of")]
    bent = [name for name in known if any(name in own and own[name].bend for own in figures)]
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\r\n")
    writer.writerow([*FACTS, *parts, *(f"{name}_bend" for name in bent), *clocks, *COSTS])
    for row, own, timed in zip(rows, figures, times, strict=True):
        line: list[Any] = [row.get(name) for name in FACTS]
        for name in known:
            found = own.get(name)
            line += [None] * 5 if found is None else [found.value, found.low, found.high, found.n, found.of]
        line += [own[name].bend if name in own else None for name in bent]
        line += [timed.get(name) for name in clocks] + [row.get(name) for name in COSTS]
        writer.writerow(map(_harmless, line))
    return target.getvalue()


def timed_columns(row: Row) -> dict[str, Any]:
    """Returns a row's times and how they were taken, one value per column: latency_ms_total_p50, ..., timing_device.

    The median of a stage has the stage's name; its other quantiles are latency_ms_decode_p90 and so on.
    """
    found: dict[str, Any] = {}
    for name in TIMES:
        times = dict(row.get(name) or {})
        for stage, (_, p90, p99) in (times.pop("quantiles", None) or {}).items():
            times |= {f"{stage}_p90": p90, f"{stage}_p99": p99}
        found |= {f"{name}_{part}": value for part, value in times.items()}
    return found | {f"timing_{name}": value for name, value in (row.get("timing") or {}).items()}


def _harmless(value: Any) -> Any:
    """Prefixes a text that a spreadsheet would execute as a formula with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
