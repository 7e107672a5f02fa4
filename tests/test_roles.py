"""Teacher, student and target on one copy of the weights: which weights each uses, and where gradients flow."""

from __future__ import annotations

import copy
import re

import pytest
import tiny
import torch
from torch import nn

from stepdistill.denoiser.load import Teacher, as_teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.consistency import LatentConsistency
from stepdistill.training import lora
from stepdistill.training.adapter import LORA_TARGETS, adapter_layers, adapter_like
from stepdistill.training.averages import Averages
from stepdistill.training.networks import trainable
from stepdistill.training.roles import Models, check_embeds_guidance, full_models, lora_models

T = torch.tensor([19.0, 999.0])


def teacher_of(family: str) -> Teacher:
    return as_teacher(tiny.MAKERS[family](), family)


def cond_of(teacher: Teacher) -> dict[str, torch.Tensor]:
    return teacher.conditioner.encode(tiny.PROMPTS)


def noise(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def stirred(family: str = "sd", **options) -> tuple[Teacher, Models]:
    """A LoRA student with a non-zero adapter, and a target far from it."""
    teacher = teacher_of(family)
    models = lora_models(teacher.denoiser, **({"rank": 4} | options))
    tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    if models.averages:
        generator = torch.Generator().manual_seed(9)
        for value in models.averages.values.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return teacher, models


def test_the_teacher_is_what_it_was_before_bit_for_bit(family):
    teacher = teacher_of(family)
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        before = teacher.denoiser(x, T, cond, kind="eps")
    models = lora_models(teacher.denoiser, rank=4)
    tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    assert torch.equal(models.teacher(x, T, cond, kind="eps"), before)
    with torch.no_grad():
        assert not torch.allclose(models.student(x, T, cond, kind="eps"), before, atol=1e-2)


def test_a_fresh_student_is_its_teacher(family):
    teacher = teacher_of(family)
    models = lora_models(teacher.denoiser, rank=4)
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        assert (models.student(x, T, cond) - models.teacher(x, T, cond)).abs().max() < 1e-4


def test_there_is_one_copy_of_the_base_weights():
    teacher, models = stirred()
    base = {p.data_ptr() for p in teacher.denoiser.backbone.parameters() if not p.requires_grad}
    for view in (models.teacher, models.target):
        assert {p.data_ptr() for p in view._denoiser.backbone.parameters() if not p.requires_grad} == base


def test_the_target_is_the_network_with_averaged_weights(family):
    teacher, models = stirred(family)
    cond, x = cond_of(teacher), noise()
    target = models.target(x, T, cond)
    with torch.no_grad():
        student = models.student(x, T, cond)
        for name, p in models.trained["student"].items():
            p.copy_(models.averages.values[name])
        assert torch.equal(models.student(x, T, cond), target)
    assert not torch.allclose(student, target, atol=1e-2)


def test_views_leave_gradients_modes_and_weights_as_they_were():
    teacher, models = stirred()
    backbone = teacher.denoiser.backbone
    flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
    weights = {name: p.detach().clone() for name, p in models.trained["student"].items()}
    cond, x = cond_of(teacher), noise()
    models.teacher(x, T, cond)
    models.target(x, T, cond)
    for view in (models.teacher, models.target):
        with pytest.raises(RuntimeError):
            view(x[:, :3], T, cond)  # a call that fails restores everything as well
    assert {name: p.requires_grad for name, p in backbone.named_parameters()} == flags
    assert sorted(n for n, on in flags.items() if on) == sorted(weights)
    assert all(".lora_" in name for name in weights)
    assert all(torch.equal(p, weights[name]) for name, p in models.trained["student"].items())
    assert models._switch == lora.Switch(on=True, dropout=True)


def test_gradients_reach_the_adapter_and_nothing_else():
    teacher, models = stirred()
    models.student(noise(), T, cond_of(teacher)).square().mean().backward()
    for name, p in teacher.denoiser.backbone.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (".lora_" in name), name


def test_a_phase_trains_its_role_and_no_other():
    teacher = teacher_of("sd")
    critic = nn.Linear(4 * 8 * 8, 1)
    models = lora_models(teacher.denoiser, rank=4)
    models = Models(teacher.denoiser, teacher.denoiser, others={"critic": critic})
    cond, x = cond_of(teacher), noise()
    for phase, trained in (("student", models.trained["student"]), ("critic", models.trained["critic"])):
        with models.only(phase):
            models.critic(models.student(x, T, cond).flatten(1)).sum().backward()
        everything = {id(p) for group in models.trained.values() for p in group.values() if p.grad is not None}
        assert everything == {id(p) for p in trained.values()}
        for group in models.trained.values():
            for p in group.values():
                assert p.requires_grad
                p.grad = None
    with pytest.raises(AttributeError, match="got role 'judge'; allowed: teacher, student, target, critic"):
        _ = models.judge


def test_averages_follow_their_formula():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    averages = Averages({"p": p}, 0.9)
    with torch.no_grad():
        p.copy_(torch.tensor([2.0, 0.0]))
    averages.update()
    assert torch.allclose(averages.values["p"], torch.tensor([1.1, 1.8]))
    with averages.in_place():
        assert torch.allclose(p, torch.tensor([1.1, 1.8]))
    assert torch.equal(p.detach(), torch.tensor([2.0, 0.0]))


def test_without_an_average_the_target_is_the_student():
    teacher, models = stirred(target_decay=0.0)
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        assert torch.equal(models.target(x, T, cond), models.student(x, T, cond))
    assert not models.target(x, T, cond).requires_grad


def test_what_is_shown_and_exported_can_be_an_average_of_its_own():
    teacher, models = stirred(export_decay=0.5)
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        student = models.student(x, T, cond)
    models.after_update()
    with models.shown() as shown:
        assert not torch.allclose(shown(x, T, cond), student, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(models.student(x, T, cond), student)


def test_dropout_is_the_students_alone():
    teacher, models = stirred(dropout=0.5, target_decay=0.0)
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        assert not torch.equal(models.student(x, T, cond), models.student(x, T, cond))
        assert torch.equal(models.target(x, T, cond), models.target(x, T, cond))
        with models.shown() as shown:
            assert torch.equal(shown(x, T, cond), models.target(x, T, cond))


# ---------------------------------------------------------------------------------------------------- the lean forward


@pytest.mark.parametrize("path", ["side", "fold"])
def test_the_lean_forward_is_pefts_sum_with_pefts_gradients(family, path, monkeypatch):
    monkeypatch.setattr(lora, "fold_pays", lambda *_: path == "fold")
    teacher, models = stirred(family, alpha=6.0)
    cond, x = cond_of(teacher), noise()
    layers = adapter_layers(teacher.denoiser.backbone)
    assert all("forward" in vars(layer) for layer in layers)

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        with torch.no_grad():
            silent = models.student(x, T, cond, kind="eps")
        loud = models.student(x, T, cond, kind="eps")
        loud.square().mean().backward()
        grads = [p.grad for p in models.trained["student"].values()]
        for p in models.trained["student"].values():
            p.grad = None
        return silent, loud.detach(), grads

    lean = run()
    for layer in layers:
        del layer.forward
    plain = run()
    for ours, theirs in ((lean[0], plain[0]), (lean[1], plain[1]), *zip(lean[2], plain[2], strict=True)):
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("conv", [None, ((2, 2), (1, 1), (1, 1)), ((1, 1), (0, 0), (1, 1))])
def test_folded_gradients_are_those_of_finite_differences(conv):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    if conv is not None:
        k = 3 if conv[1] == (1, 1) else 1
        shapes = [(2, 3, 5, 5), (4, 3, k, k), (4,), (2, 3, k, k), (4, 2, 1, 1)]
    x, weight, bias, down, up = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    free = [v.requires_grad_() for v in (x, down, up)]
    assert torch.autograd.gradcheck(lambda x, down, up: lora.Fold.apply(x, weight, bias, down, up, 1.5, conv), free)


def test_folding_pays_without_gradients_and_with_many_positions_only():
    assert lora.fold_pays(16 * 4096, 320, 320, 64, gradient=False)
    assert lora.fold_pays(16 * 256, 9 * 64, 64, 64, gradient=True)
    assert not lora.fold_pays(16, 320, 1280, 64, gradient=False)  # a time embedding: one position per sample
    assert not lora.fold_pays(16 * 64, 9 * 1280, 1280, 16, gradient=True)


def test_half_precision_never_folds(monkeypatch):
    """A bfloat16 sum of weight and adapter would lose the adapter's lower bits."""
    monkeypatch.setattr(lora, "fold_pays", lambda *_: pytest.fail("folded"))
    teacher, models = stirred(dtype=torch.bfloat16)
    cond = cond_of(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        models.target(noise(), T, cond)
        models.student(noise(), T, cond).float().square().mean().backward()


def test_half_precision_keeps_the_adapter_in_float32():
    teacher, models = stirred(dtype=torch.bfloat16)
    dtypes = {(".lora_" in n): p.dtype for n, p in teacher.denoiser.backbone.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in models.averages.values.values())


def test_under_autocast_the_student_has_its_own_weights_and_not_the_targets():
    """autocast caches its casts of weights until it ends: around the whole loss, the student would get the averages
    that were cast for the target."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    teacher, models = stirred()
    cond, uncond = cond_of(teacher), teacher.conditioner.unconditional(2)

    def loss() -> float:
        batch = Batch(noise(5), cond, uncond, Draws.at(0, 0, 2))
        return LatentConsistency().loss("student", batch, models, Clock(0, 1)).total.item()

    exact = loss()
    AcceleratorState._reset_state()
    models.student.backbone = Accelerator(cpu=True, mixed_precision="bf16").prepare(models.student.backbone)
    assert loss() == pytest.approx(exact, rel=0.05)
    AcceleratorState._reset_state()


# -------------------------------------------------------------------------------------------------------- full students


def test_a_full_student_leaves_its_teacher_alone(family):
    teacher = teacher_of(family)
    before = copy.deepcopy(teacher.denoiser.backbone.state_dict())
    models = full_models(teacher.denoiser)
    models.student(noise(), T, cond_of(teacher)).square().mean().backward()
    assert all(p.grad is not None for p in models.trained["student"].values())
    assert len(models.trained["student"]) == len(list(models.student.backbone.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.backbone.parameters())
    after = teacher.denoiser.backbone.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("other", ["sd3", "flux", "pixart", "sana", "pixel"])
def test_a_network_without_an_input_for_guidance_is_refused(other):
    backbone = teacher_of(other).denoiser.backbone
    line = f"embed_guidance: got a teacher with a {type(backbone).__name__}; allowed: UNet2DConditionModel; "
    with pytest.raises(InputError, match=re.escape(line)):
        check_embeds_guidance(backbone)


def test_a_student_told_its_guidance_starts_as_the_teacher_whatever_it_is_told(family):
    teacher = teacher_of(family)
    models = full_models(teacher.denoiser, embed_guidance=True)
    assert models.student.backbone.config.time_cond_proj_dim == 256
    cond, x = cond_of(teacher), noise()
    with torch.no_grad():
        expected = models.teacher(x, T, cond)
        for w in (0.0, 7.5):
            guided = cond | {"guidance": torch.full((2,), w)}
            assert (models.student(x, T, guided) - expected).abs().max() < 1e-4
        nn.init.normal_(models.student.backbone.time_embedding.cond_proj.weight)
        low, high = (models.student(x, T, cond | {"guidance": torch.full((2,), w)}) for w in (0.0, 7.5))
        assert not torch.allclose(low, high, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: got 0; allowed: 1 or more"),
        ({"alpha": 0.0}, "alpha: got 0; allowed: above 0"),
        ({"dropout": 1.0}, "lora_dropout: got 1; allowed: 0 to below 1"),
        ({"target_decay": 1.0}, "target_ema: got 1; allowed: 0"),
        ({"export_decay": -0.1}, "export_ema: got -0.1; allowed: 0"),
        (
            {"target_modules": ("to_q", "to_z")},
            "target modules: got to_z, which match no layer; allowed: .* conv1, conv2",
        ),
        ({"target_modules": ("q_proj",)}, "target modules: got q_proj"),
        ({"target_modules": ()}, "target modules: got none"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        lora_models(teacher_of("sd").denoiser, **({"rank": 2} | settings))


@pytest.mark.parametrize("family", tiny.MAKERS)
def test_an_adapter_is_known_before_it_is_made(family):
    teacher, state = teacher_of(family), torch.get_rng_state()
    known = adapter_like(teacher.denoiser.backbone, 3, LORA_TARGETS)
    assert torch.equal(torch.get_rng_state(), state) and not adapter_layers(teacher.denoiser.backbone)
    assert all(parameter.is_meta for parameter in known.values())
    lora_models(teacher.denoiser, rank=3, target_decay=0.0)
    made = trainable(teacher.denoiser.backbone)
    assert {k: v.shape for k, v in known.items()} == {k: v.shape for k, v in made.items()}


def test_a_teacher_with_an_adapter_is_refused():
    teacher = teacher_of("sd")
    lora_models(teacher.denoiser, rank=2)
    with pytest.raises(InputError, match="carries an adapter already; allowed: a plain one"):
        lora_models(teacher.denoiser, rank=2)
