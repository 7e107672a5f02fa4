"""Conversions: all sixteen pairs round-trip on every schedule and agree with the definitions of the kinds."""

import itertools

import pytest
import torch
from oracle import inner_times, schedules

from stepdistill.errors import InputError
from stepdistill.prediction import KINDS, convert

SCHEDULES = schedules()
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
pairs = pytest.mark.parametrize(("src", "dst"), list(itertools.product(KINDS, KINDS)))


def truth(schedule, t, dtype=torch.float64):
    """x_t and each kind by its definition, from a known x0 and eps."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(t), 3, 2, dtype=torch.float64, generator=generator)
    alpha, sigma, alpha_rate, sigma_rate = (c.reshape(-1, 1, 1) for c in (*schedule.coeffs(t), *schedule.rates(t)))
    kinds = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "flow": alpha_rate * x0 + sigma_rate * eps,
    }
    return (alpha * x0 + sigma * eps).to(dtype), {kind: y.to(dtype) for kind, y in kinds.items()}


@each
@pairs
def test_every_pair_gives_the_definition(schedule, src, dst):
    t = inner_times(schedule)
    x_t, y = truth(schedule, t)
    torch.testing.assert_close(convert(y[src], x_t, t, schedule, src=src, dst=dst), y[dst], atol=1e-10, rtol=1e-10)


@each
@pairs
def test_every_pair_round_trips(schedule, src, dst):
    t = inner_times(schedule)
    x_t, y = truth(schedule, t)
    there = convert(y[src], x_t, t, schedule, src=src, dst=dst)
    back = convert(there, x_t, t, schedule, src=dst, dst=src)
    assert (back - y[src]).abs().max() < 1e-10


@each
def test_a_scalar_time_is_a_time_for_all(schedule):
    t = inner_times(schedule)[4].item()
    x_t, y = truth(schedule, torch.full((5,), t))
    by_scalar = convert(y["eps"], x_t, t, schedule, src="eps", dst="v")
    by_sample = convert(y["eps"], x_t, torch.full((5,), t, dtype=torch.float64), schedule, src="eps", dst="v")
    assert torch.equal(by_scalar, by_sample)


def test_the_result_has_the_dtype_of_x_t_and_is_float32_for_half():
    schedule = SCHEDULES["flow"]
    t = torch.tensor([0.3, 0.6])
    for given, result in [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]:
        x_t, y = torch.ones(2, 3, dtype=given), torch.ones(2, 3, dtype=torch.bfloat16)
        for dst in KINDS:
            assert convert(y, x_t, t, schedule, src="v", dst=dst).dtype == result


def test_the_same_kind_returns_at_once_even_where_nothing_can_be_converted():
    y = torch.ones(1, 2)
    assert convert(y, y, 999.0, SCHEDULES["zero_snr"], src="eps", dst="eps") is y


@pytest.mark.parametrize(
    ("name", "src", "dst", "t"),
    [
        ("zero_snr", "eps", "x0", 999.0),
        ("cosine", "eps", "x0", 1.0),
        ("flow", "eps", "v", 1.0),
        ("alpha_bar", "x0", "eps", -1.0),
        ("edm", "x0", "flow", 0.0),
        ("zero_snr", "flow", "x0", 999.0),
    ],
)
def test_where_delta_is_zero_the_error_names_t(name, src, dst, t):
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match=f"convert {src} to {dst}: got t={t:g} on"):
        convert(x, x, t, SCHEDULES[name], src=src, dst=dst)
    inner = inner_times(SCHEDULES[name])[4].item()
    with pytest.raises(InputError, match=f"got t={t:g} "):
        convert(x, x, torch.tensor([inner, t]), SCHEDULES[name], src=src, dst=dst)


def test_v_gives_x0_where_there_is_no_signal():
    schedule = SCHEDULES["zero_snr"]
    x_t, y = truth(schedule, torch.tensor([999.0]))
    torch.testing.assert_close(convert(y["v"], x_t, 999.0, schedule, src="v", dst="x0"), y["x0"])


@pytest.mark.parametrize(("src", "dst"), [("epsilon", "x0"), ("x0", "sample")])
def test_an_unknown_kind_is_an_input_error(src, dst):
    with pytest.raises(InputError, match="allowed: x0, eps, v, flow"):
        convert(torch.ones(1, 1), torch.ones(1, 1), 0.5, SCHEDULES["flow"], src=src, dst=dst)
