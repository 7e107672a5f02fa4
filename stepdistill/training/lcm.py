"""The flags of latent consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepdistill.methods.consistency import LatentConsistency
from stepdistill.training.guided import GuidedConfig
from stepdistill.training.noisiest import check_noisiest

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class LCMConfig(GuidedConfig):
    """Flags of latent consistency distillation."""

    guidance: tuple[float, ...] = (8.0,)
    """The teacher's guidance scale: one value, as suits a LoRA, which is conditioned on it only on Flux-dev, or a range
    to draw from (1 means none; the paper's w is one less)."""
    solver_steps: int = 50
    """Points on the teacher's path."""
    loss: Literal["huber", "l2"] = "huber"
    """Distance between the two ends."""
    huber_c: float = 1e-3
    """Below this difference the Huber loss is quadratic, above it linear."""
    weighting: Literal["x0", "v"] = "x0"
    """x0 compares the ends directly; v divides by the share of a v output in its x0: steadier at low noise."""
    backward_simulation: float = 0.0
    """Share of samples noised from the student's own one-step output, as in multistep sampling, not from an image."""
    target_ema: float = 0.95
    """Decay of the target's moving average; 0 makes the student its own target."""
    timestep_scaling: float = 10.0
    """How fast c_skip falls with distance from the clean end; 10 in LCMScheduler."""

    def check(self) -> None:
        """Raises InputError if a setting is out of range, or needs a package that is not installed."""
        super().check()
        self.require("target_ema", least=0, below=1, fix=f"try {type(self).target_ema}")

    @property
    def target_decay(self) -> float:
        """The value of --target-ema."""
        return self.target_ema

    def method(self) -> LatentConsistency:
        """The method these flags describe."""
        low, high = self.guidance_range
        return LatentConsistency(
            guidance_min=low, guidance_max=high, solver_steps=self.solver_steps,
            loss_type=self.loss, huber_c=self.huber_c, weighting=self.weighting,
            backward_simulation=self.backward_simulation, timestep_scaling=self.timestep_scaling,
            embed_guidance=self.embed_guidance,
        )  # fmt: skip

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be distilled with these flags."""
        import torch

        super().check_teacher(teacher)
        check_noisiest(teacher, teacher.denoiser.schedule.t_max, self.mixed_precision)
        self.method().times(torch.zeros(1, dtype=torch.long), teacher.denoiser.schedule)


@dataclass(frozen=True)
class FullLCMConfig(LCMConfig):
    """Flags of latent consistency distillation into a full student."""

    lora: bool = False
    """Train a LoRA adapter instead, which cannot be conditioned on guidance."""
    guidance: tuple[float, ...] = (4.0, 16.0)
    """The teacher's guidance scale: a range to draw from, or one value (1 means none; the paper's w is one less)."""
    embed_guidance: bool = True
    """Condition the student on its guidance, so that users choose guidance_scale at sampling."""
