"""Encoders, pruning and traces through their commands: tables, dry runs, one-line errors, and valid recipes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from test_trainer import in_two_processes
from tiny_decoders import lines_of, sentences, tiny_decoder

from stepdistill.baselines import get
from stepdistill.baselines.language.tiny import train_tokenizer
from stepdistill.cli import main as cli
from stepdistill.training.from_yaml import from_yaml

FOLDER = Path(__file__).parents[1] / "train_scripts" / "configs" / "baselines"
RECIPES = {
    "distilbert_bert": "distilbert", "distilbert_minilm": "distilbert", "tinybert_bert": "tinybert",
    "tinybert_minilm": "tinybert", "minitron_llama": "minitron", "minitron_qwen": "minitron",
    "minitron_smollm2": "minitron", "r1_qwen": "r1_traces", "gpt2_lab": "forward_kl", "qwen_lab": "forward_kl",
    "gkd_qwen": "gkd", "gpt2_dolly": "minillm",
}  # fmt: skip


@pytest.mark.parametrize(("file", "name"), RECIPES.items())
def test_a_recipe_is_a_configuration_of_its_method(file, name):
    text = (FOLDER / f"{file}.yaml").read_text()
    config = from_yaml(FOLDER / f"{file}.yaml", get(name).config)
    config.check()
    assert f"baselines/{file}.yaml" in text and f" {name} " in text


def test_other_methods_take_the_pruned_student_and_its_controls():
    file = FOLDER / "minitron_smollm2.yaml"
    own = from_yaml(file, get("minitron").config)
    for name in ("forward_kl", "gkd", "distillm", "minillm"):
        other = from_yaml(file, get(name).config)
        assert other.shared == own.shared and other.student.startswith("prune:")


FEW = ["--quick", "--max-train-steps", "2", "--teacher-steps", "2", "--batch-size", "4"]
COMMANDS = {
    "minitron": ["--limit", "60", "--validation", "4", "--test-tokens", "300", "--shown", "2"],
    "distilbert": ["--limit", "40", "--held-out", "20"],
    "tinybert": ["--limit", "40", "--held-out", "20", "--task-limit", "20", "--task-steps", "2", "--general-steps", "2",
                 "--intermediate-steps", "2"],
    "r1_traces": ["--digits", "1", "--problems", "20", "--held-out", "5"],
}  # fmt: skip


@pytest.fixture
def taught(monkeypatch):
    """Makes the teacher's sums right: after two updates they are not."""
    from stepdistill.baselines.language import arithmetic, collect
    from stepdistill.baselines.language.traces import Completion

    def right(one, first, problems, **_):
        return [[Completion(arithmetic.worked(problem).completion, True)] for problem in problems]

    monkeypatch.setattr(collect, "answer", right)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quick_run_ends_with_a_table_and_measured_anew_it_is_the_same(name, tmp_path, capsys, taught):
    command = ["baselines", "run", name, *FEW, *COMMANDS[name], "--out", str(tmp_path)]
    assert cli([*command, "--dry-run"]) == 0
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "results.json").exists()
    assert cli(command) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {"teacher", "control", "student"} <= {row["role"] for row in rows}
    output = capsys.readouterr()
    assert "student" in output.out and (tmp_path / "student-0" / "model" / "config.json").exists()
    assert re.search(r"measuring: +\d+%\|", output.err)
    assert cli(["baselines", "eval", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["figures"] for row in again] == [row["figures"] for row in rows]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("minitron", ["--student", "prune:heads=0.99"], "0.99 of 2 heads that share keys pruned, which leaves none"),
        ("minitron", ["--teacher", "tiny-gpt2", "--student", "prune:channels=0.3"], "give channels=0.5 and heads=0.5"),
        ("distilbert", ["--data", "/nowhere.txt"], "--data: got /nowhere.txt"),
        (
            "distilbert",
            ["--test", "/nowhere.txt"],
            "--test: got /nowhere.txt with --data avatars, which",
        ),
        ("distilbert", ["--held-out", "0"], "held_out: got 0; allowed: 1 or more"),
        ("distilbert", ["--kl-weight", "nan"], "kl_weight: got nan; allowed: 0 or more"),
        ("tinybert", ["--task-test", "/nowhere.tsv"], "--task-test: got /nowhere.tsv with --task avatars"),
        ("r1_traces", ["--test", "/nowhere.jsonl"], "--test: got /nowhere.jsonl with --task addition"),
        ("minitron", ["--window", "1"], "window: got 1; allowed: 2 or more"),
        ("minitron", ["--beside", "/nowhere"], "beside: got /nowhere, which is no folder"),
        ("tinybert", ["--width", "30"], "width: got 30; allowed: multiples of 4"),
        ("distilbert", ["--length", "200"], "length: got 200 tokens; allowed: 128, the model's positions"),
        ("tinybert", ["--length", "200"], "length: got 200 tokens; allowed: 128, the model's positions"),
        ("r1_traces", ["--completion", "253"], "the longest prompt and completion: got 257 tokens; allowed: 256"),
        ("r1_traces", ["--digits", "19"], "digits: got 19; allowed: 1 to 18"),
        ("r1_traces", [], "of which the verifier accepts none"),
        ("r1_traces", ["--student", "config:hidden_size=50"], "student: got config:hidden_size=50"),
        (
            "r1_traces",
            ["--student", "/nowhere/model"],
            "learning_rate: got 0.003 for /nowhere/model, which is pretrained",
        ),
        ("r1_traces", ["--student", "/nowhere/model", "--learning-rate", "1e-4"], "/nowhere/model, which is no folder"),
    ],
)
def test_bad_input_ends_in_one_line_and_2(name, more, message, tmp_path, capsys):
    command = ["baselines", "run", name, *FEW, *COMMANDS[name], "--out", str(tmp_path), *more]
    assert cli(command) == 2
    (error,) = lines_of(capsys.readouterr().err)
    assert error.startswith("error: ") and message in error


def test_a_student_with_another_tokenizer_is_refused(tmp_path, capsys):
    for name, texts in (("one", sentences(50)), ("other", [text[::-1] for text in sentences(50)])):
        tiny_decoder(vocab_size=280).network.save_pretrained(tmp_path / name)
        train_tokenizer(texts, 280).save_pretrained(tmp_path / name)
    models = ["--teacher", str(tmp_path / "one"), "--student", str(tmp_path / "other")]
    models += ["--learning-rate", "1e-3"]
    assert cli(["baselines", "run", "forward_kl", "--quick", *models, "--out", str(tmp_path / "out")]) == 2
    (error,) = lines_of(capsys.readouterr().err)
    assert error.startswith("error: student: got ") and "whose tokenizer is not that of" in error


def test_two_processes_end_with_the_figures_of_one_at_the_same_global_batch(tmp_path):
    """One process writes; the teacher, the control and the student are each trained on both."""
    flags = ["forward_kl", "--quick", "--max-train-steps", "3", "--teacher-steps", "3", "--limit", "60", "--validation",
             "4", "--test-tokens", "300", "--shown", "2", "--adam-epsilon", "1e-3"]  # fmt: skip
    script = Path(__file__).parents[1] / "train_scripts" / "train_baseline.py"
    in_two_processes([sys.executable, str(script), *flags, "--batch-size", "2", "--out", str(tmp_path / "two")])
    assert cli(["baselines", "run", *flags, "--batch-size", "4", "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two"))
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["figures"] == pytest.approx(mine["figures"], rel=1e-4), mine["role"]
