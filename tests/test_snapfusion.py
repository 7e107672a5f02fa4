"""SnapFusion's step distillation against the paper's equations in float64, and its choice of blocks against a table."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from oracle import schedules
from test_progressive import Affine

from stepdistill.baselines.architecture import blocks, snapfusion
from stepdistill.baselines.architecture.blocks import Cost, evolve, removals
from stepdistill.baselines.architecture.cfg_aware import CFGAware
from stepdistill.baselines.architecture.contest import exported
from stepdistill.baselines.architecture.paths import Paths
from stepdistill.baselines.architecture.prune import Shape, pruned
from stepdistill.baselines.architecture.snapfusion import SnapFusionConfig
from stepdistill.baselines.architecture.unets import Samples, Untaught
from stepdistill.baselines.base import Batch
from stepdistill.baselines.results import count_parameters
from stepdistill.cli import baselines as cli
from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.methods.progressive import halving_times, two_step_x0

SCHEDULE = schedules()["alpha_bar"]
SD15 = Shape((2, 2, 2, 2), (True, True, True, False), (True, True, True, False))


def labels(n: int, value: float) -> dict[str, torch.Tensor]:
    return {"labels": torch.full((n,), value, dtype=torch.float64)}


def sample(n: int = 8) -> Batch:
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    items = {"x0": x0, "cond.labels": labels(n, 0.3)["labels"], "uncond.labels": labels(n, -0.1)["labels"]}
    return Batch(items, Draws.at(0, 0, n))


def duo(teacher: Affine, student: Affine) -> SimpleNamespace:
    return SimpleNamespace(denoiser=lambda role: {"teacher": teacher, "student": student}[role])


def coefficients(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(c[:, None] for c in SCHEDULE.coeffs(t))


def guided_v(network: Affine, z: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Equation 10: w v(c) - (w - 1) v(∅); the network's v by its own formula, alpha eps - sigma x."""
    alpha, sigma = coefficients(t)

    def v(label: float) -> torch.Tensor:
        eps = network.weight * z + label
        return alpha * eps - sigma * (z - sigma * eps) / alpha

    return w[:, None] * v(0.3) - (w[:, None] - 1) * v(-0.1)


def two_ddim_steps(teacher: Affine, z: torch.Tensor, times: list[torch.Tensor], w: torch.Tensor) -> torch.Tensor:
    """Equation 7 (with eps of t' in the second step, as 13 has it), both steps guided."""
    for t, s in itertools.pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(t), coefficients(s)
        v = guided_v(teacher, z, t, w)
        z = alpha_s * (alpha_t * z - sigma_t * v) + sigma_s * (sigma_t * z + alpha_t * v)
    return z


@pytest.mark.parametrize("scales", [1.0, (2.0, 14.0)])
@pytest.mark.parametrize("kind", ["v", "eps", "x0"])
def test_the_target_is_where_two_guided_ddim_steps_of_the_teacher_lead(kind, scales):
    teacher, z = Affine(SCHEDULE, 0.8, kind), sample(6)["x0"][:6]
    points = halving_times(SCHEDULE, 16)
    w = torch.ones(6).double() if scales == 1.0 else torch.linspace(*scales, 6).double()
    for i in range(0, 16, 2):
        times = [points[i + j].expand(6) for j in range(3)]
        scale = 1.0 if scales == 1.0 else w
        target = two_step_x0(teacher, z, times, labels(6, 0.3), labels(6, -0.1), scale)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(times[0]), coefficients(times[2])
        z_s = two_ddim_steps(teacher, z, times, w)
        ratio = sigma_s / sigma_t
        expected = (z_s - ratio * z) / (alpha_s - ratio * alpha_t)  # equation 9
        assert (target - expected).abs().max() < 1e-10
        landed = alpha_s * target + sigma_s * (z - alpha_t * target) / sigma_t
        assert (landed - z_s).abs().max() < 1e-10


@pytest.mark.parametrize("guided", [False, True])
def test_the_distillation_loss_is_equation_9_by_hand(guided):
    teacher, student = Affine(SCHEDULE, 0.8, "v"), Affine(SCHEDULE, 0.5, "v")
    objective = CFGAware(4, (2.0, 14.0), float(guided), original_weight=0.0)
    loss = objective.loss("student", sample(), duo(teacher, student), Clock(0, 1))
    assert set(loss.terms) == {"guided" if guided else "vanilla"}

    batch = sample()
    index, u, eps = batch.draws.integers(4), batch.draws.uniform(), batch.draws.normal(2).double()
    points = halving_times(SCHEDULE, 8)
    times = [points[2 * index + j] for j in range(3)]
    w = (2 + 12 * u).double() if guided else torch.ones(8).double()
    alpha, sigma = coefficients(times[0])
    z = torch.where((index == 0)[:, None], eps, alpha * batch["x0"] + sigma * eps)
    (alpha_s, sigma_s), x0 = coefficients(times[2]), alpha * z - sigma * guided_v(student, z, times[0], w)
    ratio = sigma_s / sigma
    target = (two_ddim_steps(teacher, z, times, w) - ratio * z) / (alpha_s - ratio * alpha)
    expected = ((alpha / sigma).square().clamp(min=1) * (x0 - target).square()).mean()
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_original_loss_is_added_with_gamma_brought_to_size_or_as_it_is(balanced):
    teacher, student = Affine(SCHEDULE, 0.8, "v"), Affine(SCHEDULE, 0.5, "v")
    models = duo(teacher, student)
    objective = CFGAware(4, guided_share=0.0, original_weight=0.2, balanced=balanced)
    loss = objective.loss("student", sample(), models, Clock(0, 1))
    first, original = loss.terms["vanilla"], loss.terms["original"]
    after = sample()
    for draw in ("integers", "uniform", "normal"):  # skips the distillation's draws
        getattr(after.draws, draw)(*{"integers": (4,), "uniform": (), "normal": (2,)}[draw])
    assert original.item() == pytest.approx(Untaught(0.0).loss("student", after, models, Clock(0, 1)).total.item())
    size = first / original if balanced else 1.0
    assert loss.total.item() == pytest.approx((first + 0.2 * size * original).item(), rel=1e-9)
    (grad,) = torch.autograd.grad(loss.total, student.weight)
    parts = [
        torch.autograd.grad(f, student.weight)[0]
        for f in (
            CFGAware(4, guided_share=0.0, original_weight=0.0).loss("student", sample(), models, Clock(0, 1)).total,
            Untaught(0.0).loss("student", _moved(), models, Clock(0, 1)).total,
        )
    ]
    assert grad.item() == pytest.approx((parts[0] + 0.2 * size * parts[1]).item(), rel=1e-9)


def _moved() -> Batch:
    batch = sample()
    batch.draws.integers(4), batch.draws.uniform(), batch.draws.normal(2)
    return batch


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 100), (0.2, 200), (0.35, 350), (1.0, 1000)])
def test_guided_updates_are_their_share_of_all_evenly_spread(share, count):
    objective = CFGAware(8, guided_share=share)
    updates = [u for u in range(1000) if objective.guided(u)]
    assert len(updates) == count
    gaps = {b - a for a, b in itertools.pairwise(updates)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def table(shape: Shape) -> Cost:
    """A known cost for every shape: the time and the worth of each part."""
    parts = [(4.0, 1.0) if has else (0, 0) for has in shape.down] + [(6.0, 9.0) if has else (0, 0) for has in shape.up]
    parts += [(1.0, 0.1)] if shape.mid else []
    parts += [(3.0 * n, 2.0 * n) for n in shape.pairs]
    ms, worth = (sum(v) for v in zip(*parts, strict=True))
    return Cost(ms, 100.0 - worth)


def test_blocks_go_by_what_is_lost_for_a_millisecond():
    rounds = evolve(SD15, table, 0.4)
    # a millisecond costs 0.1 in the middle block, 0.25 in down attention, 0.67 in a pair, 1.5 in up attention
    assert [r.removed for r in rounds[:4]] == ["mid_block", *(f"down_blocks.{i}.attentions" for i in (0, 1, 2))]
    assert all("a pair" in r.removed for r in rounds[4:])
    first, last = table(SD15).ms, table(rounds[-1].shape).ms
    assert last <= 0.6 * first < table(rounds[-2].shape).ms
    for before, after in itertools.pairwise([SD15, *(r.shape for r in rounds)]):
        cost = table(before)
        values = {n: (table(s).distance - cost.distance) / (cost.ms - table(s).ms) for n, s in removals(before).items()}
        assert after in [s for n, s in removals(before).items() if values[n] == min(values.values())]


def test_a_block_that_saves_nothing_stays_and_too_much_asked_is_refused_with_what_there_is():
    def slow_middle(shape: Shape) -> Cost:
        cost = table(shape)
        return cost if shape.mid else Cost(cost.ms + 2, cost.distance)

    rounds = evolve(SD15, slow_middle, 0.2)
    assert "mid_block" not in [r.removed for r in rounds]
    # the minimum left: one pair per stage and the attention of one stage, the cheapest
    with pytest.raises(
        InputError, match=r"saving: got 0.9; allowed: up to 0\.\d\d, what all blocks that can be spared"
    ):
        evolve(SD15, table, 0.9)
    assert evolve(SD15, table, 0.0) == []


def test_chosen_blocks_are_kept_for_the_run_that_goes_on(tmp_path):
    file, settings = tmp_path / "run" / "blocks.json", {"saving": 0.3, "cfg": (2, 3)}
    rounds = evolve(SD15, table, 0.3)
    assert blocks.kept_rounds(file, settings, lambda: rounds) == rounds
    assert blocks.kept_rounds(file, settings, lambda: pytest.fail("chosen again")) == rounds
    with pytest.raises(InputError, match=r"--out: got .*, whose blocks were chosen with .*; give another --out"):
        blocks.kept_rounds(file, settings | {"saving": 0.4}, lambda: rounds)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("deep")
    return str(tiny.save(root / "sd", "sd", "v_prediction", unet_options=tiny.DEEP))


@torch.no_grad()
def test_errors_of_paths_and_of_steps_are_those_by_hand(deep, pictures):
    teacher = load_teacher(deep)
    like, cache = teacher.denoiser, open_data(pictures, teacher)
    held = Samples(cache, 2, 3)
    unet = pruned(like.backbone, dataclasses.replace(Shape.of(like.backbone), mid=False)).eval()
    items, x = held.batch([0, 1, 2]), Draws.at(0, 0, 3).normal(4, 8, 8).double()
    times = halving_times(like.schedule, 4, like.grid)
    coefficients = [[c.item() for c in like.schedule.coeffs(t)] for t in times]

    def x0_of(network, x, i):
        cond, uncond = (network(x.float(), times[i], items[f"{c}.text"]).sample.double() for c in ("cond", "uncond"))
        alpha, sigma = coefficients[i]
        return alpha * x - sigma * (uncond + 3.5 * (cond - uncond))

    def step(x, x0, i, j):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients[i], coefficients[j]
        return alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t

    points = [x]
    for i in range(4):
        points.append(step(points[-1], x0_of(like.backbone, points[-1], i), i, i + 1))
    end = step(x, x0_of(unet, x, 0), 0, 2)
    end = step(end, x0_of(unet, end, 2), 2, 4)
    errors = []
    for i in (0, 2):  # the step to x_s has x0~; the student's misses it by (alpha_s - k alpha_t) of its error in x0
        landed, ((alpha_t, sigma_t), (alpha_s, sigma_s)) = step(points[i], x0_of(unet, points[i], i), i, i + 2), (
            coefficients[i], coefficients[i + 2]
        )  # fmt: skip
        error = (landed - points[i + 2]) / (alpha_s - sigma_s / sigma_t * alpha_t)
        errors.append(max((alpha_t / sigma_t) ** 2, 1) * error.square().mean().item())
    found = Paths(like, held, 2, 3.5).errors(unet)
    assert found["path_error"] == pytest.approx((end - points[4]).square().mean().item(), rel=1e-4)
    assert found["step_error"] == pytest.approx(sum(errors) / 2, rel=1e-4)


@pytest.fixture
def config(deep, pictures, tmp_path, monkeypatch) -> SnapFusionConfig:
    """A run of four updates, in which each parameter costs a millisecond."""
    monkeypatch.setattr(snapfusion, "call_times", lambda like, unet, *_, **__: [float(count_parameters(unet))])
    return SnapFusionConfig(
        teacher=deep, data=pictures, out=tmp_path / "run", pictures=0, held_out=2, judged=2, max_train_steps=4,
        batch_size=2, checkpoint_every=2, log_every=1, lr_warmup=0, saving=0.2, steps=4, cfg_probability=0.5,
    )  # fmt: skip


def test_a_run_keeps_its_blocks_and_exports_what_takes_its_steps(config, capsys):
    record = cli.finish(config)
    teacher, before, control, student = record["rows"]
    assert [row["role"] for row in record["rows"]] == ["teacher", "before", "control", "student"]
    assert student["parameters"] == before["parameters"] <= 0.8 * teacher["parameters"]
    assert record["figure"] == "path_error" and control["figures"]["path_error"] > 0
    chosen = json.loads((config.out / "blocks.json").read_text())
    assert "importance of each block" in capsys.readouterr().out
    rows = [json.loads(line) for line in (config.out / "student-0" / "metrics.jsonl").read_text().splitlines()]
    assert [("guided" in row, "vanilla" in row) for row in rows] == [(False, True), (True, False)] * 2
    pipe = StableDiffusionPipeline.from_pretrained(exported(config.out, "student", 0), safety_checker=None)
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == halving_times(SCHEDULE, 4)[:4].tolist()
    assert Shape.of(pipe.unet) == Shape(**{k: tuple(v) if isinstance(v, list) else v
                                           for k, v in chosen["rounds"][-1]["shape"].items()})  # fmt: skip
    assert cli.finish(config)["rows"][3]["figures"]["denoising_loss"] == student["figures"]["denoising_loss"]


def test_settings_and_teachers_that_cannot_work_are_refused(config, pipelines):
    for changes, message in (
        ({"teacher": pipelines["sd"]}, "which predicts eps and so has no say in x0 .*; allowed: one that predicts v"),
        ({"saving": 1.0}, "saving: got 1; allowed: 0 to below 1"),
        ({"saving": 0.99}, "saving: got 0.99; allowed: up to 0"),
        ({"cfg_range": (5.0, 2.0)}, "cfg_range: got 5 to 2; allowed: 1 or more, rising"),
        ({"cfg_probability": 1.5}, "cfg_probability: got 1.5; allowed: 0 to 1"),
        ({"steps": 501}, "steps: got 1002; allowed: 1 to 1000"),
        ({"original_weight": -1.0}, "original_weight: got -1; allowed: 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **changes).run()
        assert not list(config.out.rglob("*.safetensors"))


def test_a_saving_of_none_leaves_the_whole_network(config):
    teacher = config.open_teacher()
    shape = dataclasses.replace(config, saving=0.0).efficient(teacher, None)
    assert shape == Shape.of(teacher.denoiser.backbone)
