"""A run's settings: what is rejected, when, and with which message; and which run a folder belongs to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import stop_at, trainer

from stepdistill.baselines.language.distillm import DistiLLMConfig
from stepdistill.denoiser.load import as_teacher, load_teacher
from stepdistill.errors import InputError
from stepdistill.schedules import AlphaBar
from stepdistill.training import config, folder
from stepdistill.training.add import ADDConfig
from stepdistill.training.export import shown
from stepdistill.training.from_yaml import from_yaml
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.optim import learning_rate_at
from stepdistill.training.progressive import ProgressiveConfig, distil_chain
from stepdistill.training.run import distil


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_folder_with_a_broken_configuration_is_named(settings, content):
    settings.out.mkdir(parents=True)
    (settings.out / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"--out: got .*config.json, which cannot be read"):
        folder.claim(settings)


def test_a_teacher_that_says_nothing_where_all_is_noise_is_refused(pipelines):
    teacher = load_teacher(pipelines["sd"])
    LCMConfig().check_teacher(teacher)
    teacher.denoiser.schedule = AlphaBar(torch.cat([torch.linspace(0.999, 0.001, 999), torch.zeros(1)]))
    with pytest.raises(InputError, match="predicts eps on a schedule that ends in pure noise"):
        LCMConfig().check_teacher(teacher)
    teacher.denoiser.kind = "v"
    LCMConfig().check_teacher(teacher)


@pytest.mark.parametrize("kind", [LCMConfig, LADDConfig, ProgressiveConfig])
def test_a_precision_that_rounds_eps_to_noise_in_x0_is_refused(kind):
    """PixArt's alpha ends at 0.0064: bf16's rounding of eps is 0.26 of x0's noise there, fp16's 0.03."""
    pixart, sd = as_teacher(tiny.pixart(), "tiny"), as_teacher(tiny.sd(), "tiny")
    alpha, eps = pixart.denoiser.schedule.coeffs(999.0)[0].item(), torch.randn(100_000)
    noise = [((eps.to(half).float() - eps) / alpha).std().item() for half in (torch.bfloat16, torch.float16)]
    assert noise == pytest.approx([0.26, 0.033], rel=0.03)
    refused = r"mixed_precision: got bf16 for tiny, which predicts eps where alpha is 0\.00\d\d: .*; allowed: fp16, no"
    with pytest.raises(InputError, match=refused):
        kind(mixed_precision="bf16").check_teacher(pixart)
    kind(mixed_precision="fp16").check_teacher(pixart)
    kind(mixed_precision="bf16").check_teacher(sd)


def test_a_run_that_never_began_leaves_its_folder_free(settings):
    folder.claim(dataclasses.replace(settings, rank=settings.rank + 1))
    folder.claim(settings)
    (settings.out / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"--out: got .*, which holds a run with rank = "):
        folder.claim(dataclasses.replace(settings, rank=settings.rank + 1))


def test_a_run_goes_on_for_more_updates_only_where_none_depends_on_their_number(settings):
    kept = {"out": settings.out, "data": settings.data}
    for kind, changes, free in (
        (LCMConfig, {}, True), (LCMConfig, {"lr_scheduler": "linear"}, False),
        (LADDConfig, {}, True), (LADDConfig, {"curriculum_share": 0.5}, False),
        (ProgressiveConfig, {"lr_scheduler": "constant"}, False),  # later stages would start from another export
        (DistiLLMConfig, {}, False),
    ):  # fmt: skip
        run = kind(**kept, **changes) if kind is not DistiLLMConfig else kind(out=settings.out)
        shutil.rmtree(settings.out, ignore_errors=True)
        folder.claim(run)
        (settings.out / "metrics.jsonl").write_text("{}")
        longer = dataclasses.replace(run, max_train_steps=2 * run.max_train_steps)
        if free:
            folder.claim(longer)
        else:
            with pytest.raises(InputError, match="which holds a run with max_train_steps"):
                folder.claim(longer)


@pytest.mark.parametrize("content", ['{"_class_name": "UNet2DConditionModel"}', '{"teacher": "t", "method": "lcm"}'])
def test_a_configuration_of_something_else_is_left_alone(settings, content):
    settings.out.mkdir(parents=True)
    (settings.out / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"--out: got .*, whose config.json is no training run's; .*another --out"):
        trainer(settings)
    assert (settings.out / "config.json").read_text() == content


def test_an_export_is_no_place_for_another_run(settings):
    export = trainer(settings).fit()
    with pytest.raises(InputError, match=r"whose config.json is no training run's"):
        trainer(settings, out=export)


def test_a_folder_that_cannot_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: got .*file/run \(.*\); allowed: a folder that can be written"):
        folder.claim(dataclasses.replace(settings, out=tmp_path / "file" / "run"))


def test_a_full_disk_leaves_the_configuration_as_it_was(settings, monkeypatch):
    folder.claim(settings)
    before = (settings.out / "config.json").read_text()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepdistill.files.sync", full)
    with pytest.raises(InputError, match=r"--out: got .* \(No space left on device\)"):
        folder.claim(dataclasses.replace(settings, log_every=7))
    assert (settings.out / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "package", "message"),
    [
        ({"trackers": ("wandb",)}, "wandb", r"trackers: got wandb, .*; pip install 'stepdistill\[trackers\]'"),
        (
            {"optimizer": "adamw8bit"},
            "bitsandbytes",
            r"optimizer: got adamw8bit, .*; pip install 'stepdistill\[quant\]'",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_named(settings, monkeypatch, flags, package, message):
    find = config.importlib.util.find_spec
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InputError, match=message):
        dataclasses.replace(settings, **flags).check()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps: got 0; allowed: above 0"),
        ({"alpha": 0.0}, "alpha: got 0; allowed: above 0"),
        ({"target_ema": 1.0}, "target_ema: got 1; allowed: 0 to below 1; try 0.95"),
        ({"export_ema": -0.1}, "export_ema: got -0.1; allowed: 0 to below 1"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1; allowed: 0 to below 1"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas: got \(0.9, 1.0\); allowed: 0 to below 1"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon: got -1e-08; allowed: above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan; allowed: above 0"),
        ({"guidance": (0.5,)}, "guidance: got 0.5 to 0.5; allowed: 1 or more"),
        ({"solver_steps": 1}, "solver_steps: got 1; allowed: 2 or more"),
        ({"timestep_scaling": 0.0}, "timestep_scaling: got 0; allowed: above 0"),
    ],
)
def test_what_needs_no_teacher_is_refused_before_one_is_loaded(settings, monkeypatch, flags, message):
    monkeypatch.setattr("stepdistill.denoiser.load.load_teacher", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        distil(dataclasses.replace(settings, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_modules": ("to_z",)}, "target modules: got to_z, which match no layer"),
        ({"solver_steps": 1001}, "solver_steps: got 1001; allowed: 2 to 1000"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused_before_data_are_encoded(settings, monkeypatch, flags, message):
    monkeypatch.setattr("stepdistill.data.cache.open_data", lambda *_, **__: pytest.fail("opened the data"))
    with pytest.raises(InputError, match=message):
        distil(dataclasses.replace(settings, **flags))


def test_the_launchers_precision_is_the_default_and_part_of_the_run(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = LCMConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)
                            if f.name != "mixed_precision"})  # fmt: skip
    assert launched.mixed_precision == "bf16" and LCMConfig(mixed_precision="no").mixed_precision == "no"
    run = trainer(launched)
    assert run.accelerator.mixed_precision == "bf16" and run.backbone.dtype == torch.bfloat16
    stop_at(run, 2)
    assert json.loads((settings.out / "config.json").read_text())["mixed_precision"] == "bf16"
    with pytest.raises(InputError, match=r"holds a run with mixed_precision = bf16 \(now no\)"):
        trainer(settings)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(
        InputError, match=r"mixed_precision: got fp8, from `accelerate launch`; allowed: no, fp16, bf16"
    ):
        LCMConfig().check()


def test_only_an_embedded_teacher_has_data_of_its_own(settings, monkeypatch, tmp_path):
    """With any other teacher, a recipe without --data would train for days on 32-pixel avatars."""
    monkeypatch.setattr("stepdistill.denoiser.load.load_teacher", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=rf"--data: got none for {settings.teacher}; allowed: .*; give --data"):
        distil(dataclasses.replace(settings, data=None))
    assert not settings.out.exists()
    recipe = Path(__file__).parents[1] / "train_scripts" / "configs" / "sd15_progressive_lora.yaml"
    chain = dataclasses.replace(from_yaml(recipe, ProgressiveConfig), out=tmp_path / "chain")
    with pytest.raises(InputError, match="--data: got none for stable-diffusion-v1-5/stable-diffusion-v1-5"):
        distil_chain(chain)
    assert not chain.out.exists()
    for teacher in ("avatars", "avatars-flow"):
        config = LCMConfig(teacher=teacher)
        assert (config.samples, config.record()["data"]) == ("avatars", "avatars")


@pytest.mark.parametrize("kind", ["FSDP", "MEGATRON_LM"])  # FSDP of version 1, its default
def test_ways_of_splitting_that_are_not_known_are_refused(settings, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match=f"accelerate: got {kind}[ ;]"):
        distil(settings)
    with pytest.raises(InputError, match=f"accelerate: got {kind}[ ;]"):
        trainer(settings)


def test_what_only_encodes_and_decodes_waits_on_the_cpu(settings, monkeypatch):
    moved = []
    monkeypatch.setattr("stepdistill.training.trainer.move_coders", lambda teacher, device: moved.append(device))
    trainer(settings)
    assert moved == ["cpu"]


@pytest.mark.parametrize("kind", [ProgressiveConfig, ADDConfig, LADDConfig])
def test_a_method_without_a_target_has_no_flag_for_one_nor_a_line_of_it_in_a_card(kind):
    assert "target_ema" not in shown(kind().record(), lora=True) and kind().target_decay == 0
    assert shown(LCMConfig(target_ema=0.5).record(), lora=True)["target_ema"] == 0.5
    assert LCMConfig(target_ema=0.5).target_decay == 0.5


def test_a_card_has_the_rank_and_alpha_of_a_lora_alone():
    record = LCMConfig(rank=8, alpha=4.0).record()
    assert [shown(record, lora=True)[name] for name in ("rank", "alpha")] == [8, 4.0]
    assert not {"rank", "alpha"} & shown(record, lora=False).keys()


def test_a_run_of_before_a_flag_was_dropped_is_still_its_own(tmp_path):
    """Runs of progressive, ADD and LADD once recorded a target_ema, which they did not use."""
    config = ProgressiveConfig(out=tmp_path)
    folder.claim(config)
    recorded = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(recorded | {"target_ema": 0.95}))
    (tmp_path / "metrics.jsonl").write_text("{}")
    folder.claim(config, write=False)
    with pytest.raises(InputError, match=r"holds a run with rank = 64 \(now 8\)"):
        folder.claim(dataclasses.replace(config, rank=8), write=False)


@pytest.mark.parametrize(
    ("kind", "lora", "rate"),
    [(LCMConfig, True, 1e-4), (LCMConfig, False, 1e-5), (ADDConfig, False, 5e-6), (ADDConfig, True, 1e-4)],
)
def test_a_full_student_has_a_lower_learning_rate_unless_one_is_given(kind, lora, rate):
    config = kind(lora=lora)
    assert config.peak_rate == config.record()["learning_rate"] == learning_rate_at(0, config) == rate
    changed = dataclasses.replace(config, learning_rate=3e-4)
    assert changed.peak_rate == changed.record()["learning_rate"] == 3e-4
    assert ADDConfig(lora=lora).of("discriminator").peak_rate == 1e-4
