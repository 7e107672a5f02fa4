"""Lines below the report's tables: what their figures are not to be trusted for."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.evaluation.cells import Cell
from stepdistill.evaluation.few import too_few
from stepdistill.evaluation.summary import digits, figure


def notes(found: Sequence[Cell]) -> list[str]:
    """Returns the lines that apply: too few images for the order of distances, and how far FD∞ may be off."""
    few = next(filter(None, (too_few(cell.row) for cell in found)), None)
    bent = [(abs(own.bend), cell) for cell in found if (own := cell.figures.get("fd_inf")) and own.bend]
    lines = [] if few is None else [f"{few}."]
    if bent:
        most, cell = max(bent, key=lambda each: each[0])
        where = f"{cell.model} at {cell.steps} step{'s' * (cell.steps > 1)}" if cell.steps else cell.model
        lines.append(
            f"FD∞ is extrapolated. Its intervals include the difference between a parabola and a line, at most "
            f"{figure(most, digits('fd_inf', found))} here, for {where}; the CSV has it per row."
        )
    return lines
