"""A smaller UNet made of a UNet's own blocks, one that diffusers' stock configuration can describe.

    shape = Shape.of(unet)                                       # of the whole UNet
    small = pruned(unet, dataclasses.replace(shape, mid=False))  # without the middle block; weights copied

A configuration has one number of blocks per stage, attention in all of a stage's blocks or none, and a middle block or
none. So only these can be removed, and a saved student loads in plain diffusers, without custom code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError

WITH = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
WITHOUT = {"down": "DownBlock2D", "up": "UpBlock2D"}
MIDS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
BY_STAGE = ("attention_head_dim", "block_out_channels", "cross_attention_dim", "only_cross_attention",
            "transformer_layers_per_block")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The blocks of a UNet, stage by stage, the outermost first.

    Attributes:
        pairs: residual(-attention) pairs of each down stage; its up stage has one more.
        down, up: whether the stage's pairs have attention. mid: whether there is a middle block.
    """

    pairs: tuple[int, ...]
    down: tuple[bool, ...]
    up: tuple[bool, ...]
    mid: bool = True

    @classmethod
    def of(cls, unet: nn.Module) -> Shape:
        """Returns the shape of a UNet.

        Raises:
            InputError: it is not a UNet2DConditionModel, or has blocks of an unsupported kind.
        """
        if type(unet).__name__ != "UNet2DConditionModel":
            raise InputError(
                f"teacher: got a {type(unet).__name__}; allowed: a UNet2DConditionModel, as of Stable Diffusion 1.5"
            )
        config = unet.config
        layers, stages = config.layers_per_block, len(config.down_block_types)
        types = (*config.down_block_types, *config.up_block_types)
        odd = [t for t in types if t not in (*WITH.values(), *WITHOUT.values())]
        odd += [config.mid_block_type] if config.mid_block_type not in MIDS else []
        if odd:
            raise InputError(
                f"teacher: got the block {odd[0]}; allowed: {', '.join((*WITH.values(), *WITHOUT.values()))}"
            )
        depths = config.transformer_layers_per_block
        if config.reverse_transformer_layers_per_block or (
            not isinstance(depths, int) and any(not isinstance(depth, int) for depth in depths)
        ):
            raise InputError("teacher: got attention of another depth in each block; allowed: one depth a stage")
        return cls(
            pairs=(layers,) * stages if isinstance(layers, int) else tuple(layers),
            down=tuple(t == WITH["down"] for t in config.down_block_types),
            up=tuple(t == WITH["up"] for t in reversed(config.up_block_types)),
            mid=config.mid_block_type is not None,
        )  # fmt: skip

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.pairs)

    def without_innermost(self) -> Shape:
        """The shape without its innermost stage and its middle block."""
        return Shape(self.pairs[:-1], self.down[:-1], self.up[:-1], mid=False)


def config_of(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Returns the configuration of a UNet pruned to a shape."""
    stages = shape.stages
    # its "_use_default_values" would override the changes
    small = {name: value for name, value in config.items() if not name.startswith("_")}
    small |= {name: value[:stages] for name in BY_STAGE if isinstance(value := small[name], list | tuple)}
    return small | {
        "down_block_types": tuple((WITH if own else WITHOUT)["down"] for own in shape.down),
        "up_block_types": tuple((WITH if own else WITHOUT)["up"] for own in reversed(shape.up)),
        "mid_block_type": config["mid_block_type"] if shape.mid else None,
        "layers_per_block": shape.pairs[0] if len(set(shape.pairs)) == 1 else list(shape.pairs),
    }


def origin(name: str, whole: Shape, shape: Shape) -> str:
    """Returns the name in the whole UNet of a parameter, or module, of the smaller one.

    Of a stage's pairs the first are kept; of an up stage's the first and the last, whose skip comes from the stage
    outside it. Stages are removed from the inside.
    """
    part, *rest = name.split(".")
    if part != "up_blocks":
        return name
    stage = shape.stages - 1 - int(rest[0])
    rest[0] = str(whole.stages - 1 - stage)
    if len(rest) > 2 and rest[1] in ("resnets", "attentions") and int(rest[2]) == shape.pairs[stage]:
        rest[2] = str(whole.pairs[stage])
    return ".".join([part, *rest])


def fresh(unet: nn.Module, shape: Shape, seed: int | None = None) -> nn.Module:
    """Returns a UNet of a shape, float32, with random weights, drawn from `seed` if it is given."""
    if seed is not None:
        torch.manual_seed(seed)
    return type(unet).from_config(config_of(unet.config, shape))


def pruned(unet: nn.Module, shape: Shape, seed: int | None = None) -> nn.Module:
    """Returns the UNet pruned to a shape, float32, with copies of its weights.

    If the innermost stage was removed and has another width than the next (never in Stable Diffusion 1 and 2), the
    first block on the way up has another input: of its input channels those of the skip are kept, and the weights of
    the others start at zero.
    """
    whole, small = Shape.of(unet), fresh(unet, shape, seed)
    theirs = unet.state_dict()
    hidden = small.config.block_out_channels[-1]
    kept = {name: _kept(own, theirs[origin(name, whole, shape)], hidden) for name, own in small.state_dict().items()}
    small.load_state_dict(kept)
    return small.to(next(unet.parameters()).device)


def _kept(own: Tensor, theirs: Tensor, hidden: int) -> Tensor:
    """Fits a parameter of the whole UNet to the smaller one; in that first block, (hidden, skip) channels are dim 1 of
    a convolution's weight and dim 0 of a norm's."""
    if own.shape == theirs.shape:
        return theirs
    dim = 1 if own.ndim == 4 else 0
    skip = own.shape[dim] - hidden
    kept = own.clone()
    if own.ndim == 4:
        kept.narrow(dim, 0, hidden).zero_()
    kept.narrow(dim, hidden, skip).copy_(theirs.narrow(dim, theirs.shape[dim] - skip, skip))
    return kept
