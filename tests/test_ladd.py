"""LADD: losses by hand, which roles its gradients reach, and its known fixed point."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from oracle import BETAS
from torch import nn

from stepdistill import features
from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.load import Teacher, as_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER
from stepdistill.methods import get
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.latent_adversarial import Discriminator, LatentAdversarial
from stepdistill.schedules import EDM, AlphaBar, Cosine, RectifiedFlow
from stepdistill.timegrid import Grid
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.roles import Models, full_models, lora_models

ALPHA_BAR = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))
CLOCK = Clock(0, 1)
N, DIM = 6, 2


class Shrink(Denoiser):
    """x0 = weight x_t."""

    def __init__(self, schedule, weight: float) -> None:
        super().__init__(None, schedule, "x0")
        self.weight = nn.Parameter(torch.tensor(weight))

    def raw(self, x_t, t, cond=None, *, t_end=None):
        return self.weight * x_t


class Looking:
    """A teacher whose one block turns a point into two tokens, the point and minus twice the point."""

    takes_guidance = False

    def __init__(self, schedule, grid: Grid | None = None) -> None:
        self.schedule, self.grid, self.asked = schedule, grid or Grid(), []

    def features(self, x_t, t, cond, blocks):
        self.asked.append((x_t, t, torch.is_grad_enabled()))
        return [torch.stack([x_t, -2 * x_t], 1)]


class Line(nn.Module):
    """D = w . token at every token; records its conditions."""

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.conditions = []

    def forward(self, maps, level, text, size):
        self.conditions.append((level, text, tuple(size)))
        return [tokens @ self.w for tokens in maps]


class Trio:
    def __init__(self, schedule, *, grid: Grid | None = None, weight: float = 0.5) -> None:
        self.teacher, self.student = Looking(schedule, grid), Shrink(schedule, weight)
        self.student.grid = grid or Grid()
        self.discriminator = Line([0.4, -0.3])


def batch(seed: int = 0) -> Batch:
    x0 = torch.randn(N, DIM, generator=torch.Generator().manual_seed(1))
    return Batch(x0, {"pooled": torch.arange(3.0 * N).view(N, 3)}, {}, Draws.at(seed, 0, N))


def by_hand(method: LatentAdversarial, phase: str, schedule, shift: float = 1.0) -> tuple[float, float]:
    """The loss of `Trio`, sample by sample in plain arithmetic, and its extra term: R1 or the reconstruction."""
    sample = batch()
    draws, x0 = sample.draws, sample.x0.double()
    times = method.times(schedule, Grid(shift=shift))
    t = times[(draws.uniform().double() * len(times)).floor().long()]
    eps, level = draws.normal(DIM).double(), draws.normal().double()
    # the phase's own: noise for real and generated samples and R1's step, or noise for generated samples alone
    n_real = draws.normal(DIM).double() if phase == "discriminator" else None
    n_fake = draws.normal(DIM).double()
    n_step = draws.normal(DIM).double() if phase == "discriminator" else None

    adversarial = extra = 0.0
    for i in range(N):
        alpha, sigma = (c.item() for c in schedule.coeffs(t[i]))
        noisiest = t[i] == times[0]
        size = math.sqrt(1 + 80**2) if isinstance(schedule, EDM) else 1
        x_t = size * eps[i] if noisiest else alpha * x0[i] + sigma * eps[i]
        fake = 0.5 * x_t
        log_noise = method.logit_mean + math.log(shift) + method.logit_std * level[i].item()  # log(sigma / alpha)
        a, s = (c.item() for c in schedule.coeffs(schedule.time_at(-log_noise)))

        def logits(x):
            projected = (0.4 * x[0] - 0.3 * x[1]).item()
            return [projected, -2 * projected]

        of_fake = logits(a * fake + s * n_fake[i])
        if phase == "student":
            if method.adversarial_loss == "hinge":
                adversarial += -sum(of_fake) / 2 / N
            else:
                adversarial += sum(math.log1p(math.exp(-d)) for d in of_fake) / 2 / N
            for d in (fake - x0[i]).abs().tolist():
                extra += 0.0 if noisiest else (d * d / 2 if d < 1 else d - 0.5) / (N * DIM)
            continue
        seen = a * x0[i] + s * n_real[i]
        of_real, shaken = logits(seen), logits(seen + method.r1_size * n_step[i])
        for real, false in zip(of_real, of_fake, strict=True):
            if method.adversarial_loss == "hinge":
                adversarial += (max(0.0, 1 - real) + max(0.0, 1 + false)) / 2 / N
            else:
                adversarial += (math.log1p(math.exp(-real)) + math.log1p(math.exp(false))) / 2 / N
        extra += ((sum(shaken) - sum(of_real)) / 2 / method.r1_size) ** 2 / N
    return adversarial, extra


@pytest.mark.parametrize("phase", ["discriminator", "student"])
@pytest.mark.parametrize("adversarial_loss", ["hinge", "softplus"])
@pytest.mark.parametrize("schedule", [ALPHA_BAR, Cosine(), RectifiedFlow(), EDM()], ids=str)
def test_the_losses_equal_a_hand_computation(schedule, adversarial_loss, phase):
    method = LatentAdversarial(
        student_steps=2, logit_mean=0.3, logit_std=0.8, adversarial_loss=adversarial_loss, r1_weight=0.7, r1_size=0.05,
        reconstruction_weight=0.2,
    )  # fmt: skip
    loss = method.loss(phase, batch(), Trio(schedule), CLOCK)
    adversarial, extra = by_hand(method, phase, schedule)
    weight, name = (0.7, "r1") if phase == "discriminator" else (0.2, "reconstruction")
    terms = loss.terms
    assert terms["discriminator" if phase == "discriminator" else "adversarial"].item() == pytest.approx(
        adversarial, rel=1e-4
    )
    assert terms[name].item() == pytest.approx(extra, rel=1e-3)
    assert loss.total.item() == pytest.approx(adversarial + weight * extra, rel=1e-3)


def test_a_flows_resolution_shift_moves_the_judged_noise_by_its_logarithm():
    grid = Grid("linspace", 3.0)
    plain, moved = Trio(RectifiedFlow()), Trio(RectifiedFlow(), grid=grid)
    for models in (plain, moved):
        LatentAdversarial(student_steps=1).loss("student", batch(), models, CLOCK)
    u, shifted = plain.teacher.asked[0][1], moved.teacher.asked[0][1]
    assert torch.allclose(shifted, 3 * u / (1 + 2 * u))  # Esser et al. 2024, equation 23


def test_real_and_fake_are_judged_at_one_noise_level_and_r1_steps_from_the_noised_input():
    """Catches a step from the clean latents compared with the logits of noised ones."""
    models, method = Trio(Cosine()), LatentAdversarial(r1_weight=1.0, r1_size=0.01)
    method.loss("discriminator", batch(), models, CLOCK)
    (x_u, u, graded), *others = models.teacher.asked
    assert not others and not graded and len(x_u) == 3 * N
    real, _, shaken = x_u.chunk(3)
    assert torch.equal(u[:N], u[N : 2 * N]) and torch.equal(u[:N], u[2 * N :])
    assert 0.5 < ((shaken - real) / 0.01).std().item() < 1.5


def test_the_heads_are_told_the_noise_level_and_the_pooled_text_of_each_view():
    models = Trio(Cosine())
    LatentAdversarial().loss("discriminator", batch(), models, CLOCK)
    level, text, size = models.discriminator.conditions[0]
    u = models.teacher.asked[0][1]
    assert torch.allclose(level[:, 0], torch.sin(u.float() * math.pi / 2))
    assert torch.equal(text, batch().cond["pooled"].repeat(2, 1)) and size == ()


def test_each_phase_has_numbers_of_its_own_and_the_same_ones_each_time():
    asked = []
    for _ in range(2):
        models, sample = Trio(Cosine()), batch()
        for phase in LatentAdversarial().phases(CLOCK):
            LatentAdversarial().loss(phase, sample, models, CLOCK)
        asked.append([x_u for x_u, _, _ in models.teacher.asked])
    assert all(torch.equal(a, b) for a, b in zip(*asked, strict=True))
    assert not torch.equal(asked[0][0][N:], asked[0][1])


@pytest.mark.parametrize(
    ("name", "judged", "fooled"), [("hinge", 2.0, 0.0), ("softplus", 2 * math.log(2), math.log(2))]
)
def test_a_discriminator_that_says_nothing_has_the_known_losses(name, judged, fooled):
    models = Trio(Cosine())
    with torch.no_grad():
        models.discriminator.w.zero_()
    method = LatentAdversarial(adversarial_loss=name, r1_weight=1.0)
    first, second = (method.loss(phase, batch(), models, CLOCK) for phase in method.phases(CLOCK))
    assert first.total.item() == pytest.approx(judged) and second.total.item() == pytest.approx(fooled)
    assert first.terms["r1"].item() == 0


@pytest.mark.parametrize(("mean", "still"), [(0.0, True), (0.3, False)])
def test_where_real_and_fake_are_alike_the_discriminator_stays_at_nothing(mean, still):
    """Its gradient at D = 0 is E[fake token] - E[real token]: zero if both have one distribution. Data are
    Normal(mean, 1/4) and the student, at pure noise, makes Normal(0, 1/4)."""
    count = 20000
    models = Trio(Cosine())
    with torch.no_grad():
        models.discriminator.w.zero_()
    x0 = mean + 0.5 * torch.randn(count, DIM, generator=torch.Generator().manual_seed(3))
    sample = Batch(x0, {"pooled": torch.zeros(count, 0)}, {}, Draws.at(5, 0, count))
    LatentAdversarial(student_steps=1).loss("discriminator", sample, models, CLOCK).total.backward()
    # a token's half-sum is -x_u / 2, of variance below 1/4 (1/4 + 1), in two independent views
    bound = 4 * math.sqrt(2 * 0.25 * 1.25 / count)
    assert (models.discriminator.w.grad.abs().max() < bound) == still


def teacher_of(family: str) -> Teacher:
    teacher = as_teacher(tiny.make(family), family)
    return teacher.resize((tiny.LATENT * tiny.FACTOR,) * 2)


def run(family: str, make, method: LatentAdversarial, **options) -> tuple[Models, Teacher]:
    torch.manual_seed(0)
    teacher = teacher_of(family)
    models = make(teacher.denoiser, others=method.networks(teacher), target_decay=0.0, **options)
    if make is lora_models:
        tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    else:
        tiny.awaken(models.student.backbone, 7)
    return models, teacher


def sample_of(teacher: Teacher) -> Batch:
    x0 = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    return Batch(x0, teacher.conditioner.encode(tiny.PROMPTS), {}, Draws.at(0, 0, 2))


@pytest.mark.parametrize("make", [lora_models, full_models])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_each_phases_gradient_reaches_its_role_and_no_other(family, make):
    method = LatentAdversarial(r1_weight=1.0, reconstruction_weight=0.1)
    models, teacher = run(family, make, method)
    for phase, other in (("discriminator", "student"), ("student", "discriminator")):
        with models.only(phase):
            method.loss(phase, sample_of(teacher), models, CLOCK).total.backward()
        reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in models.trained[phase].values()]
        assert sum(reached) > 0.9 * len(reached)
        assert all(p.grad is None for p in models.trained[other].values())
        for p in models.trained[phase].values():
            p.grad = None
    frozen = [p for p in teacher.denoiser.backbone.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [lora_models, full_models])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_students_gradient_is_that_of_two_separate_networks(family, make, checkpointing):
    """One network with a switch, with and without checkpointing, against a student and a teacher that share nothing."""
    method = LatentAdversarial(student_steps=2)
    plain = teacher_of(family).denoiser
    models, teacher = run(family, make, method)
    if checkpointing:
        models.enable_checkpointing()

    class Apart:
        """A student of another run, with the teacher as it was loaded."""

        takes_guidance, schedule, grid = False, plain.schedule, plain.grid
        student, discriminator = run(family, make, method)[0].student, copy.deepcopy(models.discriminator)

        def features(self, x_t, t, cond, blocks):
            return features.read(plain, x_t, t, cond, features.check_blocks(plain.backbone, blocks))

    apart = Apart()
    apart.teacher = apart
    with models.only("student"):
        loss = method.loss("student", sample_of(teacher), models, CLOCK)
        loss.total.backward()
    expected = method.loss("student", sample_of(teacher), apart, CLOCK)
    expected.total.backward()
    assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    theirs = dict(apart.student.backbone.named_parameters())
    scale = max(p.grad.abs().max().item() for p in models.trained["student"].values())
    for name, p in models.trained["student"].items():
        assert (p.grad - theirs[name].grad).abs().max() < 1e-4 * scale, name


def test_the_discriminator_is_as_wide_as_the_blocks_and_the_text():
    discriminator = LatentAdversarial(blocks=("down_blocks.0.resnets.0", "mid_block.attentions.0")).networks(
        teacher_of("sd")
    )["discriminator"]
    widths = [head.first.conv.in_channels for head in discriminator.heads.heads]
    assert widths == [8, 16] and discriminator.heads.heads[0].projection[0].in_features == 8 + 16


def test_a_network_that_is_told_its_guidance_is_told_it_as_student_and_as_teacher(monkeypatch):
    scales = []
    method = LatentAdversarial(guidance=3.5)
    teacher = as_teacher(tiny.flux(), "flux").resize((tiny.LATENT * 8,) * 2)
    models = lora_models(teacher.denoiser, others=method.networks(teacher), target_decay=0.0)
    forward = teacher.denoiser.backbone.forward
    monkeypatch.setattr(teacher.denoiser.backbone, "forward", lambda **k: scales.append(k["guidance"]) or forward(**k))
    for phase in method.phases(CLOCK):
        method.loss(phase, sample_of(teacher), models, CLOCK)
    assert [len(w) for w in scales] == [2, 4, 2, 2] and all((w == 3.5).all() for w in scales)
    assert method.guidance_scale(models.student) == 3.5


def test_in_half_precision_the_losses_are_float32_and_near_those_of_float32():
    method = LatentAdversarial(student_steps=1)
    losses = []
    for dtype in (None, torch.bfloat16):
        models, teacher = run("sd3", lora_models, method, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            losses.append([method.loss(p, sample_of(teacher), models, CLOCK).total for p in method.phases(CLOCK)])
    assert {loss.dtype for pair in losses for loss in pair} == {torch.float32}
    for exact, half in zip(*losses, strict=True):
        assert half.item() == pytest.approx(exact.item(), abs=0.02)


def test_a_block_that_is_not_there_is_refused_before_the_data_are_encoded():
    config = dataclasses.replace(LADDConfig(), blocks=("transformer_blocks.9",))
    with pytest.raises(InputError, match=r"blocks: got 'transformer_blocks.9', not in this UNet2DCondition"):
        config.check_teacher(teacher_of("sd"))


def test_a_teacher_that_says_nothing_at_pure_noise_is_refused():
    pipe = tiny.sd()
    pipe.scheduler = tiny.scheduler("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="predicts eps on a schedule that ends in pure noise"):
        LADDConfig().check_teacher(as_teacher(pipe, "sd"))


def test_the_discriminators_optimizer_has_settings_of_its_own():
    config = LADDConfig(learning_rate=1e-5, discriminator_learning_rate=1e-3, discriminator_betas=(0.1, 0.2))
    assert (config.of("discriminator").learning_rate, config.of("discriminator").adam_betas) == (1e-3, (0.1, 0.2))
    assert config.of("student") is config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_std": 0.0}, "logit_std: got 0; allowed: above 0"),
        ({"logit_mean": math.nan}, "logit_mean: got nan"),
        ({"r1_weight": -1.0}, "r1_weight: got -1; allowed: 0 or more"),
        ({"r1_size": 0.0}, "r1_size: got 0"),
        ({"reconstruction_weight": math.inf}, "reconstruction_weight: got inf"),
        ({"adversarial_loss": "l2"}, "adversarial_loss: got 'l2'; allowed: hinge, softplus, bce"),
        ({"guidance": 0.5}, "guidance: got 0.5; allowed: 1 or more"),
        ({"student_steps": 0}, "student_steps: got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        LatentAdversarial(**settings)


def test_it_is_found_by_name():
    assert get("ladd") is LatentAdversarial and isinstance(Discriminator([16], 4), nn.Module)
