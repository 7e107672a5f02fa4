"""A benchmark's cells as text: figures with their intervals, and the main table for Markdown and the terminal."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.evaluation.cells import ATTRIBUTE, MAIN, Cell, Measured, Row, cells, names

if TYPE_CHECKING:
    from rich.console import Console

LABELS = {
    "fd": "FD", "clip_score": "CLIP", "attribute_accuracy": "attributes", "kid": "KID", "cmmd": "CMMD",
    "fd_inf": "FD∞", "diversity_lpips": "diversity, LPIPS", "diversity_features": "diversity", "hpsv2": "HPSv2",
    "imagereward": "ImageReward", "pickscore": "PickScore",
}  # fmt: skip


def label(name: str) -> str:
    """Returns a figure's name in tables."""
    return LABELS.get(name, name.removeprefix(ATTRIBUTE).replace("_", " "))


def digits(name: str, found: Sequence[Cell]) -> int:
    """Returns the decimals for a figure's column: enough to show the median half-interval to two digits."""
    halves = sorted(f.half for cell in found if (f := cell.figures.get(name)) and f.half)
    if not halves:
        return {"fd": 1, "clip_score": 2, "attribute_accuracy": 1}.get(name, 4)
    return max(0, 1 - math.floor(math.log10(halves[len(halves) // 2] * _scale(name))))


def percent(name: str) -> bool:
    """Whether a figure is shown in percent."""
    return name == "attribute_accuracy" or name.startswith(ATTRIBUTE)


def units(found: Measured) -> str:
    """Returns what a figure was measured over, for readers; rows call images pictures."""
    return "images" if found.of == "pictures" else found.of


def _scale(name: str) -> int:
    return 100 if percent(name) else 1


def figure(value: float | None, places: int) -> str:
    """Formats a number for a table; a dash for None."""
    return "–" if value is None else f"{value:,.{places}f}".replace("-", "−")


def number(name: str, value: float | None, places: int) -> str:
    """Formats a figure's value, or an end of its interval, for a table: attribute accuracies in percent."""
    return figure(None if value is None else value * _scale(name), places)


def spread(name: str, found: Measured, places: int, *, ends: bool = False) -> str:
    """Formats the interval for a table: ± half its width, or its ends; empty if there is none.

    A clearly asymmetric interval, as of a share near 0 or 100 %, is always shown by its ends.
    """
    if found.half is None:
        return ""
    to = "–" if found.low >= 0 else " to "
    both = f"{number(name, found.low, places)}{to}{number(name, found.high, places)}"
    if ends:
        return both
    aside = abs((found.low + found.high) / 2 - found.value) > found.half / 10
    return f"({both})" if aside else f"± {number(name, found.half, places)}"


def columns(found: Sequence[Cell]) -> list[dict[str, str]]:
    """Returns the main table as text: for each cell, column name -> value, with the same columns for all."""
    main = [name for name in MAIN if name in names(found)]
    places = {name: digits(name, found) for name in main}
    several = any(cell.seeds > 1 for cell in found)
    return [_columns(cell, places, several) for cell in found]


def _columns(cell: Cell, places: Mapping[str, int], several: bool) -> dict[str, str]:
    timing = cell.latency_ms or {}
    batch = timing.get("batch", 1)
    shown = {"steps": str(cell.steps) if cell.steps else "–"}
    shown["NFE"] = f"{cell.nfe:g}" if cell.steps and cell.nfe is not None else "–"
    shown |= {"seeds": str(cell.seeds)} if several else {}
    for name, count in places.items():
        found, unit = cell.figures.get(name), " %" * percent(name)
        value = f"{number(name, found.value, count)} {spread(name, found, count)}".rstrip() + unit if found else "–"
        shown[label(name)] = value
    return shown | {
        "ms": figure(cell.latency, 1),
        "p90": figure(timing["total_p90"] / batch if timing else None, 1),
        "text": figure(timing.get("text"), 2),
        "per step": figure(timing.get("denoiser_step"), 2),
        "decode": figure(timing.get("decode"), 2),
        "guidance": "–" if cell.guidance is None else f"{cell.guidance:g}",
        "scheduler": (cell.scheduler or "–").removesuffix("Scheduler"),
    }


def calls(cell: Cell, how: str = "") -> str:
    """Formats what follows a median time in brackets: its 90 % quantile and the number of calls, if known, and `how`
    it was taken."""
    times = cell.latency_ms or {}
    slow, count = times.get("total_p90"), times.get("repeats")
    parts = [] if slow is None else [f"p90 {figure(slow / times.get('batch', 1), 1)}"]
    parts += [f"{count} call{'s' * (count > 1)}"] if count else []
    parts += [how] if how else []
    return f" ({', '.join(parts)})" if parts else ""


def markdown_table(found: Sequence[Cell], shown: Sequence[str]) -> str:
    """Returns the named columns as a Markdown table, one line per cell."""
    lines = ["| model | " + " | ".join(shown) + " |", "|---|" + "---:|" * len(shown)]
    for cell, values in zip(found, columns(found), strict=True):
        lines.append(f"| {escaped(cell.model)} | " + " | ".join(values[name] for name in shown) + " |")
    return "\n".join(lines)


def escaped(text: object) -> str:
    """Escapes HTML and column separators for Markdown."""
    return html.escape(str(text)).replace("|", "\\|")


def print_table(rows: Sequence[Row], folder: Path | None = None) -> None:
    """Prints the main columns to the terminal. folder: the rows' folder, if known."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = cells(rows, folder)
    table_of = columns(found)
    shown = [n for n in table_of[0] if n in ("steps", "NFE", "seeds", *map(label, MAIN), "ms")]
    first = rows[0]
    facts = [str(first.get("protocol")), f"n = {first.get('n')}", f"FD-{first.get('fd_extractor')}"]
    facts += [f"CLIP {first['clip_model']}"] if first.get("clip_model") else []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right")
    last = None
    for cell, values in zip(found, table_of, strict=True):
        if last is not None and cell.model != last:
            table.add_section()
        table.add_row(cell.model if cell.model != last else "", *(values[name] for name in shown))
        last = cell.model
    console = wide_console()
    console.print(Text(f"{', '.join(facts)}; ± is half a 95 % interval"))
    console.print(table, markup=False)


def wide_console() -> Console:
    """Returns a console for tables: in a file or a pipe 120 columns wide, where a terminal of 80 would fold rows."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)
