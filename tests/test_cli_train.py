"""`stepdistill train` is the training scripts without their folder, and --config finds the settings that ship."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import one_line, run
from test_train_scripts import CONFIGS, FLAGS
from test_trainer import environment

from stepdistill.cli import train
from stepdistill.cli.training import parse_training
from stepdistill.errors import InputError
from stepdistill.training import plans
from stepdistill.training.lcm import LCMConfig

ROOT = Path(__file__).parents[1]


def test_it_trains_with_shipped_settings_from_another_directory(tmp_path, pipelines, pictures):
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill", "train", "lcm-lora", "--dry-run", "--config", "avatars_lcm_lora",
         "--teacher", pipelines["sd"], "--data", pictures, "--out", "student", "--rank", "2", "--batch-size", "2"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert (told["weighting"], told["solver_steps"], told["learning_rate"]) == ("v", 10, 1e-3)  # of the settings
    assert (told["rank"], told["batch_size"], told["config"]) == (2, 2, "avatars_lcm_lora")
    assert not list(tmp_path.iterdir())


def test_the_methods_are_those_of_the_scripts_with_the_same_flags():
    for name in train.METHODS:
        assert train.flags(name, []) == FLAGS[f"train_{name.replace('-', '_')}"]()
    assert {f"train_{name.replace('-', '_')}" for name in train.METHODS} == set(FLAGS)
    assert train.flags("lcm_lora", []) == LCMConfig()


def test_a_chain_is_run_as_a_chain_and_other_methods_at_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("stepdistill.training.run.distil", lambda config: ran.append(("distil", config)))
    monkeypatch.setattr("stepdistill.training.progressive.distil_chain", lambda config: ran.append(("chain", config)))
    for name in train.METHODS:
        train.main([name, "--seed", "7"])
    assert [how for how, _ in ran] == ["chain" if name == "progressive" else "distil" for name in train.METHODS]
    assert [config for _, config in ran] == [train.flags(name, ["--seed", "7"]) for name in train.METHODS]


def test_help_lists_the_methods_and_a_methods_help_its_flags(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0 and re.findall(r"^  (\S+)", out.partition("Methods;")[2], re.MULTILINE) == list(train.METHODS)
    for name, (_, _, what) in train.METHODS.items():
        code, out, _ = run(capsys, "train", name, "--help")
        assert code == 0 and f"usage: stepdistill train {name} " in out
        assert what.split(":")[0] in " ".join(out.split())
        flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.flags(name, []))}
        assert all(flag in out for flag in flags)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lad"], "train: got lad; allowed: lcm-lora, lcm, progressive, add, ladd; did you mean ladd?"),
        ([], "train: got no method; allowed: lcm-lora"),
        (["--config", "x.yaml"], "train: got --config; allowed: .*; the method comes first"),
        (["add", "--lerning-rate", "1"], ".*--learning-rate.*see stepdistill train add --help"),
        (["ladd", "--config", "sdxl_lad_lora"], "--config: got sdxl_lad_lora, .*; allowed: a YAML file, or one of "
         "sdxl_ladd_lora, "),
        (["ladd", "--config=sdxl.yaml"], "--config: got sdxl.yaml, .*sdxl_ladd_lora"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_nearest(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", *argv)
    assert one_line(code, err) and re.match("error: " + words.replace("?", r"\?"), err), err


def test_settings_are_found_by_name_in_a_wheel_as_in_a_checkout(tmp_path, monkeypatch):
    (there,) = re.findall(
        r'^"train_scripts/configs" = "stepdistill/(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    checkout = {name: file.read_text() for name, file in plans.settings_files().items()}
    assert set(checkout) == {f.stem for f in [*CONFIGS, *(ROOT / "train_scripts/configs/baselines").iterdir()]}
    shutil.copytree(ROOT / "train_scripts" / "configs", tmp_path / there)
    monkeypatch.setattr(plans, "FOLDERS", (tmp_path / there, tmp_path / "nothing"))
    assert {name: file.read_text() for name, file in plans.settings_files().items()} == checkout
    for name in ("avatars_lcm_lora", "avatars_lcm_lora.yaml"):
        assert plans.settings_file(Path(name)) == tmp_path / there / "avatars_lcm_lora.yaml"


def test_a_file_here_goes_before_settings_that_ship_and_a_path_is_never_taken_for_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("avatars_lcm_lora.yaml").write_text("rank: 3\n")
    assert parse_training(LCMConfig, None, ["--config", "avatars_lcm_lora.yaml"]).rank == 3
    assert parse_training(LCMConfig, None, ["--config", "avatars_lcm_lora"]).rank == 64
    with pytest.raises(InputError, match=r"--config: got my/avatars_lcm_lora.yaml \(No such file"):
        parse_training(LCMConfig, None, ["--config", "my/avatars_lcm_lora.yaml"])
