"""BK-SDM: losses against hand computations, resumed against uninterrupted runs, exports in plain diffusers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from oracle import BETAS
from safetensors.torch import load_file

from stepdistill.baselines import get
from stepdistill.baselines.architecture import contest
from stepdistill.baselines.architecture.bk_sdm import BKSDMConfig
from stepdistill.baselines.architecture.block_removal import BlockRemoval, feature_distance, feature_pairs
from stepdistill.baselines.architecture.block_removal import shape_of as cut_to
from stepdistill.baselines.architecture.contest import Contest, exported
from stepdistill.baselines.architecture.measure import held_out
from stepdistill.baselines.architecture.prune import Shape, pruned
from stepdistill.baselines.architecture.unets import Samples, UNets, Untaught, around, dropped
from stepdistill.baselines.base import Batch
from stepdistill.baselines.less_memory import recompute
from stepdistill.cli import baselines as cli
from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.training.from_yaml import from_yaml
from stepdistill.training.loop import Loop

CLOCK = Clock(0, 1)
CONFIGS = Path(__file__).parent.parent / "train_scripts" / "configs" / "baselines"


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> str:
    """A tiny pipeline of three stages, two pairs each, that predicts v."""
    root = tmp_path_factory.mktemp("deep")
    return str(tiny.save(root / "sd", "sd", "v_prediction", unet_options=tiny.DEEP))


@pytest.fixture
def config(deep, pictures, tmp_path) -> BKSDMConfig:
    return BKSDMConfig(
        teacher=deep, data=pictures, out=tmp_path / "run", pictures=0, held_out=2, max_train_steps=4, batch_size=2,
        checkpoint_every=2, log_every=1, lr_warmup=0,
    )  # fmt: skip


def sample(n: int = 3, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    items = {"x0": (n, 4, 8, 8), "cond.text": (n, 5, 16), "uncond.text": (n, 5, 16)}
    return Batch({k: torch.randn(s, generator=generator).to(dtype) for k, s in items.items()}, Draws.at(0, 0, n))


def networks(deep: str, size: str = "tiny", seed: int = 9) -> tuple[UNets, Shape, Shape]:
    """A teacher and a pruned student with random weights, and the shapes of both."""
    teacher = load_teacher(deep).denoiser
    whole = Shape.of(teacher.backbone)
    shape = cut_to(whole, size)
    student = pruned(teacher.backbone, shape).train()
    tiny.awaken(student, seed)
    return UNets(teacher, student), whole, shape


def test_the_distance_of_features_is_a_sum_of_means():
    generator = torch.Generator().manual_seed(0)
    own = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in {"a": (2, 3), "b": (2, 5, 4)}.items()
    }
    theirs = {
        n: torch.randn(own[o].shape, generator=generator, dtype=torch.float64) for n, o in (("x", "a"), ("y", "b"))
    }
    a = sum((p - q) ** 2 for p, q in zip(own["a"].flatten().tolist(), theirs["x"].flatten().tolist(), strict=True)) / 6
    b = sum((p - q) ** 2 for p, q in zip(own["b"].flatten().tolist(), theirs["y"].flatten().tolist(), strict=True)) / 40
    got = feature_distance(own, theirs, (("a", "x"), ("b", "y"))).item()
    assert got == pytest.approx(a + b, abs=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_authors_by_hand(tmp_path, kind):
    folder = str(tiny.save(tmp_path / "sd", "sd", kind, unet_options=tiny.DEEP))
    models, whole, shape = networks(folder)
    for network in (models.bare, models.teacher):
        network.double()
    objective = BlockRemoval(feature_pairs(whole, shape), 0.5, 2.0, 0.25)
    loss = objective.loss("student", sample(dtype=torch.float64), models, CLOCK)

    batch = sample(dtype=torch.float64)
    t, eps = batch.draws.integers(1000), batch.draws.normal(4, 8, 8).double()
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind)
    x_t = scheduler.add_noise(batch["x0"], eps, t)
    target = eps if kind == "epsilon" else scheduler.get_velocity(batch["x0"], eps, t)
    heard = {}

    def hear(network, role, names):
        for name in names:
            network.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: heard.update({(role, name): out[0] if type(out) is tuple else out})
            )

    names = ["down_blocks.0", "down_blocks.1.attentions.{}.proj_out", "up_blocks.{}", "up_blocks.{}"]
    own = [n.format(i) for n, i in zip(names, (0, 0, 0, 1), strict=True)]
    theirs = [n.format(i) for n, i in zip(names, (0, 1, 1, 2), strict=True)]
    hear(models.bare, "student", own)
    hear(models.teacher, "teacher", theirs)
    with torch.no_grad():
        y = models.bare(x_t, t, batch["cond.text"]).sample
        answer = models.teacher(x_t, t, batch["cond.text"]).sample
    mean = torch.nn.functional.mse_loss
    task, output = mean(y, target), mean(y, answer)
    feature = sum(mean(heard["student", a], heard["teacher", b]) for a, b in zip(own, theirs, strict=True))
    for name, value in {"task": task, "output": output, "feature": feature}.items():
        assert loss.terms[name].item() == pytest.approx(value.item(), abs=1e-10), name
    assert loss.total.item() == pytest.approx((0.5 * task + 2 * output + 0.25 * feature).item(), abs=1e-10)


def test_activations_that_are_computed_twice_give_the_same_gradients(deep):
    models, whole, shape = networks(deep)
    objective, calls, found = BlockRemoval(feature_pairs(whole, shape)), [], []
    models.bare.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for twice in (False, True):
        if twice:
            recompute(models.bare)
        models.bare.zero_grad()
        objective.loss("student", sample(), models, CLOCK).total.backward()
        found.append([p.grad.clone() for p in models.bare.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(*found, strict=True))


def test_the_controls_loss_is_the_task_alone(deep):
    models, whole, shape = networks(deep)
    alone = UNets(load_teacher(deep).denoiser, models.bare, alone=True)
    assert alone.teacher is None
    task = Untaught(0.0).loss("student", sample(), alone, CLOCK)
    taught = BlockRemoval(feature_pairs(whole, shape)).loss("student", sample(), models, CLOCK)
    assert task.total.item() == pytest.approx(taught.terms["task"].item(), rel=1e-6)


def test_the_teacher_answers_without_gradients_and_the_student_learns(deep):
    models, whole, shape = networks(deep)
    seen = []
    models.teacher.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    BlockRemoval(feature_pairs(whole, shape)).loss("student", sample(), models, CLOCK).total.backward()
    assert seen == [False]
    assert all(p.grad is None for p in models.teacher.parameters())
    without = [name for name, p in models.bare.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (1.0, 3)])
def test_dropped_captions_are_the_unconditional_ones(share, gone):
    batch = sample()
    got = dropped(batch, share)["text"]
    assert torch.equal(got[:gone], batch["uncond.text"][:gone]) and torch.equal(got[gone:], batch["cond.text"][gone:])


def test_held_out_errors_are_those_by_hand_and_none_to_itself(deep, pictures):
    teacher = load_teacher(deep)
    held = Samples(open_data(pictures, teacher), 2, 3)
    itself = held_out(teacher.denoiser, teacher.denoiser.backbone, held)
    assert itself["distance_to_teacher"] == 0
    models, *_ = networks(deep)
    found = held_out(teacher.denoiser, models.bare, held)
    batch = Batch(held.batch([0, 1, 2]), Draws.at(0, 0, 3))
    t, eps = batch.draws.integers(1000), batch.draws.normal(4, 8, 8)
    scheduler = DDPMScheduler(**BETAS, prediction_type="v_prediction")
    x_t, target = (f(batch["x0"], eps, t) for f in (scheduler.add_noise, scheduler.get_velocity))
    with torch.no_grad():
        own, theirs = (net(x_t, t, batch["cond.text"]).sample for net in (models.bare, teacher.denoiser.backbone))
    assert found["denoising_loss"] == pytest.approx((own - target).square().mean().item(), rel=1e-5)
    assert found["distance_to_teacher"] == pytest.approx((own - theirs).square().mean().item(), rel=1e-5)


def test_a_run_ends_with_teacher_control_and_student_and_pipelines_that_plain_diffusers_loads(config, capsys):
    record = cli.finish(config)
    assert [(row["role"], row["seed"]) for row in record["rows"]] == [
        ("teacher", None), ("before", None), ("control", 0), ("student", 0)
    ]  # fmt: skip
    teacher, before, _, student = (row["figures"] for row in record["rows"])
    assert teacher["distance_to_teacher"] == 0 < before["distance_to_teacher"]
    assert set(student) == {"denoising_loss", "distance_to_teacher", "latency_ms"}
    assert record["rows"][0]["parameters"] > record["rows"][1]["parameters"] == record["rows"][3]["parameters"]
    assert record["gap_closed"].keys() == {"tiny"} and record["note"].startswith("Student and control start")
    terms = json.loads((config.out / "student-0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"task", "output", "feature"} <= terms.keys()

    folder = exported(config.out, "student", 0)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipe.unet.config.mid_block_type is None and pipe.scheduler.config.prediction_type == "v_prediction"
    trained = load_file(config.out / "student-0" / "weights" / "student.safetensors")
    assert trained.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(v, trained[k]) for k, v in pipe.unet.state_dict().items())
    own = StableDiffusionPipeline.from_pretrained(config.teacher, safety_checker=None)
    own.unet = networks(config.teacher)[0].bare.eval()
    own.unet.load_state_dict(trained)
    drawn = []
    for each in (pipe, own):
        each.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(3)
        drawn.append(each("a red cat", num_inference_steps=3, generator=noise, output_type="latent").images)
    assert torch.equal(*drawn)
    assert "fewer blocks (tiny)" in (folder / "README.md").read_text()


def test_a_cut_run_goes_on_to_the_same_bits_and_a_finished_one_is_measured_anew(config, monkeypatch):
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    cli.finish(whole)
    step, calls = Loop.step, []

    def cut(self):
        calls.append(self.update)
        if len(calls) == 7:  # the student's third update
            raise ConnectionAbortedError
        return step(self)

    monkeypatch.setattr(Loop, "step", cut)
    with pytest.raises(ConnectionAbortedError):
        cli.finish(config)
    record = cli.finish(config)
    assert calls[7:] == [2, 3]
    for role in ("control", "student"):
        a, b = (load_file(c.out / f"{role}-0" / "weights" / "student.safetensors") for c in (config, whole))
        assert all(torch.equal(a[k], b[k]) for k in b), role
    more = dataclasses.replace(config, guidance=2.0, sample_steps=4)  # these affect measurement, not training
    again = cli.finish(more)
    assert len(calls) == 9
    assert [r["figures"]["denoising_loss"] for r in again["rows"]] == [
        r["figures"]["denoising_loss"] for r in record["rows"]
    ]


def test_pictures_are_of_the_teachers_revision_and_drawn_anew_where_a_run_is_measured_anew(config, monkeypatch, capsys):
    drawn, counts = {}, set()

    def noted(models, out, *, steps, n, **_):
        drawn.update(models)
        counts.add(n)
        out.mkdir(parents=True, exist_ok=True)
        [(name, kept)] = [(name, out / name) for name in models]  # as the harness does with its rows
        if not kept.exists():
            kept.write_text("1.0")
        return {(name, count): {"fd": float(kept.read_text())} for count in steps}

    monkeypatch.setattr(contest, "pictures", noted)
    monkeypatch.setattr(contest, "learn", lambda *_: 0.0)
    cli.finish(dataclasses.replace(config, pictures=2, revision="v2"))
    assert {name: spec.revision for name, spec in drawn.items()} == {
        "teacher": "v2", "control-0": None, "student-0": None
    }  # fmt: skip
    assert (drawn["teacher"].path, drawn["teacher"].guidance) == (config.teacher, config.guidance)
    for kept in (config.out / "bench").iterdir():
        kept.write_text("99.0")
    cli.measure(config.out)
    found = [row["figures"].get("fd") for row in json.loads((config.out / "results.json").read_text())["rows"]]
    assert found == [1.0, None, 1.0, 1.0]
    cli.measure(config.out, ["--pictures", "7"])
    assert counts == {2, 7}
    record = json.loads((config.out / "results.json").read_text())
    assert record["config"]["pictures"] == json.loads((config.out / "run.json").read_text())["pictures"] == 7
    with pytest.raises(InputError, match=r"got --pictures 7 --seed 3 .*allowed: --pictures, --protocol, "):
        cli.measure(config.out, ["--pictures", "7", "--seed", "3"])
    monkeypatch.setattr(contest, "pictures", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cli.measure(config.out, ["--pictures", "9"])
    assert sorted(path.name for path in (config.out / "bench").iterdir()) == ["control-0", "student-0", "teacher"]
    assert json.loads((config.out / "results.json").read_text()) == record


def test_an_export_is_of_the_network_as_it_is_trained_now(config):
    for steps in (1, 2):
        cli.finish(dataclasses.replace(config, max_train_steps=steps, lr_scheduler="constant"))
        for place in (exported(config.out, role, 0) for role in ("control", "student")):
            unet = load_file(place / "unet" / "diffusion_pytorch_model.safetensors")
            trained = load_file(place.parent / "weights" / "student.safetensors")
            assert all(torch.equal(unet[name], trained[name]) for name in trained)


@pytest.mark.parametrize("init", ["kept", "random"])
def test_a_control_begins_with_the_kept_blocks_or_with_random_weights_of_its_seed(config, init):
    config = dataclasses.replace(config, control_init=init)
    teacher = config.open_teacher()
    shape = cut_to(Shape.of(teacher.denoiser.backbone), "tiny")
    both = Contest(config, "bk_sdm", "tiny", teacher, shape, None, None, "", 1, None, "")
    student, control, again, other = (
        both.start(role, seed).state_dict()
        for role, seed in (("student", 0), ("control", 0), ("control", 0), ("control", 1))
    )
    equal = [torch.equal(student[k], control[k]) for k in student if student[k].ndim > 1]
    assert all(equal) if init == "kept" else not any(equal)
    assert all(torch.equal(control[k], again[k]) for k in control)
    assert all(torch.equal(control[k], other[k]) for k in control) == (init == "kept")


def test_what_cannot_work_is_refused_before_anything_is_trained(config, tmp_path):
    flow = str(tiny.save(tmp_path / "sd3", "sd3"))
    for changes, message in (
        ({"teacher": flow}, "got a SD3Transformer2DModel; allowed: a UNet2DConditionModel"),
        ({"teacher": "avatars", "size": "base"}, "that has one pair a stage already; allowed: small, tiny"),
        ({"held_out": 6}, "got 6 samples, 6 of them held out; allowed: more"),
        ({"output_weight": 0.0, "feature_weight": 0.0}, "allowed: one of them above 0"),
        ({"pictures": 5, "protocol": "coco30k-256"}, "leaves --prompts and --reference to the user"),
        ({"pictures": 1}, "pictures: got 1; allowed: 0 for none, or 2 and more"),
        ({"caption_dropout": 1.0}, "caption_dropout: got 1; allowed: 0 to below 1"),
        ({"limit": 0}, "limit: got 0; allowed: 1 or more"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **changes).run()
        assert not list(config.out.rglob("*.safetensors"))


def test_a_dry_run_leaves_nothing(config, capsys):
    assert cli.finish(dataclasses.replace(config, dry_run=True)) == {}
    assert not config.out.exists()


def test_quick_flags_are_small_and_give_way_to_what_is_said():
    config = cli.flags("bk_sdm", ["--quick", "--size", "small", "--batch-size", "3"])
    assert config.quick and (config.size, config.batch_size, config.pictures) == ("small", 3, 0)
    assert config.max_train_steps == BKSDMConfig.QUICK["max_train_steps"]


@pytest.mark.parametrize("name", ["bk_sdm", "snapfusion", "prune_then_steps"])
def test_the_recipe_for_stable_diffusion_is_read_and_says_how_to_run_it(name):
    file = CONFIGS / f"sd15_{name}.yaml"
    config, text = from_yaml(file, get(name).config), file.read_text()
    config.check()
    assert f"train_scripts/train_baseline.py {name} " in text
    assert f"--config train_scripts/configs/baselines/{file.name}" in text
    assert "# Memory (estimate): " in text and "# Time (estimate): " in text
    assert f"updates of {config.batch_size * config.gradient_accumulation} samples" in text


def test_a_denoiser_around_another_network_is_otherwise_the_same(deep):
    teacher = load_teacher(deep).denoiser
    models, *_ = networks(deep)
    twin = around(teacher, models.bare)
    assert twin.backbone is models.bare and teacher.backbone is not models.bare
    assert (twin.kind, twin.schedule) == (teacher.kind, teacher.schedule)
