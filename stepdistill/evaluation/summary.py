"""What a benchmark's rows say: cells with seeds averaged, floors, the headline, and the table's columns as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError
from stepdistill.evaluation.records import read_rows

Row = dict[str, Any]


def read_folder(folder: str | Path) -> list[Row]:
    """The rows of a benchmark's folder.

    Raises:
        InputError: it holds no results, broken ones, or rows of several protocols.
    """
    file = Path(folder) / "results.jsonl"
    if not file.is_file():
        raise InputError(
            f"report: got {folder}, which holds no results.jsonl; allowed: a folder of stepdistill bench or demo"
        )
    rows = read_rows(file)
    if not rows:
        raise InputError(f"report: got {file}, which is empty; run stepdistill bench first")
    if len(found := {f"{row.get('protocol')} ({row['protocol_hash']})": None for row in rows}) > 1:
        raise InputError(
            f"report: got rows of {' and '.join(found)}; figures of different protocols cannot be compared; keep one"
        )
    return rows


@dataclass(frozen=True)
class Cell:
    """A model at a number of steps: a row, or the mean of its rows where there are several seeds."""

    model: str
    steps: int
    row: Row
    seeds: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.row.get(name)

    @property
    def latency(self) -> float | None:
        """Median milliseconds of a whole picture."""
        timing = self.row.get("latency_ms")
        return timing["total_p50"] / timing.get("batch", 1) if timing else None


AVERAGED = ("fd", "fd_low", "fd_high", "clip_score", "attribute_accuracy", "nfe")


def cells(rows: Sequence[Row]) -> list[Cell]:
    """One cell for each model and step count, models in order of first appearance."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["steps"]), []).append(row)
    models = list(dict.fromkeys(model for model, _ in groups))
    found = []
    for (model, steps), same in sorted(groups.items(), key=lambda item: (models.index(item[0][0]), item[0][1])):
        row = dict(same[0])
        for name in AVERAGED:
            values = [r[name] for r in same if r.get(name) is not None]
            row[name] = sum(values) / len(values) if values else None
        found.append(Cell(model, steps, row, len({r.get("seed") for r in same})))
    return found


def floors(found: Sequence[Cell]) -> list[Cell]:
    """Real pictures and reconstructions: what no model can be expected to beat."""
    return [cell for cell in found if cell.steps == 0]


def verdicts(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each student, its best cell of at most 8 steps against its teacher's longest: the page's headline.

    The teacher is the one it was made from, or else the first that was measured; without a teacher nothing is said.

    Returns:
        model, steps, and stats: (figure, what it is) pairs.
    """
    measured = [cell for cell in found if cell.steps > 0 and cell.fd is not None]
    teachers = [cell for cell in measured if cell.method == "teacher"]
    several = len({cell.model for cell in teachers}) > 1
    said = []
    for model in dict.fromkeys(c.model for c in measured if teachers and c.model != teachers[0].model):
        few = [c for c in measured if c.model == model and c.steps <= 8]
        if not few:
            continue
        best = min(few, key=lambda c: c.fd)
        own = next((c for c in teachers if str(c.spec).split(",")[0] == best.teacher), teachers[0])
        baseline = [c for c in teachers if c.model == own.model]
        last, who = baseline[-1], own.model if several else "the teacher"
        at = f"{best.steps} step{'s' * (best.steps > 1)}"
        stats = [(figure(best.fd, 1), f"FD, where {who} has {figure(last.fd, 1)} at {last.steps} steps")]
        if last.fd > 0:
            stats.append((f"{figure(best.fd / last.fd, 2)}×", f"{who}’s distance at {last.steps} steps"))
        same = next((c for c in baseline if c.steps == best.steps), None)
        if same is not None and same.fd > 0:
            stats.append((f"{figure(best.fd / same.fd, 2)}×", f"{who}’s distance at the same {at}"))
        if best.latency and last.latency:
            faster = figure(last.latency / best.latency, 1)
            stats.append((f"{faster}×", f"faster than {who} at {last.steps} steps"))
        said.append({"model": model, "steps": at, "stats": stats})
    return said


def figure(value: float | None, digits: int) -> str:
    """A number for a table; a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def columns(cell: Cell) -> dict[str, str]:
    """The columns of a cell, as text."""
    timing = cell.latency_ms or {}
    batch = timing.get("batch", 1)
    return {
        "steps": str(cell.steps) if cell.steps else "–",
        "NFE": f"{cell.nfe:g}" if cell.steps and cell.nfe is not None else "–",
        "FD": figure(cell.fd, 1),
        "interval": f"{figure(cell.fd_low, 1)}–{figure(cell.fd_high, 1)}" if cell.fd_low is not None else "–",
        "CLIP": figure(cell.clip_score, 2),
        "attributes": "–" if cell.attribute_accuracy is None else f"{100 * cell.attribute_accuracy:.1f} %",
        "ms": figure(cell.latency, 1),
        "p90": figure(timing["total_p90"] / batch if timing else None, 1),
        "text": figure(timing.get("text"), 2),
        "per step": figure(timing.get("denoiser_step"), 2),
        "decode": figure(timing.get("decode"), 2),
        "guidance": "–" if cell.guidance is None else f"{cell.guidance:g}",
        "scheduler": (cell.scheduler or "–").removesuffix("Scheduler"),
    }


def markdown_table(found: Sequence[Cell], names: Sequence[str]) -> str:
    """The named columns as a Markdown table, a line a cell."""
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for cell in found:
        values = columns(cell)
        lines.append(f"| {escaped(cell.model)} | " + " | ".join(values[name] for name in names) + " |")
    return "\n".join(lines)


def escaped(text: object) -> str:
    """Text for Markdown: no HTML, no column ends."""
    return html.escape(str(text)).replace("|", "\\|")


def print_table(rows: Sequence[Row]) -> None:
    """The main columns, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = cells(rows)
    shown = ["steps", "NFE", "FD", "interval", "CLIP", "attributes", "ms"]
    first = rows[0]
    title = f"{first.get('protocol')}, n = {first.get('n')}, FD-{first.get('fd_extractor')}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right")
    last = None
    for cell in found:
        if last is not None and cell.model != last:
            table.add_section()
        values = columns(cell)
        table.add_row(cell.model if cell.model != last else "", *(values[name] for name in shown))
        last = cell.model
    Console().print(table, markup=False)
