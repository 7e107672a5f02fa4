"""Comparison of runs that differ in one setting: a table, a plot, sweep.json."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from stepdistill.baselines.base import BaselineConfig, first_word

COLOURS = {"teacher": "#6b7280", "control": "#d97706", "student": "#2563eb"}


def take_over(done: BaselineConfig, other: BaselineConfig) -> None:
    """Links what one run has trained into another's folder, if their settings for it are equal; existing files stay.

    If links cannot be created, it is trained again.
    """
    for place in sorted(done.out.iterdir()) if done.out.is_dir() else ():
        link = other.out / place.name
        if _told(done, place.name) == _told(other, place.name) and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                link.symlink_to(os.path.relpath(place, link.parent), target_is_directory=place.is_dir())


def _told(config: BaselineConfig, name: str) -> dict:
    whole = config.shared if first_word(name) in ("teacher", "control", "answers") else config
    return whole.part(name).record() | {"out": name}


def points(found: Mapping[object, Mapping]) -> list[dict]:
    """For each value: the primary figure of teacher, control and student (mean and each seed), and the gaps closed."""
    rows = []
    for value, record in found.items():
        row: dict = {"value": value}
        for role in COLOURS:
            each = [r["figures"][record["figure"]] for r in record["rows"] if r["role"] == role]
            if each:
                row[role] = {"mean": statistics.fmean(each), "seeds": each}
        rows.append(row | {"gap_closed": record["gap_closed"]})
    return rows


def write_sweep(out: Path, flag: str, found: Mapping[object, Mapping]) -> Path:
    """Writes sweep.json and sweep.png, prints the table, and returns the JSON's path. `found`: records by value."""
    from rich.console import Console
    from rich.table import Table

    from stepdistill.evaluation.records import write_record
    from stepdistill.training.processes import on_cpu

    one = next(iter(found.values()))
    rows = points(found)
    record = {"method": one["method"], "flag": flag, "figure": one["figure"], "n": one["n"], "points": rows}
    write_record(out / "sweep.json", record, "cpu" if on_cpu() else "cuda")
    plot(rows, flag, one, out / "sweep.png")
    table = Table(flag, *COLOURS, title=f"{one['method']}: {one['figure']} over {one['n']}, mean of seeds")
    for row in rows:
        table.add_row(str(row["value"]), *(f"{row[r]['mean']:.4g}" if r in row else "–" for r in COLOURS))
    Console().print(table)
    return out / "sweep.json"


def plot(rows: list[dict], flag: str, record: Mapping, file: Path) -> None:
    """Plots the primary figure against the setting: the mean over seeds, and each seed as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for role, colour in COLOURS.items():
        kept = [(x, row[role]) for x, row in zip(places, rows, strict=True) if role in row]
        style = "--" if role == "teacher" else "-"
        axes.plot([x for x, _ in kept], [y["mean"] for _, y in kept], style, color=colour, label=role, linewidth=1.8)
        for x, y in kept if role != "teacher" else []:
            axes.plot([x] * len(y["seeds"]), y["seeds"], ".", color=colour, alpha=0.55)
    values = [row["value"] for row in rows]
    axes.set_xticks(list(places), [f"{v:g}" if isinstance(v, int | float) else str(v) for v in values])
    axes.set(xlabel=flag.replace("_", " "), ylabel=record["figure"].replace("_", " "))
    axes.set_title(f"{record['method']}, {record['n']}; dots are single seeds", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
