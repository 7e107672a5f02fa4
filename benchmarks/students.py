"""Trains students of the embedded teacher with several methods and seeds, measures them, and checks every claim.

    python benchmarks/students.py --out out/students --results benchmarks/results/students
    python benchmarks/students.py --out out/students --methods progressive --seeds 1     # a part of it, on another core

Seed s trains a student with train_scripts/configs/avatars_METHOD_lora.yaml; ADD and LADD start from LCM's student of
the same seed, which is trained first if it does not exist. All are sampled from the same noise as the teacher, that of
the protocol; progressive's student for each step count is a separate export. Completed work is not repeated: a student
that was measured and then deleted keeps its rows. The rows of everything requested are collected under --results, with
the report and claims.json: whether the teacher is good enough to distil, and each goal of a student by method and seed,
and whether all seeds meet it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation.records import read_rows, write_record

STUDENT, TEACHER = "student", "teacher"
FEW, MANY = (1, 2, 4), (50,)
PARTS = ("grids", "units")  # of a benchmark's folder, in addition to its rows
Rows = dict[tuple[str, int], dict]


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/students.py."""

    methods: tuple[Literal["lcm", "progressive", "add", "ladd"], ...] = ("lcm", "progressive", "add", "ladd")
    """Distillation methods."""
    teacher: Literal["avatars", "avatars-flow"] = "avatars"
    """The teacher to distil."""
    out: Path = Path("out/students")
    """Folder for the students and their benchmarks, one subfolder per method, and for the teacher's benchmark."""
    results: Path | None = None
    """Folder for the collected rows, the report and claims.json; by default they are not written."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds."""
    n: int | None = None
    """Images per cell; overrides the protocol's 2,000."""


def fd(rows: Rows, model: str, steps: int) -> float:
    """Returns a cell's Frechet distance."""
    return rows[model, steps]["fd"]


def obeys(rows: Rows, model: str, steps: int) -> float:
    """Returns a cell's attribute accuracy."""
    return rows[model, steps]["attribute_accuracy"]


Claim = tuple[str, Callable[[Rows], float], float]  # its words, its value, and the most that the value may be

CHECKS: tuple[Claim, ...] = (  # of the teacher, whatever the student
    ("reconstructions / teacher at 1 step", lambda r: fd(r, "reconstruction", 0) / fd(r, TEACHER, 1), 0.1),
    ("teacher at 50 steps / at 1", lambda r: fd(r, TEACHER, 50) / fd(r, TEACHER, 1), 0.25),
    ("teacher at 50 steps / at 2", lambda r: fd(r, TEACHER, 50) / fd(r, TEACHER, 2), 0.5),
    ("teacher at 50 steps / at 4", lambda r: fd(r, TEACHER, 50) / fd(r, TEACHER, 4), 0.75),
    ("real images' attributes / teacher's at 50", lambda r: obeys(r, "real", 0) / obeys(r, TEACHER, 50), 1 / 0.9),
)
GOALS: tuple[Claim, ...] = (  # of a student
    ("student at 1 step / teacher at 1", lambda r: fd(r, STUDENT, 1) / fd(r, TEACHER, 1), 0.5),
    ("student at 2 steps / teacher at 2", lambda r: fd(r, STUDENT, 2) / fd(r, TEACHER, 2), 0.5),
    ("student at 1 step / teacher at 50", lambda r: fd(r, STUDENT, 1) / fd(r, TEACHER, 50), 2.0),
    ("student at 4 steps / teacher at 50", lambda r: fd(r, STUDENT, 4) / fd(r, TEACHER, 50), 1.25),
    ("teacher's attributes at 50 - student's at 4", lambda r: obeys(r, TEACHER, 50) - obeys(r, STUDENT, 4), 0.05),
)


def measure(models: dict[str, str], steps: tuple[int, ...], out: Path, n: int | None) -> None:
    """Measures the cells of some models, without latency since several may run at the same time."""
    from stepdistill.evaluation.suite import Settings, evaluate

    settings = Settings(latency_repeats=0)
    for failure in evaluate(models, "avatars-2k", steps, out=out, n=n, settings=settings).failed:
        raise InputError(f"{failure.model} at {failure.steps} steps: {failure.reason}")


def checks(rows: Rows) -> list[dict]:
    """Returns the checks of the teacher with their values."""
    return [
        {"claim": text, "at_most": round(bound, 4), "value": round(value(rows), 4), "holds": value(rows) <= bound}
        for text, value, bound in CHECKS
    ]


def goals(by_method: dict[str, dict[int, Rows]]) -> list[dict]:
    """Returns the students' goals with their values for each method and seed."""
    claims = []
    for method, by_seed in by_method.items():
        for text, value, bound in GOALS:
            exact = {seed: value(rows) for seed, rows in by_seed.items()}
            rounded = {seed: round(v, 4) for seed, v in exact.items()}  # the verdict uses the exact values
            holds = max(exact.values()) <= bound
            claim = {"claim": text, "method": method, "at_most": round(bound, 4), "seeds": rounded, "holds": holds}
            claims.append(claim)
    return claims


def gather(config: Config) -> None:
    """Collects the rows of teacher and students, the grids and the verdicts under `config.results`."""
    from stepdistill.evaluation.cards import write_cards
    from stepdistill.evaluation.report import write_report
    from stepdistill.evaluation.summary import print_table

    config.results.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        shutil.rmtree(config.results / part, ignore_errors=True)  # of an earlier recording
    cells: Rows = {}
    parts = [config.out / method / f"bench-{seed}" for method in config.methods for seed in config.seeds]
    for folder in (config.out / "bench-teacher", *parts):
        for row in read_rows(folder / "results.jsonl"):
            cells[row["model"], row["steps"]] = row  # real images are the same in every folder
        for part in filter(lambda part: (folder / part).is_dir(), PARTS):
            shutil.copytree(folder / part, config.results / part, dirs_exist_ok=True)
    rows = list(cells.values())
    (config.results / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = {method: {seed: of_student(cells, name(method, seed)) for seed in config.seeds} for method in config.methods}
    record = {
        "what": "ratios of Frechet distances, and attribute accuracies, of an embedded teacher and its students",
        "teacher": checks(cells), "students": goals(of), "n": rows[0]["n"],
    }  # fmt: skip
    write_record(config.results / "claims.json", record)
    write_cards(rows)
    print_table(rows)
    for claim in record["teacher"] + record["students"]:
        values = ", ".join(f"{v:.3f}" for v in claim.get("seeds", {"": claim.get("value")}).values())
        verdict, of_what = "holds " if claim["holds"] else "MISSED", claim.get("method", TEACHER)
        print(f"{verdict} {of_what}: {claim['claim']}: {values} (at most {claim['at_most']:.3g})")
    print(f"report: {write_report(config.results)}")


def name(method: str, seed: int) -> str:
    """Returns a student's name in rows."""
    return f"{method}-lora-{seed}"


def of_student(cells: Rows, own: str) -> Rows:
    """Returns the cells with one student renamed to STUDENT."""
    return {(STUDENT if model == own else model, steps): row for (model, steps), row in cells.items()}


def students(config: Config, method: str, seed: int) -> dict[int, Path]:
    """Trains a student, and the one it starts from, unless they exist; returns its export for each step count."""
    from stepdistill.training.plans import run, shipped

    start = {}
    if method in ("add", "ladd"):
        students(config, "lcm", seed)
        start = {"start": config.out / "lcm" / f"student-{seed}"}
    out = config.out / method / f"student-{seed}"
    return run(shipped(method, config.teacher, out=out, seed=seed, **start), FEW)


def measured(folder: Path, model: str, steps: tuple[int, ...], n: int) -> bool:
    """Whether a benchmark's folder has a model's rows at all step counts."""
    file = folder / "results.jsonl"
    rows = read_rows(file) if file.is_file() else []
    return {row["steps"] for row in rows if (row["model"], row["n"]) == (model, n)} >= set(steps)


def main(config: Config) -> None:
    """Trains and measures the students; with --results also measures the teacher and collects everything."""
    from stepdistill.evaluation.protocols import load_protocol

    n = config.n or load_protocol("avatars-2k").n
    for seed in config.seeds:
        for method in config.methods:
            student, bench = (config.out / method / f"{part}-{seed}" for part in ("student", "bench"))
            if not student.exists() and measured(bench, name(method, seed), FEW, n):
                continue
            for steps, export in students(config, method, seed).items():
                measure({name(method, seed): f"{config.teacher},lora={export}"}, (steps,), bench, config.n)
    if config.results:
        own = {"avatars": "scheduler=ddim", "avatars-flow": "sigmas=even"}[config.teacher]  # a flow's Euler is DDIM
        measure({TEACHER: f"{config.teacher},{own}"}, FEW + MANY, config.out / "bench-teacher", config.n)
        gather(config)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
