"""UNet2DModel: pixel-space models, class-conditional or not."""

from __future__ import annotations

from torch import Tensor, nn

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.errors import InputError
from stepdistill.prediction import Kind
from stepdistill.schedules import Schedule


class PixelDenoiser(Denoiser):
    """A UNet on pixels. Condition: labels, if the network has a class embedding."""

    def __init__(self, backbone: nn.Module, schedule: Schedule, kind: Kind) -> None:
        super().__init__(backbone, schedule, kind)
        size = backbone.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (backbone.config.in_channels, height, width)
        self.classes = backbone.config.num_class_embeds or 0  # the backbone may be wrapped later

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """Returns the UNet's output, the first half if it also predicts variances; x_t (B, C, H, W), clock (B,)."""
        labels = cond.get("labels") if cond else None
        if (labels is None) == bool(self.classes):
            got, allowed = ("no labels", "labels (B,)") if labels is None else ("labels", "no condition")
            raise InputError(f"condition: got {got}; allowed: {allowed} for this network; encode with its conditioner")
        return self.backbone(x_t, clock, labels, return_dict=False)[0][:, : x_t.shape[1]]
