"""Grids equal the diffusers schedulers' own; training laws have the distributions their papers name."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from oracle import BETAS, STEPS, schedules

from stepdistill import timegrid
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.schedules import EDM, RectifiedFlow

SCHEDULES = schedules()
steps_counts = pytest.mark.parametrize("steps", [*STEPS, 3, 7, 999, 1000])


@steps_counts
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_discrete_spacings_are_those_of_ddim_scheduler(spacing, steps):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = timegrid.inference_times(SCHEDULES["alpha_bar"], steps, spacing=spacing)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    assert times[-1] == -1
    assert times.dtype == torch.float64


@pytest.mark.parametrize("steps", STEPS)
def test_stable_diffusions_grid_is_leading_with_offset_one_ending_at_index_zero(steps):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    times = timegrid.inference_times(SCHEDULES["alpha_bar"], steps, spacing="leading", steps_offset=1, clean_end=False)
    assert times.tolist() == [*scheduler.timesteps.tolist(), 0]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_linspace_is_the_flow_match_euler_grid(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    times = timegrid.inference_times(RectifiedFlow(), steps, spacing="linspace", shift=shift)
    torch.testing.assert_close(times, scheduler.sigmas.double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_flow_trailing_with_a_dynamic_shift_is_the_grid_of_the_flux_pipeline(steps):
    mu = 1.15
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    times = timegrid.inference_times(RectifiedFlow(), steps, shift=math.exp(mu))
    torch.testing.assert_close(times, scheduler.sigmas.double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_edm_grid_is_karras_and_ends_at_zero(steps):
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(steps)
    times = timegrid.inference_times(EDM(), steps)
    torch.testing.assert_close(times, scheduler.sigmas.double(), atol=0, rtol=1e-5)
    assert (times[0].item(), times[-1].item()) == (pytest.approx(80, rel=1e-12), 0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("spacing", "option"), [("karras", "use_karras_sigmas"), ("logsnr", "use_exponential_sigmas")])
def test_discrete_karras_and_logsnr_have_diffusers_noise_levels(spacing, option, steps):
    scheduler = DPMSolverMultistepScheduler(**BETAS, **{option: True})
    scheduler.set_timesteps(steps)
    times = timegrid.inference_times(SCHEDULES["alpha_bar"], steps, spacing=spacing)
    noise = torch.exp(-SCHEDULES["alpha_bar"].log_snr_half(times))
    torch.testing.assert_close(noise, scheduler.sigmas.double(), atol=1e-7, rtol=1e-5)


def test_heun_linspace_is_the_unrounded_spacing_of_its_own_scheduler_when_it_is_whole():
    scheduler = HeunDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    times = timegrid.inference_times(SCHEDULES["alpha_bar"], 4, spacing="linspace")
    assert times[:-1].tolist() == [scheduler.timesteps[0].item(), *scheduler.timesteps[1::2].tolist()]


def test_shift_multiplies_the_noise_to_signal_ratio_on_any_schedule():
    for name in ("flow", "cosine", "edm"):
        schedule = SCHEDULES[name]
        t = torch.tensor([0.1, 0.4, 0.8])
        moved = timegrid.shifted(schedule, t, 3.0)
        ratio = schedule.log_snr_half(t) - schedule.log_snr_half(moved)
        torch.testing.assert_close(ratio, torch.full((3,), math.log(3.0), dtype=torch.float64))
    t = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(timegrid.shifted(RectifiedFlow(), t, 3.0), (3 * t / (1 + 2 * t)).double())


@pytest.mark.parametrize(
    ("name", "steps", "options", "says"),
    [
        ("flow", 0, {}, "steps: got 0"),
        ("alpha_bar", 1001, {}, "allowed: 1 to 1000"),
        ("flow", 4, {"spacing": "even"}, "allowed: trailing, leading"),
        ("flow", 4, {"spacing": "leading"}, "allowed: trailing, karras, logsnr, linspace"),
        ("cosine", 4, {"spacing": "karras"}, "no finite ends"),
        ("zero_snr", 4, {"spacing": "karras"}, "no finite ends"),
        ("flow", 4, {"shift": 0.0}, "shift: got 0.0"),
        ("alpha_bar", 50, {"shift": 6.0}, "too little noise"),
        ("alpha_bar", 1000, {"spacing": "leading", "steps_offset": 1}, "allowed: 0 to 0"),
    ],
)
def test_grids_that_cannot_be_are_input_errors(name, steps, options, says):
    with pytest.raises(InputError, match=says):
        timegrid.inference_times(SCHEDULES[name], steps, **options)


def test_uniform_draws_integer_timesteps_on_alpha_bar_and_leaves_out_the_clean_end_elsewhere():
    draws = Draws.at(0, 0, 4000)
    t = timegrid.uniform(SCHEDULES["alpha_bar"])(draws)
    assert torch.equal(t, t.round()) and t.min() >= 0 and t.max() <= 999
    assert abs(t.mean().item() - 499.5) < 4 * 288.7 / math.sqrt(4000)
    t = timegrid.uniform(SCHEDULES["flow"])(draws)
    assert t.min() > 0 and t.max() <= 1
    assert abs(t.mean().item() - 0.5) < 4 * 0.2887 / math.sqrt(4000)


@pytest.mark.parametrize(("schedule", "read"), [(RectifiedFlow(), torch.logit), (EDM(), torch.log)])
def test_logit_normal_is_sd3s_law_on_flow_and_karras_law_on_edm(schedule, read):
    m, s = -1.2, 1.1
    values = read(timegrid.logit_normal(schedule, m, s)(Draws.at(1, 0, 4000)))
    normal = Draws.at(1, 0, 4000).normal().double()
    torch.testing.assert_close(values, m + s * normal, atol=1e-6, rtol=1e-6)


def test_discrete_draws_only_the_given_times_each_alike():
    t = timegrid.discrete([1.0, 0.75, 0.5])(Draws.at(2, 0, 3000))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [0.5, 0.75, 1.0]
    assert (counts - 1000).abs().max() < 4 * math.sqrt(3000 * 2 / 9)


def test_a_law_gives_a_sample_the_same_time_whatever_batch_it_is_in():
    law = timegrid.uniform(SCHEDULES["flow"])
    together = law(Draws.at(3, 10, 6))
    apart = torch.cat([law(Draws.at(3, 10, 2)), law(Draws.at(3, 12, 4))])
    assert torch.equal(together, apart)


def test_laws_that_cannot_be_are_input_errors():
    with pytest.raises(InputError, match="logit_normal"):
        timegrid.logit_normal(RectifiedFlow(), 0.0, 0.0)
    with pytest.raises(InputError, match="discrete"):
        timegrid.discrete([])
