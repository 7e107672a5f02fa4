"""Taking a run up again: what may change, what is kept, and what is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.training import folder, trackers
from stepdistill.training.lcm import LCMConfig, distil
from stepdistill.training.trainer import Trainer


@pytest.fixture
def settings(tmp_path, pipelines, pictures) -> LCMConfig:
    return LCMConfig(
        teacher=pipelines["sd"], data=pictures, out=tmp_path / "run", batch_size=2, rank=2, guidance=(2.0,),
        learning_rate=1e-3, max_train_steps=4, checkpoint_every=2, log_every=1,
    )  # fmt: skip


def trainer(config: LCMConfig, **changes) -> Trainer:
    config = dataclasses.replace(config, **changes)
    teacher = load_teacher(config.teacher)
    return Trainer(config.method(), teacher, open_data(config.data, teacher), config)


def stop_at(run: Trainer, update: int) -> None:
    """Cuts a run as a kill would: between two updates, with nothing saved."""
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
    assert {"update", "consistency", "learning_rate", "seconds_per_update"} == set(rows[0])


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
    assert "done already" in capsys.readouterr().out


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


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_folder_with_a_broken_configuration_is_named(settings, content):
    settings.out.mkdir(parents=True)
    (settings.out / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"--out: got .*config.json, which cannot be read"):
        folder.claim(settings)


def test_a_run_that_never_began_leaves_its_folder_free(settings):
    folder.claim(dataclasses.replace(settings, rank=settings.rank + 1))
    folder.claim(settings)
    (settings.out / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"--out: got .*, which holds a run with rank = "):
        folder.claim(dataclasses.replace(settings, rank=settings.rank + 1))


def test_a_folder_that_cannot_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: got .*file/run \(.*\); allowed: a folder that can be written"):
        folder.claim(dataclasses.replace(settings, out=tmp_path / "file" / "run"))


def test_a_full_disk_leaves_the_configuration_as_it_was(settings, monkeypatch):
    folder.claim(settings)
    before = (settings.out / "config.json").read_text()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepdistill.training.checkpoint.sync", full)
    with pytest.raises(InputError, match=r"--out: got .* \(No space left on device\)"):
        folder.claim(dataclasses.replace(settings, log_every=7))
    assert (settings.out / "config.json").read_text() == before


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


def test_a_tracker_that_is_not_installed_is_named(settings, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"trackers: got wandb, which is not installed; pip install 'stepdistill\[trackers\]'"
    ):
        trainer(settings, trackers=("wandb",))
    assert not settings.out.exists()


def test_a_full_disk_is_one_line(settings, monkeypatch):
    run = trainer(settings)
    step = run.step

    def full():
        if run.update == 3:
            raise OSError(28, "No space left on device")
        return step()

    run.step = full
    with pytest.raises(InputError, match=r"disk: got no space left in .*; the last checkpoint is kept"):
        run.fit()
    monkeypatch.undo()
    trainer(settings).fit()
    assert (settings.out / "done.json").exists()


def test_a_full_device_is_one_line(settings):
    run = trainer(settings)

    def full():
        raise torch.OutOfMemoryError

    run.step = full
    with pytest.raises(InputError, match=r"memory of cpu: got no room for batch_size = 2; .*lower --batch-size"):
        run.fit()
