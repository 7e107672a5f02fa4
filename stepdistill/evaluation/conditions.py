"""The conditions that a cell was timed under: times are compared only if they were taken alike.

conditions(cell)        # ("AMD EPYC, 1 thread", "float32", "not compiled", "channels first", "LoRAs merged", "batch 1")
unlike(cell, other)     # "", or "timed differently: compiled against not compiled"
"""

from __future__ import annotations

from typing import Any

from stepdistill.evaluation.cells import Cell

# field of `timing`: what it is called if set, and if not
FLAGS = {
    "compiled": ("compiled", "not compiled"),
    "channels_last": ("channels last", "channels first"),
    "merged": ("LoRAs merged", "LoRAs apart"),
}


def conditions(cell: Cell) -> tuple[str, ...]:
    """Returns device, dtype, the state of each flag, and the images per call, of a cell that was timed."""
    how = _how(cell)
    flags = (words[not how.get(flag)] for flag, words in FLAGS.items())
    first = (str(how.get(name) or f"unknown {name}") for name in ("device", "dtype"))
    return *first, *flags, f"batch {(cell.latency_ms or {}).get('batch', 1):g}"


def unlike(a: Cell, b: Cell) -> str:
    """Returns how the conditions of two cells' times differ; empty if they do not."""
    differ = [pair for pair in zip(conditions(a), conditions(b), strict=True) if pair[0] != pair[1]]
    sides = (", ".join(side) for side in zip(*differ, strict=True))
    return f"timed differently: {' against '.join(sides)}" if differ else ""


def timed_as(cell: Cell, *, on: bool = True) -> str:
    """Describes how a cell was timed, without flags that are not set. on: with the device."""
    how = _how(cell)
    flags = (words[0] for flag, words in FLAGS.items() if how.get(flag))
    return ", ".join(map(str, filter(None, [how.get("dtype"), *flags, how.get("device") if on else None])))


def _how(cell: Cell) -> dict[str, Any]:
    """The row's `timing`; of older rows without it, how its images were generated."""
    return cell.timing or cell.row | {"compiled": (cell.latency_ms or {}).get("compiled")}
