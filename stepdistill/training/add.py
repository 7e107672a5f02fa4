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
    """What the discriminator looks through: efficientnet_lite2 (no download), dino_vits16, dinov2_vits14, timm:NAME."""
    picture_size: int = 0
    """Pixels the feature network works at; 0 is its own size."""
    r1_weight: float = 1e-5
    """Of the gradient penalty on what the heads are given."""
    condition_on_image: bool = True
    """Tell the discriminator of the real picture that the student's input was made from."""
    augmentation: float = 1.0
    """Probability that a picture is augmented before the discriminator sees it."""
    discriminator_betas: tuple[float, float] = (0.0, 0.999)
    """The heads' Adam betas."""

    guidance: float = 4.0
    """The teacher's guidance scale in the distillation term, and where it paints the data; 1 is none."""
    distillation_weight: float = 2.5
    """Of the distillation term against the adversarial one; 0 leaves the teacher out."""
    distillation_weighting: Literal["exponential", "uniform", "sds"] = "exponential"
    """How much each noise level counts: alpha, alike, or as in score distillation sampling."""
    distillation_space: Literal["pixels", "latents"] = "pixels"
    """Where student and teacher are compared; latents are cheaper."""

    def method(self) -> Adversarial:
        """The method these flags describe."""
        own = {field.name for field in dataclasses.fields(Adversarial)} & vars(self).keys()
        return Adversarial(**{name: getattr(self, name) for name in own}, recompute=self.gradient_checkpointing)

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be distilled as the flags say, or the feature network not be had."""
        from stepdistill.methods.feature_networks import load_feature_network

        super().check_teacher(teacher)
        if teacher.vae is None and self.guidance > 1 and self.distillation_weight:
            raise InputError(
                f"guidance: got {self.guidance:g} with {teacher.path}, a pixel model without text; allowed: 1; give "
                "--guidance 1"
            )
        load_feature_network(self.feature_network, self.picture_size)
