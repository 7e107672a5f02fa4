"""Writes a benchmark's figures into the model cards of the students it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepdistill.evaluation.cells import Row, cells
from stepdistill.evaluation.spec import parse
from stepdistill.evaluation.summary import columns, markdown_table
from stepdistill.export.card import put_figures

SHOWN = ("steps", "NFE", "seeds", "FD", "CLIP", "attributes", "ms", "guidance", "scheduler")


def write_cards(rows: Sequence[Row], folder: Path | None = None) -> list[Path]:
    """Writes a table of student and teacher into the model card of each export folder among the rows' models.

    The students of a progressive chain are separate exports, each with its own figures.

    Args:
        folder: the benchmark folder that the rows come from, if known.

    Returns:
        The folders whose cards changed.
    """
    found = cells(rows, folder)
    written = []
    for (model, spec_of), row in {(row["model"], row["spec"]): row for row in rows if row.get("spec")}.items():
        spec = parse(spec_of)
        export = Path(spec.lora or spec.path)
        shown = [cell for cell in found if cell.row["spec"] == spec_of or cell.method in ("teacher", "floor")]
        names = [name for name in columns(shown)[0] if name in SHOWN]
        seeds = sorted({r["seed"] for r in rows if r["model"] == model and r.get("seed") is not None})
        text = (
            f"Protocol {row['protocol']} (`{row['protocol_hash']}`), n = {row['n']} per cell, "
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, on {row['device']}. FD is a Fréchet "
            f"distance on {row['fd_extractor']} features; ± is half the width of a 95 % interval; ms is the median.\n\n"
            + markdown_table(shown, names)
        )
        if put_figures(export, text):
            written.append(export)
    return written
