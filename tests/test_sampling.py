"""Sampling outside a pipeline equals the pipelines' own."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchLCMScheduler, LCMScheduler
from oracle import BETAS

import stepdistill
from stepdistill.conditioning.base import expand
from stepdistill.denoiser.families import even_sigmas
from stepdistill.denoiser.load import as_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.guidance import bind
from stepdistill.methods.consistency import boundary_scalings, lcm_times, sample_lcm
from stepdistill.sampling import sample
from stepdistill.schedules import AlphaBar, RectifiedFlow
from stepdistill.solvers import SOLVERS, integrate
from stepdistill.timegrid import inference_times

FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def noise(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return (ours - theirs).abs().max() < tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("original", [50, 20, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 20])
def test_lcm_times_are_those_of_diffusers(steps, original):
    scheduler = LCMScheduler(**BETAS, original_inference_steps=original)
    scheduler.set_timesteps(steps)
    assert lcm_times(AlphaBar.from_scheduler(scheduler), steps, original) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_times_on_a_flow_are_even_ones_as_diffusers_shifts_them(steps, shift):
    scheduler = FlowMatchLCMScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=even_sigmas(steps))
    ours = lcm_times(RectifiedFlow(), steps, shift=shift)
    assert ours == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)


@FAMILIES
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_sampling_equals_the_pipeline_given_the_same_noise(family, kind, steps, monkeypatch):
    pipe = tiny.MAKERS[family](kind)
    teacher = as_teacher(pipe, "tiny")
    options = {"original_inference_steps": 25, "timestep_scaling": 8.0}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **options)
    x_T, *noises = noise(steps)
    queue = list(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: queue.pop(0))
    theirs = pipe(tiny.PROMPTS, num_inference_steps=steps, guidance_scale=1.0, latents=x_T, output_type="latent").images
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    ours = sample_lcm(teacher.denoiser, x_T, cond, steps=steps, noises=noises, original_steps=25, timestep_scaling=8.0)
    assert not queue
    assert close(ours, theirs)


def test_a_w_conditioned_student_is_told_its_guidance_as_the_pipeline_tells_it(monkeypatch):
    pipe = tiny.sd(unet_options={"time_cond_proj_dim": 256})
    teacher = as_teacher(pipe, "tiny")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    x_T, *noises = noise(2)
    queue = list(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: queue.pop(0))
    theirs = pipe(tiny.PROMPTS, num_inference_steps=2, guidance_scale=7.5, latents=x_T, output_type="latent").images
    cond = teacher.conditioner.encode(tiny.PROMPTS) | {"guidance": torch.full((2,), 6.5)}
    assert close(sample_lcm(teacher.denoiser, x_T, cond, steps=2, noises=noises), theirs)


def test_boundary_scalings_take_their_known_values():
    schedule = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))
    c_skip, c_out = boundary_scalings(torch.tensor([0.0, 19.0, 999.0]), schedule)
    assert c_skip.tolist() == pytest.approx([1, 0.25 / (190**2 + 0.25), 0.25 / (9990**2 + 0.25)], rel=1e-12)
    assert c_out.tolist() == pytest.approx([0, 190 / (190**2 + 0.25) ** 0.5, 9990 / (9990**2 + 0.25) ** 0.5], rel=1e-12)


@FAMILIES
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guided_ddim_equals_the_pipeline(family, steps, guidance):
    pipe = tiny.MAKERS[family]("v_prediction")
    teacher = as_teacher(pipe, "tiny")
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    (x_T,) = noise(1)
    theirs = pipe(
        tiny.PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=x_T, output_type="latent"
    ).images
    cond, uncond = teacher.conditioner.encode(tiny.PROMPTS), expand(teacher.conditioner.unconditional(1), 2)
    ours = sample(teacher.denoiser, x_T, cond, uncond, steps=steps, guidance=guidance)
    assert close(ours, theirs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_walks_the_trailing_grid(solver):
    teacher = as_teacher(tiny.sd("v_prediction"), "tiny")
    (x_T,) = noise(1)
    cond = teacher.conditioner.encode(tiny.PROMPTS)
    times = inference_times(teacher.denoiser.schedule, 3)
    with torch.no_grad():
        expected = integrate(SOLVERS[solver], bind(teacher.denoiser, cond), x_T, times)
    assert torch.equal(sample(teacher.denoiser, x_T, cond, steps=3, solver=solver), expected)


def test_a_sample_does_not_depend_on_its_neighbours():
    teacher = as_teacher(tiny.sd(), "tiny")
    cond = teacher.conditioner.encode(tiny.PROMPTS)

    def drawn(first: int, count: int) -> torch.Tensor:
        draws = Draws.at(5, first, count)
        part = {key: value[first : first + count] for key, value in cond.items()}
        return sample_lcm(teacher.denoiser, draws.normal(4, 8, 8), part, steps=4, draws=draws)

    assert close(torch.cat([drawn(0, 1), drawn(1, 1)]), drawn(0, 2))


def test_steps_solvers_and_noises_out_of_range_are_named():
    teacher = as_teacher(tiny.sd(), "tiny")
    schedule, (x_T,) = teacher.denoiser.schedule, noise(1)
    for steps in (0, 51):
        with pytest.raises(InputError, match=f"steps: got {steps}; allowed: 1 to 50"):
            lcm_times(schedule, steps)
    with pytest.raises(InputError, match="original_steps: got 1001; allowed: 1 to 1000"):
        lcm_times(schedule, 4, 1001)
    with pytest.raises(InputError, match=r"got 'magic'; allowed: ddim, heun, dpmpp_2m; .*stepdistill.sample_lcm"):
        sample(teacher.denoiser, x_T, {}, steps=1, solver="magic")
    assert stepdistill.sample_lcm is sample_lcm
    with pytest.raises(InputError, match="noise: got 0 noises for 4 steps; allowed: 3, or draws"):
        sample_lcm(teacher.denoiser, x_T, teacher.conditioner.encode(tiny.PROMPTS), steps=4)
