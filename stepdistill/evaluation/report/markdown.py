"""report.md: the contents of report.html, for a repository's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.evaluation.cells import Cell, Row
from stepdistill.evaluation.records import grid_name
from stepdistill.evaluation.report.notes import commits_of, notes
from stepdistill.evaluation.report.tables import Table, machines
from stepdistill.evaluation.summary import columns, escaped, markdown_table

IMAGES = {"quality.png": "quality by steps", "latency.png": "quality by latency"}


def markdown(
    title: str, caption: str, rows: Sequence[Row], found: Sequence[Cell], headlines: Sequence[dict[str, Any]],
    more: Sequence[Table], prompts: Sequence[str], images: Sequence[str], folder: Path,
) -> str:  # fmt: skip
    """Returns the page as text.

    Args:
        caption: protocol, n and seeds in a line. headlines: the verdicts. more: tables after the main one.
        images: files of the existing plots. folder: where they and the grids are.
    """
    first = rows[0]
    facts = [f"Protocol {escaped(caption)}, hash `{escaped(first['protocol_hash'])}`"]
    facts += [f"FD-{escaped(first['fd_extractor'])}"] if first.get("fd_extractor") else []
    facts += [f"{name} {escaped(device)}" for name, device in machines(rows)]
    lines = [f"# {escaped(title)}", "", f"{'; '.join(facts)}.", ""]
    for headline in headlines:
        stats = "; ".join(f"{big} {what}" for big, what in headline["stats"])
        what = escaped(f"at {headline['steps']} {headline['against']}: {stats}")
        lines += [f"**{escaped(headline['model'])}** {what}.", ""]
    lines += [markdown_table(found, list(columns(found)[0])), ""]
    lines += [*(f"![{IMAGES[file]}]({file})" for file in images), ""]
    lines += [
        "± is half the width of a 95 % interval. FD, CLIP and attributes follow the protocol; ms are per image, "
        "medians over whole calls; per step is one call.", "",
    ]  # fmt: skip
    lines += [line for note in notes(found) for line in (escaped(note), "")]
    for table in more:
        lines += [f"## {table.title}", "", _table(table), ""]
    for cell in found:
        grid = f"grids/{grid_name(cell.rows[0])}"
        if (folder / grid).is_file():
            steps = f"{cell.steps} step{'s' * (cell.steps > 1)}" if cell.steps else "for reference"
            lines.append(f"{escaped(cell.model)}, {steps}\n\n![{_alt(cell.model)}]({grid})\n")
    lines += [f"{i}. {escaped(prompt)}" for i, prompt in enumerate(prompts, 1)]
    if commands := dict.fromkeys(row["command"] for row in rows if row.get("command")):
        lines += ["", "Reproduce:", "", *(f"    {' '.join(command.split())}" for command in commands)]
    lines += ["", f"{commits}."] if (commits := escaped(commits_of(rows))) else []
    return "\n".join([*lines, ""])


def _alt(text: str) -> str:
    """Escapes text for use between square brackets."""
    return escaped(text.replace("\\", "\\\\")).replace("[", "\\[").replace("]", "\\]")


def _table(table: Table) -> str:
    """Formats a table, with intervals in brackets after the figures."""
    heads = [f"{escaped(head.name)}{f' ({escaped(head.note)})' if head.note else ''}" for head in table.heads]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for cell, values in table.lines:
        shown = [f"{value.text} ({value.small})" if value.small else value.text for value in values]
        lines.append(f"| {escaped(cell.model)} | " + " | ".join(map(escaped, shown)) + " |")
    return "\n".join(lines)
