"""The LCM loss against hand computations, diffusers' constants and the exact consistency function."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from oracle import BETAS

from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods import get
from stepdistill.methods.base import Batch, Clock, huber
from stepdistill.methods.consistency import LatentConsistency, boundary_scalings, consistency
from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow
from stepdistill.timegrid import Grid

ALPHA_BAR = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))
CLOCK = Clock(0, 1)


class Affine(Denoiser):
    """eps = weight x_t + label, so that a loss can be computed by hand."""

    def __init__(self, schedule, weight: float) -> None:
        super().__init__(None, schedule, "eps")
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.seen: list[tuple[int, bool]] = []

    def raw(self, x_t, t, cond=None, *, t_end=None):
        self.seen.append((len(x_t), torch.is_grad_enabled()))
        return self.weight * x_t + cond["labels"][:, None].to(x_t)


class Trio:
    """Teacher, student and target."""

    def __init__(self, teacher, student, target) -> None:
        self.teacher, self.student, self.target = teacher, student, target


def batch(n: int = 6, dim: int = 2, label: float = 0.3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    cond = {"labels": torch.full((n,), label)}
    return Batch(x0, cond, {"labels": torch.zeros(n)}, Draws.at(seed, 0, n))


@pytest.mark.parametrize("backward_simulation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighting", ["x0", "v"])
@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_the_loss_equals_a_hand_computation(loss_type, weighting, backward_simulation):
    settings = {"loss_type": loss_type, "weighting": weighting, "backward_simulation": backward_simulation}
    method = LatentConsistency(guidance_min=2.0, guidance_max=6.0, huber_c=1e-3, **settings)
    teacher, student, target = (Affine(ALPHA_BAR, w) for w in (0.8, 0.5, 0.6))
    loss = method.loss("student", batch(), Trio(teacher, student, target), CLOCK).total.item()

    sample, total = batch(), 0.0
    index, u, noise = sample.draws.integers(50), sample.draws.uniform(), sample.draws.normal(2).double()
    own, first = sample.draws.uniform() < backward_simulation, sample.draws.normal(2).double()
    assert own.any() == (backward_simulation > 0) and own.all() == (backward_simulation == 1)
    table = DDIMScheduler(**BETAS).alphas_cumprod.double()

    def f(weight, x, time, alpha, sigma):
        tau = 10.0 * time
        x0 = (x - sigma * (weight * x + 0.3)) / alpha
        return 0.25 / (tau**2 + 0.25) * x + tau / math.sqrt(tau**2 + 0.25) * x0

    for i in range(len(index)):
        t = 20 * (int(index[i]) + 1) - 1
        s = max(t - 20, 0)
        a_t, s_t, a_s, s_s = (math.sqrt(v) for v in (table[t], 1 - table[t], table[s], 1 - table[s]))
        x0 = sample.x0[i]
        if own[i]:  # the target's output for pure noise
            x0 = f(0.6, first[i], 999, math.sqrt(table[999]), math.sqrt(1 - table[999]))
        x_t = a_t * x0 + s_t * noise[i]
        g = 2.0 + 4.0 * float(u[i])
        eps = 0.8 * x_t + g * 0.3
        x_s = a_s * (x_t - s_t * eps) / a_t + s_s * eps

        d = (f(0.5, x_t, t, a_t, s_t) - f(0.6, x_s, s, a_s, s_s)) / (s_t if weighting == "v" else 1.0)
        total += (d**2 if loss_type == "l2" else torch.sqrt(d**2 + 1e-6) - 1e-3).sum().item()
    assert loss == pytest.approx(total / 12, rel=2e-6)


@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow(), EDM()], ids=str)
def test_the_loss_is_zero_at_the_exact_consistency_function(schedule):
    """A student that returns the ODE's exact end, between neighbours on one path of an exact solver, has zero loss."""
    mixture = GaussianMixtureDenoiser(torch.tensor([[1.0, -0.5]]), 0.4, None, schedule)

    class Exact(Denoiser):
        def __init__(self) -> None:
            super().__init__(None, schedule, "x0")

        def raw(self, x_t, t, cond=None, *, t_end=None):
            """x0_hat such that c_skip x + c_out x0_hat is the exact end of the path."""
            c_skip, c_out = (c[:, None] for c in boundary_scalings(t, schedule))
            end = mixture.flow(x_t, t, clean)
            return torch.where(c_out > 0, (end - c_skip * x_t) / c_out.clamp(min=1e-12), end)

    class ExactStep:
        """A teacher whose DDIM step lands on the exact path: x0 solved from x_s."""

        kind, grid, takes_guidance = "x0", Grid(), False

        def __init__(self, s_of) -> None:
            self.schedule, self.s_of = schedule, s_of

        def __call__(self, x_t, t, cond=None, *, kind="x0"):
            s = self.s_of[1]
            x_s = mixture.flow(x_t, t, s)
            (a_t, s_t), (a_s, s_s) = (schedule.coeffs(v) for v in (t, s))
            k = (s_s / s_t)[:, None]
            return (x_s - k * x_t) / (a_s[:, None] - k * a_t[:, None])

    clean = 0.0 if isinstance(schedule, AlphaBar) else schedule.t_min
    method = LatentConsistency(guidance_min=1.0, guidance_max=1.0)
    sample = batch(n=64)
    times = method.times(Draws.at(0, 0, 64).integers(50), schedule)
    loss = method.loss("student", sample, Trio(ExactStep(times), Exact(), Exact()), CLOCK)
    assert loss.total.item() < 1e-7


def test_times_are_the_fifty_ddim_points_with_the_last_clamped():
    t, s = LatentConsistency().times(torch.arange(50), ALPHA_BAR)
    assert t.tolist() == [20 * i + 19 for i in range(50)]
    assert s.tolist() == [0, *[20 * i + 19 for i in range(49)]]


def test_boundary_scalings_are_those_of_diffusers_lcm_scheduler():
    scheduler = LCMScheduler(**BETAS)
    for t in (0, 19, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(t)
        ours = boundary_scalings(torch.tensor([float(t)]), ALPHA_BAR)
        assert [v.item() for v in ours] == pytest.approx([float(v) for v in expected], abs=1e-12)


@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow(), EDM()], ids=str)
def test_at_the_clean_end_the_student_is_the_identity(schedule):
    x = torch.randn(3, 2, dtype=torch.float64)
    start = 0.0 if isinstance(schedule, AlphaBar) else schedule.t_min

    class Anything(Denoiser):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            return torch.full_like(x_t, 7.0)

    assert torch.equal(consistency(Anything(None, schedule, "x0"), x, torch.full((3,), start), {}, 10.0), x)


def test_the_guided_teacher_is_one_forward_of_twice_the_batch():
    teacher, student, target = (Affine(ALPHA_BAR, w) for w in (0.8, 0.5, 0.6))
    LatentConsistency().loss("student", batch(), Trio(teacher, student, target), CLOCK)
    assert teacher.seen == [(12, False)]
    assert target.seen == [(6, False)]
    assert student.seen == [(6, True)]


def test_without_guidance_the_teacher_sees_the_batch_once():
    teacher, student, target = (Affine(ALPHA_BAR, w) for w in (0.8, 0.5, 0.6))
    both = Trio(teacher, student, target)
    LatentConsistency(guidance_min=1.0, guidance_max=1.0).loss("student", batch(), both, CLOCK)
    assert teacher.seen == [(6, False)]


def test_gradients_reach_the_student_and_nothing_else():
    teacher, student, target = (Affine(ALPHA_BAR, w) for w in (0.8, 0.5, 0.6))
    LatentConsistency().loss("student", batch(), Trio(teacher, student, target), CLOCK).total.backward()
    assert student.weight.grad.abs().item() > 0
    assert teacher.weight.grad is None and target.weight.grad is None


def test_a_float32_student_is_given_float32():
    """Solver coefficients are float64; what reaches the network is not."""
    dtypes = []

    class Watch(Affine):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            dtypes.append(x_t.dtype)
            return super().raw(x_t, t, cond).float()

    sample = batch()
    sample = Batch(sample.x0.float(), sample.cond, sample.uncond, sample.draws)
    models = Trio(*(Watch(ALPHA_BAR, w) for w in (0.8, 0.5, 0.6)))
    assert LatentConsistency().loss("student", sample, models, CLOCK).total.dtype == torch.float32
    assert set(dtypes) == {torch.float32}


def test_a_teacher_gives_one_loss_whatever_it_predicts():
    """Catches a velocity taken for x0."""
    mixture = GaussianMixtureDenoiser(torch.tensor([[1.0, -0.5], [-1.0, 0.2]]), 0.4, None, ALPHA_BAR)

    class Saying(Denoiser):
        def raw(self, x_t, t, cond=None, *, t_end=None):
            return mixture(x_t, t, kind=self.kind)

    losses = []
    for kind in ("x0", "eps", "v", "flow"):
        networks = Trio(*(Saying(None, ALPHA_BAR, kind) for _ in range(3)))
        losses.append(LatentConsistency().loss("student", batch(), networks, CLOCK).total.item())
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_student_is_told_the_papers_w_which_is_one_less_and_its_teacher_is_told_nothing():
    seen = {"teacher": [], "student": [], "target": []}

    class Listening(Affine):
        def __init__(self, role: str) -> None:
            super().__init__(ALPHA_BAR, 0.5)
            self.role = role
            self.takes_guidance = role != "teacher"

        def raw(self, x_t, t, cond=None, *, t_end=None):
            seen[self.role].append(cond.get("guidance"))
            return super().raw(x_t, t, cond)

    method = LatentConsistency(guidance_min=2.0, guidance_max=6.0, embed_guidance=True)
    method.loss("student", batch(n=256), Trio(*(Listening(r) for r in seen)), CLOCK)
    draws = batch(n=256).draws
    draws.integers(50)
    expected = 1.0 + 4.0 * draws.uniform()
    assert seen["teacher"] == [None]
    assert torch.allclose(seen["student"][0], expected) and torch.equal(seen["target"][0], seen["student"][0])
    assert 1 <= expected.min() < 1.2 and 4.8 < expected.max() <= 5


def test_path_points_are_those_of_the_schedules_own_sampling_grid():
    index = torch.arange(4)
    t, s = LatentConsistency(solver_steps=4).times(index, Cosine())
    assert torch.allclose(t, torch.tensor([0.25, 0.5, 0.75, 1.0]).double())
    assert torch.allclose(s, torch.tensor([0.0, 0.25, 0.5, 0.75]).double())
    t, s = LatentConsistency(solver_steps=4).times(index, EDM())
    ramp = torch.linspace(0, 1, 4, dtype=torch.float64)
    karras = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(t, karras.flip(0)) and torch.equal(s[1:], t[:-1]) and s[0] == 0


def test_huber_is_quadratic_near_zero_and_linear_far_away():
    assert huber(torch.tensor([0.0]), 0.5).item() == 0
    assert huber(torch.tensor([3.0]), 4.0).item() == pytest.approx(1.0)
    assert huber(torch.tensor([1e4]), 1e-3).item() == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_min": 0.5}, "guidance: got 0.5 to 16; allowed: 1 or more"),
        ({"guidance_min": 9.0, "guidance_max": 3.0}, "guidance: got 9 to 3"),
        ({"solver_steps": 1}, "solver_steps: got 1; allowed: 2 or more"),
        ({"loss_type": "l1"}, "loss: got 'l1'; allowed: huber, l2"),
        ({"huber_c": 0.0}, "huber_c: got 0"),
        ({"backward_simulation": 1.5}, "backward_simulation: got 1.5; allowed: 0 to 1"),
        ({"timestep_scaling": 0.0}, "timestep_scaling: got 0; allowed: above 0"),
        ({"guidance_max": math.inf}, "guidance: got 4 to inf"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        LatentConsistency(**settings)


def test_methods_are_found_by_name():
    assert get("lcm") is LatentConsistency
    with pytest.raises(InputError, match="method: got 'dmd'; allowed: lcm"):
        get("dmd")
