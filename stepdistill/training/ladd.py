"""The flags of latent adversarial diffusion distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.conditioning.base import to
from stepdistill.methods.latent_adversarial import LatentAdversarial
from stepdistill.training.adversarial import AdversarialConfig

if TYPE_CHECKING:
    from stepdistill.conditioning.base import Cond
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class LADDConfig(AdversarialConfig):
    """Flags of latent adversarial diffusion distillation."""

    blocks: tuple[str, ...] = ()
    """Blocks of the teacher that are judged, by their names in its network; four over its depth where not given."""
    logit_mean: float = 0.0
    """Mean of log(sigma / alpha) of the noise that latents are judged under; a flow's log(shift) is added."""
    logit_std: float = 1.0
    """Standard deviation of it."""
    r1_weight: float = 0.0
    """Of the approximate gradient penalty on noised real latents; 0 is none, and saves a third of the judging."""
    r1_size: float = 0.01
    """Size of the steps it is measured by."""
    reconstruction_weight: float = 0.0
    """Of the distance to the real latent where the student saw some of it; for data that the teacher did not make."""

    def method(self) -> LatentAdversarial:
        """The method these flags describe."""
        return LatentAdversarial(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LatentAdversarial)})

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be distilled as the flags say."""
        from stepdistill.features import check_blocks, check_pictures

        super().check_teacher(teacher)
        check_blocks(teacher.denoiser.backbone, self.blocks)
        if self.blocks:
            check_pictures(teacher.denoiser, self._some_condition(teacher), self.blocks)

    def _some_condition(self, teacher: Teacher) -> Cond:
        """A condition of batch 1 as training gives it, of any prompt or class."""
        import torch

        cond = teacher.conditioner.encode([""] if teacher.vae is not None else ["0"])
        if teacher.denoiser.takes_guidance:
            cond["guidance"] = torch.tensor([self.guidance - 1])
        return to(cond, next(teacher.denoiser.parameters()).device)
