"""Builds report.md and one self-contained report.html from a benchmark's folder: tables, curves, images side by side.

write_report("out/bench")       # or: stepdistill report out/bench
"""

from __future__ import annotations

from stepdistill.evaluation.report.page import write_report

__all__ = ["write_report"]
