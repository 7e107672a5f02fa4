"""Resuming a run: what may change, what is kept, and what is reported."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepdistill import holds
from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.run import distil
from stepdistill.training.trainer import Trainer


def trainer(config: LCMConfig, **changes) -> Trainer:
    config = dataclasses.replace(config, **changes)
    teacher = load_teacher(config.teacher)
    return Trainer(config.method(), teacher, open_data(config.data, teacher), config)


def stop_at(run: Trainer, update: int) -> None:
    """Interrupts a run as a kill would: between two updates, with nothing saved."""
    step = run.step

    def cut():
        if run.update == update:
            raise ConnectionAbortedError
        return step()

    run.step = cut
    with pytest.raises(ConnectionAbortedError):
        run.fit()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "pytorch_lora_weights.safetensors")


def test_metrics_have_one_line_an_update_after_a_cut(settings):
    stop_at(trainer(settings), 3)
    with open(settings.out / "metrics.jsonl", "a") as file:
        file.write('{"update": 4, "consist')  # a line cut in the middle
    trainer(settings).fit()
    rows = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert {"update", "consistency", "grad_norm_student", "learning_rate", "seconds_per_update"} == set(rows[0])


def test_a_logged_loss_is_the_mean_since_the_last_line(settings):
    trainer(settings, out=settings.out / "each").fit()
    trainer(settings, out=settings.out / "pairs", log_every=2).fit()
    each, pairs = (
        [json.loads(line)["consistency"] for line in (settings.out / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("each", "pairs")
    )
    assert pairs == pytest.approx([(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rel=1e-6)


def test_a_full_student_with_averages_resumes_bit_identically(settings):
    full = {"lora": False, "embed_guidance": True, "export_ema": 0.9, "learning_rate": 1e-4, "lr_scheduler": "cosine"}
    stop_at(trainer(settings, **full), 3)
    trainer(settings, **full).fit()
    trainer(settings, out=settings.out / "whole", **full).fit()
    a, b = (
        load_file(p / "export" / "unet" / "diffusion_pytorch_model.safetensors")
        for p in (settings.out, settings.out / "whole")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("update", [1, 3])
def test_dropout_goes_on_after_a_validation_and_after_a_cut(settings, update):
    """Grids are sampled without dropout; an interrupted run samples them at other moments of the process."""
    drops = {"lora_dropout": 0.5, "validate_every": 2}
    stop_at(trainer(settings, **drops), update)
    trainer(settings, **drops).fit()
    trainer(settings, out=settings.out / "whole", **drops).fit()
    never = trainer(settings, out=settings.out / "never", lora_dropout=0.5)
    never.fit()
    a, b, c = (weights(run) for run in (settings.out, settings.out / "whole", settings.out / "never"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(a[k], c[k]) for k in a), "a grid changed the training"


@pytest.mark.parametrize("damage", ["truncate", "list"])
def test_a_broken_newest_checkpoint_is_passed_over_in_one_line(settings, capsys, damage):
    stop_at(trainer(settings, max_train_steps=6, checkpoint_every=2), 5)
    newest = settings.out / "checkpoints" / "step-00000004"
    if damage == "truncate":
        content = (newest / "state.safetensors").read_bytes()
        (newest / "state.safetensors").write_bytes(content[: len(content) // 2])
    else:
        (newest / "state.json").write_text("[]")
    capsys.readouterr()
    trainer(settings, max_train_steps=6).fit()
    lines = capsys.readouterr().out.splitlines()
    assert f"checkpoint {newest} is broken" in lines[0] and lines[1] == "resuming from update 2"
    trainer(settings, max_train_steps=6, out=settings.out / "whole").fit()
    a, b = weights(settings.out), weights(settings.out / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_half_precision_resumes_bit_identically(settings):
    stop_at(trainer(settings, mixed_precision="bf16"), 3)
    trainer(settings, mixed_precision="bf16").fit()
    trainer(settings, mixed_precision="bf16", out=settings.out / "whole").fit()
    a, b = weights(settings.out), weights(settings.out / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_cut_between_training_and_export_only_exports(settings):
    trainer(settings).fit()
    before = weights(settings.out)
    (settings.out / "done.json").unlink()
    shutil.rmtree(settings.out / "export")
    run = trainer(settings)
    run.step = lambda: pytest.fail("trained again")
    run.fit()
    after = weights(settings.out)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_finished_run_returns_without_loading_anything(settings, capsys, monkeypatch):
    export = trainer(settings).fit()
    monkeypatch.setattr("stepdistill.denoiser.load.load_teacher", lambda *_, **__: pytest.fail("loaded"))
    assert distil(settings) == export
    assert "already done" in capsys.readouterr().out


def test_a_finished_run_goes_on_to_more_updates(settings):
    trainer(settings).fit()
    trainer(settings, max_train_steps=6).fit()
    trainer(settings, max_train_steps=6, out=settings.out / "whole").fit()
    a, b = weights(settings.out), weights(settings.out / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_samples_split_otherwise_are_the_same_run(settings):
    stop_at(trainer(settings, learning_rate=1e-4), 3)
    trainer(settings, learning_rate=1e-4, batch_size=1, gradient_accumulation=2).fit()
    trainer(settings, learning_rate=1e-4, out=settings.out / "whole").fit()
    a, b = weights(settings.out), weights(settings.out / "whole")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    with pytest.raises(InputError, match=r"holds a run with samples_per_update = 2 \(now 4\)"):
        trainer(settings, learning_rate=1e-4, batch_size=4)


def test_the_folder_may_be_named_otherwise_and_options_of_convenience_may_change(settings, monkeypatch):
    stop_at(trainer(settings), 3)
    monkeypatch.chdir(settings.out.parent)
    trainer(settings, out=Path("run"), log_every=2, checkpoint_every=3, validate_every=4).fit()
    assert (settings.out / "validation" / "00000004.png").exists()


def test_activations_computed_twice_give_the_same_weights(settings):
    trainer(settings, learning_rate=1e-4).fit()
    trainer(settings, learning_rate=1e-4, out=settings.out / "twice", gradient_checkpointing=True).fit()
    a, b = weights(settings.out), weights(settings.out / "twice")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


def test_a_dry_run_prints_the_settings_and_leaves_nothing(settings, capsys):
    trainer(settings, dry_run=True).fit()
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["rank"] == 2
    assert not settings.out.exists()


def test_a_dry_run_of_the_command_encodes_a_few_samples_and_leaves_nothing(settings, tmp_path, monkeypatch, capsys):
    """Nor does it upload anything, or leave a cache that a real run would find."""
    from stepdistill.denoiser.load import Teacher

    cache, encoded, encode = tmp_path / "cache", [], Teacher.encode
    monkeypatch.setenv("STEPDISTILL_CACHE", str(cache))
    monkeypatch.setattr(Teacher, "encode", lambda teacher, x: encoded.append(len(x)) or encode(teacher, x))
    distil(dataclasses.replace(settings, dry_run=True, push_to_hub="me/mine"))
    assert encoded == [4]
    assert not settings.out.exists() and not cache.exists()
    assert json.loads(capsys.readouterr().out)["max_train_steps"] == 4


def test_a_push_that_failed_is_all_that_the_same_command_does_again(settings, monkeypatch, capsys):
    import huggingface_hub

    config, uploads, cards = dataclasses.replace(settings, push_to_hub="me/student"), [], []

    class Hub:
        def create_repo(self, name, exist_ok):
            pass

        def upload_folder(self, repo_id, folder_path):
            uploads.append(repo_id)
            if len(uploads) == 1:
                raise ConnectionError("the network is gone")
            assert f'pipe.load_lora_weights("{folder_path}")' in (folder_path / "README.md").read_text()

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
            assert path_in_repo == "README.md"
            cards.append(path_or_fileobj.decode())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(InputError, match=r"push_to_hub: got me/student, .*the network is gone.*the same command again"):
        distil(config)
    monkeypatch.setattr("stepdistill.denoiser.load.load_teacher", lambda *_, **__: pytest.fail("loaded"))
    for _ in range(2):
        assert distil(config) == settings.out / "export"
    assert uploads == ["me/student"] * 2 and len(cards) == 1
    assert 'pipe.load_lora_weights("me/student")' in cards[0] and str(settings.out) not in cards[0]
    assert json.loads((settings.out / "done.json").read_text())["pushed"] == "me/student"
    assert distil(dataclasses.replace(config, push_to_hub="me/other")) and uploads[2:] == ["me/other"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(settings, monkeypatch, number):
    run = trainer(settings)
    step = run.step

    def full():
        if run.update == 3:
            raise OSError(number, os.strerror(number))
        return step()

    run.step = full
    with pytest.raises(InputError, match=r"disk: got no space left in .*; the last checkpoint is kept"):
        run.fit()
    monkeypatch.undo()
    trainer(settings).fit()
    assert (settings.out / "done.json").exists()


def test_a_folder_that_another_process_trains_in_is_refused(settings):
    run = trainer(settings)
    with holds.claimed(settings.out), pytest.raises(InputError, match="another process is writing to; allowed: one"):
        run.fit()
    assert run.update == 0
    run.fit()


def test_a_full_device_is_one_line(settings):
    run = trainer(settings)

    def full():
        raise torch.OutOfMemoryError

    run.step = full
    with pytest.raises(InputError, match=r"memory of cpu: got no room for batch_size = 2; .*lower --batch-size"):
        run.fit()
