"""report.html: one file that loads nothing from outside, with its script's hash in its content security policy."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from stepdistill import files
from stepdistill.evaluation.cells import Row, cells, of_run, read_folder
from stepdistill.evaluation.records import FIELDS
from stepdistill.evaluation.report import inline
from stepdistill.evaluation.report.curves import BY_LATENCY, Make, cost_curves, curves, main_curves, timed_apart
from stepdistill.evaluation.report.families import models_of
from stepdistill.evaluation.report.markdown import markdown
from stepdistill.evaluation.report.notes import commits_of, notes
from stepdistill.evaluation.report.strips import chosen, prompts_of, strips_of
from stepdistill.evaluation.report.tables import as_csv, cost_table, machines, tables
from stepdistill.evaluation.report.verdicts import beside, gains, verdicts

HERE = Path(__file__).parent
IMAGES = {"quality.png": "FD by steps", "latency.png": BY_LATENCY}  # for report.md, and for a README


def write_report(folder: str | Path, *, title: str | None = None) -> Path:
    """Writes report.md, its PNG plots and report.html into the folder.

    Args:
        title: of the page; by default derived from what was measured.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder holds no results.
    """
    folder = of_run(folder)
    rows = read_folder(folder)
    found = cells(rows, folder)
    gained, models = gains(found), models_of(found)
    drawn, cost = curves(found), cost_curves(found, gained)
    headlines, all_tables = verdicts(gained, models), tables(found)
    title = title or f"Quality {'and latency ' if BY_LATENCY in drawn else ''}by step count"
    prompts, strips, costs = prompts_of(folder), strips_of(folder, found), cost_table(gained)
    main = {name: make for name, make in drawn.items() if name in main_curves()}
    others = {name: make for name, make in drawn.items() if name not in main}
    script, marks = _text("page.js"), {name: model for model in models for name in (*model.members, model.name)}
    context = {
        "title": title, "first": dict.fromkeys(FIELDS) | rows[0], "facts": _facts(rows), "caption": _caption(rows),
        "verdicts": headlines, "models": models, "marks": marks, "tables": all_tables,
        "students": [model for model in models if {gain.cell.model for gain in gained} & {*model.members}],
        "seeded": [model for model in models if len(model.members) > 1],
        "costs": costs if costs.lines else None, "other": beside(gained), "strips": strips,
        "chosen": chosen(strips, headlines, list(marks)),
        "prompts": prompts[: max((len(strip.uris) for strip in strips), default=0)],
        "by_steps": [(n, [s for s in strips if s.steps == n]) for n in sorted({s.steps for s in strips})],
        "svgs": _svgs(main), "more_svgs": _svgs(others), "cost_svgs": _svgs(cost),
        "averaged": any(cell.seeds > 1 for cell in found), "timed": BY_LATENCY in drawn,
        "timed_apart": timed_apart(found), "notes": notes(found),
        "floors": any(cell.steps == 0 for cell in found),
        "commands": _all(rows, "command"), "commits": commits_of(rows),
        "csv": base64.b64encode(as_csv(rows).encode()).decode(),
        "style": _text("page.css"), "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(_text("page.html.j2")).render(context)
    images = [file for file, name in IMAGES.items() if name in drawn]
    for file in images:
        inline.png(drawn[IMAGES[file]], folder / file)
    more = [table for table in (*all_tables[1:], costs) if table.lines]
    text = markdown(title, _caption(rows), rows, found, headlines, more, prompts, images, folder)
    files.write(folder / "report.md", text)
    files.write(folder / "report.html", page)
    return folder / "report.html"


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _svgs(makes: Mapping[str, Make]) -> list[str]:
    return [inline.svg(make(), name) for name, make in makes.items()]


def _all(rows: Sequence[Row], name: str) -> list[Any]:
    """Returns the distinct values of a field, in order."""
    return list(dict.fromkeys(row[name] for row in rows if row.get(name) is not None))


def _seeds(rows: Sequence[Row]) -> str:
    seeds = sorted(_all(rows, "seed"))
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""


def _caption(rows: Sequence[Row]) -> str:
    """Returns protocol, n and seeds in a line for captions."""
    first = rows[0]
    n = f"n = {first['n']:,} per cell" if first.get("n") else ""
    return ", ".join(filter(None, (first.get("protocol"), n, _seeds(rows))))


def _facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Returns (name, value) pairs common to all rows, for the head of the page."""
    first = rows[0]
    content = (first.get("settings") or {}).get("content")
    content = content if isinstance(content, dict) else {}
    name, _, seeds = _seeds(rows).partition(" ")
    pairs = [
        ("protocol", first.get("protocol")), ("hash", first["protocol_hash"]),
        ("n", f"{first['n']:,}" if first.get("n") else None), (name, seeds),
        ("distance", first.get("fd_extractor") and f"FD-{first['fd_extractor']}"), ("CLIP", first.get("clip_model")),
        ("reference", content.get("statistics") and "foreign statistics"),
        *machines(rows),
    ]  # fmt: skip
    return [(name, value) for name, value in pairs if value]
