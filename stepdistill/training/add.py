"""The flags of adversarial diffusion distillation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.methods.adversarial import Adversarial
from stepdistill.training.config import TrainConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class ADDConfig(TrainConfig):
    """Flags of adversarial diffusion distillation."""

    student_steps: int = 4
    """Times the student is trained at, those an inference of as many steps visits."""
    warm_share: float = 0.0
    """Share of the run over which the noisiest time comes to its weight; 0 is no curriculum."""
    last_weight: float = 1.0
    """How likely the noisiest time is in the end against each of the others."""

    feature_network: str = "dino_vits16"
    """What the discriminator looks through: efficientnet_lite2 (no download), dino_vits16, dinov2_vits14, timm:NAME."""
    picture_size: int = 0
    """Pixels the feature network works at; 0 is its own size."""
    adversarial_loss: Literal["hinge", "softplus"] = "hinge"
    """Of the discriminator and the student."""
    r1_weight: float = 1e-5
    """Of the gradient penalty on what the heads are given."""
    condition_on_image: bool = True
    """Tell the discriminator of the real picture that the student's input was made from."""
    augmentation: float = 1.0
    """Probability that a picture is augmented before the discriminator sees it."""
    discriminator_learning_rate: float = 1e-4
    """The heads', at the plateau."""
    discriminator_betas: tuple[float, float] = (0.0, 0.999)
    """The heads' Adam betas."""

    guidance: float = 4.0
    """The teacher's guidance scale in the distillation term; 1 is none."""
    distillation_weight: float = 2.5
    """Of the distillation term against the adversarial one; 0 leaves the teacher out."""
    distillation_weighting: Literal["exponential", "uniform", "sds"] = "exponential"
    """How much each noise level counts: alpha, alike, or as in score distillation sampling."""
    distillation_space: Literal["pixels", "latents"] = "pixels"
    """Where student and teacher are compared; latents are cheaper."""

    def check(self) -> None:
        """Raises InputError where a setting is out of range, or needs a package that is not installed."""
        super().check()
        if not 0 < self.discriminator_learning_rate < math.inf:
            got = f"{self.discriminator_learning_rate:g}"
            raise InputError(f"discriminator_learning_rate: got {got}; allowed: above 0; the paper uses 1e-4")
        if not all(0 <= beta < 1 for beta in self.discriminator_betas):
            raise InputError(
                f"discriminator_betas: got {self.discriminator_betas}; allowed: 0 to below 1; try (0.0, 0.999)"
            )

    def method(self) -> Adversarial:
        """The method these flags describe."""
        own = {field.name for field in dataclasses.fields(Adversarial)} & vars(self).keys()
        return Adversarial(**{name: getattr(self, name) for name in own}, recompute=self.gradient_checkpointing)

    @property
    def data_guidance(self) -> float:
        """The teacher's own."""
        return self.guidance

    def of(self, role: str) -> TrainConfig:
        """The discriminator's optimizer has a learning rate and betas of its own."""
        if role != "discriminator":
            return self
        return dataclasses.replace(
            self, learning_rate=self.discriminator_learning_rate, adam_betas=self.discriminator_betas
        )

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be distilled as the flags say, or the feature network not be had."""
        from stepdistill.methods.feature_networks import load_feature_network

        super().check_teacher(teacher)
        if teacher.vae is None and self.guidance > 1 and self.distillation_weight:
            raise InputError(
                f"guidance: got {self.guidance:g} with {teacher.path}, a pixel model without text; allowed: 1; give "
                "--guidance 1"
            )
        denoiser = teacher.denoiser
        alpha, _ = denoiser.schedule.coeffs(denoiser.schedule.t_max)
        if alpha == 0 and denoiser.kind == "eps":
            raise InputError(
                f"teacher: got {teacher.path}, which predicts eps on a schedule that ends in pure noise, where that "
                "says nothing of x0; allowed: v, x0 or flow there; take a teacher of another prediction_type"
            )
        load_feature_network(self.feature_network, self.picture_size)
