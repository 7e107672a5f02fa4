"""Holds a benchmark's figures against bounds: exit code 0 where all are met, 1 where one is missed. Made for CI.

    stepdistill bench gate out/bench --model student --steps 4 --max-fd 90 --min-clip 39
    stepdistill bench gate out/bench --max kid=0.01 --window clip_score=31.69,31.81 --max ms=100
    stepdistill bench gate out/bench --gate mlperf-sdxl

The value is judged; its interval is printed beside it. A NAME is any figure of the rows' `metrics`, or ms, the median
of a whole picture. Bad input ends with 2, as everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.evaluation.gate import Bound, Gate


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill bench gate`."""

    folder: tyro.conf.Positional[Path]
    """A folder that `stepdistill bench` or `stepdistill demo` wrote."""
    model: str | None = None
    """The model that is judged; all of them where not given."""
    steps: tuple[int, ...] = ()
    """Its step counts; the gate file's, else all that were measured, where not given."""
    max_fd: float | None = None
    """The Frechet distance is at most this."""
    min_clip: float | None = None
    """The CLIP score is at least this."""
    max: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: the figure is at most this; once for each."""
    min: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: the figure is at least this; once for each."""
    window: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=LOW,HIGH: the figure is within; once for each."""
    gate: str | None = None
    """A gate that ships, as mlperf-sdxl, or a .yaml file of bounds, beside those of the flags."""


def main(config: Config) -> int:
    """Prints a line a bound; 1 where one is missed."""
    from stepdistill.evaluation.cells import read_run
    from stepdistill.evaluation.gate import judge

    judgements = judge(read_run(config.folder), gate_of(config), config.model)
    for judgement in judgements:
        print(judgement)
    return 0 if all(judgement.met for judgement in judgements) else 1


def gate_of(config: Config) -> Gate:
    """The bounds of a command line and of its gate file.

    Raises:
        InputError: a bound that is not NAME=VALUE, or a broken file.
    """
    from stepdistill.evaluation.gate import Bound, Gate, load_gate

    gate = load_gate(config.gate) if config.gate else Gate()
    bounds = [*gate.bounds]
    if config.max_fd is not None:
        bounds.append(Bound("fd", high=config.max_fd))
    if config.min_clip is not None:
        bounds.append(Bound("clip_score", low=config.min_clip))
    bounds += [bound_of("max", text) for text in config.max]
    bounds += [bound_of("min", text) for text in config.min]
    bounds += [bound_of("window", text) for text in config.window]
    return dataclasses.replace(gate, bounds=tuple(bounds), steps=config.steps or gate.steps)


def bound_of(flag: str, text: str) -> Bound:
    """A bound from NAME=VALUE, or NAME=LOW,HIGH of a window.

    Raises:
        InputError: it is something else.
    """
    from stepdistill.evaluation.gate import Bound

    form = "NAME=LOW,HIGH" if flag == "window" else "NAME=VALUE"
    name, _, values = text.partition("=")
    try:
        ends = [float(value) for value in values.split(",")]
    except ValueError:
        ends = []
    if not name or len(ends) != (2 if flag == "window" else 1) or any(map(math.isnan, ends)):
        raise InputError(f"--{flag}: got {text}; allowed: {form}")
    if flag == "window":
        return Bound(name, *ends)
    return Bound(name, high=ends[0]) if flag == "max" else Bound(name, low=ends[0])
