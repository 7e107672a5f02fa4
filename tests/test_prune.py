"""Smaller UNets against surgery by hand, the published sizes and the published configurations."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from stepdistill.baselines.architecture.block_removal import feature_pairs, shape_of
from stepdistill.baselines.architecture.blocks import removals
from stepdistill.baselines.architecture.prune import Shape, config_of, fresh, origin, pruned
from stepdistill.baselines.results import count_parameters
from stepdistill.errors import InputError

SIZES = ("base", "small", "tiny")
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15 = Shape((2, 2, 2, 2), (True, True, True, False), (True, True, True, False))


@pytest.fixture(scope="module")
def sd15() -> nn.Module:
    """Stable Diffusion 1.5's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def deep(seed: int = 0, **options) -> nn.Module:
    unet = tiny.unet(16, **tiny.DEEP | options).eval()
    tiny.awaken(unet, seed)
    return unet


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([700.0, 40.0]), torch.randn(
        2, 5, 16, generator=generator)  # fmt: skip


@torch.no_grad()
def answer(unet: nn.Module) -> torch.Tensor:
    return unet(*inputs()).sample


# Hundredths of 10⁹, from the authors' model card (0.86 B, 0.58 B, 0.49 B, 0.33 B), which rounds up: 482.3 M is 0.49 B.
@pytest.mark.parametrize(("size", "hundredths"), [(None, 86), ("base", 58), ("small", 49), ("tiny", 33)])
def test_sizes_of_stable_diffusion_are_the_published_ones(sd15, size, hundredths):
    if size is None:
        assert math.ceil(count_parameters(sd15) / 1e7) == hundredths
        return
    with torch.device("meta"):
        small = fresh(sd15, shape_of(Shape.of(sd15), size))
    assert math.ceil(count_parameters(small) / 1e7) == hundredths


@pytest.mark.parametrize("size", SIZES)
def test_configurations_of_stable_diffusion_are_the_authors(sd15, size):
    config = config_of(sd15.config, shape_of(Shape.of(sd15), size))
    stages = 3 if size == "tiny" else 4
    assert config["block_out_channels"] == (320, 640, 1280, 1280)[:stages]
    assert config["down_block_types"] == (DOWN, DOWN, DOWN, "DownBlock2D")[:stages]
    assert config["up_block_types"] == ("UpBlock2D", UP, UP, UP)[4 - stages :]
    assert config["mid_block_type"] == ("UNetMidBlock2DCrossAttn" if size == "base" else None)
    assert config["layers_per_block"] == 1
    rest = set(config) - {"block_out_channels", "down_block_types", "up_block_types", "mid_block_type",
                          "layers_per_block"}  # fmt: skip
    assert all(config[name] == sd15.config[name] for name in rest)


# Weights that the authors' script copies under another name: student's prefix, teacher's.
SAME = {f"up_blocks.{i}.{part}.1.": f"up_blocks.{i}.{part}.2."
        for i in range(4) for part in ("resnets", "attentions")}  # fmt: skip
SHIFTED = {
    f"up_blocks.{i}.{part}{own}": f"up_blocks.{i + 1}.{part}{theirs}" for i in range(3)
    for part, own, theirs in [(p, f".{j}.", f".{2 * j}.") for p in ("resnets", "attentions") for j in (0, 1)]
    + [("upsamplers", ".0.", ".0.")]
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_blocks_come_from_where_the_authors_copy_them(sd15, size):
    whole = Shape.of(sd15)
    shape = shape_of(whole, size)
    with torch.device("meta"):
        names = list(fresh(sd15, shape).state_dict())
    table = SHIFTED if size == "tiny" else SAME
    for name in names:
        prefix = next((p for p in table if name.startswith(p)), None)
        expected = name if prefix is None else table[prefix] + name.removeprefix(prefix)
        assert origin(name, whole, shape) == expected


@pytest.mark.parametrize("size", SIZES)
def test_compared_features_are_the_authors(size):
    pairs = dict(feature_pairs(SD15, shape_of(SD15, size)))
    if size == "tiny":
        expected = {"down_blocks.0": "down_blocks.0", "down_blocks.1": "down_blocks.1",
                    "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
                    **{f"up_blocks.{i}": f"up_blocks.{i + 1}" for i in range(3)}}  # fmt: skip
    else:
        expected = {f"{part}_blocks.{i}": f"{part}_blocks.{i}" for part in ("up", "down") for i in range(4)}
    assert pairs == expected


@pytest.mark.parametrize("size", SIZES)
def test_kept_blocks_are_bit_equal_to_the_teachers(size):
    unet = deep()
    whole = Shape.of(unet)
    shape = shape_of(whole, size)
    small, theirs = pruned(unet, shape), unet.state_dict()
    for name, value in small.state_dict().items():
        assert torch.equal(value, theirs[origin(name, whole, shape)]), name


def cut_by_hand(unet: nn.Module, size: str) -> nn.Module:
    """The same pruning by deleting modules."""
    unet = copy.deepcopy(unet)
    for block in unet.down_blocks:
        for part in (block.resnets, getattr(block, "attentions", None)):
            if part is not None:
                del part[1]
    for block in unet.up_blocks:
        for part in (block.resnets, getattr(block, "attentions", None)):
            if part is not None:
                del part[1]
    if size != "base":
        unet.mid_block = None
    if size == "tiny":
        del unet.down_blocks[-1], unet.up_blocks[0]
        unet.down_blocks[-1].downsamplers = None
    return unet


@pytest.mark.parametrize("size", SIZES)
def test_a_pruned_network_answers_as_one_cut_by_hand(size):
    unet = deep()
    small = pruned(unet, shape_of(Shape.of(unet), size)).eval()
    assert (answer(small) - answer(cut_by_hand(unet, size))).abs().max() < 1e-6
    assert (answer(small) - answer(unet)).abs().max() > 1e-2


def test_every_block_that_can_be_spared_leaves_what_skipping_it_leaves():
    unet = deep()
    for name, shape in removals(Shape.of(unet)).items():
        skipped = copy.deepcopy(unet)
        if name == "mid_block":
            skipped.mid_block = None
        elif name.endswith("attentions"):
            for block in skipped.get_submodule(name):
                block.forward = lambda x, **_: (x,)
        else:
            down, up = (part.split(",")[0] for part in name.split(" and "))
            for part in (down, up):
                block = skipped.get_submodule(part)
                del block.resnets[1]
                if hasattr(block, "attentions"):
                    del block.attentions[1]
        assert (answer(pruned(unet, shape).eval()) - answer(skipped)).abs().max() < 1e-6, name


def test_the_blocks_of_stable_diffusion_that_can_be_spared():
    attentions = [f"down_blocks.{i}.attentions" for i in (0, 1, 2)] + [f"up_blocks.{i}.attentions" for i in (3, 2, 1)]
    pairs = [f"down_blocks.{i} and up_blocks.{3 - i}, a pair" for i in range(4)]
    assert list(removals(SD15)) == [*attentions, "mid_block", *pairs]


def test_the_last_cross_attention_stays():
    shape = Shape((1, 1), (False, False), (True, False), mid=False)
    assert removals(shape) == {}


def test_an_entrance_of_another_width_keeps_what_it_knows_of_the_skip():
    unet = deep(block_out_channels=(8, 16, 32))
    small, whole = pruned(unet, shape_of(Shape.of(unet), "tiny")), unet.up_blocks[1].resnets[0]
    entrance = small.up_blocks[0].resnets[0]
    assert (whole.conv1.in_channels, entrance.conv1.in_channels) == (32 + 16, 16 + 16)
    for name in ("conv1", "conv_shortcut"):
        own, theirs = getattr(entrance, name).weight, getattr(whole, name).weight
        assert torch.equal(own[:, 16:], theirs[:, 32:]) and not own[:, :16].any()
    assert torch.equal(entrance.norm1.weight[16:], whole.norm1.weight[32:])
    rest = {k: v for k, v in small.state_dict().items() if not k.startswith("up_blocks.0.resnets.0.")}
    shape = Shape.of(small)
    assert all(torch.equal(v, unet.state_dict()[origin(k, Shape.of(unet), shape)]) for k, v in rest.items())


def test_a_smaller_network_is_saved_and_loaded_by_plain_diffusers(tmp_path):
    unet = deep()
    shape = dataclasses.replace(Shape.of(unet), pairs=(2, 1, 2), down=(False, True, False), mid=False)
    small = pruned(unet, shape).eval()
    small.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded), answer(small)) and Shape.of(loaded) == shape


def test_settings_of_each_stage_are_cut_with_it():
    unet = deep(attention_head_dim=(2, 4, 8), transformer_layers_per_block=(1, 2, 1), use_linear_projection=True)
    small = pruned(unet, shape_of(Shape.of(unet), "tiny")).eval()
    assert (answer(small) - answer(cut_by_hand(unet, "tiny"))).abs().max() < 1e-6


def test_networks_that_cannot_be_cut_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"got a SD3Transformer2DModel; allowed: a UNet2DConditionModel"):
        Shape.of(tiny.sd3().transformer)
    with pytest.raises(InputError, match=r"got a UNet2DModel; allowed: a UNet2DConditionModel"):
        Shape.of(tiny.pixel().unet)
    simple = {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    with pytest.raises(InputError, match=r"got the block UNetMidBlock2DSimpleCrossAttn; allowed: CrossAttnDownBlock2D"):
        Shape.of(deep(**simple))
    depths = {"transformer_layers_per_block": ((1, 1), (2, 1), (1, 1)),
              "reverse_transformer_layers_per_block": ((1, 1, 1), (1, 1, 1), (1, 1, 1))}  # fmt: skip
    with pytest.raises(InputError, match="attention of another depth in each block; allowed: one depth a stage"):
        Shape.of(deep(**depths))


def test_sizes_that_leave_nothing_out_or_too_little_are_refused_with_what_is_left():
    shallow = Shape((1, 1), (True, False), (True, False))
    with pytest.raises(InputError, match=r"got base for a UNet that has one pair a stage already; allowed: small$"):
        shape_of(shallow, "base")
    with pytest.raises(InputError, match="got tiny for a UNet of 2 stages, of which one would be left"):
        shape_of(shallow, "tiny")
    with pytest.raises(InputError, match="one pair a stage and no middle block already; allowed: a larger teacher"):
        shape_of(dataclasses.replace(shallow, mid=False), "small")
