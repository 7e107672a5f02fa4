"""Reads intermediate features of any backbone: the token maps of selected blocks.

    maps = read(denoiser, x_t, t, cond, ["transformer_blocks.3", "transformer_blocks.7"])

A block is a submodule, given by name. Its output is recognised by shape: an image's feature map (B, C, h, w), a token
sequence (B, N, C), one vector (B, C), or an MMDiT block's tuple of text and image tokens, of which the image tokens are
used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from stepdistill import hooks
from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.errors import InputError
from stepdistill.schedules import Time

# block names by type of backbone; the first pattern that matches is used
BLOCKS = (
    r"(transformer_blocks|single_transformer_blocks)\.\d+",  # MMDiT, DiT and linear DiT
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+",  # UNet with attention
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+",  # UNet without
)
TEXT_FIRST = {"JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}


def blocks_of(backbone: nn.Module) -> list[str]:
    """Returns the names of a backbone's blocks in call order.

    Raises:
        InputError: no name matches a known pattern.
    """
    names = [name for name, _ in backbone.named_modules()]
    for pattern in BLOCKS:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            order = ("down", "mid", "up", "transformer", "single")
            return sorted(found, key=lambda name: next(i for i, o in enumerate(order) if name.startswith(o)))
    raise InputError(
        f"blocks: got none for a {type(backbone).__name__}; allowed: names of its submodules, as its blocks are "
        "not known; name some"
    )


def check_blocks(backbone: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Returns `names` if all are submodules or, if it is empty, up to four blocks spread evenly over the depth.

    Raises:
        InputError: a name is no submodule of this backbone, or none is given and its blocks are not known.
    """
    if not names:
        known = blocks_of(backbone)
        count = min(4, len(known))
        return tuple(known[((i + 1) * len(known)) // count - 1] for i in range(count))
    modules = dict(backbone.named_modules())
    if unknown := [name for name in names if not name or name not in modules]:
        known = blocks_of(backbone)
        shown = ", ".join(known if len(known) <= 6 else [*known[:3], "...", *known[-2:]])
        got = ", ".join(map(repr, unknown))
        raise InputError(f"blocks: got {got}, not in this {type(backbone).__name__}; allowed: names such as {shown}")
    return tuple(names)


@torch.no_grad()
def check_pictures(denoiser: Denoiser, cond: Cond, names: Sequence[str]) -> None:
    """Checks that blocks return image features, not text or time features: that these grow with the image.

    Args:
        cond: of batch size 1. names: of submodules.

    Raises:
        InputError: a block is never called (a list of blocks, for example) or returns something else.
    """
    channels, *_, height, width = denoiser.sample_shape
    sizes: list[dict[str, int]] = []
    for rows in (height, height // 2):
        x_t = torch.zeros(1, channels, rows, width, device=next(denoiser.parameters()).device)
        with capture(denoiser.backbone, names) as captured:
            denoiser.raw(x_t, denoiser.schedule.t_max, cond)
        sizes.append({name: maps.shape[1] for name, maps in captured.items()})
    for name in names:
        whole, half = (size.get(name, 0) for size in sizes)
        if whole <= half:
            got = "is never called" if not whole else f"returns {whole} tokens of any picture"
            known = ", ".join(check_blocks(denoiser.backbone, ()))
            raise InputError(
                f"blocks: got {name}, which {got}; allowed: what returns a map of the picture, such as {known}"
            )


def capture(backbone: nn.Module, names: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
    """Context in which each call of the backbone stores the token maps (B, N, C) of these blocks in the dictionary."""
    return hooks.capture(backbone, names, lambda module, inputs, output: tokens(module, output))


def tokens(block: nn.Module, output: object) -> Tensor:
    """Returns the image tokens (B, N, C) of a block's output.

    Raises:
        InputError: an unsupported shape, or no tensor.
    """
    if isinstance(output, tuple | list):
        own = {kind.__name__ for kind in type(block).__mro__}  # sharding replaces a block's class by a subclass
        output = output[1] if own & TEXT_FIRST else output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "sample", None)  # a Transformer2DModelOutput
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else "no tensor"
        raise InputError(
            f"blocks: got a {type(block).__name__} that returns {got}; allowed: (B, C, h, w), (B, N, C) or (B, C); "
            "choose another"
        )
    if output.ndim == 2:
        return output[:, None]
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


def read(denoiser: Denoiser, x_t: Tensor, t: Time, cond: Cond | None, blocks: Sequence[str]) -> list[Tensor]:
    """Runs the backbone once; returns the token maps (B, N, C) of the blocks, in order, at least float32.

    Args:
        x_t: (B, ...). t: a float, () or (B,). cond: of batch size B.
    """
    # a compiled network would not call the hooks
    with capture(denoiser.backbone, blocks) as captured, torch.compiler.set_stance("force_eager"):
        denoiser.raw(x_t, t, cond)
    return [captured[name].to(torch.promote_types(captured[name].dtype, torch.float32)) for name in blocks]
