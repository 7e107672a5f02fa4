"""UNet2DConditionModel: Stable Diffusion 1.x and 2.x, SDXL, and guidance-conditioned students of either."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.prediction import Kind
from stepdistill.schedules import Schedule


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 w, (B, width) float32: the guidance input of a student (Luo et al. 2023, sec. 4.1).

    Args:
        w: (B,), the guidance scale minus one.
        width: even; `time_cond_proj_dim` of the network.
    """
    half = width // 2
    rate = torch.exp(torch.arange(half, device=w.device) * (-math.log(10_000.0) / (half - 1)))
    angle = 1000.0 * w.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class UNetDenoiser(Denoiser):
    """A text-conditioned UNet.

    Conditions: text (B, S, D); for SDXL also pooled (B, P) and time_ids (B, 6); if the network is guidance-conditioned
    (`time_cond_proj_dim`), guidance (B,), the weight w = scale - 1.
    """

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        config = backbone.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (config.in_channels, height, width)
        self.guidance_width = config.time_cond_proj_dim
        self.sized = config.addition_embed_type == "text_time"
        self.takes_guidance = bool(self.guidance_width)
        added = {"pooled", "time_ids"} if self.sized else set()
        self.needs = frozenset({"text"} | added | ({"guidance"} if self.takes_guidance else set()))

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """Returns the UNet's output, the first half if it also predicts variances; x_t (B, C, H, W), clock (B,)."""
        cond = self.check(cond)
        added, embedding = None, None
        if self.sized:
            added = {"text_embeds": cond["pooled"].to(x_t.dtype), "time_ids": cond["time_ids"]}
        if self.guidance_width:
            embedding = guidance_embedding(cond["guidance"], self.guidance_width).to(x_t.dtype)
        y = self.backbone(
            x_t, clock, cond["text"].to(x_t.dtype), timestep_cond=embedding, added_cond_kwargs=added, return_dict=False
        )[0]
        return y[:, : x_t.shape[1]]
