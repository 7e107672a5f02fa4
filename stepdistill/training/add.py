"""The flags of adversarial diffusion distillation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.methods.adversarial import Adversarial
from stepdistill.training.adversarial import AdversarialConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class ADDConfig(AdversarialConfig):
    """Flags of adversarial diffusion distillation."""

    feature_network: str = "dino_vits16"
    """The discriminator's network: efficientnet_lite2 (no download), dino_vits16, dinov2_vits14 or timm:NAME."""
    feature_resolution: int = 0
    """Input size of the feature network in pixels; 0 for its own."""
    r1_weight: float = 1e-5
    """Weight of the R1 gradient penalty on the heads' input; 0 for none."""
    condition_on_image: bool = True
    """Condition the discriminator on the real image that the student's input was made from."""
    augmentation: float = 1.0
    """Probability that an image is augmented before the discriminator."""
    discriminator_betas: tuple[float, float] = (0.0, 0.999)
    """Adam betas of the discriminator."""

    guidance: float = 4.0
    """The teacher's guidance scale in the distillation term, and for data that it generates; 1 means none."""
    distillation_weight: float = 50.0
    """Weight of the distillation term, a mean over pixels, relative to the adversarial one; 0 omits the teacher."""
    distillation_weighting: Literal["exponential", "uniform", "sds"] = "exponential"
    """Weight of each noise level: alpha, uniform, or as in score distillation sampling."""
    distillation_space: Literal["pixels", "latents"] = "pixels"
    """Space in which student and teacher are compared; latents are cheaper."""

    def method(self) -> Adversarial:
        """The method these flags describe."""
        own = {field.name for field in dataclasses.fields(Adversarial)} - {"recompute"}
        return Adversarial(**{name: getattr(self, name) for name in own}, recompute=self.gradient_checkpointing)

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be distilled with these flags, or the feature network not loaded."""
        from stepdistill.methods.feature_networks import load_feature_network

        super().check_teacher(teacher)
        if teacher.vae is None and self.guidance > 1 and self.distillation_weight:
            raise InputError(
                f"guidance: got {self.guidance:g} with {teacher.path}, a pixel model without text; allowed: 1; give "
                "--guidance 1"
            )
        load_feature_network(self.feature_network, self.feature_resolution)
