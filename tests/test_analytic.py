"""The closed-form teacher equals quadrature, automatic differentiation and conservation of probability."""

import math

import pytest
import torch
from oracle import (
    gaussian_denoise,
    gaussian_flow,
    inner_times,
    mixture_flow_1d,
    mixture_x0_1d,
    schedules,
)

from stepdistill import solvers, timegrid
from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.errors import InputError
from stepdistill.guidance import bind, guided
from stepdistill.prediction import KINDS, convert
from stepdistill.schedules import EDM, RectifiedFlow

SCHEDULES = schedules()
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

MEANS = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.1, 0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def line(schedule):
    """Three components in one dimension."""
    return GaussianMixtureDenoiser(MEANS[:, None], STDS, WEIGHTS, schedule)


def ring(schedule, std=0.1):
    """Eight components on a circle."""
    angle = torch.arange(8) * math.pi / 4
    return GaussianMixtureDenoiser(torch.stack([angle.cos(), angle.sin()], dim=1), std, None, schedule)


@each
def test_x0_is_the_posterior_mean_found_by_quadrature(schedule):
    for t in inner_times(schedule, 5).tolist():
        alpha, sigma = (c.item() for c in schedule.coeffs(t))
        for x_t in (-1.3, 0.4):
            x_t = x_t * max(1.0, sigma)
            ours = line(schedule)(torch.tensor([[x_t]], dtype=torch.float64), t).item()
            assert ours == pytest.approx(mixture_x0_1d(x_t, alpha, sigma, MEANS, STDS, WEIGHTS), abs=1e-8)


@each
def test_score_is_the_gradient_of_the_log_density(schedule):
    network = ring(schedule)
    for t in inner_times(schedule, 4).tolist():
        alpha, sigma = schedule.coeffs(t)
        x_t = (torch.randn(6, 2, dtype=torch.float64) * torch.hypot(alpha, sigma)).requires_grad_()
        variance = (alpha * 0.1) ** 2 + sigma**2
        square = ((x_t[:, None] - alpha * network.means) ** 2).sum(-1)
        log_p = (-square / (2 * variance)).logsumexp(-1)
        (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
        torch.testing.assert_close(network.score(x_t.detach(), t), gradient, atol=1e-8, rtol=1e-8)


@each
def test_every_kind_is_consistent_with_x0(schedule):
    network, t = ring(schedule), inner_times(schedule, 6)
    x_t = torch.randn(6, 2, dtype=torch.float64)
    x0 = network(x_t, t)
    for kind in KINDS:
        expected = convert(x0, x_t, t, schedule, src="x0", dst=kind)
        torch.testing.assert_close(network(x_t, t, kind=kind), expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(network.raw(x_t, t), x0)


@each
def test_the_flow_of_one_component_is_the_closed_form(schedule):
    network = GaussianMixtureDenoiser(torch.tensor([[0.7]], dtype=torch.float64), 0.5, None, schedule)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    t, s = inner_times(schedule)[[7, 2]].tolist()
    expected = gaussian_flow(schedule, 0.7, 0.5, x, t, s)
    torch.testing.assert_close(network.flow(x[:, None], t, s)[:, 0], expected, atol=1e-12, rtol=1e-12)
    denoised = gaussian_denoise(schedule, 0.7, 0.5)(x, t)
    torch.testing.assert_close(network(x[:, None], t)[:, 0], denoised, atol=1e-12, rtol=1e-12)


@each
def test_the_consistency_function_conserves_probability_from_noise_to_data(schedule):
    t = schedule.t_max
    x_t = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64) * schedule.coeffs(t)[1]
    expected = mixture_flow_1d(schedule, MEANS, STDS, WEIGHTS, x_t, t, schedule.t_min)
    ours = line(schedule).consistency(x_t[:, None], t)[:, 0]
    assert (ours - expected).abs().max() < 1e-8


@each
def test_the_flow_is_the_limit_of_the_solvers(schedule):
    t, s = inner_times(schedule)[[6, 3]].tolist()
    x_t = torch.randn(5, 2, dtype=torch.float64) * torch.hypot(*schedule.coeffs(t))
    start, end = schedule.log_snr_half(torch.tensor([t, s], dtype=torch.float64)).tolist()
    times = schedule.time_at(torch.linspace(start, end, 1001, dtype=torch.float64))
    walked = solvers.integrate(solvers.heun, bind(ring(schedule, 0.3)), x_t, times)
    torch.testing.assert_close(walked, ring(schedule, 0.3).flow(x_t, t, s), atol=2e-4, rtol=0)


def test_the_flow_runs_both_ways_by_each_samples_times_and_stays_on_one_path():
    network = ring(RectifiedFlow(), 0.3)
    x_t = torch.randn(4, 2, dtype=torch.float64)
    t, s = torch.tensor([1.0, 0.8, 0.6, 0.3]), torch.tensor([0.0, 0.4, 0.6, 0.1])
    x_s = network.flow(x_t, t, s)
    torch.testing.assert_close(network.flow(x_s, s, t), x_t, atol=1e-6, rtol=0)
    torch.testing.assert_close(network.consistency(x_s, s), network.consistency(x_t, t), atol=1e-6, rtol=0)
    torch.testing.assert_close(x_s[2], x_t[2], atol=1e-15, rtol=0)


def test_the_same_data_have_the_same_flow_on_every_schedule():
    starts = []
    for schedule in SCHEDULES.values():
        t = schedule.time_at(-0.5)
        alpha, sigma = schedule.coeffs(t)
        x_t = torch.tensor([[0.3, -0.8], [1.0, 0.2]]).double() * torch.hypot(alpha, sigma)
        starts.append(ring(schedule).consistency(x_t, t))
    for other in starts[1:]:
        torch.testing.assert_close(other, starts[0], atol=1e-8, rtol=0)


def test_a_label_selects_a_component_and_minus_one_none():
    schedule = RectifiedFlow()
    network = line(schedule)
    x_t = torch.tensor([[0.4], [0.4], [0.4]], dtype=torch.float64)
    ours = network(x_t, 0.5, {"labels": torch.tensor([0, 2, -1])})[:, 0]
    expected = [gaussian_denoise(schedule, MEANS[k].item(), STDS[k].item())(x_t[0], 0.5).item() for k in (0, 2)]
    assert ours[:2].tolist() == pytest.approx(expected, abs=1e-12)
    assert ours[2] == network(x_t[2:], 0.5)


def test_guidance_serves_the_closed_form_too():
    network = line(RectifiedFlow())
    x_t = torch.tensor([[0.4], [-0.2]], dtype=torch.float64)
    cond, uncond = {"labels": torch.tensor([0, 1])}, {"labels": torch.tensor([-1, -1])}
    ours = guided(network, x_t, 0.5, cond, uncond, 3.0)
    expected = network(x_t, 0.5) + 3 * (network(x_t, 0.5, cond) - network(x_t, 0.5))
    torch.testing.assert_close(ours, expected)


def test_samples_have_the_mixtures_shares_means_and_spread():
    network, n = line(EDM()), 20_000
    generator = torch.Generator().manual_seed(0)
    x0 = network.sample(n, generator)
    assert (x0.shape, x0.dtype) == ((n, 1), torch.float32)
    mean = (WEIGHTS * MEANS).sum().item()
    variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum().item() - mean**2
    assert abs(x0.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert x0.var().item() == pytest.approx(variance, rel=0.05)
    labels = torch.tensor([0, 1, 2]).repeat(2000)
    by_label = network.sample(6000, generator, labels).reshape(2000, 3)
    torch.testing.assert_close(by_label.mean(0).double(), MEANS, atol=0.05, rtol=0)
    torch.testing.assert_close(by_label.std(0).double(), STDS, atol=0, rtol=0.1)


def test_the_exact_flow_of_noise_reaches_each_mode_in_its_share():
    network = ring(SCHEDULES["zero_snr"])
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x0 = network.consistency(noise, 999.0, tolerance=1e-6)
    shares = network.responsibilities(x0, -1.0).mean(0)
    assert (shares - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / 2000)
    assert x0.dtype == torch.float32


def test_images_and_uneven_spreads_are_samples_like_any():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 3, 4, 4, generator=generator)
    std = torch.rand(2, 3, 4, 4, generator=generator) + 0.1
    network = GaussianMixtureDenoiser(means, std, torch.tensor([3.0, 1.0]), RectifiedFlow())
    assert network.sample_shape == (3, 4, 4)
    x_t = torch.randn(5, 3, 4, 4, generator=generator)
    flat = GaussianMixtureDenoiser(means.flatten(1), std.flatten(1), torch.tensor([0.75, 0.25]), RectifiedFlow())
    assert torch.equal(network(x_t, 0.5).flatten(1), flat(x_t.flatten(1), 0.5))
    assert network.sample(2, generator).shape == (2, 3, 4, 4)
    single = network(x_t[:1], 0.5, {"labels": torch.tensor([1])})
    gain = 0.5 * std[1] ** 2 / (0.25 * std[1] ** 2 + 0.25)
    torch.testing.assert_close(single[0], means[1] + gain * (x_t[0] - 0.5 * means[1]), atol=1e-6, rtol=1e-6)


def test_the_truth_stays_in_float64_through_casts_and_is_saved():
    network = line(RectifiedFlow()).half().to(torch.bfloat16)
    assert network.means.dtype == torch.float64
    assert torch.equal(network.means[:, 0], MEANS)
    assert set(network.state_dict()) == {"means", "std", "weights"}
    assert network(torch.zeros(2, 1), 0.5).dtype == torch.float32


def test_a_few_solver_steps_come_close_to_the_flow():
    network = line(RectifiedFlow())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = timegrid.inference_times(RectifiedFlow(), 200)
    walked = solvers.integrate(solvers.heun, bind(network), x, times)
    assert (walked - network.consistency(x, 1.0)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("means", "std", "weights", "says"),
    [
        (torch.zeros(3), 1.0, None, "add a dimension"),
        (torch.zeros(3, 2), torch.ones(2), None, r"allowed: std \(\), \(3,\) or \(3, 2\)"),
        (torch.zeros(3, 2), 1.0, torch.ones(2), r"weights \(3,\)"),
        (torch.zeros(3, 2), 0.0, None, "above 0"),
        (torch.zeros(3, 2), 1.0, torch.tensor([1.0, 0.0, 1.0]), "above 0"),
    ],
)
def test_mixtures_that_cannot_be_are_input_errors(means, std, weights, says):
    with pytest.raises(InputError, match=says):
        GaussianMixtureDenoiser(means, std, weights, RectifiedFlow())


def test_a_flow_of_what_is_not_a_number_is_an_input_error():
    with pytest.raises(InputError, match="not finite"):
        line(RectifiedFlow()).consistency(torch.tensor([[math.nan]]), 1.0)
