"""The verdict of benchmarks/students.py, on rows made by hand and on the recorded ones, and the recorded commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from stepdistill.evaluation.records import read_rows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = {
    ("real", 0): (10.0, 0.98), ("reconstruction", 0): (12.0, 0.98),
    ("teacher", 1): (400.0, 0.5), ("teacher", 2): (200.0, 0.8), ("teacher", 4): (120.0, 0.89),
    ("teacher", 50): (80.0, 0.9),
    ("student", 1): (150.0, 0.8), ("student", 2): (110.0, 0.84), ("student", 4): (90.0, 0.86),
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import students

    return students


def test_every_claim_is_a_ratio_of_the_rows_and_holds_where_all_seeds_hold(script):
    rows = {cell: {"fd": fd, "attribute_accuracy": obeys} for cell, (fd, obeys) in ROWS.items()}
    better = rows | {("student", 2): {"fd": 90.0, "attribute_accuracy": 0.9}}
    checks, goals = script.checks(rows), script.goals({"lcm": {0: better, 1: rows}})
    assert [check["value"] for check in checks] == pytest.approx([0.03, 0.2, 0.4, 0.6667, 1.0889], abs=1e-4)
    assert all(check["holds"] for check in checks)
    assert [goal["seeds"][1] for goal in goals] == pytest.approx([0.375, 0.55, 1.875, 1.125, 0.04], abs=1e-4)
    assert goals[1]["seeds"] == {0: 0.45, 1: 0.55}
    assert [goal["holds"] for goal in goals] == [True, False, True, True, True]  # one seed of two is not enough


def test_each_method_is_held_against_the_goals_by_itself(script):
    rows = {cell: {"fd": fd, "attribute_accuracy": obeys} for cell, (fd, obeys) in ROWS.items()}
    worse = rows | {("student", 1): {"fd": 300.0, "attribute_accuracy": 0.8}}
    said = {(c["method"], c["claim"]): c for c in script.goals({"lcm": {0: rows}, "add": {0: worse}})}
    at_one = [said[method, "student at 1 step / teacher at 1"] for method in ("lcm", "add")]
    assert [(claim["seeds"][0], claim["holds"]) for claim in at_one] == [(0.375, True), (0.75, False)]


def test_each_seed_is_held_against_the_one_teacher(script):
    cells = {("teacher", 1): {"fd": 4.0}, ("lcm-lora-0", 1): {"fd": 1.0}, ("lcm-lora-1", 1): {"fd": 2.0}}
    ratios = [script.fd(rows, "student", 1) / script.fd(rows, "teacher", 1)
              for rows in (script.of_student(cells, script.name("lcm", seed)) for seed in (0, 1))]  # fmt: skip
    assert ratios == [0.25, 0.5]


def test_recorded_claims_are_those_of_the_rows_beside_them(script):
    files = sorted((BENCHMARKS / "results").glob("*/claims.json"))
    assert files
    for file in files:
        cells = {(row["model"], row["steps"]): row for row in read_rows(file.parent / "results.jsonl")}
        by_method = {}
        for method, seed in sorted({tuple(model.split("-lora-")) for model, _ in cells if "-lora-" in model}):
            by_method.setdefault(method, {})[seed] = script.of_student(cells, script.name(method, seed))
        record = json.loads(file.read_text())
        assert record["teacher"] == script.checks(cells), file
        said = {(claim["method"], claim["claim"]): claim for claim in record["students"]}
        known = {(claim["method"], claim["claim"]): claim for claim in script.goals(by_method)}
        assert said.keys() == known.keys(), file
        for key, claim in known.items():
            assert said[key]["seeds"] == pytest.approx(claim["seeds"], abs=1e-4), (file, key)
            assert all(said[key][part] == claim[part] for part in ("at_most", "holds")), (file, key)
        assert {row["n"] for row in cells.values()} == {record["n"]}, file


def commands(record) -> list[str]:
    """Every `command` at any depth of a record."""
    if isinstance(record, list):
        return [found for each in record for found in commands(each)]
    if not isinstance(record, dict):
        return []
    own = [record["command"]] if isinstance(record.get("command"), str) else []
    return own + [found for value in record.values() for found in commands(value)]


def test_every_recorded_command_names_what_is_in_the_repository():
    results, strange = BENCHMARKS / "results", {}
    for file in sorted([*results.rglob("*.json"), *results.rglob("results.jsonl")]):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        for command in commands([json.loads(line) for line in lines]):
            words = shlex.split(command)
            if words[:2] == ["accelerate", "launch"]:
                words = [word for word in words if word.endswith(".py")]
            script = words[0] if words else ""
            known = script.startswith(("benchmarks/", "train_scripts/")) and (BENCHMARKS.parent / script).is_file()
            if not known and Path(script).name != "stepdistill":
                strange.setdefault(file.relative_to(results).parts[0], set()).add(command)
    assert not strange


def test_a_student_that_was_measured_and_deleted_is_not_trained_again(script, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(script, "students", lambda config, method, seed: trained.append((method, seed)) or {})
    for seed, steps in ((0, script.FEW), (1, script.FEW[:-1])):
        rows = [{"model": script.name("lcm", seed), "steps": n, "n": 2000, "protocol_hash": "p"} for n in steps]
        (folder := tmp_path / "lcm" / f"bench-{seed}").mkdir(parents=True)
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.main(script.Config(methods=("lcm",), out=tmp_path, seeds=(0, 1, 2)))
    assert trained == [("lcm", 1), ("lcm", 2)]
    trained.clear()
    (tmp_path / "lcm" / "student-0").mkdir()
    script.main(script.Config(methods=("lcm",), out=tmp_path, seeds=(0,)))
    assert trained == [("lcm", 0)]
