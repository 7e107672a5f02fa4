"""The flags of latent consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.methods.consistency import LatentConsistency
from stepdistill.training.config import TrainConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class LCMConfig(TrainConfig):
    """Flags of latent consistency distillation."""

    guidance: tuple[float, ...] = (4.0, 16.0)
    """The teacher's guidance scale: one value, or a range drawn from (1 is none; the paper's w is one less)."""
    solver_steps: int = 50
    """Points on the teacher's path."""
    loss: Literal["huber", "l2"] = "huber"
    """Distance between the two ends."""
    huber_c: float = 1e-3
    """Below this difference the Huber loss is quadratic, above it linear."""
    weighting: Literal["x0", "v"] = "x0"
    """Compare ends as they are, or over the share that the network's output has in them: steadier at low noise."""
    timestep_scaling: float = 10.0
    """How steeply the boundary condition is left; LCMScheduler's 10."""
    embed_guidance: bool = False
    """Tell a full student its guidance weight (--no-lora only)."""

    def method(self) -> LatentConsistency:
        """The method these flags describe."""
        low, high = guidance_range(self)
        return LatentConsistency(
            guidance_min=low, guidance_max=high, solver_steps=self.solver_steps,
            loss_type=self.loss, huber_c=self.huber_c, weighting=self.weighting, timestep_scaling=self.timestep_scaling,
            embed_guidance=self.embed_guidance,
        )  # fmt: skip

    @property
    def data_guidance(self) -> float:
        """The middle of the range."""
        return (self.guidance[0] + self.guidance[-1]) / 2

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be distilled as the flags say."""
        import torch

        super().check_teacher(teacher)
        check_guidance(self, teacher)
        self.method().times(torch.zeros(1, dtype=torch.long), teacher.denoiser.schedule)


def guidance_range(config: TrainConfig) -> tuple[float, float]:
    """The ends of --guidance.

    Raises:
        InputError: more than two values, or a LoRA is to be told its guidance.
    """
    if len(config.guidance) not in (1, 2):
        raise InputError(f"guidance: got {len(config.guidance)} values; allowed: one, or two for a range")
    if config.embed_guidance and config.lora:
        raise InputError("embed_guidance: got it for a LoRA; allowed: a full student (--no-lora)")
    return config.guidance[0], config.guidance[-1]


def check_guidance(config: TrainConfig, teacher: Teacher) -> None:
    """Raises InputError where a teacher cannot be guided, or its student cannot be told."""
    from stepdistill.training.roles import tellable

    if config.embed_guidance:
        tellable(teacher.denoiser.backbone)
    if teacher.vae is None and config.guidance[-1] > 1:
        raise InputError(
            f"guidance: got {config.guidance[-1]:g} with {teacher.path}, a pixel model without text; allowed: 1; give "
            "--guidance 1"
        )
