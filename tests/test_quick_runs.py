"""Every baseline runs with --quick: the six that no other file runs so, on even fewer samples; and recorded times."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stepdistill.baselines import BASELINES, get
from stepdistill.cli import main

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "baselines" / "quick.json"
DECODER = ["--teacher-steps", "2", "--batch-size", "4", "--limit", "60", "--validation", "4", "--test-tokens", "300",
           "--shown", "2"]  # fmt: skip
UNET = ["--batch-size", "2", "--limit", "4", "--held-out", "4"]
COMMANDS = {
    "gkd": DECODER,
    "distillm": DECODER,
    "minillm": DECODER,
    "bk_sdm": UNET,
    "snapfusion": [*UNET, "--judged", "1", "--saving", "0.02"],
    "prune_then_steps": [*UNET, "--step-updates", "1", "--pictures", "2", "--steps", "1", "--plain-steps", "1"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quick_run_trains_measures_and_ends_with_a_table(name, tmp_path, capsys):
    words = ["--quick", "--max-train-steps", "2", "--log-every", "1", *COMMANDS[name], "--out", str(tmp_path)]
    assert main(["baselines", "run", name, *words]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["method"] == name and record["config"]["quick"]
    given = get(name).config.QUICK.items()
    kept = {flag: value for flag, value in given if f"--{flag.replace('_', '-')}" not in words}
    assert {flag: record["config"][flag] for flag in kept} == json.loads(json.dumps(kept))
    figures = {row["role"]: row["figures"] for row in record["rows"]}
    assert {"teacher", "control", "student"} <= figures.keys()
    assert all(math.isfinite(value) for each in figures.values() for value in each.values())
    trained = [file for file in tmp_path.rglob("metrics.jsonl") if file.parent.name in ("control-0", "student-0")]
    assert [[json.loads(line)["update"] for line in file.open()] for file in trained] == 2 * [[1, 2]]
    assert f"results: {tmp_path}/results.json" in capsys.readouterr().out


def test_the_quick_run_of_every_baseline_is_recorded_and_took_less_than_a_minute():
    seconds = json.loads(RECORD.read_text())["seconds"]
    assert seconds.keys() == BASELINES.keys() and all(0 < time < 60 for time in seconds.values())
