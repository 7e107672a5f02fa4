"""Flags of the methods that distil a teacher's guidance: latent consistency and progressive distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class GuidedConfig(TrainConfig):
    """Flags of a student with its teacher's guidance in its weights, or conditioned on it."""

    guidance: tuple[float, ...] = (4.0,)
    """The teacher's guidance scale: one value, or a range to draw from (1 means none; LCM's w is one less)."""
    embed_guidance: bool = False
    """Condition a full student on guidance, so that users choose it (--no-lora only; give a range)."""

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The ends of --guidance.

        Raises:
            InputError: more than two values, or embed_guidance with a LoRA.
        """
        if len(self.guidance) not in (1, 2):
            raise InputError(f"guidance: got {len(self.guidance)} values; allowed: one, or two for a range")
        if self.embed_guidance and self.lora:
            raise InputError("embed_guidance: got it for a LoRA; allowed: a full student (--no-lora)")
        return self.guidance[0], self.guidance[-1]

    @property
    def data_guidance(self) -> float:
        """The scale, or the low end of a range: images at the high end would be oversaturated."""
        return self.guidance[0]

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be distilled with these flags."""
        from stepdistill.training.roles import check_embeds_guidance

        super().check_teacher(teacher)
        if self.embed_guidance:
            check_embeds_guidance(teacher.denoiser.backbone)
        if teacher.vae is None and self.guidance[-1] > 1:
            raise InputError(
                f"guidance: got {self.guidance[-1]:g} with {teacher.path}, a pixel model without text; allowed: 1; "
                "give --guidance 1"
            )
