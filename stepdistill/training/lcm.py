"""A latent consistency run from its configuration: what train_lcm.py, train_lcm_lora.py and the demo share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig


@dataclass(frozen=True)
class LCMConfig(TrainConfig):
    """Flags of latent consistency distillation."""

    guidance: tuple[float, ...] = (3.0, 15.0)
    """The teacher's guidance scale: one value, or a range drawn from (1 is none)."""
    solver_steps: int = 50
    """Points on the teacher's path."""
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = 1e-3
    timestep_scaling: float = 10.0
    embed_guidance: bool = False
    """Tell a full student its guidance weight (--no-lora only)."""

    def method(self):
        """The method these flags describe."""
        from stepdistill.methods.consistency import LatentConsistency

        if len(self.guidance) not in (1, 2):
            raise InputError(f"guidance: got {len(self.guidance)} values; allowed: one, or two for a range")
        if self.embed_guidance and self.lora:
            raise InputError("embed_guidance: got it for a LoRA; allowed: a full student (--no-lora, or train_lcm.py)")
        return LatentConsistency(
            guidance_min=self.guidance[0], guidance_max=self.guidance[-1], solver_steps=self.solver_steps,
            loss_type=self.loss, huber_c=self.huber_c, timestep_scaling=self.timestep_scaling,
            embed_guidance=self.embed_guidance,
        )  # fmt: skip


def distil(config: LCMConfig) -> Path:
    """Loads the teacher and the data, trains and exports.

    Returns:
        The export folder.
    """
    method = config.method()
    from stepdistill.data.cache import open_data
    from stepdistill.denoiser.load import load_teacher
    from stepdistill.training.trainer import Trainer

    teacher = load_teacher(config.teacher)
    guidance = (config.guidance[0] + config.guidance[-1]) / 2
    data = open_data(config.data, teacher, resolution=config.resolution, seed=config.seed, synthetic_guidance=guidance)
    return Trainer(method, teacher, data, config).fit()
