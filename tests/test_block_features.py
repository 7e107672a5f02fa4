"""What features.read captures of each backbone, against hooks on a plain network, and how gradients pass through it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from stepdistill.denoiser.load import Teacher, as_teacher
from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER
from stepdistill.features import blocks_of, check_blocks, read, tokens
from stepdistill.training.ladd import LADDConfig
from stepdistill.training.roles import full_models, keep_in, lora_models

BLOCKS = {
    "sd": ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0",
           "up_blocks.1.attentions.1"],
    "sdxl": ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0",
             "up_blocks.1.attentions.1"],
    "pixel": ["down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.0",
              "up_blocks.0.attentions.1"],
    "sd3": ["transformer_blocks.0", "transformer_blocks.1"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.0"],
    "pixart": ["transformer_blocks.0", "transformer_blocks.1"],
    "sana": ["transformer_blocks.0", "transformer_blocks.1"],
}  # fmt: skip
PICTURE = {"sd3": 1, "flux": 1}  # index of the image in the pair that an MMDiT block returns; elsewhere it comes first


def teacher_of(family: str) -> Teacher:
    teacher = as_teacher(tiny.MAKERS[family](), family)
    side = tiny.LATENT * teacher.factor
    return teacher.resize((side, side))


def given(teacher: Teacher) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, t and the condition of two samples."""
    x_t = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(3))
    cond = teacher.conditioner.encode(tiny.PROMPTS if teacher.vae is not None else ["0", "0"])
    if teacher.denoiser.takes_guidance:
        cond["guidance"] = torch.full((2,), 3.0)
    schedule = teacher.denoiser.schedule
    return x_t, schedule.time_at(torch.tensor([0.3, -0.7])), cond


def by_plain_hooks(teacher: Teacher, names: list[str], family: str) -> list[Tensor]:
    """What forward hooks on a copy of the network capture, written without `features`."""
    twin = copy.deepcopy(teacher.denoiser)
    heard = {}
    for name in names:
        twin.backbone.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: heard.update({name: o}))
    with torch.no_grad():
        twin.raw(*given(teacher))
    maps = []
    for name in names:
        output = heard[name]
        if isinstance(output, tuple):
            output = output[PICTURE.get(family, 0)]
        if output.ndim == 4:
            output = torch.stack([output[:, :, row, column] for row in range(output.shape[2])
                                  for column in range(output.shape[3])], 1)  # fmt: skip
        maps.append(output)
    return maps


@pytest.mark.parametrize("family", BLOCKS)
def test_features_are_what_a_plain_hook_hears(family):
    teacher = teacher_of(family)
    expected = by_plain_hooks(teacher, BLOCKS[family], family)
    with torch.no_grad():
        got = read(teacher.denoiser, *given(teacher), BLOCKS[family])
    height, width = teacher.sample_shape[1:]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32
        assert (height * width) % ours.shape[1] == 0, "the text's tokens are among them"


@pytest.mark.parametrize("family", BLOCKS)
def test_without_names_it_is_blocks_spread_over_the_depth_in_order(family):
    assert list(check_blocks(teacher_of(family).denoiser.backbone, ())) == BLOCKS[family]


def test_four_of_many_end_with_the_last():
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(24))
    assert check_blocks(network, ()) == tuple(f"transformer_blocks.{i}" for i in (5, 11, 17, 23))


def test_a_unets_blocks_are_in_the_order_they_are_called():
    network = teacher_of("sd").denoiser.backbone
    called = []
    for name in blocks_of(network):
        network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: called.append(name))
    teacher = teacher_of("sd")
    teacher.denoiser.backbone = network
    with torch.no_grad():
        teacher.denoiser.raw(*given(teacher))
    assert called == blocks_of(network)


def test_an_unknown_block_is_one_line_that_names_some():
    network = teacher_of("sd3").denoiser.backbone
    with pytest.raises(InputError) as error:
        check_blocks(network, ("transformer_blocks.1", "blocks.7"))
    assert str(error.value) == (
        "blocks: got 'blocks.7', not in this SD3Transformer2DModel; allowed: names such as transformer_blocks.0, "
        "transformer_blocks.1"
    )
    with pytest.raises(InputError, match=r"blocks: got none for a Linear; allowed: names of its submodules"):
        check_blocks(nn.Linear(1, 1), ())


@pytest.mark.parametrize(
    ("family", "names", "says"),
    [
        ("sd", "down_blocks", "is never called"),
        ("sd", "mid_block.attentions", "is never called"),
        ("sd3", "transformer_blocks", "is never called"),
        ("sd", "time_embedding", "returns 1 tokens of any picture"),
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "returns 16 tokens of any picture"),
        ("sd3", "transformer_blocks.0.ff_context", r"returns \d+ tokens of any picture"),
    ],
)
def test_what_hears_nothing_of_the_picture_is_not_judged_by(family, names, says):
    teacher = teacher_of(family)
    flags = LADDConfig(blocks=(BLOCKS[family][0], names))
    with pytest.raises(InputError, match=rf"blocks: got {names}, which {says}; allowed: .* such as \w+"):
        flags.check_teacher(teacher)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])  # as a run in bfloat16 loads the network
@pytest.mark.parametrize("family", BLOCKS)
def test_every_block_that_is_known_hears_the_picture(family, dtype):
    teacher = teacher_of(family)
    keep_in(dtype, teacher.denoiser.backbone)
    flags = LADDConfig(blocks=tuple(blocks_of(teacher.denoiser.backbone)))
    flags.check_teacher(teacher)
    assert len(flags.method().networks(teacher)["discriminator"].heads.heads) == len(flags.blocks)


def test_a_block_that_returns_no_map_is_refused():
    with pytest.raises(InputError, match=r"blocks: got a Identity that returns shape \(2,\); allowed: "):
        tokens(nn.Identity(), torch.zeros(2))


def test_hooks_are_gone_afterwards_even_if_the_call_fails():
    teacher = teacher_of("sd")
    x_t, t, cond = given(teacher)
    with pytest.raises(RuntimeError):
        read(teacher.denoiser, x_t[:, :3], t, cond, BLOCKS["sd"])
    assert not any(module._forward_hooks for module in teacher.denoiser.backbone.modules())


def slope(maps: list[Tensor], x_t: Tensor) -> Tensor:
    """The gradient of a fixed functional of the maps."""
    weights = [torch.randn(m.shape, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(maps)]
    return torch.autograd.grad(sum((m * w).sum() for m, w in zip(maps, weights, strict=True)), x_t)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd", "sd3", "sana"])
@pytest.mark.parametrize("make", [lora_models, full_models])
def test_gradients_pass_through_the_teacher_as_through_a_separate_network(make, family, checkpointing):
    """By the time of the backward, the student's adapter is on again and its own forward done."""
    teacher = teacher_of(family)
    x_t, t, cond = given(teacher)
    x_t.requires_grad_(True)
    alone = copy.deepcopy(teacher.denoiser)
    expected = slope(read(alone, x_t, t, cond, BLOCKS[family]), x_t)
    models = make(teacher.denoiser, target_decay=0.0)
    if make is lora_models:
        tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    else:
        tiny.awaken(models.student.backbone, 7)
    if checkpointing:
        models.enable_checkpointing()
    with models.only("student"):
        maps = models.teacher.features(x_t, t, cond, BLOCKS[family])
        models.student(x_t, t, cond)
        got = slope(maps, x_t)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(p.grad is None for p in teacher.denoiser.backbone.parameters())


def kept(checkpointing: bool) -> int:
    """Number of values that a forward of a full student's teacher saves for the backward."""
    teacher = teacher_of("sd3")
    x_t, t, cond = given(teacher)
    models = full_models(teacher.denoiser, target_decay=0.0)
    if checkpointing:
        models.enable_checkpointing()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        models.teacher.features(x_t.requires_grad_(True), t, cond, BLOCKS["sd3"])
    return sum(sizes)


def test_checkpointing_spares_the_activations_of_a_full_students_teacher_too():
    assert kept(True) < kept(False) / 2


def test_mixed_precision_features_are_float32():
    teacher = teacher_of("sd3")
    models = lora_models(teacher.denoiser, target_decay=0.0, dtype=torch.bfloat16)
    x_t, t, cond = given(teacher)
    x_t.requires_grad_(True)
    maps = models.teacher.features(x_t, t, cond, BLOCKS["sd3"])
    assert {m.dtype for m in maps} == {torch.float32}
    assert slope(maps, x_t).abs().sum() > 0
