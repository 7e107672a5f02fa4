"""The training loop: exact resume, update counts, several processes, and what bad input leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher, move_coders
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.training import checkpoint, processes
from stepdistill.training.folder import claim
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.optim import learning_rate_at
from stepdistill.training.order import sample_indices
from stepdistill.training.trainer import Trainer
from stepdistill.training.validation import encoded, grid

SCRIPT = Path(__file__).parent.parent / "train_scripts" / "train_lcm_lora.py"
FLAGS = ["--rank", "2", "--batch-size", "2", "--guidance", "2", "--lora-dropout", "0.1", "--learning-rate", "1e-3"]


def trainer(out: Path, teacher: str, data: str, **more) -> Trainer:
    config = LCMConfig(teacher=teacher, data=data, out=out, batch_size=2, rank=2, guidance=(2.0,), learning_rate=1e-3)
    config = dataclasses.replace(config, **({"max_train_steps": 4, "checkpoint_every": 2} | more))
    loaded = load_teacher(teacher)
    return Trainer(config.method(), loaded, open_data(data, loaded), config)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "export" / "pytorch_lora_weights.safetensors")


def environment() -> dict[str, str]:
    root = str(SCRIPT.parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(out: Path, teacher: str, data: str, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--teacher", teacher, "--data", data, "--out", str(out), *FLAGS, *more]


STOPPED_TWICE = """
import datetime, runpy, signal, torch
from stepdistill.training import trainer

own = trainer.Trainer.step
def step(self):
    patience = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert patience == datetime.timedelta(hours=6), patience
    if self.update == 1 and self.accelerator.process_index == 1:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return own(self)
trainer.Trainer.step = step
"""
KILLED = """
import os, runpy, signal, sys
place, left, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def hook(event, arguments):
    global left
    if event in ("open", "os.rename") and place in map(str, arguments[:2]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
del sys.argv[:3]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def killed_at(place: Path, times: int, words: list[str]) -> bool:
    """Runs a script that is killed when a file is opened, or renamed to, for the given time; whether it was."""
    words = [sys.executable, "-c", KILLED, str(place), str(times), *words[1:]]
    done = subprocess.run(words, env=environment(), check=False, capture_output=True)
    return done.returncode == -signal.SIGKILL


def test_a_run_killed_at_any_point_ends_with_the_same_bits(tmp_path, pipelines, pictures):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--max-train-steps", "60", "--checkpoint-every", "15", "--log-every", "1", "--validate-every", "20")
    subprocess.run(
        command(whole, pipelines["sd"], pictures, *flags), env=environment(), check=True, capture_output=True
    )
    again = command(cut, pipelines["sd"], pictures, *flags)

    assert killed_at(cut / "metrics.jsonl", 5, again)
    assert not list(cut.glob("checkpoints/step-*"))
    assert killed_at(cut / "metrics.jsonl", random.Random(0).randint(18, 40), again)
    assert list(cut.glob("checkpoints/step-*"))
    assert killed_at(cut / "export", 1, again)
    assert (cut / "checkpoints" / "step-00000060").exists() and not (cut / "done.json").exists()

    subprocess.run(again, env=environment(), check=True, capture_output=True)
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_method_that_its_settings_do_not_describe_is_refused_before_anything_is_written(tmp_path):
    config = LCMConfig(teacher="avatars", out=tmp_path / "run", guidance=(2.0,))
    other = dataclasses.replace(config.method(), guidance_max=3.0, solver_steps=20)
    message = r"got guidance_max = 3.0 \(config: 2.0\), solver_steps = 20 \(config: 50\); allowed: the LatentConsis"
    with pytest.raises(InputError, match=message):
        Trainer(other, None, [0], config)
    with pytest.raises(InputError, match="got a LatentAdversarial; allowed: the LatentConsistency of"):
        Trainer(LADDConfig().method(), None, [0], config)
    assert not config.out.exists()


def test_a_stop_signal_saves_and_the_same_command_goes_on(tmp_path, pipelines, pictures):
    first = trainer(tmp_path / "run", pipelines["sd"], pictures, checkpoint_every=100)
    step = first.step

    def stop_after_two():
        if first.update == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    first.step = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.update == 2
    trainer(tmp_path / "run", pipelines["sd"], pictures, checkpoint_every=100).fit()
    trainer(tmp_path / "whole", pipelines["sd"], pictures, checkpoint_every=100).fit()
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(a[k], b[k]) for k in a)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"
)  # fmt: skip


def in_two_processes(words: list[str], by: Sequence[str] = TORCHRUN) -> None:
    launcher = [sys.executable, *by]
    done = subprocess.run([*launcher, *words[1:]], env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_of_two_processes_one_is_told_to_stop_twice_and_both_save_at_once(tmp_path, pipelines, pictures):
    """A scheduler sends the signal, and so does torchrun, which kills half a minute later; logs are far apart here."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_TWICE + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    out = tmp_path / "out"
    words = [sys.executable, str(script), *command(out, pipelines["sd"], pictures, "--log-every", "9")[2:]]
    with pytest.raises(AssertionError):  # torchrun's own exit code
        in_two_processes(words)
    assert [folder.name for folder in out.glob("checkpoints/*")] == ["step-00000002"]


@pytest.mark.parametrize(("name", "other"), [("update", 2), ("data", "another")])
def test_processes_that_do_not_share_a_disk_are_refused(tmp_path, pipelines, pictures, monkeypatch, name, other):
    run = trainer(tmp_path / "run", pipelines["sd"], pictures)
    own = {"update": 0, "data": run.data.key}
    monkeypatch.setattr(processes, "gather_object", lambda facts: [*facts, facts[0] | {name: other}])
    line = rf"processes: got {name} {own[name]} in one and {other} in another; allowed: the same in all; give all .*"
    with pytest.raises(InputError, match=line):
        run.fit()
    assert run.update == 0


def test_no_casts_of_weights_are_kept_and_the_others_wait_for_hours(tmp_path, pipelines, pictures):
    """Autocast's cache would hold a copy of every weight until the network's call ends."""
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, mixed_precision="bf16")
    seen = []
    block = run.backbone.up_blocks[0]
    block.register_forward_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    run.step()
    assert set(seen) == {(True, False)}
    assert run.accelerator.init_handler.timeout == timedelta(hours=6)


def test_no_text_is_encoded_once_the_text_encoders_have_left_the_device(tmp_path, pipelines, pictures, monkeypatch):
    """On the CPU a large one takes minutes."""

    def moved(teacher, device):
        move_coders(teacher, device)
        monkeypatch.setattr(teacher.conditioner, "encode", lambda *_, **__: pytest.fail("encoded on the CPU"))

    monkeypatch.setattr("stepdistill.training.trainer.move_coders", moved)
    config = LADDConfig(
        teacher=pipelines["sd"], data=pictures, out=tmp_path, batch_size=2, rank=2, max_train_steps=1, validate_every=1
    )
    teacher = load_teacher(pipelines["sd"])
    Trainer(config.method(), teacher, open_data(pictures, teacher), config).fit()
    assert (tmp_path / "validation" / "00000001.png").exists()


def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(tmp_path, pipelines, pictures):
    """Adam's epsilon is raised: if a gradient is pure rounding error, Adam takes full steps of its sign."""
    teacher = pipelines["sd"]
    flags = ("--max-train-steps", "10", "--lora-dropout", "0", "--adam-epsilon", "1e-3", "--log-every", "1")
    in_two_processes(command(tmp_path / "two", teacher, pictures, *flags))
    one = command(tmp_path / "one", teacher, pictures, *flags, "--batch-size", "4")
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[k] - trained).abs().max().item() for k, trained in b.items()) < 1e-6
    assert all(trained.abs().max() > 1e-4 for k, trained in b.items() if "lora_B" in k), "a layer was not trained"
    logs = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("one", "two")]  # fmt: skip
    assert [line["update"] for line in logs[0]] == [line["update"] for line in logs[1]] == list(range(1, 11))
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["consistency"] == pytest.approx(mine["consistency"], rel=1e-5)


def test_two_processes_of_accelerate_launch_train_a_full_student_as_one_does(tmp_path, pipelines, pictures):
    """`--multi_gpu` makes accelerate start several, also on a CPU. The student takes the guidance scale as an input."""
    flags = ["--teacher", pipelines["sd"], "--data", pictures, "--guidance", "1", "3", "--max-train-steps", "10"]
    flags += ["--adam-epsilon", "1e-3", "--learning-rate", "1e-4", "--log-every", "1", "--backward-simulation", "0.5"]
    words = [sys.executable, str(SCRIPT.with_name("train_lcm.py")), *flags]
    in_two_processes([*words, "--out", str(tmp_path / "two"), "--batch-size", "2"], by=ACCELERATE)
    one = [*words, "--out", str(tmp_path / "one"), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    logs = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("one", "two")]  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 10
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["consistency"] == pytest.approx(mine["consistency"], rel=1e-5)
    file = "unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / name / "export" / file) for name in ("one", "two"))
    before = load_file(Path(pipelines["sd"]) / file)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert sum((b[k] - before[k]).abs().max() > 1e-5 for k in before) > 0.9 * len(before)


def test_two_processes_with_a_tracker_come_to_their_end(tmp_path, pictures):
    """Only one validates; Stable Diffusion 3's network has a buffer, which a wrapped one would send to the others."""
    pytest.importorskip("tensorboard", reason="tensorboard, of the extra `trackers`, is not installed")
    flags = ("--max-train-steps", "2", "--trackers", "tensorboard", "--validate-every", "1")
    teacher = str(tiny.save(tmp_path / "sd3", "sd3"))
    in_two_processes(command(tmp_path / "run", teacher, pictures, *flags))
    assert (tmp_path / "run" / "done.json").exists()
    assert list((tmp_path / "run" / "stepdistill").glob("events*"))


def test_accumulated_batches_make_one_update(tmp_path, pipelines, pictures):
    """Four updates of two batches are four optimizer steps and eight losses, and equal one double batch."""
    run = trainer(tmp_path / "two", pipelines["sd"], pictures, gradient_accumulation=2, learning_rate=1e-4)
    calls = []
    loss = run.method.loss
    object.__setattr__(run.method, "loss", lambda *a: calls.append(1) or loss(*a))
    run.fit()
    steps = {int(s["step"]) for s in run.optimizers["student"].state.values()}
    assert (len(calls), steps, run.update) == (8, {4}, 4)
    trainer(tmp_path / "one", pipelines["sd"], pictures, batch_size=4, learning_rate=1e-4).fit()
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


def test_every_epoch_sees_every_sample_once_in_another_order():
    first, second = sample_indices(0, 0, 10, 10), sample_indices(0, 10, 10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert sample_indices(0, 7, 6, 10) == first[7:] + second[:3]


def test_learning_rates_follow_their_formulas():
    config = LCMConfig(learning_rate=1.0, lr_warmup=10, max_train_steps=110, lr_scheduler="linear")
    assert [learning_rate_at(u, config) for u in (0, 9, 10, 60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    config = dataclasses.replace(config, lr_scheduler="cosine")
    assert [learning_rate_at(u, config) for u in (10, 35, 60)] == pytest.approx([1.0, 0.5 + 0.5 * 0.5**0.5, 0.5])


def test_the_loss_falls(tmp_path, pipelines, pictures):
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, max_train_steps=120, rank=8, learning_rate=5e-3)
    held = [run.batch(10_000 + i) for i in range(8)]

    def held_loss() -> float:
        with torch.no_grad():
            return sum(run.method.loss("student", b, run.models, Clock(0, 1)).total.item() for b in held)

    before = held_loss()
    held = [run.batch(10_000 + i) for i in range(8)]  # the draws have been used
    for _ in range(120):
        run.step()
    assert held_loss() < 0.75 * before


def test_validation_shows_the_students_samples_of_1_2_4_and_8_steps_from_one_noise_and_not_the_bases(
    tmp_path, pipelines, pictures
):
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, learning_rate=1e-2, seed=3)
    for _ in range(3):
        run.step()
    captions = run.data.captions[:4]
    cond = encoded(run.teacher, captions)

    def samples(steps: int) -> torch.Tensor:
        draws = Draws.at(3, 0, 4)
        x_T = draws.normal(*run.teacher.sample_shape)
        with torch.no_grad():
            x0 = run.method.sample(run.models.student, x_T, cond, steps=steps, draws=draws)
            return (127.5 + 127.5 * run.teacher.decode(x0).clamp(-1, 1)).permute(0, 2, 3, 1)

    sheet = np.array(grid(run.method, run.teacher, run.models.student, cond, 4, 3))
    sheet = torch.from_numpy(np.pad(sheet, ((0, 4), (0, 4), (0, 0))))  # cells are 128 pixels wide, gaps are 4
    cells = sheet.view(4, 132, 4, 132, 3).transpose(1, 2)[:, :, :128:4, :128:4]
    known = [samples(steps) for steps in (1, 2, 4, 8)]
    run.teacher.denoiser.backbone.disable_adapters()
    known += [samples(steps) for steps in (1, 2, 4, 8)]
    errors = (cells[:, :, None] - torch.stack(known, 1)[:, None]).abs().amax((3, 4, 5))  # by row, column and sample
    assert torch.equal(errors < 1, torch.eye(4, 8, dtype=torch.bool).expand(4, 4, 8))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, pipelines, pictures):
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, log_every=1)
    loss = run.method.loss

    def poisoned(phase, batch, models, clock):
        value = loss(phase, batch, models, clock)
        scale = float("nan") if clock.update == 3 else 1.0
        return dataclasses.replace(
            value, total=value.total * scale, terms={"consistency": value.terms["consistency"] * scale}
        )

    object.__setattr__(run.method, "loss", poisoned)
    with pytest.raises(InputError, match=r"the last checkpoint is kept; lower --learning-rate"):
        run.fit()
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[0] == 2


def test_another_run_in_the_folder_is_refused_by_name(tmp_path, pipelines, pictures):
    trainer(tmp_path / "run", pipelines["sd"], pictures).fit()
    with pytest.raises(InputError, match=r"holds a run with rank = 2 \(now 3\); .*give another --out"):
        trainer(tmp_path / "run", pipelines["sd"], pictures, rank=3)


def test_a_finished_run_is_not_run_again(tmp_path, pipelines, pictures, capsys):
    export = trainer(tmp_path / "run", pipelines["sd"], pictures).fit()
    assert trainer(tmp_path / "run", pipelines["sd"], pictures).fit() == export
    assert "already done" in capsys.readouterr().out


def test_a_checkpoint_is_written_from_the_tensors_themselves_and_of_a_view_only_its_own_part(tmp_path):
    whole, tensors = torch.arange(6.0), {}
    checkpoint.flatten({"whole": whole, "part": whole[2:4]}, "s", tensors)
    assert tensors["s.whole"].data_ptr() == whole.data_ptr()
    assert tensors["s.part"].untyped_storage().nbytes() == 8
    checkpoint.save(tmp_path, 1, {"whole": whole, "part": whole[2:4]})
    state = checkpoint.load_latest(tmp_path)[1]
    assert state["whole"].tolist() == [0, 1, 2, 3, 4, 5] and state["part"].tolist() == [2, 3]


def test_a_truncated_checkpoint_is_passed_over(tmp_path):
    for update in (1, 2):
        checkpoint.save(tmp_path, update, {"w": torch.tensor([float(update)])})
    broken = tmp_path / "step-00000002" / "state.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    messages: list[str] = []
    update, state = checkpoint.load_latest(tmp_path, messages.append)
    assert (update, state["w"].item()) == (1, 1.0)
    assert messages == [f"checkpoint {broken.parent} is broken (its hash does not match); trying the previous one"]
    for content in ("{", "[]", "{}", '{"sha256": 3, "tree": []}', ""):
        (tmp_path / "step-00000001" / "state.json").write_text(content)
        with pytest.raises(InputError, match="all broken"):
            checkpoint.load_latest(tmp_path, messages.append)
    assert not any("\n" in line for line in messages)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(1)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"disk: got no space left .* what was there is kept"):
        checkpoint.save(tmp_path, 2, {"w": torch.ones(1)})
    assert checkpoint.load_latest(tmp_path)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoints_hold_any_nesting_and_the_last_two_stay(tmp_path):
    state = {"a": [torch.arange(3), {"b": 2.5, 7: None}], "c": (True, "x")}
    for update in (1, 2, 3):
        checkpoint.save(tmp_path, update, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    _, got = checkpoint.load_latest(tmp_path)
    assert torch.equal(got["a"][0], torch.arange(3))
    assert got["a"][1] == {"b": 2.5, 7: None} and got["c"] == [True, "x"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, pictures, pipelines) -> dict[str, Path]:
    """Folders with one defect each."""
    root = tmp_path_factory.mktemp("bad")
    folders = {name: root / name for name in ("empty", "broken", "uncaptioned", "taken")}
    for folder in folders.values():
        folder.mkdir()
    picture = Path(pictures, "0.png").read_bytes()
    (folders["broken"] / "a.png").write_bytes(picture[:200])
    (folders["broken"] / "a.txt").write_text("a cat")
    (folders["uncaptioned"] / "a.png").write_bytes(picture)
    claim(LCMConfig(out=folders["taken"], seed=5))
    (folders["taken"] / "metrics.jsonl").write_text("")
    return folders


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank: got 0; allowed: 1 or more"),
        (["--guidance", "0.5"], "guidance: got 0.5 to 0.5; allowed: 1 or more"),
        (["--teacher", "{empty}"], "pipeline: got {empty} (no model_index.json); allowed: a diffusers pipeline folder"),
        (["--data", "{empty}"], "--data: got {empty}, which holds no pictures; allowed: .png"),
        (["--data", "{broken}"], "picture: got {broken}/a.png, which is broken (image file is truncated"),
        (["--data", "{uncaptioned}"], "captions: got none for {uncaptioned}/a.png; allowed: metadata.jsonl"),
        (["--target-modules", "to_q", "to_z"], "target modules: got to_z, which match no layer; allowed: endings such"),
        (["--out", "{taken}"], "--out: got {taken}, which holds a run with "),
    ],
    ids=lambda value: value[0].strip("-") + value[1].strip("{}") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, pipelines, pictures, bad, flags, message):
    flags = [flag.format(**bad) for flag in flags]
    words = command(tmp_path / "run", pipelines["sd"], pictures, *flags)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "%|" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: " + message.format(**bad))
    assert not (tmp_path / "run").exists()


def test_yaml_gives_defaults_flags_win_and_typos_are_named(tmp_path):
    from stepdistill.cli.training import parse_training as parse

    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1e-3\nrank: 8\nguidance: [2.0, 4.0]\n")
    config = parse(LCMConfig, None, ["--config", str(file), "--rank", "16"])
    assert (config.learning_rate, config.rank, config.guidance) == (1e-3, 16, (2.0, 4.0))
    file.write_text("learning_rat: 1e-3\n")
    with pytest.raises(InputError, match=r"got the field 'learning_rat'; .* did you mean learning_rate\?"):
        parse(LCMConfig, None, ["--config", str(file)])


def test_state_files_hold_tensors_only(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)})
    assert not list(tmp_path.rglob("*.p*t*")) and not list(tmp_path.rglob("*.pkl"))
    save_file(load_file(tmp_path / "step-00000001" / "state.safetensors"), tmp_path / "again.safetensors")
