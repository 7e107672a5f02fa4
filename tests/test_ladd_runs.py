"""Whole LADD runs: interrupted and resumed, and on two processes. test_mixture.py has one with a known answer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_trainer import ACCELERATE, environment, in_two_processes

from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.export.adapters import load_whole
from stepdistill.methods.base import Clock
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.trainer import Trainer

SCRIPT = Path(__file__).parent.parent / "train_scripts" / "train_ladd.py"


def trainer(out: Path, teacher: str, data: str, **more) -> Trainer:
    config = LADDConfig(
        teacher=teacher, data=data, out=out, batch_size=2, rank=2, learning_rate=1e-3, max_train_steps=4,
        discriminator_learning_rate=1e-2, checkpoint_every=2, r1_weight=0.1, reconstruction_weight=0.1,
    )  # fmt: skip
    config = dataclasses.replace(config, **more)
    loaded = load_teacher(teacher)
    return Trainer(config.method(), loaded, open_data(data, loaded), config)


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_that_was_cut_ends_with_the_same_bits(tmp_path, pipelines, pictures, lora):
    """With two optimizers, and heads whose spectral norms are estimated by iterations that continue across updates."""
    whole, first = (trainer(tmp_path / n, pipelines["sd"], pictures, lora=lora) for n in ("whole", "cut"))
    whole.fit()
    first.step(), first.step()
    first._save()
    again = trainer(tmp_path / "cut", pipelines["sd"], pictures, lora=lora)
    again.fit()
    assert again.seconds >= 0 and first.update == 2
    file = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / name / "export" / file) for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    ours, theirs = (run.models.others["discriminator"].state_dict() for run in (whole, again))
    assert any("_u" in key for key in ours) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    fresh = trainer(tmp_path / "fresh", pipelines["sd"], pictures, lora=lora).models.others["discriminator"]
    assert not all(torch.equal(v, ours[k]) for k, v in fresh.state_dict().items())


def test_accumulated_batches_make_one_update_of_each_network(tmp_path, pipelines, pictures):
    """Four updates of two batches: eight losses and four optimizer steps for each phase."""
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, gradient_accumulation=2)
    phases, loss = [], run.method.loss
    object.__setattr__(run.method, "loss", lambda phase, *rest: phases.append(phase) or loss(phase, *rest))
    run.fit()
    assert phases == ["discriminator", "student"] * 8
    for role in ("discriminator", "student"):
        assert {int(state["step"]) for state in run.optimizers[role].state.values()} == {4}, role


def test_an_update_is_adamws_of_each_roles_own_clipped_gradient(tmp_path, pipelines, pictures):
    """Adam's first step depends on a gradient's size only through epsilon, so that is large. Of accumulated batches,
    the student's gradient of the first is there while the discriminator's is clipped."""
    own = {"max_grad_norm": 0.01, "weight_decay": 0.5, "adam_epsilon": 1e-3, "gradient_accumulation": 2}
    run, hand = (
        trainer(tmp_path / name, pipelines["sd"], pictures, learning_rate=0.1, discriminator_learning_rate=0.2, **own)
        for name in ("run", "hand")
    )
    for micro in range(2):
        batch = hand.batch(micro)
        for role, rate in (("discriminator", 0.2), ("student", 0.1)):
            with hand.models.only(role):
                (hand.method.loss(role, batch, hand.models, Clock(0, 4)).total / 2).backward()
            if micro == 0:
                continue
            group = hand.models.trained[role].values()
            norm = torch.cat([p.grad.flatten() for p in group]).norm()
            assert norm > 0.04, role
            for p in group:
                gradient = p.grad * 0.01 / norm
                p.data.mul_(1 - rate * 0.5).sub_(rate * gradient / (gradient.abs() + 1e-3))
    run.step()
    for role, group in run.models.trained.items():
        for name, p in group.items():
            torch.testing.assert_close(p, hand.models.trained[role][name], rtol=1e-4, atol=1e-5)


def test_the_export_names_the_blocks_that_were_judged(tmp_path, pipelines, pictures):
    out = trainer(tmp_path / "run", pipelines["sd"], pictures, max_train_steps=1).fit()
    named = json.loads((out / "config.json").read_text())["judged_blocks"]
    assert named.split(", ")[0] == "down_blocks.0.attentions.0" and named in (out / "README.md").read_text()


def test_in_its_discriminator_warmup_the_discriminator_alone_learns(tmp_path, pipelines, pictures):
    run = trainer(tmp_path / "run", pipelines["sd"], pictures, discriminator_warmup=2)

    def weights() -> dict[str, torch.Tensor]:
        return {role: torch.cat([p.flatten() for p in group.values()]) for role, group in run.models.trained.items()}

    changed = []
    for _ in range(3):
        before = {role: values.clone() for role, values in weights().items()}
        run.step()
        changed.append({role: not torch.equal(values, before[role]) for role, values in weights().items()})
    alone, both = {"student": False, "discriminator": True}, {"student": True, "discriminator": True}
    assert changed == [alone, alone, both]


def test_a_discriminator_warmup_is_shorter_than_the_run(tmp_path, pipelines, pictures):
    with pytest.raises(
        InputError, match=r"discriminator_warmup: got 4 of 4 updates; allowed: fewer than all; try a tenth"
    ):
        trainer(tmp_path / "run", pipelines["sd"], pictures, discriminator_warmup=4).config.check()


def test_a_student_may_begin_with_another_runs_and_its_teacher_stays_the_teacher(tmp_path, pipelines, pictures):
    first = trainer(tmp_path / "first", pipelines["sd"], pictures, learning_rate=1e-2).fit().parent
    bare = load_teacher(pipelines["sd"])
    began = load_teacher(pipelines["sd"])
    load_whole(began.source, first / "export")
    run = trainer(tmp_path / "second", pipelines["sd"], pictures, start=first)
    x, t, cond = torch.randn(2, 4, 8, 8), 600.0, bare.conditioner.encode(["a red cat", "the dog"])
    with torch.no_grad():
        student, frozen, theirs, own = (m(x, t, cond) for m in (
            run.models.student, run.models.teacher, began.denoiser, bare.denoiser))  # fmt: skip
    torch.testing.assert_close(student, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(frozen, own) and (student - own).abs().max() > 1e-2
    record, before = (json.loads((folder / "config.json").read_text()) for folder in (run.fit(), first / "export"))
    assert record["start"] == str(first) and record["train_seconds"] > before["train_seconds"] > 0


def test_what_a_student_cannot_begin_with_is_named(tmp_path, pipelines, pictures):
    first = trainer(tmp_path / "first", pipelines["sd"], pictures, max_train_steps=1).fit()
    with pytest.raises(InputError, match=r"adapter: got .* allowed: one made with the same --rank"):
        trainer(tmp_path / "ranks", pipelines["sd"], pictures, start=first, rank=3)
    for changes in ({"rank": 3}, {"rank": 2, "target_modules": ("to_q",)}):
        with pytest.raises(InputError, match=r"adapter: got .* allowed: one made with the same --rank"):
            LADDConfig(start=first, **changes).check_teacher(load_teacher(pipelines["sd"]))  # before data are encoded
    with pytest.raises(InputError, match=r"alpha: got 1 with --start .*, whose adapter's is 2; .*; give --alpha 2"):
        LADDConfig(start=first, rank=2, alpha=1).check_teacher(load_teacher(pipelines["sd"]))
    with pytest.raises(InputError, match=r"start: got .* with --no-lora; allowed: with a LoRA"):
        trainer(tmp_path / "full", pipelines["sd"], pictures, start=first, lora=False)
    file = first / "scheduler" / "scheduler_config.json"  # as a chain from eps to v would leave it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(InputError, match=r"start: got .* predicts v, for a teacher that predicts eps; allowed"):
        LADDConfig(start=first, rank=2).check_teacher(load_teacher(pipelines["sd"]))
    with pytest.raises(InputError, match=r"start: got nowhere, which does not exist; allowed: .*; train it first"):
        LADDConfig(start=Path("nowhere"), rank=2).check_teacher(load_teacher(pipelines["sd"]))
    with pytest.raises(InputError, match=r"lora: got .*, which holds no .safetensors file"):
        LADDConfig(start=tmp_path, rank=2).check_teacher(load_teacher(pipelines["sd"]))


def test_scaled_losses_of_accumulated_batches_train_both_roles_as_unscaled_ones(tmp_path, pipelines, pictures):
    """As in fp16: the discriminator's step must neither unscale what the student is still accumulating, nor change the
    scale under it, as growth after every step would."""
    scaled, plain = (
        trainer(tmp_path / name, pipelines["sd"], pictures, gradient_accumulation=2, max_grad_norm=1e-2)
        for name in ("scaled", "plain")
    )
    plain.step()
    plain.step()
    expected = [p.detach().clone() for group in plain.models.trained.values() for p in group.values()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)  # powers of two: scaling does not round
    scaled.accelerator.scaler = scaler
    scaled.step()
    scaled.step()
    assert scaler.get_scale() == 4096.0  # grew once an update
    found = [p.detach() for group in scaled.models.trained.values() for p in group.values()]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "flags"), [("sd", ["--rank", "2"]), ("sd3", ["--no-lora", "--gradient-accumulation", "2"])]
)
def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(tmp_path, pictures, family, flags):
    """Adam's epsilon is raised: if a gradient is pure rounding error, Adam takes full steps of its sign. So is R1's
    perturbation: of a small one, the logits' difference is mostly rounding. A mean of logits may cross zero."""
    teacher = str(tiny.save(tmp_path / family, family))
    words = [
        sys.executable, str(SCRIPT), "--teacher", teacher, "--data", pictures, *flags, "--log-every", "1",
        "--max-train-steps", "10", "--adam-epsilon", "1e-3", "--learning-rate", "1e-3", "--r1-weight", "0.1",
        "--r1-size", "0.5",
        "--discriminator-learning-rate", "1e-3", "--reconstruction-weight", "0.1",
    ]  # fmt: skip
    in_two_processes([*words, "--out", str(tmp_path / "two"), "--batch-size", "2"], by=ACCELERATE)
    one = [*words, "--out", str(tmp_path / "one"), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    logs = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("one", "two")]  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 10
    for mine, theirs in zip(*logs, strict=True):
        for name in ("discriminator", "adversarial", "r1", "reconstruction"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-7), (mine["update"], name)


def test_bad_flags_are_one_line_and_exit_2(tmp_path, pipelines, pictures):
    words = [
        sys.executable,
        str(SCRIPT),
        "--teacher",
        pipelines["sd"],
        "--data",
        pictures,
        "--out",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(
        [*words, "--blocks", "mid_block.attentions.0", "up_blocks.9"], env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    error = done.stderr.strip()
    assert done.returncode == 2 and "\n" not in error, done.stderr
    assert error.startswith("error: blocks: got 'up_blocks.9', not in this UNet2DConditionModel; allowed: names such")
    assert not (tmp_path / "r").exists()
