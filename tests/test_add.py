"""ADD: losses against hand computations, which loss trains which role, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from oracle import schedules
from test_trainer import ACCELERATE, environment, in_two_processes
from torch import nn

from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.load import as_teacher, load_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods import adversarial, get
from stepdistill.methods.adversarial import Adversarial, Decoder, Discriminator, distillation_weight
from stepdistill.methods.augmentation import augment, coloured, cutout, translated
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.feature_networks import from_vit
from stepdistill.timegrid import Grid
from stepdistill.training.add import ADDConfig
from stepdistill.training.roles import Models

CLOCK = Clock(0, 1)
SCRIPT = Path(__file__).parent.parent / "train_scripts" / "train_add.py"
PLAIN = {
    "feature_network": "efficientnet_lite2", "guidance": 1.0, "augmentation": 0.0, "condition_on_image": False,
    "distillation_weight": 2.5,
}  # fmt: skip


class Affine(Denoiser):
    """x0 = weight x_t + label."""

    def __init__(self, schedule, weight: float) -> None:
        super().__init__(None, schedule, "x0")
        self.sample_shape = (2,)
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.given: list[torch.Tensor] = []

    def raw(self, x_t, t, cond=None, *, t_end=None):
        self.given.append(torch.as_tensor(t))
        return self.weight * x_t + cond["labels"][:, None].to(x_t)


class Gain(nn.Module):
    """A decoder whose images are twice the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return self.gain * x


class LinearTrunk(nn.Module):
    """Points (B, D) as two maps of D tokens, (x, x + 1) and (3 x,), and an embedding (x, -x, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        x = self.scale * x
        embedding = torch.cat([x, -x, torch.ones_like(x[:, :1])], 1)
        return [torch.stack([x, x + 1], 2), 3 * x[..., None]], embedding


class LinearHeads(nn.Module):
    """Logits w · token + v · condition."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5]).double()])
        self.v = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, maps, condition):
        about = self.v * condition.sum(1, keepdim=True)
        return [tokens @ w + about for tokens, w in zip(maps, self.w, strict=True)]


class Judge(Discriminator):
    """The real discriminator on linear heads."""

    def __init__(self) -> None:
        super().__init__([2, 1])
        self.heads, self.conditions = LinearHeads(), []

    def forward(self, maps, condition, penalised=0):
        self.conditions.append(condition)
        return super().forward(maps, condition, penalised)


class Cast:
    """All roles, with requires_grad set on every parameter."""

    def __init__(self, schedule) -> None:
        self.teacher, self.student = Affine(schedule, 0.8), Affine(schedule, 0.5)
        self.discriminator, self.trunk, self.decoder = Judge(), LinearTrunk(), Gain()

    def touched(self) -> set[str]:
        return {role for role, module in vars(self).items() if any(p.grad is not None for p in module.parameters())}


def batch(n: int = 6, dim: int = 2, seed: int = 0) -> Batch:
    x0 = torch.randn(n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cond = {"labels": torch.full((n,), 0.3), "pooled": torch.arange(2.0 * n).view(n, 2) / 10}
    return Batch(x0, cond, {"labels": torch.zeros(n), "pooled": torch.zeros(n, 2)}, Draws.at(seed, 0, n))


def student_input(method: Adversarial, schedule, sample: Batch) -> tuple[torch.Tensor, list[float]]:
    """x_t computed by hand, and its times."""
    times = method.times(schedule, Grid()).tolist()
    index = [min(len(times) - 1, int(float(u) * len(times))) for u in sample.draws.uniform()]
    eps, rows = sample.draws.normal(2).double(), []
    for i, k in enumerate(index):
        alpha, sigma = (c.item() for c in schedule.coeffs(times[k]))
        rows.append(math.hypot(alpha, sigma) * eps[i] if k == 0 else alpha * sample.x0[i] + sigma * eps[i])
    return torch.stack(rows), [times[k] for k in index]


def logits(x: torch.Tensor, about: torch.Tensor) -> list[torch.Tensor]:
    """The discriminator's logits of images x (B, D), computed by hand."""
    return [0.7 * x - 0.4 * (x + 1) + 0.1 * about, 0.5 * 3 * x + 0.1 * about]


def shaded(x: torch.Tensor, draws: Draws | None, share: float) -> torch.Tensor:
    """In place of `augment`: the identity at 0, and x / 2 + 0.1 at 1."""
    return (1 - 0.5 * share) * x + 0.1 * share


ALL = schedules()
SHADES = pytest.mark.parametrize("share", [0.0, 1.0], ids=["plain", "augmented"])


@SHADES
@pytest.mark.parametrize("name", ALL)
def test_the_discriminators_loss_equals_a_hand_computation(name, share, monkeypatch):
    monkeypatch.setattr(adversarial, "augment", shaded)
    schedule, method = ALL[name], Adversarial(**PLAIN | {"augmentation": share}, r1_weight=0.5)
    loss = method.loss("discriminator", batch(), Cast(schedule), CLOCK)
    sample = batch()
    x_t, _ = student_input(method, schedule, sample)
    about = sample.cond["pooled"].double().sum(1, keepdim=True)
    real, fake = (logits(shaded(2 * x0, None, share), about) for x0 in (sample.x0, 0.5 * x_t + 0.3))
    hinge = [(1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean() for r, f in zip(real, fake, strict=True)]
    # D is the sum over two tokens, so d D / d token is w at each: two tokens of |w|²
    r1 = (2 * (0.7**2 + 0.4**2) + 2 * 0.5**2) / 2
    assert loss.terms["discriminator"].item() == pytest.approx(sum(hinge).item() / 2, rel=1e-5)
    assert loss.terms["r1"].item() == pytest.approx(r1, rel=1e-6)
    assert loss.total.item() == pytest.approx(sum(hinge).item() / 2 + 0.5 * r1, rel=1e-5)


@SHADES
@pytest.mark.parametrize("space", ["pixels", "latents"])
@pytest.mark.parametrize("name", ALL)
def test_the_students_loss_equals_a_hand_computation(name, space, share, monkeypatch):
    """The discriminator alone sees augmented images: the distillation is of the student's own."""
    monkeypatch.setattr(adversarial, "augment", shaded)
    schedule = ALL[name]
    method = Adversarial(**PLAIN | {"guidance": 3.0, "augmentation": share}, distillation_space=space)
    loss = method.loss("student", batch(), Cast(schedule), CLOCK)
    sample = batch()
    x_t, _ = student_input(method, schedule, sample)
    x0 = 0.5 * x_t + 0.3
    about = sample.cond["pooled"].double().sum(1, keepdim=True)
    adversarial_part = -sum(d.mean() for d in logits(shaded(2 * x0, None, share), about)).item() / 2
    grid = adversarial.inference_times(schedule, 1000)[:-1].tolist()
    index, eps, total = sample.draws.integers(1000), sample.draws.normal(2).double(), 0.0
    for i, k in enumerate(index.tolist()):
        alpha, sigma = (c.item() for c in schedule.coeffs(grid[k]))
        teacher_x0 = 0.8 * (alpha * x0[i] + sigma * eps[i]) + 3.0 * 0.3
        gain = 2 if space == "pixels" else 1
        total += alpha / math.hypot(alpha, sigma) * (gain * (x0[i] - teacher_x0)).square().sum().item()
    assert loss.terms["adversarial"].item() == pytest.approx(adversarial_part, rel=1e-5, abs=1e-6)
    assert loss.terms["distillation"].item() == pytest.approx(total / 12, rel=1e-5)
    assert loss.total.item() == pytest.approx(adversarial_part + 2.5 * total / 12, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("weighting", ["exponential", "uniform", "sds"])
@pytest.mark.parametrize("name", ALL)
def test_there_is_nothing_to_distil_where_the_student_says_what_the_teacher_says(name, weighting):
    cast = Cast(ALL[name])
    for denoiser in (cast.teacher, cast.student):
        nn.init.zeros_(denoiser.weight)  # a constant x0
    method = Adversarial(**PLAIN, distillation_weighting=weighting)
    assert method.loss("student", batch(), cast, CLOCK).terms["distillation"].item() == 0


@pytest.mark.parametrize(
    ("name", "judged", "fooled"), [("hinge", 2.0, 0.0), ("softplus", 2 * math.log(2), math.log(2))]
)
def test_the_losses_at_the_fixed_point_are_known(name, judged, fooled):
    """The student predicts what the teacher does, and a discriminator without an opinion cannot tell it from data."""
    cast = Cast(ALL["cosine"])
    for module in (cast.teacher, cast.student):
        nn.init.zeros_(module.weight)
    for weight in cast.discriminator.parameters():
        nn.init.zeros_(weight)
    method = Adversarial(**PLAIN, adversarial_loss=name, r1_weight=1.0)
    first, second = (method.loss(phase, batch(), cast, CLOCK) for phase in method.phases(CLOCK))
    assert first.total.item() == pytest.approx(judged) and second.total.item() == pytest.approx(fooled)
    assert first.terms["r1"].item() == 0


def test_sds_weights_give_the_gradient_of_score_distillation():
    """2 c (x0_hat - x0) is sigma² (eps_teacher - eps'), as x0_hat - x0 is sigma / alpha of that difference."""
    schedule = ALL["alpha_bar"]
    u = torch.tensor([10.0, 400.0, 990.0])
    alpha, sigma = schedule.coeffs(u)
    slope = 2 * distillation_weight("sds", u, schedule) * sigma / alpha
    torch.testing.assert_close(slope, sigma**2)
    torch.testing.assert_close(distillation_weight("exponential", u, schedule), alpha)


def test_no_gradient_passes_the_teacher_or_what_it_is_given():
    """The distillation's gradient is 2 c (x0_hat - teacher_x0), as if the second were a constant."""
    method = Adversarial(**PLAIN, distillation_weighting="uniform", distillation_space="latents")
    cast, sample = Cast(ALL["flow"]), batch()
    x_t, _ = student_input(method, ALL["flow"], sample)
    student_x0 = (0.5 * x_t + 0.3).requires_grad_(True)
    again = batch()
    term = method._distillation(again, cast, student_x0, student_x0)
    (slope,) = torch.autograd.grad(term, student_x0)
    again = batch()
    u = adversarial.inference_times(ALL["flow"], 1000)[again.draws.integers(1000)]
    x_u = ALL["flow"].add_noise(student_x0.detach(), again.draws.normal(2).double(), u)
    torch.testing.assert_close(slope, 2 * (student_x0 - 0.8 * x_u - 0.3).detach() / 12, rtol=1e-5, atol=1e-7)
    assert cast.touched() == set()


def test_the_discriminators_gradient_reaches_nothing_else_and_the_students_neither():
    cast = Cast(ALL["cosine"])
    Adversarial(**PLAIN).loss("discriminator", batch(), cast, CLOCK).total.backward()
    assert cast.touched() == {"discriminator"}
    cast = Cast(ALL["cosine"])
    for frozen in (cast.trunk, cast.decoder):
        frozen.requires_grad_(False)
    others = {"discriminator": cast.discriminator, "trunk": cast.trunk, "decoder": cast.decoder}
    cast.student.backbone = nn.ParameterList([cast.student.weight])
    models = Models(cast.teacher, cast.student, others=others, target_decay=0.0)
    assert models.trained.keys() == {"student", "discriminator"}
    with models.only("student"):
        Adversarial(**PLAIN).loss("student", batch(), models, CLOCK).total.backward()
    assert cast.touched() == {"student"}


@pytest.mark.parametrize("name", ALL)
def test_the_embedding_of_the_real_picture_is_zero_where_the_student_saw_only_noise(name):
    schedule, method = ALL[name], Adversarial(**PLAIN | {"condition_on_image": True})
    for phase in method.phases(CLOCK):
        cast, sample = Cast(schedule), batch(64)
        method.loss(phase, sample, cast, CLOCK)
        noisiest = cast.student.given[0] >= method.times(schedule, Denoiser.grid)[0]
        condition = cast.discriminator.conditions[0][:64]
        x = 2 * sample.x0
        embedding = torch.cat([x, -x, torch.ones_like(x[:, :1])], 1)
        embedding = (embedding - embedding.mean(1, keepdim=True)) / (embedding.var(1, False, True) + 1e-5).sqrt()
        assert 0 < noisiest.sum() < 64
        torch.testing.assert_close(condition[:, 2:], embedding * ~noisiest[:, None])
        torch.testing.assert_close(condition[:, :2], sample.cond["pooled"].double())


@pytest.mark.parametrize("steps", [1, 4, 40])
@pytest.mark.parametrize("name", ALL)
def test_the_student_is_never_asked_at_the_clean_end(name, steps):
    schedule, method = ALL[name], Adversarial(**PLAIN, student_steps=steps)
    cast = Cast(schedule)
    method.loss("discriminator", batch(256), cast, CLOCK)
    assert cast.student.given[0].min() > max(schedule.t_min, 0)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixel"])
def test_the_heads_are_told_pooled_text_and_an_embedding_and_nothing_else_is_trained(monkeypatch, kind):
    monkeypatch.setattr(adversarial, "load_feature_network", lambda *_: tiny_trunk())
    teacher = as_teacher(tiny.make(kind), "tiny")
    made = Adversarial(feature_network="dino_vits16").networks(teacher)
    cond = teacher.conditioner.encode(["0"])
    width = cond["pooled"].shape[1] if "pooled" in cond else cond["text"].shape[2] if "text" in cond else 0
    assert {head.projection[0].in_features for head in made["discriminator"].heads.heads} == {width + 24}
    assert not any(p.requires_grad for role in ("trunk", "decoder") for p in made[role].parameters())
    latents = torch.randn(1, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    painted = made["decoder"](latents)
    assert torch.equal(painted, teacher.decode(latents))
    (slope,) = torch.autograd.grad(painted.square().mean(), latents)
    again = Decoder(teacher, recompute=True)(latents).square().mean()
    assert slope.abs().min() > 0 and torch.equal(torch.autograd.grad(again, latents)[0], slope)


def test_images_are_decoded_again_one_by_one_in_the_backward():
    """The activations of one image are held at a time; the gradient is that of the whole batch."""
    teacher, sizes = as_teacher(tiny.sd(), "tiny"), []
    latents = torch.randn(3, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    (slope,) = torch.autograd.grad(Decoder(teacher)(latents).square().sum(), latents)
    decoder = Decoder(teacher, recompute=True)
    total = decoder(latents).square().sum()
    teacher.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    (again,) = torch.autograd.grad(total, latents)
    assert sizes == [1, 1, 1]
    assert (again - slope).abs().max() < 1e-5 * slope.abs().max()


def test_real_images_are_decoded_and_embedded_once_for_both_phases(monkeypatch):
    method, cast = Adversarial(**PLAIN | {"condition_on_image": True, "guidance": 1.0}), Cast(ALL["alpha_bar"])
    decoded, seen, sample = [], [], batch()
    own, trunk = cast.decoder, cast.trunk
    cast.decoder = lambda latents: decoded.append(latents is sample.x0) or own(latents)
    cast.trunk = lambda pictures: seen.append(len(pictures)) or trunk(pictures)
    for phase in ("discriminator", "student"):
        method.loss(phase, sample, cast, CLOCK)
    assert decoded.count(True) == 1
    size = len(sample.x0)
    assert seen == [size, 2 * size, size]  # the real images' embedding; real and generated; generated


def tiny_trunk():
    import timm

    torch.manual_seed(3)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return from_vit(timm.create_model("vit_small_patch16_224.dino", pretrained=False, **sizes), "tiny")


def test_an_autoencoder_that_half_overflows_is_kept_in_float32_so_that_gradients_pass():
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.half()
    teacher = as_teacher(pipe, "tiny")
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    Decoder(teacher)(latents).mean().backward()
    assert teacher.vae.dtype == torch.float32 and latents.grad.abs().max() > 0


def photos(n: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_augmentation_is_the_identity_at_probability_0_and_draws_nothing():
    draws, untouched = Draws.at(0, 0, 4), Draws.at(0, 0, 4)
    x = photos()
    assert augment(x, draws, 0.0) is x
    assert torch.equal(draws.uniform(), untouched.uniform())


def test_augmentation_belongs_to_the_sample_and_changes_the_share_asked_for():
    x = photos(400, 8)
    whole = augment(x, Draws.at(0, 0, 400), 0.5)
    assert torch.equal(whole[100:], augment(x[100:], Draws.at(0, 100, 300), 0.5))
    changed = (whole != x).flatten(1).any(1).double().mean().item()
    assert abs(changed - 0.5) < 4 * math.sqrt(0.25 / 400)


def test_augmentation_is_differentiable():
    x = photos(2, 6).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: augment(x, Draws.at(0, 0, 2), 1.0), (x,))


def test_colour_is_zhaos_brightness_saturation_and_contrast():
    x, draws = photos(), Draws.at(0, 0, 4)
    got = coloured(x, draws)
    draws = Draws.at(0, 0, 4)
    b, s, c = (draws.uniform().double() for _ in range(3))
    for i in range(4):
        y = x[i] + b[i] - 0.5
        y = y.mean(0) + 2 * s[i] * (y - y.mean(0))
        y = y.mean() + (c[i] + 0.5) * (y - y.mean())
        torch.testing.assert_close(got[i], y, rtol=1e-6, atol=1e-7)


def test_translation_moves_by_at_most_an_eighth_and_brings_in_zeros():
    x = photos(64)
    moved, offsets = translated(x, Draws.at(0, 0, 64)), set()
    for before, after in zip(x, moved, strict=True):
        found = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                there = torch.zeros(3, 20, 20, dtype=torch.float64)
                there[:, 2 + dy : 18 + dy, 2 + dx : 18 + dx] = before
                found += [(dy, dx)] if torch.equal(there[:, 2:18, 2:18], after) else []
        assert len(found) == 1
        offsets |= set(found)
    assert {dy for dy, _ in offsets} == {dx for _, dx in offsets} == {-2, -1, 0, 1, 2}


def test_cutout_is_a_square_of_half_the_side_which_may_hang_over_the_edge():
    holes = (cutout(torch.ones(256, 1, 16, 16), Draws.at(0, 0, 256)) == 0)[:, 0]
    for hole in holes:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])
        assert 4 <= rows.sum() <= 8 and 4 <= columns.sum() <= 8
        assert rows.diff().sum() <= 2
    assert holes.any(0).all() and (holes.sum((1, 2)) == 64).any()


def config(settings, **more) -> ADDConfig:
    """A short run on a tiny pipeline."""
    own = {"teacher": settings.teacher, "data": settings.data, "out": settings.out, "batch_size": 2, "rank": 2}
    own |= {"max_train_steps": 6, "checkpoint_every": 3, "log_every": 1, "learning_rate": 1e-3, "guidance": 2.0}
    return ADDConfig(**own | {"discriminator_learning_rate": 1e-3} | more)


@pytest.fixture
def small_trunk(monkeypatch):
    """Replaces every feature network by a tiny one with random weights."""
    monkeypatch.setattr(adversarial, "load_feature_network", lambda *_: tiny_trunk())


def trainer(config: ADDConfig):
    from stepdistill.data.cache import open_data
    from stepdistill.training.trainer import Trainer

    teacher = load_teacher(config.teacher)
    return Trainer(config.method(), teacher, open_data(config.data, teacher), config)


def test_a_run_cut_and_resumed_ends_with_the_same_bits_in_every_role(settings, small_trunk):
    whole = trainer(config(settings, out=settings.out / "whole", validate_every=2))
    whole.fit()
    cut = config(settings, out=settings.out / "cut")
    first = trainer(cut)
    for _ in range(3):
        first.step()
    first._save()
    again = trainer(cut)
    again.fit()
    for role in ("student", "discriminator"):
        a, b = whole.models.trained[role], again.models.trained[role]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        old, new = (run.optimizers[role].state_dict()["state"] for run in (whole, again))
        assert all(torch.equal(old[k]["exp_avg_sq"], new[k]["exp_avg_sq"]) for k in old)
    kept, loaded = (dict(run.models.others["discriminator"].named_buffers()) for run in (whole, again))
    assert any(name.endswith("_u") for name in kept)
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)
    assert whole.optimizers["discriminator"].param_groups[0]["betas"] == (0.0, 0.999)


def test_the_feature_network_is_named_in_the_exports_card_and_configuration(settings, small_trunk):
    run = trainer(config(settings, max_train_steps=1))
    export = run.fit()
    identity = run.models.trunk.identity
    assert json.loads((export / "config.json").read_text())["feature_weights"] == identity
    assert f"| feature_weights | {identity} |" in (export / "README.md").read_text()


SMOOTH = """
import sys
sys.path[:0] = [{tests!r}, {scripts!r}]
from test_add import tiny_trunk
from stepdistill.methods import adversarial, feature_networks
adversarial.load_feature_network = feature_networks.load_feature_network = lambda *_: tiny_trunk()
from train_add import main
main()
"""


@pytest.mark.parametrize("student", [["--rank", "2"], ["--no-lora"]], ids=["lora", "full"])
def test_two_processes_log_the_losses_of_one_at_the_same_global_batch(tmp_path, pipelines, pictures, student):
    """Uses a feature network without kinks: in EfficientNet-Lite2 the last bit of an image can switch a ReLU6, which
    changes the gradient by a hundredth. Adam's epsilon is raised: see test_trainer."""
    script = tmp_path / "smooth.py"
    script.write_text(SMOOTH.format(tests=str(Path(__file__).parent), scripts=str(SCRIPT.parent)))
    words = [sys.executable, str(script), "--teacher", pipelines["sd"], "--data", pictures, "--guidance", "2"]
    words += [*student, "--max-train-steps", "10", "--log-every", "1", "--adam-epsilon", "1e-3"]
    words += ["--learning-rate", "1e-3", "--discriminator-learning-rate", "1e-3"]
    in_two_processes([*words, "--out", str(tmp_path / "two"), "--batch-size", "2"], by=ACCELERATE)
    one = [*words, "--out", str(tmp_path / "one"), "--batch-size", "4"]
    subprocess.run(one, env=environment(), check=True, capture_output=True)
    logs = []
    for name in ("one", "two"):
        logs.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert len(logs[0]) == len(logs[1]) == 10
    for a, b in zip(*logs, strict=True):
        for term in ("discriminator", "r1", "adversarial", "distillation"):
            assert b[term] == pytest.approx(a[term], rel=1e-5), (a["update"], term)


def test_the_optimizers_have_their_own_settings():
    flags = ADDConfig(learning_rate=2e-5, discriminator_learning_rate=3e-4, discriminator_betas=(0.1, 0.9))
    assert (flags.of("student").learning_rate, flags.of("student").adam_betas) == (2e-5, (0.9, 0.999))
    assert (flags.of("discriminator").learning_rate, flags.of("discriminator").adam_betas) == (3e-4, (0.1, 0.9))


def test_flags_become_the_method_of_the_same_names():
    flags = ADDConfig(guidance=3.0, student_steps=2, feature_network="dinov2_vits14", gradient_checkpointing=True)
    method = flags.method()
    shared = {f.name for f in dataclasses.fields(method)} & {f.name for f in dataclasses.fields(flags)}
    assert all(getattr(method, name) == getattr(flags, name) for name in shared)
    assert {f.name for f in dataclasses.fields(method)} - shared == {"recompute"}
    assert method.recompute and get("add") is Adversarial


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_network": "vgg"}, "feature_network: got 'vgg'; allowed: efficientnet_lite2"),
        ({"adversarial_loss": "l2"}, "adversarial_loss: got 'l2'; allowed: hinge, softplus, bce"),
        ({"r1_weight": -1.0}, "r1_weight: got -1; allowed: 0 or more"),
        ({"distillation_weight": math.inf}, "distillation_weight: got inf"),
        ({"distillation_weighting": "snr"}, "distillation_weighting: got 'snr'; allowed: exponential, uniform, sds"),
        ({"distillation_space": "rgb"}, "distillation_space: got 'rgb'; allowed: pixels, latents"),
        ({"guidance": 0.5}, "guidance: got 0.5; allowed: 1 or more"),
        ({"augmentation": 1.5}, "augmentation: got 1.5; allowed: 0 to 1"),
        ({"student_steps": 0}, "student_steps: got 0; allowed: 1 to 40"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Adversarial(**settings)


def test_what_cannot_be_distilled_is_refused_before_data_are_encoded(monkeypatch):
    monkeypatch.setattr("stepdistill.methods.feature_networks.load_feature_network", lambda *_: None)
    pixel = as_teacher(tiny.pixel(), "tiny")
    with pytest.raises(InputError, match="guidance: got 4 with tiny, a pixel model without text; allowed: 1"):
        ADDConfig().check_teacher(pixel)
    ADDConfig(guidance=1.0).check_teacher(pixel)
    zero = tiny.sd()
    zero.scheduler = tiny.scheduler("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="teacher: got tiny, which predicts eps on a schedule that ends in pure noise"):
        ADDConfig().check_teacher(as_teacher(zero, "tiny"))


def test_a_feature_network_that_cannot_be_had_is_one_line_and_exit_2(tmp_path, pipelines, pictures):
    words = [
        sys.executable,
        str(SCRIPT),
        "--teacher",
        pipelines["sd"],
        "--data",
        pictures,
        "--out",
        str(tmp_path / "run"),
    ]
    nowhere = environment() | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_CACHE": str(tmp_path / "empty")}
    done = subprocess.run(words, env=nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: feature_network: got dino_vits16, whose weights could not be loaded")
    assert not (tmp_path / "run").exists()
