"""Solvers equal diffusers' schedulers, show their declared order on the Gaussian flow, keep no state."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from oracle import (
    BETAS,
    STEPS,
    diffusers_sample,
    gaussian_denoise,
    gaussian_flow,
    measured_order,
    schedules,
)

from stepdistill import solvers, timegrid
from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.errors import InputError
from stepdistill.guidance import bind
from stepdistill.prediction import convert
from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow

SCHEDULES = schedules()
each_count = pytest.mark.parametrize("steps", STEPS)
TOLERANCE = 1e-6


def teacher(schedule):
    """A nonlinear denoiser: two components in three dimensions."""
    return GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, 0.3]]), 0.4, None, schedule)


def noise():
    return torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def largest(difference):
    return difference.abs().max().item()


@each_count
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize(
    "options",
    [{"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}],
    ids=["trailing", "sd"],
)
def test_ddim_is_ddim_scheduler(options, kind, steps):
    prediction_type = {"eps": "epsilon", "v": "v_prediction"}[kind]
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=prediction_type, **options)
    scheduler.set_timesteps(steps)
    schedule = AlphaBar.from_scheduler(scheduler)
    network = teacher(schedule)
    times = timegrid.inference_times(
        schedule,
        steps,
        spacing=options["timestep_spacing"],
        steps_offset=options.get("steps_offset", 0),
        clean_end=options.get("set_alpha_to_one", True),
    )
    path = [noise()]
    ours = solvers.integrate(solvers.ddim, bind(network), noise(), times, lambda _, x, s: path.append(x))
    # stock: each step alone, since over fifty its float32 coefficients drift by rounding that depends on the machine
    for (x, following), t in zip(pairwise(path), scheduler.timesteps, strict=True):
        theirs = scheduler.step(network(x, float(t), kind=kind), t, x).prev_sample
        assert largest(following - theirs) < TOLERANCE
    # with the table in float64 only rounding remains, from noise to the clean end
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    theirs = diffusers_sample(scheduler, lambda x, t: network(x, float(t), kind=kind), noise())
    assert largest(ours - theirs) < 1e-12


@each_count
def test_ddim_is_ddim_scheduler_at_zero_terminal_snr(steps):
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(steps)
    schedule = AlphaBar.from_scheduler(scheduler)
    network = teacher(schedule)
    ours = solvers.integrate(solvers.ddim, bind(network), noise(), timegrid.inference_times(schedule, steps))
    theirs = diffusers_sample(scheduler, lambda x, t: network(x, float(t), kind="v"), noise())
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_each_linspace_step_is_ddim_scheduler_step(steps):
    # the scheduler steps to t - N // steps, which on this spacing is not its own next timestep
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    schedule = AlphaBar.from_scheduler(scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # its float32 alone costs 1e-6 in eps at t = 999
    network = teacher(schedule)
    for t in scheduler.timesteps:
        s = max(t.item() - 1000 // steps, -1)
        ours = solvers.ddim(bind(network), noise(), float(t), float(s))
        theirs = scheduler.step(network(noise(), float(t), kind="eps"), t, noise()).prev_sample
        assert largest(ours - theirs) < 1e-12


@each_count
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("solver", "scheduler_class"),
    [(solvers.ddim, FlowMatchEulerDiscreteScheduler), (solvers.heun, FlowMatchHeunDiscreteScheduler)],
    ids=["ddim", "heun"],
)
def test_flow_steps_are_the_flow_match_schedulers(solver, scheduler_class, shift, steps):
    scheduler = scheduler_class(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = RectifiedFlow()
    network = teacher(schedule)
    times = timegrid.inference_times(schedule, steps, spacing="linspace", shift=shift)
    ours = solvers.integrate(solver, bind(network), noise(), times)
    theirs = diffusers_sample(scheduler, lambda x, t: network(x, t.item() / 1000, kind="flow"), noise())
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_heun_is_heun_discrete_scheduler(steps):
    scheduler = HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = AlphaBar.from_scheduler(scheduler)
    network = teacher(schedule)
    times = timegrid.inference_times(schedule, steps)

    def model(y, t):  # that scheduler's sample is x_t / alpha
        return network(y * schedule.coeffs(float(t))[0], float(t), kind="eps")

    ours = solvers.integrate(solvers.heun, bind(network), noise(), times)
    theirs = diffusers_sample(scheduler, model, noise() / schedule.coeffs(times[0])[0])
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_heun_on_edm_is_heun_discrete_scheduler_on_its_own_noise_levels(steps):
    scheduler = HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    network = teacher(EDM())
    clock = iter(torch.cat([levels[:1], levels[1:-1].repeat_interleave(2)]))
    ours = solvers.integrate(solvers.heun, bind(network), noise() * levels[0], levels)
    theirs = diffusers_sample(scheduler, lambda y, t: network(y, next(clock), kind="eps"), noise() * levels[0])
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_dpmpp_2m_is_dpm_solver_multistep_scheduler(steps):
    # in v: that scheduler rounds x to float32, which its eps -> x0 at alpha = 0.07 magnifies past 1e-6 in one step
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = AlphaBar.from_scheduler(scheduler)
    network = teacher(schedule)
    times = timegrid.inference_times(schedule, steps)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    ours = solvers.integrate(solvers.dpmpp_2m, bind(network), noise(), times)
    theirs = diffusers_sample(scheduler, lambda x, t: network(x, float(t), kind="v"), noise())
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_dpmpp_2m_on_flow_is_dpm_solver_multistep_scheduler_with_flow_sigmas(steps):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(steps)
    times = scheduler.sigmas.double()
    levels = iter(times)
    network = teacher(RectifiedFlow())
    ours = solvers.integrate(solvers.dpmpp_2m, bind(network), noise(), times)
    theirs = diffusers_sample(scheduler, lambda x, t: network(x, next(levels), kind="flow"), noise())
    assert largest(ours - theirs) < TOLERANCE


@each_count
def test_dpmpp_2m_on_edm_is_edm_dpm_solver_multistep_scheduler(steps):
    sigma_data = 0.5
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data)
    scheduler.set_timesteps(steps)
    network = teacher(EDM())

    def model(y, t):  # the raw output whose preconditioning gives this x0
        sigma = math.exp(4 * t.double().item())
        skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        return (network(y, sigma) - skip * y) / (sigma * math.sqrt(skip))

    ours = solvers.integrate(solvers.dpmpp_2m, bind(network), 80 * noise(), timegrid.inference_times(EDM(), steps))
    theirs = diffusers_sample(scheduler, model, 80 * noise())
    assert largest(ours - theirs) < TOLERANCE


RANGES = {"alpha_bar": (400, 50), "zero_snr": (400, 50), "cosine": (0.9, 0.1), "flow": (0.9, 0.1), "edm": (2.0, 0.1)}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)
def test_the_declared_order_is_seen_on_the_gaussian_flow(solver, name):
    assert measured_order(solver, SCHEDULES[name], *RANGES[name]) == pytest.approx(solver.order, abs=0.06)


def test_heun_on_flow_keeps_its_order_from_pure_noise_to_clean_data():
    assert measured_order(solvers.heun, RectifiedFlow(), 1.0, 0.0) == pytest.approx(2, abs=0.06)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)
def test_every_solver_is_exact_where_x0_does_not_change(solver, name):
    # data at one point: paths are straight in every second-order step's coordinates
    schedule, (t, s) = SCHEDULES[name], RANGES[name]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    times = torch.linspace(t, s, 4, dtype=torch.float64)
    ours = solvers.integrate(solver, gaussian_denoise(schedule, 0.7, 0.0), x, times)
    assert largest(ours - gaussian_flow(schedule, 0.7, 0.0, x, t, s)) < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_step_moves_each_sample_by_its_own_times(name):
    schedule = SCHEDULES[name]
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    s = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([0.5, 0.0, 0.1], dtype=torch.float64)
    x0, eps = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    x_s = solvers.ddim_step(schedule, schedule.add_noise(x0, eps, t), x0, t, s)
    torch.testing.assert_close(x_s, schedule.add_noise(x0, eps, s), atol=1e-12, rtol=1e-12)
    single = solvers.ddim_step(schedule, schedule.add_noise(x0, eps, t).float(), x0.float(), t, s)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, x_s.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)
def test_times_of_each_sample_give_what_each_gets_alone(solver):
    network = teacher(RectifiedFlow())
    t, s = torch.tensor([0.9, 0.6]), torch.tensor([0.5, 0.0])
    x = noise()[:2]
    together = solver(bind(network), x, t, s)
    alone = torch.cat([solver(bind(network), x[i : i + 1], t[i].item(), s[i].item()) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)
def test_a_walk_is_its_steps_with_the_history_handed_on(solver):
    network = teacher(RectifiedFlow())
    times = timegrid.inference_times(RectifiedFlow(), 5)
    x, history, seen = noise(), None, []
    for t, s in pairwise(times.tolist()):
        x, history = solver.advance(bind(network), x, t, s, history)
    for _ in range(2):  # twice: nothing is left over from the first walk
        walked = solvers.integrate(
            solver, bind(network), noise(), times, callback=lambda i, x_s, s: seen.append((i, s))
        )
        assert torch.equal(walked, x)
    assert seen == list(enumerate(times[1:].tolist())) * 2


@pytest.mark.parametrize("solver", solvers.SOLVERS.values(), ids=solvers.SOLVERS)
def test_the_number_of_network_calls_is_as_declared_and_heun_ends_with_euler(solver):
    calls = []
    network = teacher(RectifiedFlow())
    denoise = solvers.Denoise(lambda x, t: calls.append(t) or network(x, t), RectifiedFlow())
    solvers.integrate(solver, denoise, noise(), torch.tensor([1.0, 0.6, 0.3]))
    assert len(calls) == 2 * solver.evaluations
    calls.clear()
    landed = solver(denoise, noise(), 0.3, 0.0)
    assert calls == [0.3]
    torch.testing.assert_close(landed, network(noise(), 0.3), atol=1e-14, rtol=0)


def test_any_function_of_the_right_signature_is_a_step():
    def euler(denoise, x_t, t, s):
        return x_t + (s - t) * (x_t - denoise(x_t, t)) / t

    times = timegrid.inference_times(RectifiedFlow(), 4)
    denoise = bind(teacher(RectifiedFlow()))
    ours = solvers.integrate(solvers.ddim, denoise, noise(), times)
    torch.testing.assert_close(solvers.integrate(euler, denoise, noise(), times), ours, atol=1e-12, rtol=0)


def distillation_step(schedule, x0, eps, v, t, s):
    """The steps of a consistency loss: add noise, convert, one solver step, all at each sample's own times."""
    x_t = schedule.add_noise(x0, eps, t)
    return solvers.ddim_step(schedule, x_t, convert(v, x_t, t, schedule, src="v", dst="x0"), t, s)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_on_a_device_is_looked_at(name):
    # a meta tensor has no values: reading one, as a check or a branch would, raises
    x, t = torch.empty(4, 3, device="meta"), torch.empty(4, device="meta")
    assert distillation_step(SCHEDULES[name], x, x, x, t, t).shape == x.shape
    assert SCHEDULES[name].time_at(t).shape == t.shape
    denoise = solvers.Denoise(lambda x_t, t: x_t, SCHEDULES[name])
    for solver in solvers.SOLVERS.values():
        x_s, history = solver.advance(denoise, x, t, t, None)
        assert solver.advance(denoise, x_s, t, t, history)[0].shape == x.shape


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_distillation_step_compiles_to_one_graph(name):
    torch._dynamo.reset()
    schedule = SCHEDULES[name]
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.tensor([0.9, 0.5], dtype=torch.float64)
    arguments = (schedule, *torch.randn(3, 2, 3), t, t / 2)
    compiled = torch.compile(distillation_step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), distillation_step(*arguments))


def test_heun_without_signal_says_where_and_what_to_do():
    with pytest.raises(InputError, match=r"heun needs alpha\(t\) > 0, got t=1 on Cosine; start below 1 or use ddim"):
        solvers.heun(bind(teacher(Cosine())), noise(), 1.0, 0.5)


def test_ddim_from_the_clean_end_says_where():
    with pytest.raises(InputError, match=r"ddim needs sigma\(t\) > 0, got t=-1 on AlphaBar"):
        solvers.ddim(bind(teacher(SCHEDULES["alpha_bar"])), noise(), -1.0, -1.0)


def test_an_unknown_solver_is_an_input_error():
    assert solvers.get("heun") is solvers.heun
    with pytest.raises(InputError, match="allowed: ddim, heun, dpmpp_2m"):
        solvers.get("euler")
