"""Compares two models under one protocol: each figure's A - B, its 95 % interval, and a verdict.

    stepdistill bench compare out/new out/old                                  # one model each
    stepdistill bench compare out/new out/old --model-a student                # of this name in both
    stepdistill bench compare out/bench --model-a student --model-b teacher    # two models of one run
    stepdistill bench compare out/bench --model-a student --steps-a 4 --model-b teacher --steps-b 50

They are compared prompt by prompt, and noise by noise if both had the same seeds, from the influences that a run stores
in units/; without those by the intervals of the rows. "No difference found" means that the interval contains 0, not
that the two are equal: the interval says how far apart they may be. Rows of different protocols are rejected, and the
difference is named.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.evaluation.compare import Comparison


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill bench compare`."""

    a: tyro.conf.Positional[Path]
    """Folder of a run of `stepdistill bench` or `stepdistill demo`."""
    b: tyro.conf.Positional[Path | None] = None
    """The folder to compare with; default: A, for two models of one run."""
    model_a: str | None = None
    """A's model, if it has several."""
    model_b: str | None = None
    """B's model, if it has several."""
    steps_a: int | None = None
    """A's step count; default: all that both have."""
    steps_b: int | None = None
    """B's step count, which may differ from A's."""
    metric: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A figure to compare; repeat for more; default: all."""
    json: bool = False
    """Print JSON instead of the table."""


def main(config: Config) -> None:
    """Prints the comparison."""
    from stepdistill.evaluation.cells import read_run
    from stepdistill.evaluation.compare import compare, pairs

    found_a = read_run(config.a)
    same = config.b is None or config.b.resolve() == config.a.resolve()
    found_b = found_a if same else read_run(config.b)
    both = pairs(found_a, found_b, config.model_a, config.model_b, config.steps_a, config.steps_b)
    known = sorted({name for pair in both for cell in pair for name in cell.figures})
    if unknown := [name for name in config.metric if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        fix = f"did you mean {near[0]}?" if near else "leave it out"
        raise InputError(f"--metric: got {unknown[0]}; allowed: {', '.join(known)}; {fix}")
    found = [comparison for a, b in both for comparison in compare(a, b, config.metric)]
    if not found:
        raise InputError(
            f"--metric: got {', '.join(config.metric) or 'none'}, of which nothing can be compared; allowed: figures "
            f"with intervals in both, of {', '.join(known)}; measure runs of before again"
        )
    if config.json:
        print(json.dumps(as_json(config, found), indent=2))
    else:
        print_comparisons(config, found)


def as_json(config: Config, found: list[Comparison]) -> dict:
    """Returns everything that the table shows."""
    first = found[0]
    sides = {side: {"folder": str(folder), "model": cell.model, "seeds": seeds_of(cell)} for side, folder, cell in
             (("a", config.a, first.cell_a), ("b", config.b or config.a, first.cell_b))}  # fmt: skip
    row = first.cell_a.row
    protocol = {name: row.get(name) for name in ("protocol", "protocol_hash", "n", "fd_extractor", "clip_model")}
    return sides | protocol | {"comparisons": [comparison.row() for comparison in found]}


def seeds_of(cell) -> list[int]:
    """Returns the seeds of a cell's images."""
    return sorted({row["seed"] for row in cell.rows if row.get("seed") is not None})


def print_comparisons(config: Config, found: list[Comparison]) -> None:
    """Prints a table on the terminal, one line per figure."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from stepdistill.evaluation.few import too_few
    from stepdistill.evaluation.summary import digits, label, number, spread, wide_console

    console, first = wide_console(), found[0]
    for side, folder, cell in (("A", config.a, first.cell_a), ("B", config.b or config.a, first.cell_b)):
        console.print(Text(f"{side}  {cell.model} from {folder}, seed {', '.join(map(str, seeds_of(cell))) or 'none'}"))
    row = first.cell_a.row
    networks = f"FD-{row.get('fd_extractor')}" + f", CLIP {row['clip_model']}" * bool(row.get("clip_model"))
    console.print(Text(f"{row.get('protocol')} ({row['protocol_hash']}), {networks}"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, justify in (
        ("steps", "right"), ("figure", "left"), ("A", "right"), ("B", "right"), ("A - B", "right"),
        ("its interval", "right"), ("n", "right"), ("verdict on A", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)
    colours = {"better": "green", "worse": "red"}
    for one in found:
        places = digits(one.name, [one.cell_a, one.cell_b])
        a, b = (f"{number(one.name, m.value, places)} {spread(one.name, m, places)}".strip() for m in (one.a, one.b))
        gap, low, high = (number(one.name, v, places) for v in (one.gap.value, one.gap.low, one.gap.high))
        steps = (
            f"{one.cell_a.steps}" if one.cell_a.steps == one.cell_b.steps else f"{one.cell_a.steps}, {one.cell_b.steps}"
        )
        how, counts = "" if one.gap.paired else "*", dict.fromkeys((one.a.seeds, one.b.seeds))
        seeds = f" × {', '.join(map(str, counts))}" if max(counts) > 1 else ""
        n = "–" if one.a.n is None else f"{one.a.n:,}{seeds}"
        table.add_row(
            steps, label(one.name), a, b, gap, f"{low} to {high}{how}", n,
            Text(one.word, colours.get(one.word, "")),
        )  # fmt: skip
    console.print(table)
    console.print(Text("± is half a 95 % interval; in brackets are its ends"))
    if any(one.name == "fd" for one in found) and (few := too_few(row)):
        console.print(Text(few))
    if any(not one.gap.paired for one in found):
        console.print(Text("* not paired: influences were not stored, or are of other units; the interval is wider"))
    if len(found) > 10:
        console.print(Text(f"of {len(found)} 95 % intervals, about {len(found) / 20:.0f} exclude 0 by chance alone"))
