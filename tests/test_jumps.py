"""The adversarial students' times against diffusers' schedulers, and how they are drawn and noised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchLCMScheduler
from oracle import BETAS

from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.load import as_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.jumps import Jumper
from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow
from stepdistill.timegrid import Grid

ALPHA_BAR = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))


@dataclass(frozen=True)
class Jump(Jumper):
    """A method without a loss."""

    name: ClassVar[str] = "jump"

    def loss(self, phase, batch, models, clock):
        raise NotImplementedError


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_the_times_are_those_of_the_exported_lcm_scheduler(family, steps):
    teacher = as_teacher(tiny.make(family), family)
    scheduler = Jump().scheduler(teacher)
    scheduler.set_timesteps(steps)
    ours = Jump(student_steps=steps).times(teacher.denoiser.schedule, teacher.denoiser.grid)
    assert ours.tolist() == scheduler.timesteps.tolist()


def test_four_steps_of_stable_diffusion_are_quarters_of_the_clock():
    assert Jump(student_steps=4).times(ALPHA_BAR, Grid()).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_times_are_those_its_pipeline_asks_of_the_flow_scheduler(family, steps):
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    teacher = as_teacher(tiny.make(family), family)
    side = tiny.LATENT * teacher.factor
    teacher.resize((side, side))
    scheduler = Jump().scheduler(teacher)
    assert isinstance(scheduler, FlowMatchLCMScheduler)
    if family == "flux":
        c = scheduler.config
        patches = (tiny.LATENT // 2) ** 2
        mu = calculate_shift(patches, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    ours = Jump(student_steps=steps).times(teacher.denoiser.schedule, teacher.denoiser.grid)
    assert ours.tolist() == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)


def shares(method: Jump, clock: Clock, count: int = 20000) -> list[float]:
    """The share of draws of each time."""
    t = method.draw_times(Draws.at(0, 0, count), ALPHA_BAR, Grid(), clock)
    return [(t == time).double().mean().item() for time in method.times(ALPHA_BAR, Grid())]


@pytest.mark.parametrize(
    ("update", "weight"), [(0, 1.0), (25, 2.5), (50, 4.0), (99, 4.0)], ids=["start", "half up", "risen", "end"]
)
def test_the_noisiest_time_comes_to_its_weight(update, weight):
    got = shares(Jump(student_steps=4, curriculum_share=0.5, last_weight=4.0), Clock(update, 100))
    expected = [weight / (weight + 3), *[1 / (weight + 3)] * 3]
    for share, p in zip(got, expected, strict=True):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20000)
    assert sum(got) == pytest.approx(1)


def test_without_a_curriculum_all_times_are_alike_or_the_weight_is_there_at_once():
    assert shares(Jump(), Clock(0, 100)) == pytest.approx([0.25] * 4, abs=4 * math.sqrt(0.25 * 0.75 / 20000))
    assert shares(Jump(last_weight=3.0), Clock(0, 100))[0] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 20000))
    assert shares(Jump(student_steps=1), Clock(0, 100), 10) == [1.0]


@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow()], ids=str)
def test_the_noisiest_input_is_the_unit_noise_that_sampling_begins_with_bit_for_bit(schedule):
    method = Jump(student_steps=2)
    x0, eps = (torch.randn(2, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    t = method.times(schedule, Grid())
    x_t = method.noised(schedule, Grid(), 100 * x0, eps, t)
    assert torch.equal(x_t[0], eps[0])
    assert torch.equal(x_t[1:], schedule.add_noise(100 * x0, eps, t)[1:])


class Echo(Denoiser):
    """Records its inputs, and returns a hundredth of x_t."""

    def __init__(self, schedule) -> None:
        super().__init__(None, schedule, "x0")
        self.sample_shape, self.asked = (2,), []

    def raw(self, x_t, t, cond=None, *, t_end=None):
        self.asked.append((x_t, t))
        return x_t / 100


@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow(), EDM()], ids=str)
def test_sampling_begins_where_training_did(schedule):
    """On EDM too, where the noise at the highest time has the scale of sigma."""
    method, student = Jump(student_steps=2), Echo(schedule)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(2))
    method.sample(student, noise, {}, steps=2, draws=Draws.at(0, 0, 5))
    times = method.times(schedule, Grid())
    assert [t[0].item() for _, t in student.asked] == times.tolist()
    top = times[0].expand(5)
    assert torch.equal(student.asked[0][0], method.noised(schedule, Grid(), torch.ones(5, 2), noise, top))


def test_on_edm_a_one_step_sample_of_the_exact_denoiser_has_the_datas_mean():
    schedule = EDM()
    teacher = GaussianMixtureDenoiser(torch.tensor([[3.0, -1.0]]), 0.5, None, schedule)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(2))
    x0 = Jump(student_steps=1).sample(teacher, noise, {}, steps=1, draws=Draws.at(0, 0, 1))
    expected = teacher(80.0 * noise, 80.0, kind="x0")
    assert (x0 - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_steps": 0}, "student_steps: got 0; allowed: 1 to 40"),
        ({"student_steps": 41}, "student_steps: got 41"),
        ({"curriculum_share": 1.5}, "curriculum_share: got 1.5; allowed: 0 to 1"),
        ({"discriminator_warmup": -1}, "discriminator_warmup: got -1; allowed: 0 or more"),
        ({"last_weight": 0.0}, "last_weight: got 0; allowed: above 0"),
        ({"last_weight": math.inf}, "last_weight: got inf"),
        ({"last_weight": math.nan}, "last_weight: got nan"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Jump(**settings)


@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow(), EDM()], ids=str)
def test_its_share_of_samples_is_noised_from_the_students_own_first_answer(schedule):
    """By hand: times and noise are the same as without it; at times below the noisiest, half of the images are replaced
    by the student's output 3 x_T + 1, and then no ground truth is known for them."""

    class Student(Denoiser):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            assert not torch.is_grad_enabled() and (t == times[0]).all()
            return 3 * x_t + 1

    student = Student(None, schedule, "x0")
    models, n = SimpleNamespace(teacher=student, student=student), 64
    x0 = torch.randn(n, 2, dtype=torch.float64)
    times = Jump(student_steps=4).times(schedule, Grid())
    (plain_x, t, _, known), (x_t, same, _, own_known) = (
        Jump(student_steps=4, backward_simulation=share).drawn(
            Batch(x0, {}, {}, Draws.at(0, 0, n)), models, Clock(0, 1)
        )
        for share in (0.0, 0.5)
    )
    draws = Draws.at(0, 0, n)
    draws.uniform()
    eps, own, noise = draws.normal(2).double(), draws.uniform() < 0.5, draws.normal(2).double()
    alpha, sigma = schedule.coeffs(t)
    size = math.sqrt(1 + 80**2) if isinstance(schedule, EDM) else 1.0
    answer = alpha[:, None] * (3 * size * noise + 1) + sigma[:, None] * eps
    below = t < times[0]
    expected = torch.where((own & below)[:, None], answer, plain_x)
    assert torch.equal(same, t) and torch.equal(known, below) and torch.equal(own_known, below & ~own)
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)
    assert 10 < (own & below).sum() < 40


def test_the_card_gives_the_step_count_that_a_student_was_trained_at():
    assert [Jump(student_steps=steps).steps for steps in (1, 2, 4)] == [1, 2, 4]
