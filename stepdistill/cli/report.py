"""Turns the folder of a benchmark into report.md and one self-contained report.html.

    stepdistill report out/bench
    stepdistill report out/demo

Only recorded rows and grids are read; nothing is generated or measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill report`."""

    folder: tyro.conf.Positional[Path]
    """A folder written by `stepdistill bench` or `stepdistill demo`; it or its bench/ holds results.jsonl."""
    title: str | None = None
    """Heading of the page; default: derived from what was measured."""


def main(config: Config) -> None:
    """Writes the report and prints its path."""
    from stepdistill.evaluation.cells import of_run, read_folder
    from stepdistill.evaluation.report import write_report
    from stepdistill.evaluation.summary import print_table

    print_table(read_folder(config.folder), of_run(config.folder))
    print(f"report: {write_report(config.folder, title=config.title)}")
