"""How long `stepdistill baselines run NAME --quick` takes, for every baseline.

    python benchmarks/baselines_quick.py --out benchmarks/results/baselines/quick.json

Each runs in a process of its own and in an empty folder, imports included. The goal is 60 s at most on two CPU cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from stepdistill.baselines import BASELINES, get
from stepdistill.cli.command import guard, parse
from stepdistill.evaluation import records

GOAL = 60


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/baselines_quick.py."""

    names: tuple[str, ...] = tuple(BASELINES)
    """Baselines to time."""
    out: Path | None = None
    """JSON file for the times."""


def seconds(name: str) -> float:
    """Returns the wall-clock seconds of a baseline's quick run."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        words = [sys.executable, "-m", "stepdistill", "baselines", "run", name, "--quick", "--out", f"{folder}/out"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main(config: Config) -> None:
    """Times the baselines, prints a line for each, and writes the figures."""
    for name in config.names:
        get(name)  # reports an unknown name before anything runs
    taken = {}
    for name in config.names:
        taken[name] = round(seconds(name), 1)
        print(f"{name:<18} {taken[name]:6.1f} s", flush=True)
    if config.out is not None:
        record = {"what": "seconds of `stepdistill baselines run NAME --quick`", "goal": GOAL, "seconds": taken}
        records.write_record(config.out, record)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
