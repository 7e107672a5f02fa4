"""Checks a benchmark's figures against bounds: exit code 0 if all are met, 1 if one is missed. Meant for CI.

    stepdistill bench gate out/bench --model student --steps 4 --max-fd 90 --min-clip 39
    stepdistill bench gate out/bench --max kid=0.01 --window clip_score=31.69,31.81 --max ms=100
    stepdistill bench gate out/bench --gate mlperf-sdxl

The value is checked; its interval is printed next to it. A NAME is any figure of the rows' `metrics`, or ms, the median
latency of an image. Invalid input exits with 2, as in all commands.
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
    """The model to check; default: all."""
    steps: tuple[int, ...] = ()
    """Its step counts; default: the gate file's, else all that were measured."""
    max_fd: float | None = None
    """Upper bound of the Frechet distance."""
    min_clip: float | None = None
    """Lower bound of the CLIP score."""
    max: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: upper bound of a figure; repeat for more."""
    min: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE: lower bound of a figure; repeat for more."""
    window: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=LOW,HIGH: lower and upper bound of a figure; repeat for more."""
    gate: str | None = None
    """A shipped gate, such as mlperf-sdxl, or a .yaml file of bounds, in addition to those of the flags."""


def main(config: Config) -> int:
    """Prints one line per bound; returns 1 if one is missed."""
    from stepdistill.evaluation.cells import read_run
    from stepdistill.evaluation.gate import judge

    judgements = judge(read_run(config.folder), gate_of(config), config.model)
    for judgement in judgements:
        print(judgement)
    return 0 if all(judgement.met for judgement in judgements) else 1


def gate_of(config: Config) -> Gate:
    """Returns the bounds of a command line and of its gate file.

    Raises:
        InputError: a malformed bound or gate file.
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
    """Parses a bound from NAME=VALUE, or NAME=LOW,HIGH for a window.

    Raises:
        InputError: any other form.
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
