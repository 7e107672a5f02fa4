"""FSDP2: two processes with sharded weights learn what one process learns, and export the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_trainer import environment, in_two_processes

from stepdistill.errors import InputError
from stepdistill.training import sharding
from stepdistill.training.lcm import LCMConfig

SCRIPTS = Path(__file__).parent.parent / "train_scripts"
RUNS = {
    "lcm of flux": ("train_lcm_lora", "flux", ("--backward-simulation", "0.5", "--gradient-accumulation", "2")),
    "ladd of sd3": ("train_ladd", "sd3", ("--gradient-checkpointing",)),
    "ladd of pixart": ("train_ladd", "pixart", ()),
    "full ladd of sd3": ("train_ladd", "sd3", ("--no-lora", "--gradient-checkpointing", "--export-ema", "0.5")),
    "ladd of a deep unet": ("train_ladd", "sd", ("--blocks", "down_blocks.1.attentions.1", "up_blocks.1.attentions.2")),
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DIVIDED = """
import torch
from torch.distributed.tensor import DTensor
from stepdistill.training import trainer

own = trainer.Trainer._fit
def fit(self):
    frozen = [p for p in self.models.teacher.backbone.parameters() if not p.requires_grad]
    trained = list(self.models.trained["student"].values())
    assert frozen and all(isinstance(p, DTensor) for p in frozen)
    divided = frozen if self.config.lora else [*frozen, *trained]
    assert sum(p.to_local().numel() for p in divided) <= 0.6 * sum(p.numel() for p in divided)
    assert trained and {isinstance(p, DTensor) for p in trained} == {not self.config.lora}
    return own(self)
trainer.Trainer._fit = fit
"""


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("update", "seconds_per_update")} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter's folder, or of a pipeline's network."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/diffusion_pytorch_model.safetensors")]
    return load_file(next(file for file in files if file.parent.name != "vae"))


def check_two_are_one(
    root: Path, monkeypatch, script: str, flags: list[str], check: str, launcher: dict[str, str]
) -> None:
    """Two processes, as a launcher starts them, have the losses and the export of one at the same global batch.

    Adam's epsilon is raised: if a gradient is pure rounding error, Adam takes full steps of its sign.

    Args:
        flags: `--teacher`, its folder, and more. check: code that the two run before the script.
    """
    checked, file = root / "checked.py", str(SCRIPTS / f"{script}.py")
    checked.write_text(f"{check}\nimport runpy\nrunpy.run_path({file!r}, run_name='__main__')")
    words = [
        *flags, "--log-every", "1", "--max-train-steps", "4", "--adam-epsilon", "1e-3", "--learning-rate", "1e-3"
    ]  # fmt: skip
    one = [sys.executable, file, *words, "--out", str(root / "one"), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    for key, value in launcher.items():
        monkeypatch.setenv(key, value)
    in_two_processes([sys.executable, str(checked), *words, "--out", str(root / "two"), "--batch-size", "2"])
    mine, theirs = losses(root / "one"), losses(root / "two")
    assert len(mine) == len(theirs) == 4
    for ours, others in zip(mine, theirs, strict=True):
        assert others == pytest.approx(ours, rel=1e-5, abs=1e-6)
    a, b, before = weights(root / "one" / "export"), weights(root / "two" / "export"), weights(Path(flags[1]))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert any((value - before.get(key, 0)).abs().max() > 1e-4 for key, value in b.items() if "lora_A" not in key)


@pytest.mark.parametrize("name", RUNS)
def test_divided_weights_give_the_losses_and_the_export_of_whole_ones(tmp_path, pictures, monkeypatch, name):
    script, teacher, more = RUNS[name]
    options = {"unet_options": tiny.DEEP} if "deep" in name else {}
    folder = str(tiny.save(tmp_path / "teacher", teacher, **options))
    flags = ["--teacher", folder, "--data", pictures, "--rank", "2", *more]
    check_two_are_one(tmp_path, monkeypatch, script, flags, DIVIDED, FSDP)


def test_a_full_run_goes_on_divided_from_where_it_was_whole(tmp_path, pictures, monkeypatch):
    """Checkpoints hold whole tensors of weights, averages and optimizer, in either case."""
    folder = str(tiny.save(tmp_path / "teacher", "sd"))
    words = [
        "--teacher", folder, "--data", pictures, "--no-lora", "--max-train-steps", "4", "--adam-epsilon", "1e-3",
        "--learning-rate", "1e-3", "--checkpoint-every", "2", "--validate-every", "2", "--export-ema", "0.5",
        "--gradient-accumulation", "2", "--log-every", "1",
    ]  # fmt: skip
    script = str(SCRIPTS / "train_lcm.py")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = [sys.executable, script, *words, "--out", str(whole), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("export", "done.json", "step-00000004"))
    for key, value in FSDP.items():
        monkeypatch.setenv(key, value)
    in_two_processes([sys.executable, script, *words, "--out", str(cut), "--batch-size", "2"])
    assert [f.name for f in sorted(cut.glob("validation/*"))] == ["00000002.png", "00000004.png"]
    assert losses(cut)[2:] == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in losses(whole)[2:]]
    for place in ("export/unet/diffusion_pytorch_model", "checkpoints/step-00000004/state"):
        a, b = (load_file(out / f"{place}.safetensors") for out in (whole, cut))
        assert a.keys() == b.keys() and max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 1e-6


@pytest.mark.parametrize(
    ("variables", "lora", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, True, "accelerate: got FSDP of version 1; allowed: 2; set fsdp_version: 2"),
        (FSDP, False, "mixed_precision: got fp16 for a full student under FSDP2; allowed there: bf16 or no; or a LoRA"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, variables, lora, message):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        sharding.check(LCMConfig(teacher="", out=Path(), lora=lora, mixed_precision="fp16"))


def test_every_process_loads_its_own_text_encoders(monkeypatch):
    """transformers gives a process other than a machine's first no weights if both of these are set."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for key, value in FSDP.items():
        monkeypatch.setenv(key, value)
    assert sharding.check(LCMConfig(teacher="", out=Path()))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_nothing_is_divided_unasked(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not any(sharding.check(LCMConfig(teacher="", out=Path(), lora=lora)) for lora in (True, False))


def test_the_shipped_launcher_settings_are_accelerates_own_and_ask_for_what_they_say():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = SCRIPTS / "configs" / "accelerate"
    one, eight, fsdp = (
        load_config_from_file(str(folder / f"{n}.yaml")) for n in ("one_gpu", "eight_gpus", "fsdp2")
    )  # fmt: skip
    assert (one.num_processes, eight.num_processes, fsdp.num_processes) == (1, 8, 8)
    assert [c.distributed_type.value for c in (one, eight, fsdp)] == ["NO", "MULTI_GPU", "FSDP"]
    assert fsdp.fsdp_config["fsdp_version"] == 2
    assert fsdp.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
