"""Sweeps: values with their flags' types, runs that share what the flag does not change; and results that are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from test_baselines_classifier import QUICK

from stepdistill.baselines import BASELINES, get
from stepdistill.baselines.learner import Learner
from stepdistill.baselines.results import Results, Row, read
from stepdistill.baselines.shown import show
from stepdistill.baselines.sweep import parse_over, take_over, variants
from stepdistill.cli import main

RECORDED = sorted((Path(__file__).parents[1] / "benchmarks/results/baselines").glob("*.json"))


def test_a_sweep_puts_runs_side_by_side_and_trains_once_what_they_share(tmp_path, capsys, monkeypatch):
    trained, begin = [], Learner.__init__

    def noted(self, objective, models, data, config):
        trained.append(config.out.relative_to(tmp_path).as_posix())
        begin(self, objective, models, data, config)

    monkeypatch.setattr(Learner, "__init__", noted)
    argv = ["baselines", "sweep", "hinton", "--over", "temperature=1,4", "--quick", *QUICK, "--out", str(tmp_path)]
    assert main([*argv, "--label", "background"]) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["value"] for point in record["points"]] == [1.0, 4.0] and record["flag"] == "temperature"
    assert Image.open(tmp_path / "sweep.png").size[0] > 500
    assert trained == [*(f"temperature-1.0/{part}" for part in ("teacher", "control-0", "student-0")),
                       "temperature-4.0/student-0"]  # fmt: skip
    assert record["points"][0]["control"]["seeds"] == record["points"][1]["control"]["seeds"]
    student = record["points"][1]["student"]
    assert student["parameters"] == {"resnet8": 75_030} and student["other_figures"]["latency_ms"] > 0
    table = " ".join(capsys.readouterr().out.split("mean of seeds")[1].split())
    assert "75,030" in table and "gap" in table and "latency" in table


@pytest.mark.parametrize(
    ("name", "over", "values"),
    [
        ("hinton", "temperature=1,2.5", [1.0, 2.5]),
        ("hinton", "max-train-steps=10,20", [10, 20]),
        ("hinton", "limit=100,none", [100, None]),
        ("hinton", "test=a/b,c", [Path("a/b"), Path("c")]),
        ("hinton", "seeds=0;[1, 2]", [(0,), (1, 2)]),
        ("minitron", "student=prune:layers=0.25,neurons=0.4;prune:layers=0.5",
         ["prune:layers=0.25,neurons=0.4", "prune:layers=0.5"]),
        ("prune_then_steps", "size=small,tiny", [("small",), ("tiny",)]),
        ("prune_then_steps", "size=small; [small, tiny]", [("small",), ("small", "tiny")]),
        ("snapfusion", "cfg_range=[1, 7];[2, 14]", [(1.0, 7.0), (2.0, 14.0)]),
        ("snapfusion", "balanced=true,false", [True, False]),
    ],
)  # fmt: skip
def test_a_sweeps_values_have_their_flags_types_and_folders_of_their_own(name, over, values):
    config = get(name).config()
    runs = variants(config, *parse_over(over, type(config)))
    assert list(runs) == values and [*map(type, runs)] == [*map(type, values)]
    flag = over.partition("=")[0].replace("-", "_")
    assert [getattr(run, flag) for run in runs.values()] == values
    assert len({run.out for run in runs.values()}) == len(values)
    assert all(run.out.parent == config.out for run in runs.values())


@pytest.mark.parametrize("name", BASELINES)
def test_the_values_that_are_swept_by_default_pass_the_check(name):
    config = get(name).config()
    flag, values = config.SWEEP
    assert tuple(variants(config, flag, values)) == values


@pytest.mark.parametrize(
    ("name", "over", "error"),
    [
        ("distilbert", "init=layer", "--over: got init: 'layer'; allowed: layers, random"),
        ("gkd", "trainer=own2", "--over: got trainer: 'own2'; allowed: own, trl"),
        ("hinton", "max_train_steps=1.5", "--over: got max_train_steps: 1.5; allowed: a whole number"),
        ("hinton", "teacher=18", "--over: got teacher: 18; allowed: text; did you mean 18 in quotes?"),
        ("hinton", "temperature=warm", "--over: got temperature: 'warm'; allowed: a number"),
        ("hinton", "temperature=1,2,0", "temperature: got 0; allowed: above 0"),
        ("hinton", "temperature=1,[2", "--over: got temperature=1,[2, which is no YAML"),
        ("hinton", "temperature=1,1.0", "--over: got temperature=1.0 twice"),
        ("hinton", "temperature=1,,2", "--over: got temperature=1,,2; allowed: a flag and its values, as in temperat"),
        ("hinton", "mood=1", "--over: got mood=1"),
        ("hinton", "out=a,b", "--over: got out=a,b"),
        ("hinton", "temperature", "--over: got temperature;"),
        ("prune_then_steps", "distiller=lcm,ldad", "--over: got distiller: 'ldad'; allowed: lcm, ladd"),
        ("prune_then_steps", "size=small,huge", "--over: got size[0]: 'huge'; allowed: base, small, tiny"),
        ("minitron", "student=prune:layers=0.25,neurons=0.4", "got 0.002 for neurons=0.4, which is pretrained"),
        ("snapfusion", "cfg_range=2,14", "--over: got cfg_range: [2]; allowed: a list of 2; write it as [a, b]"),
    ],
)
def test_a_value_that_cannot_be_swept_is_refused_before_anything_is_trained(
    name, over, error, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(get(name).config, "run", lambda _: pytest.fail("a run has begun"))
    assert main(["baselines", "sweep", name, "--quick", "--over", over, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "over", "shared"),
    [
        ("forward_kl", "max_train_steps=1,2", {"teacher"}),
        ("forward_kl", "shown=2,3", {"teacher", "control-0", "student-0"}),
        ("forward_kl", "seeds=0;[0, 1]", {"teacher", "control-0", "student-0"}),
        ("forward_kl", "student=layers:1;layers:2", {"teacher"}),
        ("forward_kl", "batch_size=1,2", set()),
        ("hinton", "seeds=0,1", {"teacher", "control-0", "student-0"}),
        ("bk_sdm", "pictures=2,3", {"control-0", "student-0"}),
        ("snapfusion", "learning_rate=1e-4,5e-5", {"blocks.json"}),
        ("snapfusion", "cfg_probability=0.1,1", {"blocks.json", "control-0"}),
        ("snapfusion", "saving=0.1,0.2", set()),
        ("bk_sdm", "size=small,tiny", set()),
    ],
)
def test_what_a_flag_does_not_change_is_linked_and_measurements_are_not(name, over, shared, tmp_path):
    config = dataclasses.replace(get(name).config(), out=tmp_path)
    first, second = variants(config, *parse_over(over, type(config))).values()
    more = {"bk_sdm": set(), "snapfusion": {"blocks.json"}}
    parts = {"control-0", "student-0"} | more.get(name, {"teacher"})
    for place in (*parts, *config.DRAWN):
        (first.out / place).mkdir(parents=True)
    (first.out / "results.json").touch()
    take_over(first, second)
    assert {place.name for place in second.out.glob("*")} == shared


@pytest.mark.parametrize("more", [[], ["--quick"]])
def test_a_flag_that_is_swept_need_not_be_given_besides(more, tmp_path, monkeypatch):
    """Its default would be refused for this student, which is pretrained."""
    monkeypatch.setattr(get("forward_kl").config, "run", lambda self: found.append(self.learning_rate))
    found = []
    words = ["--dry-run", "--teacher", "/a/pretrained/model", "--out", str(tmp_path), *more]
    assert main(["baselines", "sweep", "forward_kl", "--over", "learning_rate=1e-4,5e-5", *words]) == 0
    assert found == [1e-4, 5e-5]
    assert main(["baselines", "sweep", "forward_kl", "--over", "seed=0,1", *words]) == 2


def test_a_figure_with_an_interval_is_shown_with_it_and_one_of_an_old_record_without(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # which xdist sets
    rows = [
        Row("control", "tiny", {"fd": 96.8254, "latency_ms": 9.36}, 100),
        Row("student", "tiny", {"fd": 88.4796, "fd_low": 84.25, "fd_high": 92.75, "latency_ms": 10.01}, 100),
    ]
    show(Results("bk_sdm", "fd", False, "300 pictures", rows).record())
    output = " ".join(capsys.readouterr().out.split())
    assert "88.48 (84.25–92.75)" in output and "96.83 " in output and "fd low" not in output


@pytest.mark.parametrize(
    "content",
    [
        '{"method": [], "figure": "", "higher_is_better": true, "n": "", "rows": [], "note": ""}',
        "[]",
        '{"rows": []}',
        '{"rows": [1]}',
        '{"points": []}',
        "7",
        "{",
        '{"rows": [{"role": "student"}]}',
    ],
)
def test_results_that_are_not_a_baselines_are_refused(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    assert main(["baselines", "eval", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: results: got {tmp_path}") and "allowed: a finished run's folder" in line


@pytest.mark.parametrize("file", RECORDED, ids=lambda f: f.stem)
def test_recorded_results_are_read_and_shown(file, tmp_path, capsys):
    record = json.loads(file.read_text())
    if "rows" not in record:
        pytest.skip("a sweep, or times")
    (tmp_path / "results.json").write_text(file.read_text())
    show(read(tmp_path))
    assert capsys.readouterr().out.count("gap closed by") == len(record["gap_closed"])


@pytest.mark.parametrize(
    ("name", "flag", "value", "shared"),
    [
        ("hinton", "temperature", 2.0, ["control-0", "teacher"]),
        ("hinton", "student", "resnet14", ["teacher"]),
        ("hinton", "teacher", "resnet14", ["control-0"]),
        ("hinton", "learning_rate", 0.1, []),
        ("forward_kl", "temperature", 3.0, ["control-0", "teacher"]),
        ("gkd", "lmbda", 0.25, ["control-0", "teacher"]),
        ("forward_kl", "block", 32, []),
        ("r1_traces", "keep", 1, ["control-0", "teacher", "traces.jsonl"]),
        ("r1_traces", "samples", 1, ["control-0", "teacher"]),
        ("distilbert", "init", "random", ["teacher"]),
        ("distilbert", "kl_weight", 1.0, ["control-0", "teacher"]),
        ("tinybert", "layers", 1, ["task", "teacher"]),
        ("tinybert", "temperature", 2.0, ["control-0", "task", "teacher"]),
        ("tinybert", "task_limit", 10, ["teacher"]),
        ("bk_sdm", "feature_weight", 0.5, ["control-0"]),
        ("bk_sdm", "size", "small", []),
        ("snapfusion", "cfg_probability", 0.5, ["blocks.json", "control-0"]),
        ("snapfusion", "saving", 0.1, []),
        ("prune_then_steps", "distiller", "ladd", ["data", "prune-small"]),
        ("prune_then_steps", "size", ("tiny",), ["data", "prune-small"]),
    ],
)
def test_the_runs_of_a_sweep_share_what_the_flag_does_not_change(name, flag, value, shared, tmp_path):
    one = get(name).config(out=tmp_path / "one")
    two = dataclasses.replace(one, out=tmp_path / "two", **{flag: value})
    for place in ("teacher", "task", "control-0", "student-0", "steps-student-0", "bench", "data", "prune-small"):
        (one.out / place).mkdir(parents=True)
    for place in ("results.json", "run.json", "traces.jsonl", "blocks.json"):
        (one.out / place).write_text(place)
    (two.out / "student-0").mkdir(parents=True)
    take_over(one, two)
    links = [place for place in sorted(two.out.iterdir()) if place.is_symlink()]
    assert [place.name for place in links] == shared
    assert all(place.samefile(one.out / place.name) for place in links)
