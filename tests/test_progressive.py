"""Progressive distillation against hand computations, diffusers' own schedulers and the exact ODE."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from oracle import BETAS, diffusers_sample, schedules

from stepdistill import solvers
from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods import get
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.progressive import Progressive, halving_times, one_step_x0, two_step_x0, x0_of
from stepdistill.methods.schedulers import ddim_scheduler
from stepdistill.prediction import convert
from stepdistill.schedules import EDM, RectifiedFlow
from stepdistill.solvers import Denoise
from stepdistill.timegrid import Grid
from stepdistill.training.progressive import ProgressiveConfig

SCHEDULES = schedules()
ALPHA_BAR = SCHEDULES["alpha_bar"]
CLOCK = Clock(0, 1)
SHIFTED = Grid("linspace", 3.0)  # SD3's


class Affine(Denoiser):
    """eps = weight x_t + label, converted to any kind; records its inputs."""

    def __init__(self, schedule, weight: float, kind: str = "eps", takes_guidance: bool = False) -> None:
        super().__init__(None, schedule, kind)
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.takes_guidance = takes_guidance
        self.seen: list[dict] = []

    def raw(self, x_t, t, cond=None, *, t_end=None):
        self.seen.append({"x_t": x_t, "t": t, "grad": torch.is_grad_enabled()} | cond)
        label = cond["labels"].to(x_t)
        if self.takes_guidance:
            label = label * (1 + cond["guidance"])
        return convert(self.weight * x_t + label[:, None], x_t, t, self.schedule, src="eps", dst=self.kind)


def batch(n: int = 6, label: float = 0.3, seed: int = 0, scale: float = 1.0) -> Batch:
    x0 = scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x0, {"labels": torch.full((n,), label)}, {"labels": torch.zeros(n)}, Draws.at(seed, 0, n))


def duo(teacher, student) -> SimpleNamespace:
    return SimpleNamespace(teacher=teacher, student=student)


def mixture(schedule) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(torch.tensor([[1.0, -0.5], [-0.7, 0.9]]), 0.4, None, schedule)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_ddim_step_to_the_target_lands_where_two_steps_of_the_teacher_do(name, solver):
    schedule = SCHEDULES[name]
    teacher = mixture(schedule)
    points = halving_times(schedule, 8)
    if solver == "heun" and name in ("zero_snr", "cosine"):
        points = points[2:]  # heun has no step from pure noise there
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i in range(len(points) // 2):
        t, m, s = (points[2 * i + j].expand(4) for j in range(3))
        target = two_step_x0(teacher, x_t, (t, m, s), {}, solver=solver)
        x_s = x_t
        for a, b in ((t, m), (m, s)):
            step = solvers.get(solver)
            x_s = step(Denoise(lambda x, time: teacher(x, time), schedule), x_s, a, b)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.coeffs(v[0].item()) for v in (t, s))
        landed = alpha_s * target + sigma_s * (x_t - alpha_t * target) / sigma_t
        assert (landed - x_s).abs().max() < 1e-10


@pytest.mark.parametrize("backward_simulation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighting", ["truncated_snr", "snr+1"])
def test_the_loss_equals_a_hand_computation(weighting, backward_simulation):
    teacher, student = Affine(ALPHA_BAR, 0.8), Affine(ALPHA_BAR, 0.5)
    method = Progressive(steps=4, weighting=weighting, backward_simulation=backward_simulation)
    sample = batch(12)
    index, _, noise = sample.draws.integers(4), sample.draws.uniform(), sample.draws.normal(2).double()
    own = (sample.draws.uniform() < backward_simulation) & (index > 0)
    assert own.any() == (backward_simulation > 0) and (own == (index > 0)).all() == (backward_simulation == 1)
    loss = method.loss("student", batch(12), duo(teacher, student), CLOCK).total.item()

    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    table = [scheduler.alphas_cumprod[t].double().item() for t in scheduler.timesteps] + [1.0]
    alpha, sigma = ([math.sqrt(v) for v in values] for values in (table, [1 - v for v in table]))
    total = 0.0
    assert set(index.tolist()) == {0, 1, 2, 3}
    for i in range(12):
        a = 2 * int(index[i])

        def begun(j, i=i):
            return noise[i] if j == 0 else alpha[j] * sample.x0[i] + sigma[j] * noise[i]

        x_t = begun(a)

        def x0_at(x, j, weight):
            return (x - sigma[j] * (weight * x + 0.3)) / alpha[j]

        if own[i]:  # where the student's own step from the previous time ends
            x_b = begun(a - 2)
            x0 = x0_at(x_b, a - 2, 0.5)
            x_t = alpha[a] * x0 + sigma[a] * (x_b - alpha[a - 2] * x0) / sigma[a - 2]
        x = x_t
        for j in (a, a + 1):
            x0 = x0_at(x, j, 0.8)
            x = alpha[j + 1] * x0 + sigma[j + 1] * (x - alpha[j] * x0) / sigma[j]
        k = sigma[a + 2] / sigma[a]
        target = (x - k * x_t) / (alpha[a + 2] - k * alpha[a])
        snr = (alpha[a] / sigma[a]) ** 2
        weight = max(snr, 1.0) if weighting == "truncated_snr" else snr + 1
        total += weight * (x0_at(x_t, a, 0.5) - target).square().sum().item()
    assert loss == pytest.approx(total / 24, rel=2e-6)


@pytest.mark.parametrize("stage", ["guide", "halve"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_where_x0_is_known_one_step_is_as_good_as_two_and_there_is_no_loss(name, stage):
    class Sure(Denoiser):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            return torch.full_like(x_t, 0.7)

    sure = Sure(None, SCHEDULES[name], "x0")
    assert Progressive(steps=4, stage=stage).loss("student", batch(32), duo(sure, sure), CLOCK).total < 1e-12


def test_gradients_reach_the_student_and_nothing_else():
    teacher, student = Affine(ALPHA_BAR, 0.8), Affine(ALPHA_BAR, 0.5)
    Progressive(steps=4).loss("student", batch(), duo(teacher, student), CLOCK).total.backward()
    assert student.weight.grad.abs().item() > 0 and teacher.weight.grad is None
    assert [call["grad"] for call in teacher.seen] == [False, False]
    assert [call["grad"] for call in student.seen] == [True]


def test_the_weights_are_the_larger_of_both_errors_and_the_error_of_v():
    t = torch.tensor([100.0, 700.0], dtype=torch.float64)
    alpha, sigma = ALPHA_BAR.coeffs(t)
    x_t, x0, off = (torch.randn(2, dtype=torch.float64) for _ in range(3))
    of_eps, of_v = (
        convert(x0 + off, x_t, t, ALPHA_BAR, src="x0", dst=kind) - convert(x0, x_t, t, ALPHA_BAR, src="x0", dst=kind)
        for kind in ("eps", "v")
    )
    truncated, plus = Progressive().weight(ALPHA_BAR, t), Progressive(weighting="snr+1").weight(ALPHA_BAR, t)
    assert torch.allclose(truncated * off**2, torch.maximum(off**2, of_eps**2))
    assert torch.allclose(plus * off**2, of_v**2)
    assert truncated[1] == 1 < truncated[0] and alpha[0] > sigma[0]


def test_a_student_begins_with_noise_alone_as_sampling_does():
    """If alpha(T) > 0, a student trained on noised images would rely on the image in them, which sampling lacks."""
    seen = []

    class Watch(Denoiser):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            seen.append(x_t)
            return x_t

    for schedule in SCHEDULES.values():
        seen.clear()
        for scale in (1.0, 100.0):
            watched = duo(mixture(schedule), Watch(None, schedule, "x0"))
            Progressive(steps=1).loss("student", batch(scale=scale), watched, CLOCK)
        assert torch.equal(*seen)
        noise = batch().draws
        noise.integers(1), noise.uniform()
        start = EDMEulerScheduler().init_noise_sigma if isinstance(schedule, EDM) else 1.0
        assert torch.allclose(seen[0], start * noise.normal(2).double())


def test_at_the_last_interval_the_target_is_where_the_teacher_ends():
    for schedule in SCHEDULES.values():
        t, s = halving_times(schedule, 4)[-2:]
        x_t, x_s = torch.randn(2, 3, dtype=torch.float64)
        assert torch.equal(one_step_x0(schedule, x_t, x_s, t, s), x_s)


def test_a_guided_eps_teacher_becomes_a_v_student_of_one_forward():
    g, w = 3.0, 0.8
    teacher, student = Affine(ALPHA_BAR, w), Affine(ALPHA_BAR, w, kind="v")
    method = Progressive(steps=8, stage="guide", guidance_min=g, guidance_max=g)
    plain = method.loss("student", batch(16), duo(teacher, student), CLOCK).total.item()
    assert [len(call["x_t"]) for call in teacher.seen] == [32] and [len(c["x_t"]) for c in student.seen] == [16]

    class Guided(Affine):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            return super().raw(x_t, t, cond | {"labels": g * cond["labels"]})

    exact = method.loss("student", batch(16), duo(teacher, Guided(ALPHA_BAR, w, kind="v")), CLOCK).total.item()
    assert exact < 1e-9 < plain


@pytest.mark.parametrize("takes_guidance", [False, True])
def test_the_guided_stages_loss_equals_a_hand_computation_with_a_scale_per_sample(takes_guidance):
    teacher, student = Affine(ALPHA_BAR, 0.8), Affine(ALPHA_BAR, 0.5, takes_guidance=takes_guidance)
    method, sample = Progressive(steps=4, stage="guide", guidance_min=2.0, guidance_max=6.0), batch(12)
    index, scale = sample.draws.integers(4).tolist(), (2.0 + 4.0 * sample.draws.uniform().double()).tolist()
    noise = sample.draws.normal(2).double()
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    total = 0.0
    for i, j in enumerate(index):
        mean = scheduler.alphas_cumprod[scheduler.timesteps[j]].double().item()
        alpha, sigma = math.sqrt(mean), math.sqrt(1 - mean)
        x_t = noise[i] if j == 0 else alpha * sample.x0[i] + sigma * noise[i]
        label = 0.3 * scale[i] if takes_guidance else 0.3  # a network given w = scale - 1 adds w labels
        gap = sigma / alpha * ((0.8 * x_t + 0.3 * scale[i]) - (0.5 * x_t + label))
        total += max(mean / (1 - mean), 1.0) * gap.square().sum().item()
    assert set(index) == {0, 1, 2, 3} and min(scale) < 3 and max(scale) > 5
    loss = method.loss("student", batch(12), duo(teacher, student), CLOCK).total.item()
    assert loss == pytest.approx(total / 24, rel=2e-6)


@pytest.mark.parametrize("stage", ["guide", "halve"])
def test_a_network_that_takes_its_guidance_is_told_the_papers_w_and_called_once(stage):
    """Catches a guidance-conditioned network called without its scale, which then takes 1."""
    guiding = stage == "guide"
    teacher, student = Affine(ALPHA_BAR, 0.8, takes_guidance=not guiding), Affine(ALPHA_BAR, 0.5, takes_guidance=True)
    method = Progressive(steps=4, stage=stage, guidance_min=2.0, guidance_max=6.0)
    method.loss("student", batch(64), duo(teacher, student), CLOCK)
    draws = batch(64).draws
    draws.integers(4)
    w = 1.0 + 4.0 * draws.uniform()
    assert torch.allclose(student.seen[0]["guidance"], w) and len(student.seen[0]["x_t"]) == 64
    for call in teacher.seen:
        assert "guidance" not in call if guiding else torch.allclose(call["guidance"], w)
    method.sample(student, torch.randn(3, 2), {"labels": torch.zeros(3)}, steps=1, draws=draws)
    assert student.seen[-1]["guidance"].tolist() == [3.0] * 3 and method.guidance_scale(student) == 4.0


def test_the_chain_begins_with_guidance_or_kind_and_without_either_with_a_halving():
    def stages(kind, takes_guidance=False, **flags):
        teacher = SimpleNamespace(kind=kind, takes_guidance=takes_guidance)
        return [(m.stage, m.steps) for m in ProgressiveConfig(start_steps=4, **flags).methods(teacher)]

    halvings = [("halve", 2), ("halve", 1)]
    assert stages("v", guidance=(3.0,)) == [("guide", 4), *halvings]
    assert stages("eps", guidance=(1.0,)) == [("guide", 4), *halvings]
    assert stages("eps", guidance=(1.0,), student_prediction="eps") == halvings
    assert stages("v", guidance=(1.0,)) == stages("flow", takes_guidance=True, guidance=(2.0, 4.0)) == halvings
    assert stages("v", guidance=(1.0, 4.0), embed_guidance=True, lora=False) == [("guide", 4), *halvings]
    kinds = [Progressive().student_kind(kind) for kind in ("eps", "v", "x0", "flow")]
    assert kinds == ["v", "v", "x0", "flow"]


@pytest.mark.parametrize("grid", [Grid(), SHIFTED, Grid("trailing", 2.0)], ids=lambda g: f"{g.spacing}-{g.shift:g}")
def test_the_times_of_n_steps_are_every_other_one_of_twice_as_many(grid):
    for schedule in SCHEDULES.values() if grid == Grid() else [RectifiedFlow()]:
        for steps in (1, 2, 4, 8, 16, 32):
            few, many = halving_times(schedule, steps, grid), halving_times(schedule, 2 * steps, grid)
            assert torch.allclose(few, many[::2], rtol=0, atol=1e-12) and few[-1] == schedule.t_min
            assert (many.diff() < 0).all()
            if isinstance(schedule, EDM):  # never below what the network was trained at
                assert many[0] == pytest.approx(schedule.t_max) and many[-2] > schedule.sigma_min


def exported(schedule, kind: str, steps: int, pipeline: str, grid: Grid):
    """The scheduler a student is exported with."""
    flow = isinstance(schedule, RectifiedFlow)
    own = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler(**BETAS, prediction_type="epsilon")
    source = type(pipeline, (), {"scheduler": own})()
    return ddim_scheduler(SimpleNamespace(source=source, denoiser=SimpleNamespace(grid=grid)), kind=kind, steps=steps)


@pytest.mark.parametrize(
    ("schedule", "kind", "pipeline", "grid"),
    [
        (ALPHA_BAR, "v", "StableDiffusionPipeline", Grid()),
        (ALPHA_BAR, "eps", "StableDiffusionPipeline", Grid()),
        (ALPHA_BAR, "x0", "DDPMPipeline", Grid()),
        (RectifiedFlow(), "flow", "StableDiffusion3Pipeline", SHIFTED),
    ],
    ids=["v", "eps", "x0", "flow"],
)
def test_the_exported_scheduler_walks_the_same_path(schedule, kind, pipeline, grid):
    truth = mixture(schedule)

    class Saying(Denoiser):
        """The mixture's output at the given clock, which a flow's scheduler truncates to thousandths."""

        def raw(self, x_t, t, cond=None, *, t_end=None):
            return truth(x_t, t, kind=kind)

    student = Saying(None, schedule, kind)
    student.grid = grid
    x_T = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    unit = 1000.0 if kind == "flow" else 1.0
    for steps in (1, 2, 4, 8, 16, 32):
        scheduler = exported(schedule, kind, steps, pipeline, grid)
        scheduler.set_timesteps(steps)
        theirs = diffusers_sample(scheduler, lambda x, t: truth(x, t.item() / unit, kind=kind), x_T)
        ours = Progressive(steps=steps).sample(student, x_T, {}, steps=steps, draws=Draws.at(0, 0, 8))
        assert (ours - theirs).abs().max() < 1e-4, steps
        if type(scheduler) is DDIMScheduler:
            assert scheduler.timesteps.tolist() == halving_times(schedule, steps)[:-1].tolist()
            assert scheduler.final_alpha_cumprod == 1


def test_flux_walks_the_times_it_asks_its_own_scheduler_for():
    scheduler = exported(RectifiedFlow(), "flow", 4, "FluxPipeline", Grid("trailing", 3.0))
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 4, 4).tolist())
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.allclose(
        scheduler.sigmas.double(), halving_times(RectifiedFlow(), 4, Grid("trailing", 3.0)), atol=1e-6
    )


def test_a_clock_in_thousandths_moves_the_clock_and_not_the_coefficients():
    student = Affine(RectifiedFlow(), 0.5, "flow")
    student.grid = SHIFTED
    x, t = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0.74962], dtype=torch.float64)
    x0 = x0_of(student, x, t, {"labels": torch.zeros(1)})
    assert student.seen[0]["t"].item() == 0.749
    velocity = 0.5 - (1 - 0.749 * 0.5) / 0.251
    assert x0[0, 0].item() == pytest.approx(1 - 0.74962 * velocity, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0; allowed: 1 or more"),
        ({"guidance_min": 0.5}, "guidance: got 0.5 to 1"),
        ({"weighting": "snr"}, r"weighting: got 'snr'; allowed: truncated_snr, snr\+1"),
        ({"solver": "dpmpp_2m"}, "solver: got 'dpmpp_2m'; allowed: ddim, heun"),
        ({"stage": "all"}, "stage: got 'all'; allowed: guide, halve"),
        ({"eps_student": "flow"}, "eps_student: got 'flow'; allowed: v, x0, eps"),
        ({"backward_simulation": 1.5}, "backward_simulation: got 1.5; allowed: 0 to 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Progressive(**settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"start_steps": 24}, "start_steps: got 24; allowed: a power of two, as each halving needs; try 32"),
        ({"end_steps": 0}, "end_steps: got 0; allowed: a power of two, as each halving needs; try 1"),
        ({"end_steps": 64}, "end_steps: got 64 from start_steps 32; allowed: no more than those"),
        ({"final_factor": 0.0}, "final_factor: got 0; allowed: above 0"),
        ({"guide_updates": -1}, "guide_updates: got -1; allowed: 0 or more"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ProgressiveConfig(), **flags).check()


def test_teachers_that_cannot_begin_are_refused():
    def check(schedule, kind, **flags):
        backbone = torch.nn.Sequential()
        denoiser = SimpleNamespace(schedule=schedule, kind=kind, grid=Grid(), takes_guidance=False, backbone=backbone)
        teacher = SimpleNamespace(denoiser=denoiser, path="T", vae=object())
        ProgressiveConfig(lora=False, **flags).check_teacher(teacher)

    zero = SCHEDULES["zero_snr"]
    check(zero, "v")
    check(RectifiedFlow(), "flow", teacher_solver="heun")
    with pytest.raises(InputError, match="teacher: got T, which predicts eps on a schedule that ends in pure noise"):
        check(zero, "eps")
    with pytest.raises(InputError, match="teacher_solver: got heun with T"):
        check(zero, "v", teacher_solver="heun")
    with pytest.raises(InputError, match="end_steps: got 32, the start steps, without guidance to distil"):
        check(ALPHA_BAR, "v", end_steps=32, guidance=(1.0,))


def test_an_eps_student_of_one_step_is_refused_and_others_are_not():
    def check(kind, **flags):
        denoiser = SimpleNamespace(
            schedule=ALPHA_BAR, kind=kind, grid=Grid(), takes_guidance=False, backbone=torch.nn.Sequential()
        )
        teacher = SimpleNamespace(denoiser=denoiser, path="T", vae=object())
        ProgressiveConfig(lora=False, **flags).check_teacher(teacher)

    check("eps"), check("eps", student_prediction="x0")
    check("eps", student_prediction="eps", end_steps=2)
    check("v", student_prediction="eps")  # it predicts v, as its teacher does
    for start in (32, 1):
        with pytest.raises(InputError, match=r"student_prediction: got eps for one step with T, .*allowed: v or x0"):
            check("eps", student_prediction="eps", start_steps=start)


def test_each_run_has_its_updates_its_folders_and_an_end_of_its_own():
    config = ProgressiveConfig(start_steps=8, max_train_steps=100, guide_updates=30, push_to_hub="me/it", out="o")
    runs = [config.run(steps) for steps in (8, *config.halvings)]
    assert [run.max_train_steps for run in runs] == [30, 100, 200, 200]
    assert [str(run.out) for run in runs] == [f"o/runs/steps-{n}" for n in (8, 4, 2, 1)]
    assert [run.push_to_hub for run in runs] == [None, None, None, "me/it"]
    assert dataclasses.replace(config, end_steps=4).run(4) == dataclasses.replace(config.run(4), push_to_hub="me/it")


def test_the_settings_of_each_run_describe_its_stage():
    config = ProgressiveConfig(start_steps=8, guidance=(3.0,), weighting="snr+1")
    stages = config.methods(SimpleNamespace(kind="v", takes_guidance=False))
    assert [(m.stage, m.steps) for m in stages] == [("guide", 8), ("halve", 4), ("halve", 2), ("halve", 1)]
    assert [config.run(method.steps).method() for method in stages] == stages


def test_the_method_is_found_by_name():
    assert get("progressive") is Progressive
