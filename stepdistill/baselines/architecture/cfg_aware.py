"""SnapFusion's loss (Li et al. 2023, section 3.2): one step for the teacher's two, guided or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.baselines.architecture.unets import UNets, conditions, task_loss
from stepdistill.baselines.base import Batch, Objective
from stepdistill.baselines.reduce import masked_mean
from stepdistill.methods.base import Clock, Loss
from stepdistill.methods.progressive import Progressive, halving_times, on_grid, two_step_x0, x0_of
from stepdistill.schedules import match


@dataclass(frozen=True)
class CFGAware(Objective):
    """L = L_dstl + gamma L_ori (equation 11), at the times of `steps` steps.

    L_dstl is max(SNR, 1) |x0 - x0~|², x0~ where the teacher's two DDIM steps go (equation 9). In a share `guided_share`
    of the updates, evenly spread, teacher and student are both guided, with a scale drawn from `guidance` for each
    sample (equation 10); in the others neither is. L_ori is the usual training loss of diffusion models.

    Args:
        steps: of the student. original_weight: gamma; with `balanced`, L_ori is first scaled to the size of L_dstl.
    """

    steps: int
    guidance: tuple[float, float] = (2.0, 14.0)
    guided_share: float = 0.1
    original_weight: float = 0.2
    balanced: bool = True
    caption_dropout: float = 0.0

    def guided(self, update: int) -> bool:
        """Whether an update is one of the guided ones."""
        return int((update + 1) * self.guided_share + 1e-9) > int(update * self.guided_share + 1e-9)

    def loss(self, phase: str, batch: Batch, models: UNets, clock: Clock) -> Loss:
        """The loss of the student."""
        guided, distance = self.guided(clock.update), self.distillation(batch, models, clock)
        terms = {"guided" if guided else "vanilla": distance.detach()}
        if not self.original_weight:
            return Loss(distance, terms)
        original = task_loss(models.denoiser("student"), batch, self.caption_dropout)
        size = (distance / original).detach() if self.balanced else 1.0
        return Loss(distance + self.original_weight * size * original, terms | {"original": original.detach()})

    def distillation(self, batch: Batch, models: UNets, clock: Clock) -> Tensor:
        """L_dstl of one update, scalar."""
        student, teacher, draws = models.denoiser("student"), models.denoiser("teacher"), batch.draws
        schedule, x0 = teacher.schedule, batch["x0"]
        points = halving_times(schedule, 2 * self.steps, teacher.grid).to(draws.device, non_blocking=True)
        index = 2 * draws.integers(self.steps)
        low, high = self.guidance
        drawn = low + (high - low) * draws.uniform()
        scale = drawn if self.guided(clock.update) else 1.0
        x_t = on_grid(schedule, x0, draws.normal(*x0.shape[1:]).to(x0.dtype), points, index)
        t, m, s = (points[index + i] for i in range(3))
        cond, uncond = conditions(batch, "cond"), conditions(batch, "uncond")
        with torch.no_grad():
            target_x0 = two_step_x0(teacher, x_t, (t, m, s), cond, uncond, scale)
        error = (x0_of(student, x_t, t, cond, uncond, scale) - target_x0).square()
        return masked_mean(match(Progressive(self.steps).weight(schedule, t), error) * error)
