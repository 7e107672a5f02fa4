"""Prints the table of a baseline's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepdistill.baselines.results import Results


def _is_end(name: str, figures: Mapping[str, float]) -> bool:
    stem, _, end = name.rpartition("_")
    return end in ("low", "high") and stem in figures


def _shown(name: str, figures: Mapping[str, float]) -> str:
    """A value, with its interval if it has one; a dash if there is none. Old records lack intervals."""
    if name not in figures:
        return "–"
    ends = [figures.get(f"{name}_{end}") for end in ("low", "high")]
    return f"{figures[name]:.4g}" + ("" if None in ends else " ({:.4g}–{:.4g})".format(*ends))


def show(record: Mapping) -> None:
    """Prints the table of a results.json, a row for each network, and the gap closed, as a mean over seeds."""
    from rich.table import Table

    from stepdistill.evaluation.summary import wide_console

    rows: Sequence[Mapping] = record["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"] if not _is_end(name, row["figures"])))
    table = Table("", "name", "seed", "parameters", *(n.replace("_", " ") for n in names), "training, s",
                  title=f"{record['method']}: {record['n']}")  # fmt: skip
    for row in rows:
        values = (_shown(name, row["figures"]) for name in names)
        seed = "–" if row["seed"] is None else str(row["seed"])
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        table.add_row(row["role"], row["name"], seed, f"{row['parameters']:,}", *values, seconds)
    console = wide_console()
    console.print(table)
    results = Results.of(record)
    for name in results.gaps():
        gap = results.gap(name)
        value = f"not reported: {gap}" if isinstance(gap, str) else f"{gap:.1%}"
        console.print(f"gap closed by {name}, in {record['figure'].replace('_', ' ')}, mean over seeds: {value}")
    if record["note"]:
        console.print(record["note"])
