"""report.md: what report.html says, for a repository's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepdistill.evaluation.cells import Cell, Row
from stepdistill.evaluation.records import grid_name
from stepdistill.evaluation.report.tables import Table
from stepdistill.evaluation.summary import columns, escaped, markdown_table


def markdown(
    title: str, rows: Sequence[Row], found: Sequence[Cell], said: Sequence[dict[str, Any]], more: Sequence[Table],
    prompts: Sequence[str], timed: bool,
) -> str:  # fmt: skip
    """The page, as text.

    Args:
        said: the verdicts. more: tables after the main one. timed: whether there is a latency.png.
    """
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows if row.get("seed") is not None})
    devices = dict.fromkeys(escaped(row.get("device")) for row in rows)
    lines = [
        f"# {escaped(title)}", "",
        f"Protocol {escaped(first.get('protocol'))} (`{escaped(first['protocol_hash'])}`), n = {first.get('n')} a "
        f"cell, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, FD-{escaped(first.get('fd_extractor'))}; "
        f"on {'; '.join(devices)}.", "",
    ]  # fmt: skip
    for verdict in said:
        told = "; ".join(f"{big} {what}" for big, what in verdict["stats"])
        lines += [f"**{escaped(verdict['model'])}** at {verdict['steps']}: {escaped(told)}.", ""]
    lines += [markdown_table(found, list(columns(found)[0])), ""]
    lines += ["![quality by steps](quality.png)", *(["![quality by latency](latency.png)"] if timed else []), ""]
    lines += [
        "± is half of a 95 % interval. FD, CLIP and attributes by the protocol; ms a picture are medians of whole "
        "calls; per step is one call.", "",
    ]  # fmt: skip
    for table in more:
        lines += [f"## {table.title}", "", _table(table), ""]
    for cell in found:
        lines.append(
            f"{escaped(cell.model)}, {cell.steps} steps\n\n![{escaped(cell.model)}](grids/{grid_name(cell.row)})\n"
        )
    lines += [f"{i}. {escaped(prompt)}" for i, prompt in enumerate(prompts, 1)]
    commands = dict.fromkeys(row.get("command") or "" for row in rows)
    lines += ["", "Made by:", "", *(f"    {' '.join(command.split())}" for command in commands), ""]
    return "\n".join(lines)


def _table(table: Table) -> str:
    """A table whose intervals stand behind the figures in brackets."""
    heads = [f"{escaped(head.name)}{f' ({escaped(head.note)})' if head.note else ''}" for head in table.heads]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for cell, values in table.lines:
        shown = [f"{value.text} ({value.small})" if value.small else value.text for value in values]
        lines.append(f"| {escaped(cell.model)} | " + " | ".join(map(escaped, shown)) + " |")
    return "\n".join(lines)
