"""From a benchmark's folder to report.md and one self-contained report.html: tables, curves, pictures side by side.

write_report("out/bench")       # or: stepdistill report out/bench
"""

from __future__ import annotations

from stepdistill.evaluation.report.page import write_report

__all__ = ["write_report"]
