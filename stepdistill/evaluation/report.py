"""From a benchmark's folder to report.md and one self-contained report.html: tables, curves, grids of the same seeds.

write_report("out/bench")       # or: stepdistill report out/bench
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.errors import InputError
from stepdistill.evaluation import plots
from stepdistill.evaluation.records import grid_name
from stepdistill.evaluation.summary import (
    Cell,
    Row,
    cells,
    columns,
    escaped,
    floors,
    markdown_table,
    read_folder,
    verdicts,
)

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(folder: str | Path, *, title: str = "Quality and latency by number of steps") -> Path:
    """Writes report.md, its two PNG plots and report.html into the folder.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder holds no results, or matplotlib or jinja2 is not installed.
    """
    folder = Path(folder)
    rows = read_folder(folder)
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"report: needs {error.name}, which is not installed; pip install 'stepdistill[demo]'"
        ) from error
    found = cells(rows)
    figures = _figures(found)
    prompts = _prompts(folder)
    context = {
        "title": title, "first": rows[0], "verdicts": verdicts(found), "models": _models(found),
        "floors": floors(found),
        "columns": columns, "names": list(columns(found[0])), "grids": _grids(folder, rows), "prompts": prompts,
        "svgs": [plots.svg(make(), name) for name, make in figures.items()],
        "commands": list(dict.fromkeys(row.get("command") or "" for row in rows)),
        "seeds": sorted({row["seed"] for row in rows if row.get("seed") is not None}),
        "devices": list(dict.fromkeys(row.get("device") or "" for row in rows)),
    }  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text()).render(context)
    for name in ("quality", "latency"):
        make = figures.get("FD by steps" if name == "quality" else "FD by latency")
        if make is not None:
            plots.png(make, folder / f"{name}.png")
    files.write(folder / "report.md", _markdown(title, rows, found, prompts, "FD by latency" in figures))
    files.write(folder / "report.html", page)
    return folder / "report.html"


def _models(found: Sequence[Cell]) -> list[tuple[str, int, list[Cell]]]:
    names = list(dict.fromkeys(cell.model for cell in found if cell.steps > 0))
    return [(name, i % plots.SERIES + 1, [c for c in found if c.model == name]) for i, name in enumerate(names)]


def _figures(found: Sequence[Cell]) -> dict[str, Any]:
    """name -> a function that draws it; only what was measured."""
    models, base = _models(found), floors(found)

    def curves(y: str, x: str, interval: bool = False) -> list[plots.Curve]:
        lines = []
        for i, (name, _, own) in enumerate(models):
            points = [
                plots.Point(getattr(c, x), c.row[y], *((c.fd_low, c.fd_high) if interval else (None, None)), c.steps)
                for c in own
                if c.row.get(y) is not None and getattr(c, x) is not None
            ]
            lines.append(plots.Curve(name, points, i))
        return [line for line in lines if line.points]

    def level(y: str) -> list[tuple[str, float]]:
        return [(c.model, c.row[y]) for c in base if c.row.get(y)]

    made: dict[str, Any] = {}
    if curves("fd", "steps"):
        label = f"FD-{found[0].fd_extractor}"
        made["FD by steps"] = lambda: plots.quality_by_steps(
            curves("fd", "steps", True), label, level("fd"), log=True, better="lower"
        )
        if curves("fd", "latency"):
            batch = next(c.latency_ms for c in found if c.latency_ms).get("batch", 1)
            made["FD by latency"] = lambda: plots.quality_by_latency(
                curves("fd", "latency"), label, level("fd"), f"ms a picture, batch {batch}; numbers are steps"
            )
    for name, column, text in (
        ("CLIP score by steps", "clip_score", "CLIP score"),
        ("Attributes by steps", "attribute_accuracy", "Attribute accuracy"),
    ):
        if curves(column, "steps"):
            made[name] = lambda column=column, text=text: plots.quality_by_steps(
                curves(column, "steps"), text, level(column), log=False, better="higher"
            )
    return made


def _prompts(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "grids" / "prompts.json").read_text())
    except (OSError, ValueError):
        return []
    return [str(prompt) for prompt in found] if isinstance(found, list) else []


def _grids(folder: Path, rows: Sequence[Row]) -> list[tuple[int, list[tuple[str, int, str]]]]:
    """(steps, [(model, colour, data URI)]): the strips of the first seed, side by side at each step count."""
    colours = {name: colour for name, colour, _ in _models(cells(rows))}
    groups: dict[int, list[tuple[str, int, str]]] = {}
    seen = set()
    for row in rows:
        file = folder / "grids" / grid_name(row)
        if (row["model"], row["steps"]) in seen or not file.is_file():
            continue
        seen.add((row["model"], row["steps"]))
        uri = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        groups.setdefault(row["steps"], []).append((row["model"], colours.get(row["model"], 0), uri))
    return sorted(groups.items())


def _markdown(title: str, rows: Sequence[Row], found: Sequence[Cell], prompts: Sequence[str], timed: bool) -> str:
    first = rows[0]
    lines = [
        f"# {escaped(title)}", "",
        f"Protocol {escaped(first.get('protocol'))} (`{escaped(first['protocol_hash'])}`), "
        f"n = {first.get('n')} a cell, FD-{escaped(first.get('fd_extractor'))}; on {escaped(first.get('device'))}.", "",
    ]  # fmt: skip
    for said in verdicts(found):
        told = "; ".join(f"{big} {what}" for big, what in said["stats"])
        lines += [f"**{escaped(said['model'])}** at {said['steps']}: {escaped(told)}.", ""]
    lines.append(markdown_table(found, list(columns(found[0]))))
    lines += ["", "![quality by steps](quality.png)", *(["![quality by latency](latency.png)"] if timed else []), ""]
    lines += [
        "FD, CLIP and attributes by the protocol; ms a picture are medians of whole calls; per step is one call.",
        "",
    ]
    for cell in found:
        lines.append(
            f"{escaped(cell.model)}, {cell.steps} steps\n\n![{escaped(cell.model)}](grids/{grid_name(cell.row)})\n"
        )
    lines += [f"{i}. {escaped(prompt)}" for i, prompt in enumerate(prompts, 1)]
    commands = dict.fromkeys(row.get("command") or "" for row in rows)
    lines += ["", "Made by:", "", *(f"    {' '.join(command.split())}" for command in commands), ""]
    return "\n".join(lines)
