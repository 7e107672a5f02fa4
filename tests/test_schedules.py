"""Schedules: known values, exact inverses, rates that are derivatives."""

import math
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from oracle import BETAS, inner_times, schedules

from stepdistill.errors import InputError
from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow

SCHEDULES = schedules()
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, LCMScheduler, EulerDiscreteScheduler])
def test_alpha_bar_is_the_diffusers_table_bit_for_bit(scheduler_class, zero_snr):
    schedule = AlphaBar.from_scheduler(scheduler_class(**BETAS, rescale_betas_zero_snr=zero_snr))
    table = DDIMScheduler(**BETAS, rescale_betas_zero_snr=zero_snr).alphas_cumprod.double()
    alpha, sigma = schedule.coeffs(torch.arange(1000))
    assert torch.equal(alpha, table.sqrt())
    assert torch.equal(sigma, (1 - table).sqrt())


def test_alpha_bar_is_linear_between_indices_and_clean_at_minus_one():
    schedule = AlphaBar(torch.tensor([0.9, 0.5, 0.1]))
    table = torch.tensor([0.9, 0.5, 0.1]).double()
    alpha, sigma = schedule.coeffs(torch.tensor([-1.0, -0.5, 0.25, 1.5, 2.0]))
    expected = torch.stack(
        [
            torch.ones((), dtype=torch.float64),
            (1 + table[0]) / 2,
            0.75 * table[0] + 0.25 * table[1],
            (table[1] + table[2]) / 2,
            table[2],
        ]
    )
    torch.testing.assert_close(alpha**2, expected, atol=1e-15, rtol=0)
    torch.testing.assert_close(sigma**2, 1 - expected, atol=1e-15, rtol=0)
    assert (alpha[0], sigma[0]) == (1, 0)


def test_zero_terminal_snr_has_no_signal_at_the_last_index_and_log_snr_of_minus_infinity():
    schedule = SCHEDULES["zero_snr"]
    alpha, sigma = schedule.coeffs(999.0)
    assert (alpha, sigma) == (0, 1)
    assert schedule.log_snr_half(999.0) == -math.inf
    assert schedule.time_at(-math.inf) == 999
    assert schedule.time_at(math.inf) == -1


def test_closed_schedules_take_their_defining_values():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    alpha, sigma = Cosine().coeffs(t)
    torch.testing.assert_close(alpha, torch.cos(math.pi / 2 * t), atol=1e-15, rtol=0)
    torch.testing.assert_close(sigma, torch.sin(math.pi / 2 * t), atol=1e-15, rtol=0)
    assert alpha[2] == 0 and sigma[2] == 1 and sigma[0] == 0
    assert [c.tolist() for c in RectifiedFlow().coeffs(t)] == [[1.0, 0.7, 0.0], [0.0, 0.3, 1.0]]
    assert [c.tolist() for c in EDM().coeffs(torch.tensor([0.5, 80.0]))] == [[1.0, 1.0], [0.5, 80.0]]


@each
def test_time_at_inverts_log_snr(schedule):
    t = inner_times(schedule, 101)
    width = schedule.t_max - schedule.t_min
    torch.testing.assert_close(schedule.time_at(schedule.log_snr_half(t)), t, atol=1e-11 * width, rtol=0)


@each
def test_log_snr_falls_and_its_ends_map_back(schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 2001, dtype=torch.float64)
    value = schedule.log_snr_half(t)
    assert (value.diff() < 0).all()
    assert value[0] == math.inf
    assert schedule.time_at(value[0]) == schedule.t_min
    assert schedule.time_at(value[-1]).item() == pytest.approx(schedule.t_max, abs=1e-9 * schedule.t_max)


@each
def test_rates_are_the_derivatives(schedule):
    t = inner_times(schedule) + 0.003
    h = 1e-6 * (schedule.t_max - schedule.t_min)
    ahead, behind = schedule.coeffs(t + h), schedule.coeffs(t - h)
    for rate, up, down in zip(schedule.rates(t), ahead, behind, strict=True):
        torch.testing.assert_close(rate, (up - down) / (2 * h), atol=1e-8, rtol=1e-5)


@each
def test_coefficients_are_float64_of_the_shape_of_t(schedule):
    for t in (schedule.t_max / 2, torch.tensor(schedule.t_max / 2), torch.full((3,), schedule.t_max / 2)):
        for coefficient in (*schedule.coeffs(t), *schedule.rates(t), schedule.log_snr_half(t)):
            assert coefficient.dtype == torch.float64
            assert coefficient.shape == torch.as_tensor(t).shape


@each
def test_add_noise_is_its_definition_in_the_dtype_of_x0(schedule):
    x0, eps = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    t = inner_times(schedule, 4)
    alpha, sigma = (c.reshape(4, 1, 1) for c in schedule.coeffs(t))
    expected = alpha * x0.double() + sigma * eps.double()
    noised = schedule.add_noise(x0, eps, t)
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, expected.float(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(schedule.add_noise(x0.double(), eps, t), expected, atol=1e-12, rtol=0)
    assert schedule.add_noise(x0.bfloat16(), eps.bfloat16(), t).dtype == torch.float32


@each
def test_times_outside_the_schedule_are_an_input_error(schedule):
    beyond = schedule.t_max + 1
    with pytest.raises(InputError, match=f"got {beyond:g}; allowed: {schedule.t_min:g} to {schedule.t_max:g}"):
        schedule.coeffs(torch.tensor([schedule.t_max, beyond]))
    with pytest.raises(InputError):
        schedule.coeffs(math.nan)


def test_a_scheduler_without_a_table_is_an_input_error():
    with pytest.raises(InputError, match="RectifiedFlow"):
        AlphaBar.from_scheduler(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("table", [[0.5, 0.9], [1.5, 0.1], [[0.9]], []])
def test_a_table_that_does_not_fall_from_one_is_an_input_error(table):
    with pytest.raises(InputError, match="alphas_cumprod"):
        AlphaBar(torch.tensor(table))


def test_noise_levels_in_the_wrong_order_are_an_input_error():
    with pytest.raises(InputError, match="sigma_min"):
        EDM(sigma_min=2.0, sigma_max=1.0)


def test_importing_the_package_loads_neither_torch_nor_diffusers_and_the_core_no_diffusers():
    code = (
        "import sys, stepdistill; assert not {'torch', 'diffusers'} & set(sys.modules); "
        "stepdistill.schedules, stepdistill.convert, stepdistill.solvers, stepdistill.guidance, stepdistill.timegrid; "
        "import stepdistill.denoiser.analytic; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
