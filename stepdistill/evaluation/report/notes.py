"""Lines below the report's tables: what their figures are not to be trusted for."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.evaluation.cells import Cell, Row
from stepdistill.evaluation.few import too_few
from stepdistill.evaluation.summary import digits, figure, label

ON_FEATURES = ("fd", "fd_inf", "kid", "precision", "recall", "density", "coverage", "diversity_features")
ON_EMBEDDINGS = ("clip_score", "cmmd", "attribute_accuracy")


def notes(found: Sequence[Cell]) -> list[str]:
    """Returns the lines that apply: whose features the figures are of, too few images for the order of distances, and
    how far FD∞ may be off."""
    few = next(filter(None, (too_few(cell.row) for cell in found)), None)
    bent = [(abs(own.bend), cell) for cell in found if (own := cell.figures.get("fd_inf")) and own.bend]
    lines = [*networks(found), *([] if few is None else [f"{few}."])]
    if bent:
        most, cell = max(bent, key=lambda each: each[0])
        where = f"{cell.model} at {cell.steps} step{'s' * (cell.steps > 1)}" if cell.steps else cell.model
        lines.append(
            f"FD∞ is extrapolated. Its intervals include the difference between a parabola and a line, at most "
            f"{figure(most, digits('fd_inf', found))} here, for {where}; the CSV has it per row."
        )
    return lines


def networks(found: Sequence[Cell]) -> list[str]:
    """Returns a line on whose features and embeddings the figures are of, as far as the rows say; none else."""
    first, names = found[0], {name for cell in found for name in cell.figures}
    parts = []
    for figures, network, what in (
        (ON_FEATURES, first.fd_extractor, "features"), (ON_EMBEDDINGS, first.clip_model, "embeddings"),
    ):  # fmt: skip
        if network and (of := [label(name) for name in figures if name in names]):
            listed = " and ".join(filter(None, (", ".join(of[:-1]), of[-1])))
            parts.append(f"{listed} {'are' if len(of) > 1 else 'is'} of {network} {what}")
    return [f"{'; '.join(parts)}. Figures of other networks are not comparable."] if parts else []


def commits_of(rows: Sequence[Row]) -> str:
    """Returns the commits of all rows, superseded ones too, in order; "" if none says."""
    commits = dict.fromkeys(row["commit"] for row in rows if row.get("commit"))
    changed = " (+: with uncommitted changes)" * any(commit.endswith("+") for commit in commits)
    return f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}{changed}" if commits else ""
