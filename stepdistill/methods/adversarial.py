"""Adversarial diffusion distillation, ADD (Sauer et al. 2023a).

The student jumps from one of N times to the clean end. A discriminator behind a frozen image network compares its
output with real images; a distillation term compares it with the teacher's prediction from that output, noised again:

    x0_hat = student(x_t, t)                                  x_t a noised real image, pure noise at the noisiest t
    L_D    = sum_k E max(0, 1 - D_k(real)) + E max(0, 1 + D_k(x0_hat)) + gamma R1        equation 3
    L_G    = -sum_k E D_k(x0_hat) + lambda c(u) ||x0_hat - teacher(x_u, u)||²            equations 1, 2 and 4
             x_u = alpha_u stop(x0_hat) + sigma_u eps'

Here the sum over heads is replaced by the mean, and the square is averaged over pixels, so that neither weight depends
on the feature network or the image size.

Data are cached as latents, so real images are decoded ones: the autoencoder bounds the student's quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.denoiser.base import Cond
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.methods.augmentation import augment
from stepdistill.methods.base import Batch, Clock, Loss, Models, Role, check_share
from stepdistill.methods.discriminators import LOSSES, Heads, Logits, check_loss, mean_logits, pooled_text, r1
from stepdistill.methods.feature_networks import check_name, load_feature_network
from stepdistill.methods.jumps import Jumper
from stepdistill.schedules import AlphaBar, Schedule, match
from stepdistill.timegrid import inference_times

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

SPACES = ("pixels", "latents")
LEVELS = 1000  # noise levels at which the teacher is called; on AlphaBar, all its timesteps


def _exponential(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha


def _sds(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * sigma / 2


# c of equation 4 by name, for alpha and sigma scaled to alpha² + sigma² = 1
WEIGHTINGS = {
    "exponential": _exponential,  # the paper's choice: falls with noise
    "uniform": lambda alpha, sigma: torch.ones_like(alpha),
    # the gradient is that of score distillation, sigma² (eps_teacher - eps') (Poole et al. 2022, equation 3): with
    # x0_hat - teacher_x0 = sigma/alpha (eps_teacher - eps'), c = sigma² alpha / (2 sigma)
    "sds": _sds,
}


class Decoder(nn.Module):
    """Decodes latents to images, differentiably, with the teacher's autoencoder; a pixel teacher needs no decoding.

    Args:
        recompute: recompute activations in the backward, image by image, instead of keeping them.
    """

    def __init__(self, teacher: Teacher, *, recompute: bool = False) -> None:
        super().__init__()
        self.vae, self.recompute = teacher.vae, recompute
        self._paint = teacher.paint
        if self.vae is not None and getattr(self.vae.config, "force_upcast", False):
            self.vae.float()  # fp16 overflows; casting only around the forward would be undone before the backward

    def forward(self, latents: Tensor) -> Tensor:
        """Maps (B, C, h, w) to (B, 3, H, W), about [-1, 1], float32."""
        if self.recompute and torch.is_grad_enabled():
            # one by one: the backward then holds the activations of one image
            return torch.cat([checkpoint(self._paint, one, use_reentrant=False) for one in latents.split(1)])
        return self._paint(latents)


class Discriminator(nn.Module):
    """Heads on the maps of a feature network, conditioned by projection on the pooled text and the real image.

    Args:
        channels: of each map. condition: width of the condition.
    """

    def __init__(self, channels: Sequence[int], condition: int = 0) -> None:
        super().__init__()
        self.heads = Heads(channels, condition)

    def forward(self, maps: Sequence[Tensor], condition: Tensor, penalised: int = 0) -> tuple[Logits, Tensor]:
        """Returns logits (B, N) per map, and R1 on the heads' input for the first `penalised` samples (0 if none).

        Args:
            maps: (B, N, C) each. condition: (B, D).
        """
        penalty = condition.new_zeros(())
        if penalised:
            penalised_condition = condition[:penalised]
            penalised_maps = [tokens[:penalised] for tokens in maps]
            penalty = r1(lambda features: self.heads(features, penalised_condition), penalised_maps)
        return self.heads(maps, condition), penalty


@lru_cache(maxsize=8)
def _levels(schedule: Schedule, device: torch.device) -> Tensor:
    count = int(schedule.t_max) + 1 if isinstance(schedule, AlphaBar) else LEVELS
    return inference_times(schedule, count)[:-1].to(device)


def distillation_weight(weighting: str, u: Tensor, schedule: Schedule) -> Tensor:
    """c(u) of equation 4, (B,) float64, for the process scaled to unit variance, as in the paper."""
    alpha, sigma = schedule.coeffs(u)
    size = torch.hypot(alpha, sigma)
    return WEIGHTINGS[weighting](alpha / size, sigma / size)


@dataclass(frozen=True)
class Adversarial(Jumper):
    """Adversarial diffusion distillation. For the student's times and their settings see Jumper.

    `guidance` is also the teacher's scale in the distillation term; 1 means none.

    Args:
        feature_network: network whose features the discriminator judges, see `feature_networks`.
        feature_resolution: its input size in pixels; 0 for the network's own.
        adversarial_loss: "hinge", or "softplus" or "bce", which are one.
        r1_weight: gamma, the weight of R1 on the heads' input; 0 for none.
        condition_on_image: condition the discriminator on the real image that x_t was made from (zero at pure noise).
        distillation_weight: lambda, of a mean over pixels; 0 omits the teacher.
        distillation_weighting: c: "exponential", "uniform" or "sds".
        distillation_space: compare with the teacher's x0 in "pixels", as the paper does, or in "latents".
        augmentation: probability that an image is augmented before the discriminator.
        recompute: recompute the decoder's activations in the backward instead of keeping them.

    Raises:
        InputError: a setting out of range, or an unknown name.
    """

    feature_network: str = "dino_vits16"
    feature_resolution: int = 0
    adversarial_loss: str = "hinge"
    r1_weight: float = 1e-5
    condition_on_image: bool = True
    distillation_weight: float = 50.0
    distillation_weighting: str = "exponential"
    distillation_space: str = "pixels"
    augmentation: float = 1.0
    recompute: bool = False

    name: ClassVar[str] = "add"
    roles: ClassVar[dict[str, Role]] = {
        "teacher": Role.FROZEN, "student": Role.TRAINED, "discriminator": Role.TRAINED, "trunk": Role.FROZEN,
        "decoder": Role.FROZEN,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.feature_network)
        check_loss(self.adversarial_loss)
        for setting in ("feature_resolution", "r1_weight", "distillation_weight"):
            if not 0 <= getattr(self, setting) < math.inf:
                raise InputError(f"{setting}: got {getattr(self, setting):g}; allowed: 0 or more")
        for setting, allowed in (("distillation_weighting", WEIGHTINGS), ("distillation_space", SPACES)):
            if getattr(self, setting) not in allowed:
                raise InputError(f"{setting}: got {getattr(self, setting)!r}; allowed: {', '.join(allowed)}")
        check_share("augmentation", self.augmentation, "0 is none")

    def networks(self, teacher: Teacher) -> dict[str, nn.Module]:
        """Creates the discriminator, its feature network and the decoder.

        Raises:
            InputError: see `load_feature_network`.
        """
        trunk = load_feature_network(self.feature_network, self.feature_resolution)
        cond = teacher.conditioner.encode(["0"])  # a prompt, or a class
        text_width = pooled_text(cond, 1, teacher.denoiser.classes).shape[1]
        width = text_width + (trunk.width if self.condition_on_image else 0)
        return {
            "discriminator": Discriminator(trunk.channels, width),
            "trunk": trunk,
            "decoder": Decoder(teacher, recompute=self.recompute),
        }

    def stamp(self, models: Models) -> dict[str, str]:
        """The identity of the feature network, weights included."""
        return {"feature_weights": models.trunk.identity}

    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """Returns L_D for the discriminator, L_G for the student."""
        x_t, t, cond, known = self.drawn(batch, models, clock)
        if phase == "discriminator":
            return self._judge(batch, models, x_t, t, cond, known)
        return self._deceive(batch, models, x_t, t, cond, known)

    def _judge(
        self, batch: Batch, models: Models, x_t: Tensor, t: Tensor, cond: Cond, known: Tensor
    ) -> Loss:  # fmt: skip
        size = len(x_t)
        with torch.no_grad():
            fake = models.decoder(models.student(x_t, t, cond, kind="x0"))
            real = self._real(batch, models)
            condition = self._condition(batch, known, models)
            images = torch.cat([augment(pictures, batch.draws, self.augmentation) for pictures in (real, fake)])
            maps, _ = models.trunk(images)
        logits, penalty = models.discriminator(maps, torch.cat([condition, condition]), size if self.r1_weight else 0)
        of_real, of_fake = [each[:size] for each in logits], [each[size:] for each in logits]
        adversarial = LOSSES[self.adversarial_loss][0](of_real, of_fake)
        terms = {"discriminator": adversarial.detach(), "r1": penalty.detach(), **mean_logits(of_real, of_fake)}
        return Loss(adversarial + self.r1_weight * penalty, terms)

    def _deceive(
        self, batch: Batch, models: Models, x_t: Tensor, t: Tensor, cond: Cond, known: Tensor
    ) -> Loss:  # fmt: skip
        student_x0 = models.student(x_t, t, cond, kind="x0")
        fake = models.decoder(student_x0)
        condition = self._condition(batch, known, models)
        maps, _ = models.trunk(augment(fake, batch.draws, self.augmentation))
        logits, _ = models.discriminator(maps, condition)
        adversarial = LOSSES[self.adversarial_loss][1](logits)
        terms = {"adversarial": adversarial.detach()}
        if not self.distillation_weight:
            return Loss(adversarial, terms)
        distillation = self._distillation(batch, models, student_x0, fake)
        terms["distillation"] = distillation.detach()
        return Loss(adversarial + self.distillation_weight * distillation, terms)

    def _real(self, batch: Batch, models: Models) -> Tensor:
        """The batch's own images, decoded once for both phases."""
        with torch.no_grad():
            return batch.once("real", lambda: models.decoder(batch.x0))

    def _condition(self, batch: Batch, known: Tensor, models: Models) -> Tensor:
        """The discriminator's condition (B, D): the pooled text or the class, and the normalised embedding of the real
        image, zero for samples whose x_t contains nothing of it."""
        text = pooled_text(batch.cond, len(known), models.student.classes).to(known.device)
        if not self.condition_on_image:
            return text
        with torch.no_grad():
            embedding = batch.once("embedding", lambda: models.trunk(self._real(batch, models))[1])
        return torch.cat([text, F.layer_norm(embedding, embedding.shape[1:]) * known[:, None]], 1)

    def _distillation(self, batch: Batch, models: Models, student_x0: Tensor, fake: Tensor) -> Tensor:
        """The mean of c(u) (x0_hat - teacher_x0)², with no gradient through the teacher or its input."""
        schedule, draws = models.teacher.schedule, batch.draws
        with torch.no_grad():
            levels = _levels(schedule, draws.device)
            u = levels[draws.integers(len(levels))]
            eps = draws.normal(*student_x0.shape[1:]).to(student_x0.dtype)
            x_u = schedule.add_noise(student_x0.detach(), eps, u)
            target = guided(models.teacher, x_u, u, batch.cond, batch.uncond, self.guidance, kind="x0")
            if self.distillation_space == "pixels":
                target = models.decoder(target)
        ours = fake if self.distillation_space == "pixels" else student_x0
        c = distillation_weight(self.distillation_weighting, u, schedule)
        return (match(c, ours) * (ours - target).square()).float().mean()
