"""Latent adversarial diffusion distillation, LADD (Sauer et al. 2024).

The student jumps from one of N times to the clean end. Its latents are held against real ones, the data's or the
teacher's own, by a discriminator that sees both noised again, through the frozen teacher:

    x0_hat = student(x_t, t)                               x_t a noised real latent, pure noise at the noisiest t
    F_k(x) = block k of teacher(x_u, u),  x_u = alpha_u x + sigma_u eps,  log(sigma_u / alpha_u) ~ Normal(m, s²)
    L_D    = E max(0, 1 - D_k(F_k(real), u, text)) + E max(0, 1 + D_k(F_k(x0_hat), u, text)) + gamma R1
    L_G    = -E D_k(F_k(x0_hat), u, text) + rho smooth_l1(x0_hat, real)

averaged over the blocks k. Much noise (large m) makes it judge the composition, little the texture. Nothing is decoded,
and the gradient of L_G reaches the student through the teacher. On the teacher's own latents adversarial training alone
is enough, as in the paper; rho is for data, and counts only where x_t says something of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import features
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Clock, Loss, Models, Role
from stepdistill.methods.discriminators import (
    LOSSES,
    NOISE_FEATURES,
    Heads,
    Logits,
    approximate_r1,
    check_loss,
    laid_out,
    noise_features,
    pooled_text,
)  # fmt: skip
from stepdistill.methods.jumps import Jumper
from stepdistill.schedules import match
from stepdistill.timegrid import logit_normal

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


class Discriminator(nn.Module):
    """Two-dimensional heads on a teacher's token maps, told by projection the noise level and the pooled text.

    Args:
        channels: of each map. text: width of the pooled text.
    """

    def __init__(self, channels: Sequence[int], text: int = 0) -> None:
        super().__init__()
        self.heads = Heads(channels, NOISE_FEATURES + text, planar=True)

    def forward(self, maps: Sequence[Tensor], level: Tensor, text: Tensor, size: Sequence[int]) -> Logits:
        """Maps (B, N, C) of latents of sides `size`, noise_features (B, F), text (B, P): logits (B, N) map by map."""
        return self.heads(maps, torch.cat([level, text], 1), size)


@dataclass(frozen=True)
class LatentAdversarial(Jumper):
    """Latent adversarial diffusion distillation. Its student times and their settings are Jumper's.

    Args:
        blocks: names of the teacher's submodules that are judged; none is four spread over its depth.
        logit_mean, logit_std: m and s. The resolution shift of the teacher's grid is added to m as log(shift).
        adversarial_loss: "hinge" or "softplus", which is binary cross-entropy.
        r1_weight: gamma, of the approximate R1 on the noised input; 0 is none.
        r1_size: standard deviation of the noise it is measured with.
        reconstruction_weight: rho; 0 is none.

    Raises:
        InputError: a setting out of range, or an unknown name.
    """

    blocks: tuple[str, ...] = ()
    logit_mean: float = 0.0
    logit_std: float = 1.0
    adversarial_loss: str = "hinge"
    r1_weight: float = 0.0
    r1_size: float = 0.01
    reconstruction_weight: float = 0.0

    name: ClassVar[str] = "ladd"
    roles: ClassVar[dict[str, Role]] = {
        "teacher": Role.FROZEN, "student": Role.TRAINED, "discriminator": Role.TRAINED,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.adversarial_loss)
        for setting in ("r1_weight", "reconstruction_weight"):
            if not 0 <= getattr(self, setting) < math.inf:
                raise InputError(f"{setting}: got {getattr(self, setting):g}; allowed: 0 or more; 0 is none")
        for setting in ("logit_std", "r1_size"):
            if not 0 < getattr(self, setting) < math.inf:
                raise InputError(f"{setting}: got {getattr(self, setting):g}; allowed: above 0")
        if not math.isfinite(self.logit_mean):
            raise InputError(f"logit_mean: got {self.logit_mean:g}; allowed: any finite number; 0 is even noise")

    def networks(self, teacher: Teacher) -> dict[str, nn.Module]:
        """The discriminator, as wide as the chosen blocks are in one forward of the teacher.

        Raises:
            InputError: see `features.check_blocks`; or a block returns no map of the picture.
        """
        denoiser = teacher.denoiser
        blocks = features.check_blocks(denoiser.backbone, self.blocks)
        device = next(denoiser.parameters()).device
        cond = {key: value.to(device) for key, value in teacher.conditioner.encode(["0"]).items()}  # a prompt or class
        x = torch.zeros(1, *denoiser.sample_shape, device=device)
        half = denoiser.schedule.time_at(0.0).item()
        with torch.no_grad():
            maps = features.read(denoiser, x, half, self.told(denoiser, cond, 1, device), blocks)
        for tokens in maps:
            laid_out(tokens, x.shape[2:])
        text = pooled_text(cond, 1, denoiser.classes).shape[1]
        return {"discriminator": Discriminator([m.shape[2] for m in maps], text)}

    def stamp(self, models: Models) -> dict[str, str]:
        """The blocks that were judged."""
        return {"judged_blocks": ", ".join(features.check_blocks(models.student.backbone, self.blocks))}

    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """L_D or L_G. Each draws numbers of its own, so the student is not judged on what was learnt from just now."""
        x_t, t, cond, known = self.drawn(batch, models, clock)
        if phase == "discriminator":
            with torch.no_grad():
                fake = models.student(x_t, t, cond, kind="x0")
            return self._judge(batch, models, fake)
        return self._deceive(batch, models, models.student(x_t, t, cond, kind="x0"), known)

    def _judge(self, batch: Batch, models: Models, fake: Tensor) -> Loss:
        u = self._levels(batch, models)
        views = [self._noised_again(batch, models, x, u) for x in (batch.x0, fake)]
        if self.r1_weight:
            views.append(views[0] + self.r1_size * batch.draws.normal(*fake.shape[1:]))
        with torch.no_grad():
            seen = self._seen(batch, models, torch.cat(views), u)
        logits = models.discriminator(*seen)  # one call: a wrapped network is called once for each backward
        real, false, *shaken = zip(*(each.chunk(len(views)) for each in logits), strict=True)
        adversarial = LOSSES[self.adversarial_loss][0](real, false)
        terms = {"discriminator": adversarial.detach()}
        if not shaken:
            return Loss(adversarial, terms)
        penalty = approximate_r1(real, shaken[0], self.r1_size)
        return Loss(adversarial + self.r1_weight * penalty, terms | {"r1": penalty.detach()})

    def _deceive(self, batch: Batch, models: Models, fake: Tensor, known: Tensor) -> Loss:
        u = self._levels(batch, models)
        logits = models.discriminator(*self._seen(batch, models, self._noised_again(batch, models, fake, u), u))
        adversarial = LOSSES[self.adversarial_loss][1](logits)
        terms = {"adversarial": adversarial.detach()}
        if not self.reconstruction_weight:
            return Loss(adversarial, terms)
        reconstruction = (match(known, fake) * F.smooth_l1_loss(fake, batch.x0.to(fake.dtype), reduction="none")).mean()
        return Loss(
            adversarial + self.reconstruction_weight * reconstruction,
            terms | {"reconstruction": reconstruction.detach()},
        )

    def _levels(self, batch: Batch, models: Models) -> Tensor:
        """u, (B,) float64."""
        m = self.logit_mean + math.log(models.teacher.grid.shift)
        return logit_normal(models.teacher.schedule, m, self.logit_std)(batch.draws)

    def _noised_again(self, batch: Batch, models: Models, x: Tensor, u: Tensor) -> Tensor:
        """x_u, with noise of its own."""
        return models.teacher.schedule.add_noise(x, batch.draws.normal(*x.shape[1:]), u)

    def _seen(
        self, batch: Batch, models: Models, x_u: Tensor, u: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Sequence[int]]:
        """What the discriminator is given of noised latents (k B, ...), k views of the batch one after the other."""
        times = len(x_u) // len(u)
        cond = self.told(models.teacher, batch.cond, len(u), x_u.device)
        cond = {key: torch.cat([value] * times) for key, value in cond.items()}
        u = torch.cat([u] * times)
        maps = models.teacher.features(x_u, u, cond, self.blocks)
        level = noise_features(*models.teacher.schedule.coeffs(u))
        text = pooled_text(cond, len(u), models.student.classes).to(x_u.device)
        return maps, level.to(x_u.device), text, x_u.shape[2:]
