"""Distance of a UNet from its teacher's paths of twice as many steps: over whole paths, and one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepdistill.baselines.architecture.measure import held_batches
from stepdistill.baselines.architecture.unets import Samples, around, conditions
from stepdistill.baselines.base import Batch
from stepdistill.baselines.reduce import masked_mean
from stepdistill.denoiser.base import Denoiser
from stepdistill.methods.progressive import Progressive, halving_times, one_step_x0, x0_of
from stepdistill.schedules import from_noise, match
from stepdistill.solvers import Denoise, ddim

MOST = 128  # held-out samples that paths are computed for


@dataclass(frozen=True)
class Paths:
    """The teacher's guided DDIM paths of twice `steps` steps, for at most 128 held-out captions; computed once.

    Attributes:
        steps: of the networks that are compared with them. guidance: scale of these and of the teacher; 1 for none.
    """

    teacher: Denoiser
    held: Samples
    steps: int
    guidance: float

    @torch.no_grad()
    def errors(self, unet: nn.Module) -> dict[str, float]:
        """Mean squared errors in latents, guided as the teacher is.

        `path_error`: of the end of the UNet's `steps` steps, from the noise that the teacher's path starts from. One
        sample that took another branch (green hair for red, if the caption says neither) counts as much as many that
        are slightly off. `step_error`: the loss that a step is distilled with, max(SNR, 1) |x0 - x0~|², with x_t on
        the teacher's path and x0~ where its two steps from there lead; the mean over the steps.
        """
        network, times, count = around(self.teacher, unet), self._times(self.steps), 0
        path = step = 0.0
        for batch, points in self._drawn:
            denoise = self._denoise(network, batch)
            x = points[0]
            for i, (t, s) in enumerate(pairwise(times)):
                x0 = denoise(points[i], t) - one_step_x0(self.teacher.schedule, points[i], points[i + 1], t, s)
                weight = Progressive(self.steps).weight(self.teacher.schedule, t)
                step += len(x) * masked_mean(match(weight, x0) * x0.square()).item() / self.steps
                x = ddim(denoise, x, t, s)
            path += len(x) * masked_mean((x - points[-1]).square()).item()
            count += len(x)
        return {"path_error": path / count, "step_error": step / count}

    @cached_property
    def _drawn(self) -> list[tuple[Batch, list[Tensor]]]:
        """Batches, and every other point of the teacher's paths, noise first: steps + 1 tensors (B, ...)."""
        held = Samples(self.held.cache, self.held.first, min(self.held.count, MOST))
        drawn, times = [], self._times(2 * self.steps)
        for batch in held_batches(held, next(self.teacher.backbone.parameters()).device):
            denoise, x = self._denoise(self.teacher, batch), batch.draws.normal(*batch["x0"].shape[1:])
            points = [from_noise(self.teacher.schedule, x, times[0])]
            for t, s in pairwise(times):
                points.append(ddim(denoise, points[-1], t, s))
            drawn.append((batch, points[::2]))
        return drawn

    def _times(self, steps: int) -> Tensor:
        return halving_times(self.teacher.schedule, steps, self.teacher.grid)

    def _denoise(self, network: Denoiser, batch: Batch) -> Denoise:
        cond, uncond = (conditions(batch, kind) for kind in ("cond", "uncond"))
        return Denoise(lambda x, t: x0_of(network, x, t, cond, uncond, self.guidance), self.teacher.schedule)
