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

    out: Path = Path("out/demo")
    """Folder for students, figures and the report."""
    quick: bool = False
    """Train for less and measure fewer pictures."""
    methods: tuple[str, ...] = METHODS
    """Which families to distil with."""
    seed: int = 0
    """Seed of everything drawn."""
    guidance: float = 2.0
    """Guidance scale that the teacher is sampled and distilled with."""


@dataclass(frozen=True)
class Size:
    """How much a demo does."""

    pictures: int
    updates: int
    measured: int


FULL = Size(pictures=6000, updates=900, measured=500)
QUICK = Size(pictures=1000, updates=120, measured=64)


def main(config: Config) -> None:
    """Trains, measures and reports."""
    from stepdistill.data.cache import open_data
    from stepdistill.denoiser.load import load_teacher
    from stepdistill.training.lcm import LCMConfig
    from stepdistill.training.trainer import Trainer

    if unknown := [m for m in config.methods if m not in METHODS]:
        raise InputError(f"--methods: got {', '.join(unknown)}; allowed: {', '.join(METHODS)}")
    size = QUICK if config.quick else FULL
    teacher = load_teacher("avatars")
    data = open_data("avatars", teacher, limit=size.pictures, cache_dir=config.out / "cache")
    run = LCMConfig(
        out=config.out / "lcm-lora", seed=config.seed, guidance=(config.guidance,), max_train_steps=size.updates,
        batch_size=16, learning_rate=5e-4, lr_scheduler="linear", rank=32, checkpoint_every=100,
    )  # fmt: skip
    student = Trainer(run.method(), teacher, data, run).fit()
    measure(config, size, student)


def measure(config: Config, size: Size, student: Path) -> None:
    """Benchmarks teacher and student and writes the report."""
    from stepdistill.evaluation.protocols import load_protocol
    from stepdistill.evaluation.report import write_report
    from stepdistill.evaluation.suite import Settings, evaluate
    from stepdistill.evaluation.summary import print_table

    protocol = dataclasses.replace(load_protocol("avatars-2k"), n=size.measured)
    settings = Settings(latency_repeats=5)
    out = config.out / "bench"
    guidance = f"guidance={config.guidance:g}"
    teacher = {"teacher": f"avatars,scheduler=ddim,{guidance}"}
    students = {"lcm-lora": f"avatars,lora={student}"}
    results = evaluate(teacher | students, protocol, (1, 2, 4), out=out, seed=config.seed, settings=settings)
    reference = evaluate(teacher, protocol, (50,), out=out, seed=config.seed, settings=settings)
    if failed := [*results.failed, *reference.failed]:
        raise InputError(f"demo: {failed[0].model} could not be measured ({failed[0].reason})")
    (config.out / "config.json").write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n")
    print_table(json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    print(f"report: {write_report(out)}")
