"""Measures each method's one-step student on eight modes in the plane, where the exact answer is known.

    python benchmarks/mixture.py --out benchmarks/results/mixture

LCM and progressive distillation are compared with the exact ODE's map: the median distance of a sample from the end of
the path from the same noise, over the spread of the data. ADD and LADD are compared with the data: the energy distance
of sets of 250 samples to fresh data, over that between sets of fresh data; at the end also of sets of 1,000, which
reveal smaller errors. Such distances barely detect whether there are modes, so the contents of each mode are measured
at the end too (modes.Modes). mixture.json has the curves, mixture.png plots them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from modes import in_modes
from plane import MODES, add, from_the_data, ladd, lcm, off_the_map, progressive

from stepdistill.cli.command import guard, parse
from stepdistill.evaluation.records import write_record

METHODS = {"lcm": lcm, "progressive": progressive, "add": add, "ladd": ladd}
MAP = ("lcm", "progressive")
GOALS = {"map": 0.1, "data": 2.0}


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/mixture.py."""

    out: Path = Path("out/mixture")
    """Folder for the curves and their plot."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""


def curve(name: str) -> dict:
    """Runs one method: returns its student's error by updates, and the final contents of the modes."""
    points: list[list[float]] = []
    look = off_the_map if name in MAP else from_the_data

    def watch(update: int, student) -> None:
        points.append([update, round(look(student)[0], 4)])
        print(f"{name}: update {update}, {points[-1][1]:.3f}", flush=True)

    started = time.time()
    student = METHODS[name](watch)
    _, answers = look(student)
    larger = {} if name in MAP else {"of_1000": round(from_the_data(student, 1000, 4)[0], 4)}
    return {
        "held_against": "map" if name in MAP else "data", "goal": GOALS["map" if name in MAP else "data"],
        "curve": points, **larger, **in_modes(answers).record(),
        "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def draw(curves: dict[str, dict], file: Path) -> None:
    """Plots two panels, errors against the map and against the data, each with its goal."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = {"map": "median error of the ODE map / spread", "data": "energy distance / that of fresh data"}
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        for name, row in curves.items():
            if row["held_against"] == kind:
                axes.plot(*zip(*row["curve"], strict=True), label=name, linewidth=1.6)
        axes.axhline(GOALS[kind], color="#60646c", linewidth=0.8, linestyle="--", label="goal")
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log")
        axes.set_xlabel("updates")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main(config: Config) -> None:
    """Runs the methods and writes the record."""
    config.out.mkdir(parents=True, exist_ok=True)
    curves = {name: curve(name) for name in config.methods}
    record = {
        "what": f"one-step students on {MODES} modes in the plane, update by update", "methods": curves,
    }  # fmt: skip
    write_record(config.out / "mixture.json", record)
    draw(curves, config.out / "mixture.png")
    print(config.out / "mixture.png")


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
