"""Distils the embedded teacher by every method, measures all models, and writes the report.

    stepdistill demo                 # every method, then the report
    stepdistill demo --quick         # the same, shortened

Nothing is downloaded. The same command resumes an interrupted run. The students are sized for about 10 minutes of
training on two CPU cores; the recorded run is benchmarks/results/demo.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Config:
    """Flags of `stepdistill demo`."""

    out: Path | None = None
    """Folder for students, figures and the report; default: out/demo, or out/demo-quick with --quick."""
    quick: bool = False
    """Train for fewer updates and measure fewer images."""
    methods: tuple[str, ...] = ("lcm", "progressive", "add", "ladd")
    """The methods to distil with."""
    seed: int = 0
    """Seed of all random numbers."""
    dry_run: bool = False
    """Print what would be trained and measured, and exit."""


@dataclass(frozen=True)
class Size:
    """Size of a demo: images to train on, changes to the shipped settings, images per cell."""

    pictures: int
    changes: dict[str, dict[str, Any]]
    measured: int


FULL = Size(
    pictures=6000,
    changes={
        "lcm": {"max_train_steps": 500, "rank": 32},
        "progressive": {"max_train_steps": 60, "guide_updates": 60, "start_steps": 8, "final_factor": 2.0},
        "add": {"max_train_steps": 50, "rank": 32},
        "ladd": {
            "max_train_steps": 80,
            "rank": 32,
            "discriminator_warmup": 40,
            "learning_rate": 2e-4,
            "discriminator_learning_rate": 3e-2,  # high, because the updates are few
        },
    },
    measured=300,
)
QUICK = Size(
    pictures=1000,
    changes={
        "lcm": {"max_train_steps": 60, "rank": 32},
        "progressive": {"max_train_steps": 8, "guide_updates": 8, "start_steps": 8, "final_factor": 2.0},
        "add": {"max_train_steps": 6, "rank": 32},
        "ladd": {"max_train_steps": 12, "rank": 32},
    },
    measured=48,
)
FEW, MANY = (1, 2, 4), (50,)
METRICS = ("fd", "kid", "prdc", "clip", "attributes")  # those that are informative with so few images


def main(config: Config) -> None:
    """Trains, measures and reports."""
    if unknown := [m for m in config.methods if m not in FULL.changes]:
        raise InputError(f"--methods: got {', '.join(unknown)}; allowed: {', '.join(FULL.changes)}")
    out = config.out or Path("out/demo-quick" if config.quick else "out/demo")
    size = QUICK if config.quick else FULL
    if config.dry_run:
        for method in config.methods:
            print(f"would train {method} on {size.pictures} images, {size.changes[method]}, into {out / method}")
        at = f"{' '.join(map(str, FEW))} steps, and the teacher at {' '.join(map(str, MANY))}"
        print(f"would measure teacher and students at {at}, {size.measured} images per cell, into {out / 'bench'}")
        return
    data = encode(out / "data", size.pictures)
    students: dict[str, dict[int, Path]] = {}
    for method in sorted(config.methods, key=list(FULL.changes).index):  # lcm first: others start from its student
        students[method] = train(method, out, data, size, config.seed, students.get("lcm"))
    measure(students, out, size, config.seed)
    (out / "demo.json").write_text(json.dumps(dataclasses.asdict(config), default=str, indent=2) + "\n")


def encode(out: Path, pictures: int) -> Path:
    """Builds the cache that all methods train on."""
    from stepdistill.data.cache import make_cache
    from stepdistill.denoiser.load import load_teacher

    make_cache("avatars", load_teacher("avatars"), out, limit=pictures)
    return out


def train(
    method: str, out: Path, data: Path, size: Size, seed: int, lcm: dict[int, Path] | None
) -> dict[int, Path]:  # fmt: skip
    """Distils the embedded teacher with the shipped settings, shortened; returns the export folder of each step count.
    The adversarial methods start from the student of `lcm`, if there is one."""
    from stepdistill.training.plans import run, shipped

    changes = {"out": out / method, "data": str(data), "seed": seed, "validate_every": 0, **size.changes[method]}
    if method in ("add", "ladd"):
        changes["start"] = lcm[1] if lcm else None
    config = shipped(method, **changes)
    print(f"{method}: training for {config.max_train_steps} updates{' per halving' * (method == 'progressive')}")
    return run(config, FEW)


def measure(students: dict[str, dict[int, Path]], out: Path, size: Size, seed: int) -> None:
    """Benchmarks teacher and students; writes the report and the figures in the students' model cards."""
    from stepdistill.evaluation.cards import write_cards
    from stepdistill.evaluation.cells import read_folder
    from stepdistill.evaluation.protocols import load_protocol
    from stepdistill.evaluation.report import write_report
    from stepdistill.evaluation.suite import Settings, evaluate
    from stepdistill.evaluation.summary import print_table

    protocol = dataclasses.replace(load_protocol("avatars-2k"), n=size.measured, metrics=METRICS)
    print(f"measuring teacher and students at {', '.join(map(str, FEW + MANY))} steps, {size.measured} images per cell")
    bench = {"protocol": protocol, "out": out / "bench", "seed": seed, "settings": Settings(latency_repeats=5)}
    teacher = {"teacher": "avatars,scheduler=ddim"}
    results = [evaluate(teacher, steps=FEW + MANY, **bench)]
    for method, exports in students.items():
        for export in dict.fromkeys(exports.values()):
            steps = tuple(n for n in FEW if exports[n] == export)
            results.append(evaluate({f"{method}-lora": f"avatars,lora={export}"}, steps=steps, **bench))
    if failed := [failure for result in results for failure in result.failed]:
        raise InputError(f"demo: got {failed[0].model}, which could not be measured: {failed[0].reason}")
    rows = read_folder(out / "bench")
    write_cards(rows)
    print_table(rows)
    for method, exports in students.items():
        for export in dict.fromkeys(exports.values()):
            print(f"{method}-lora: {export}")
    print(f"report: {write_report(out / 'bench')}")
