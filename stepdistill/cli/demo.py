"""The main job on the embedded default: distil the teacher, measure teacher and student, write the report.

    stepdistill demo                 # about ten minutes on two cores
    stepdistill demo --quick         # a taste in two

Nothing is downloaded. The same command again goes on where it was cut.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from stepdistill.errors import InputError

METHODS = ("lcm-lora",)


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill demo`."""

    out: Path | None = None
    """Folder for students, figures and the report; out/demo, or out/demo-quick, where not given."""
    quick: bool = False
    """Train for less and measure fewer pictures."""
    methods: tuple[str, ...] = METHODS
    """Which families to distil with."""
    seed: int = 0
    """Seed of everything drawn."""
    dry_run: bool = False
    """Say what would be trained and measured, and stop."""


@dataclass(frozen=True)
class Size:
    """How much a demo does: pictures to train on, updates, pictures measured a cell."""

    pictures: int
    updates: int
    measured: int


FULL = Size(pictures=6000, updates=800, measured=400)
QUICK = Size(pictures=1000, updates=120, measured=64)
FEW, MANY = (1, 2, 4), (50,)


def main(config: Config) -> None:
    """Trains, measures and reports."""
    if unknown := [m for m in config.methods if m not in METHODS]:
        raise InputError(f"--methods: got {', '.join(unknown)}; allowed: {', '.join(METHODS)}")
    out = config.out or Path("out/demo-quick" if config.quick else "out/demo")
    size = QUICK if config.quick else FULL
    if config.dry_run:
        for method in config.methods:
            print(f"would train {method} for {size.updates} updates on {size.pictures} pictures into {out / method}")
        at = f"{' '.join(map(str, FEW))} steps, the teacher at {' '.join(map(str, MANY))} too"
        print(f"would measure teacher and students at {at}, {size.measured} pictures a cell, into {out / 'bench'}")
        return
    students = {method: train(method, out / method, size, config.seed) for method in config.methods}
    measure(students, out, size, config.seed)
    (out / "demo.json").write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n")


def train(method: str, out: Path, size: Size, seed: int) -> Path:
    """Distils the embedded teacher; returns the export folder."""
    from stepdistill.data.cache import open_data
    from stepdistill.denoiser.load import load_teacher
    from stepdistill.training.lcm import LCMConfig
    from stepdistill.training.trainer import Trainer

    print(f"{method}: training for {size.updates} updates")
    run = LCMConfig(
        out=out, seed=seed, guidance=(3.0,), max_train_steps=size.updates, batch_size=16, learning_rate=1e-3,
        lr_scheduler="linear", lr_warmup=20, rank=32, solver_steps=10, weighting="v", own_share=0.5,
        checkpoint_every=100,
    )  # fmt: skip
    teacher = load_teacher("avatars")
    data = open_data("avatars", teacher, limit=size.pictures)
    return Trainer(run.method(), teacher, data, run).fit()


def measure(students: dict[str, Path], out: Path, size: Size, seed: int) -> None:
    """Benchmarks teacher and students, writes the report and the figures of the students' cards."""
    from stepdistill.evaluation.cards import write_cards
    from stepdistill.evaluation.protocols import load_protocol
    from stepdistill.evaluation.report import write_report
    from stepdistill.evaluation.suite import Settings, evaluate
    from stepdistill.evaluation.summary import print_table, read_folder

    protocol = dataclasses.replace(load_protocol("avatars-2k"), n=size.measured)
    print(f"measuring teacher and students at {', '.join(map(str, FEW + MANY))} steps, {size.measured} pictures a cell")
    bench = {"protocol": protocol, "out": out / "bench", "seed": seed, "settings": Settings(latency_repeats=5)}
    teacher = {"teacher": "avatars,scheduler=ddim"}
    models = teacher | {name: f"avatars,lora={folder}" for name, folder in students.items()}
    results = [evaluate(models, steps=FEW, **bench), evaluate(teacher, steps=MANY, **bench)]
    if failed := [failure for result in results for failure in result.failed]:
        raise InputError(f"demo: got {failed[0].model}, which could not be measured: {failed[0].reason}")
    rows = read_folder(out / "bench")
    write_cards(rows)
    print_table(rows)
    for name, folder in students.items():
        print(f"{name}: {folder}")
    print(f"report: {write_report(out / 'bench')}")
