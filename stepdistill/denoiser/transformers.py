"""Transformer backbones: Stable Diffusion 3, Flux, PixArt and Sana.

Each class defines its network's inputs and its timestep input, `clock`; latents are (B, C, h, w) for all of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.prediction import Kind
from stepdistill.schedules import Schedule


class Square(Denoiser):
    """A network whose config gives the side of its latents and of its patches."""

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        size = backbone.config.sample_size
        self.sample_shape = (backbone.config.in_channels, size, size)
        self.patch = backbone.config.patch_size


class SD3Denoiser(Square):
    """SD3Transformer2DModel (Esser et al. 2024): text (B, S, D) and pooled (B, P); the clock is 1000 t."""

    needs = frozenset({"text", "pooled"})

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t."""
        return 1000 * t

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """The velocity; x_t (B, C, h, w), clock (B,)."""
        cond = self.check(cond)
        return self.backbone(
            hidden_states=x_t, timestep=clock, encoder_hidden_states=cond["text"].to(x_t.dtype),
            pooled_projections=cond["pooled"].to(x_t.dtype), return_dict=False,
        )[0]  # fmt: skip


class FluxDenoiser(Denoiser):
    """FluxTransformer2DModel: text, pooled and, for a guidance-distilled network (dev), guidance; the clock is t.

    The network works on 2 x 2 patches of the latents, which are packed and unpacked here.

    The network has no fixed size; its pipeline's default is 128 x 128 latents.
    """

    patch = 2

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        self.sample_shape = (backbone.config.in_channels // 4, 128, 128)
        self.takes_guidance = bool(backbone.config.guidance_embeds)
        self.needs = frozenset({"text", "pooled"} | ({"guidance"} if self.takes_guidance else set()))

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """The velocity; x_t (B, C, h, w), clock (B,)."""
        cond = self.check(cond)
        batch, channels, height, width = x_t.shape
        rows, columns = height // 2, width // 2
        patches = x_t.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        text = cond["text"].to(x_t.dtype)
        y = self.backbone(
            hidden_states=patches.reshape(batch, rows * columns, 4 * channels), timestep=clock.to(x_t.dtype),
            guidance=(cond["guidance"] + 1).float() if self.takes_guidance else None,
            pooled_projections=cond["pooled"].to(x_t.dtype), encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3), img_ids=_places(rows, columns, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        y = y.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(batch, channels, height, width)


@lru_cache(maxsize=8)
def _places(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows * columns, 3): 0, row and column of each patch."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return nn.functional.pad(grid, (1, 0)).to(device, dtype)


class PixArtDenoiser(Square):
    """PixArtTransformer2DModel (Chen et al. 2023, 2024): text and text_mask, for Alpha at 1024 pixels also resolution
    (B, 2) and aspect_ratio (B, 1); the clock is the timestep index. Half its output is variances, which are dropped."""

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        self.sized = bool(backbone.use_additional_conditions)
        self.needs = frozenset({"text", "text_mask"} | ({"resolution", "aspect_ratio"} if self.sized else set()))

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """eps; x_t (B, C, h, w), clock (B,)."""
        cond = self.check(cond)
        added = {name: cond[name].to(x_t.dtype) if self.sized else None for name in ("resolution", "aspect_ratio")}
        y = self.backbone(
            x_t, encoder_hidden_states=cond["text"].to(x_t.dtype), encoder_attention_mask=cond["text_mask"],
            timestep=clock, added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip
        return y[:, : x_t.shape[1]]


class SanaDenoiser(Square):
    """SanaTransformer2DModel (Xie et al. 2024): text and text_mask; the clock is 1000 t times its `timestep_scale`."""

    needs = frozenset({"text", "text_mask"})

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        self.scale = 1000 * backbone.config.timestep_scale  # the backbone may be wrapped later

    def network_time(self, t: Tensor) -> Tensor:
        """1000 t times `timestep_scale`."""
        return self.scale * t

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """The velocity; x_t (B, C, h, w), clock (B,)."""
        cond = self.check(cond)
        return self.backbone(
            x_t, encoder_hidden_states=cond["text"].to(x_t.dtype), encoder_attention_mask=cond["text_mask"],
            timestep=clock, return_dict=False,
        )[0]  # fmt: skip
