"""DeepSpeed: two processes with sharded optimizers learn what one process learns, and export the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from test_sharding import SCRIPTS, check_two_are_one, losses
from test_trainer import environment, in_two_processes

from stepdistill.errors import InputError
from stepdistill.training import zero
from stepdistill.training.lcm import LCMConfig

pytest.importorskip("deepspeed", reason="DeepSpeed's tests need the extra deepspeed")

RUNS = {
    "lcm of flux, stage 2": (
        "train_lcm_lora",
        "flux",
        "2",
        ("--backward-simulation", "0.5", "--gradient-accumulation", "2"),
    ),
    "full lcm of a unet, stage 1": ("train_lcm", "sd", "1", ("--gradient-accumulation", "2", "--export-ema", "0.5")),
    "full ladd of sd3, stage 2": ("train_ladd", "sd3", "2", ("--no-lora", "--gradient-checkpointing")),
    "ladd of a unet, stage 1": (
        "train_ladd",
        "sd",
        "1",
        ("--gradient-accumulation", "2", "--discriminator-warmup", "1"),
    ),
}
DIVIDED = """
from stepdistill.training import trainer

own = trainer.Trainer._finish
def finish(self):
    assert len(self.optimizers) == len(self.models.trained)
    for role, optimizer in self.optimizers.items():
        mine = sum(v.numel() for flat in optimizer.engine.optimizer.optimizer.state.values() for v in flat.values())
        whole = sum(2 * p.numel() for p in self.models.trained[role].values())  # AdamW's moments
        assert 0 < mine <= 0.51 * whole + 2, (role, mine, whole)
    return own(self)
trainer.Trainer._finish = finish
"""


def launcher(stage: str) -> dict[str, str]:
    """What `accelerate launch` sets for DeepSpeed."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}


@pytest.mark.parametrize("name", RUNS)
def test_a_divided_optimizer_gives_the_losses_and_the_export_of_a_whole_one(tmp_path, pictures, monkeypatch, name):
    script, teacher, stage, more = RUNS[name]
    flags = ["--teacher", str(tiny.save(tmp_path / "teacher", teacher)), "--data", pictures, *more]
    check_two_are_one(tmp_path, monkeypatch, script, flags, DIVIDED, launcher(stage))


def test_a_run_goes_on_with_a_divided_optimizer_from_where_it_was_whole(tmp_path, pictures, monkeypatch):
    """Checkpoints hold whole tensors of weights and of both optimizers, in either case."""
    folder = str(tiny.save(tmp_path / "teacher", "sd"))
    words = [
        "--teacher", folder, "--data", pictures, "--max-train-steps", "4", "--adam-epsilon", "1e-3",
        "--learning-rate", "1e-3", "--checkpoint-every", "2", "--export-ema", "0.5", "--log-every", "1",
    ]  # fmt: skip
    script = str(SCRIPTS / "train_ladd.py")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = [sys.executable, script, *words, "--out", str(whole), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("export", "done.json", "step-00000004"))
    for key, value in launcher("2").items():
        monkeypatch.setenv(key, value)
    in_two_processes([sys.executable, script, *words, "--out", str(cut), "--batch-size", "2"])
    assert losses(cut)[2:] == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in losses(whole)[2:]]
    a, b = (load_file(out / "checkpoints/step-00000004/state.safetensors") for out in (whole, cut))
    assert a.keys() == b.keys() and max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-6
    assert any("optimizers.discriminator.state.0.exp_avg" in key for key in a)


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "accelerate: got zero_stage 3; allowed: 1 or 2; or fsdp2.yaml"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {},
            "accelerate: got offload_optimizer_device cpu; allowed: none; or fsdp2.yaml",
        ),
        (
            {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            {},
            "accelerate: got deepspeed_config_file ds.json; allowed: zero_stage; or fsdp2.yaml",
        ),
        ({}, {"mixed_precision": "fp16"}, "mixed_precision: got fp16 under DeepSpeed; allowed there: bf16 or no"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(monkeypatch, variables, settings, message):
    for key, value in (launcher("2") | variables).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        zero.check(LCMConfig(teacher="", out=Path(), **settings))


def test_deepspeed_that_is_not_installed_is_asked_for_in_vain(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"accelerate: got DEEPSPEED, which is not installed; .*; pip install"):
        zero.asked_for()


def test_the_shipped_launcher_settings_ask_for_stage_two(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    shipped = load_config_from_file(str(SCRIPTS / "configs" / "accelerate" / "deepspeed.yaml"))
    assert (shipped.num_processes, shipped.distributed_type.value) == (8, "DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for key, value in shipped.deepspeed_config.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key.upper()}", str(value))
    assert zero.asked_for() == 2
    assert "ACCELERATE_USE_DEEPSPEED" in os.environ
