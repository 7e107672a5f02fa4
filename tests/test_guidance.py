"""Guidance: one forward, the linear rule, the same for every prediction type."""

import pytest
import torch
from oracle import inner_times, schedules
from torch import nn

from stepdistill.denoiser.base import Denoiser
from stepdistill.errors import InputError
from stepdistill.guidance import bind, guided
from stepdistill.prediction import KINDS, convert
from stepdistill.schedules import RectifiedFlow

SCHEDULES = schedules()
SCALE = 7.5


class Network(Denoiser):
    """Predicts `kind` by a fixed nonlinear function of x_t, the clock and cond["shift"], and counts its calls."""

    def __init__(self, schedule, kind):
        super().__init__(nn.Linear(3, 3, dtype=torch.float64), schedule, kind)
        self.sample_shape = (3,)
        self.batches = []

    def evaluate(self, x_t, clock, cond):
        self.batches.append(len(x_t))
        shift = 0 if cond is None else cond["shift"].to(x_t)[:, None]
        return torch.tanh(self.backbone(x_t) + shift) + 0.01 * clock[:, None]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    x_t = torch.randn(4, 3, dtype=torch.float64)
    return x_t, {"shift": torch.linspace(-1, 1, 4)}, {"shift": torch.zeros(4)}


def by_hand(network, x_t, t, cond, uncond, scale, kind):
    """Both predictions converted first, then guided."""
    with_cond, without = network(x_t, t, cond, kind=kind), network(x_t, t, uncond, kind=kind)
    return without + scale * (with_cond - without)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predicts", KINDS)
def test_guiding_the_raw_output_is_guiding_any_kind(schedule, predicts, kind, inputs):
    torch.manual_seed(0)
    network = Network(schedule, predicts)
    t = inner_times(schedule)[4].item()
    ours = guided(network, inputs[0], t, *inputs[1:], SCALE, kind=kind)
    expected = by_hand(network, inputs[0], t, *inputs[1:], SCALE, kind)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_guidance_is_one_forward_of_twice_the_batch(inputs):
    network = Network(RectifiedFlow(), "flow")
    guided(network, inputs[0], 0.5, *inputs[1:], SCALE)
    assert network.batches == [8]


@pytest.mark.parametrize("scale", [1.0, 1])
def test_scale_one_is_a_plain_forward_that_needs_no_uncond(scale, inputs):
    network = Network(RectifiedFlow(), "flow")
    x_t, cond, _ = inputs
    assert torch.equal(guided(network, x_t, 0.5, cond, None, scale), network(x_t, 0.5, cond))
    assert network.batches == [4, 4]


def test_scale_and_time_may_be_of_each_sample(inputs):
    network = Network(RectifiedFlow(), "flow")
    x_t, cond, uncond = inputs
    t, scale = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([1.0, 2.0, 5.0, 15.0])
    together = guided(network, x_t, t, cond, uncond, scale)
    for i in range(4):
        one = ({"shift": c["shift"][i : i + 1]} for c in (cond, uncond))
        alone = guided(network, x_t[i : i + 1], t[i : i + 1], *one, scale[i].item())
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-6)


def test_scale_zero_is_the_unconditional_prediction(inputs):
    network = Network(RectifiedFlow(), "flow")
    x_t, cond, uncond = inputs
    torch.testing.assert_close(guided(network, x_t, 0.5, cond, uncond, 0.0), network(x_t, 0.5, uncond))


def test_bind_fixes_conditions_and_scale(inputs):
    network = Network(RectifiedFlow(), "v")
    x_t, cond, uncond = inputs
    denoise = bind(network, cond, uncond, SCALE)
    assert denoise.schedule is network.schedule
    assert torch.equal(denoise(x_t, 0.5), guided(network, x_t, 0.5, cond, uncond, SCALE))
    assert torch.equal(bind(network)(x_t, 0.5), network(x_t, 0.5))


@pytest.mark.parametrize(
    ("cond", "uncond", "says"),
    [
        ({"shift": torch.zeros(4)}, None, "pass uncond or use scale=1.0"),
        ({"shift": torch.zeros(4)}, {"shift": torch.zeros(1)}, "repeat uncond to the batch"),
        ({"shift": torch.zeros(4), "text": torch.zeros(4)}, {"shift": torch.zeros(4)}, "same keys"),
    ],
)
def test_conditions_that_cannot_be_fused_are_input_errors(cond, uncond, says, inputs):
    with pytest.raises(InputError, match=says):
        guided(Network(RectifiedFlow(), "v"), inputs[0], 0.5, cond, uncond, SCALE)


# the Denoiser base


class Half(Network):
    """A network with bfloat16 weights that requires bfloat16 input and a float32 clock."""

    def __init__(self, schedule, kind):
        super().__init__(schedule, kind)
        self.to(torch.bfloat16)

    def evaluate(self, x_t, clock, cond):
        assert (x_t.dtype, clock.dtype, clock.shape) == (torch.bfloat16, torch.float32, (4,))
        return self.backbone(x_t)


@pytest.mark.parametrize(
    ("given", "result"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_half_precision_network_answers_in_float32(given, result, inputs):
    network = Half(RectifiedFlow(), "flow")
    x_t = inputs[0].to(given)
    for t in (0.5, torch.tensor(0.5), torch.full((4,), 0.5)):
        assert network.raw(x_t, t).dtype == result
        assert network(x_t, t, kind="eps").dtype == result


def test_forward_is_raw_converted_with_exact_coefficients(inputs):
    network = Network(SCHEDULES["alpha_bar"], "v")
    t = torch.tensor([3.0, 250.0, 500.5, 999.0])
    x0 = network(inputs[0], t, inputs[1])
    raw = network.raw(inputs[0], t, inputs[1])
    assert torch.equal(x0, convert(raw, inputs[0], t, network.schedule, src="v", dst="x0"))
    assert torch.equal(network(inputs[0], t, inputs[1], kind="v"), raw)


def test_one_time_networks_refuse_a_second_time(inputs):
    with pytest.raises(InputError, match="t_end"):
        Network(RectifiedFlow(), "v")(inputs[0], 0.5, t_end=0.1)


def test_an_unknown_kind_of_network_is_an_input_error():
    with pytest.raises(InputError, match="allowed: x0, eps, v, flow"):
        Network(RectifiedFlow(), "epsilon")
