"""Students that jump from a few fixed times straight to the clean end, as trained by adversarial distillation.

    t  in the N times that an N-step sampler visits; x_t is pure noise at the noisiest, as at the start of sampling
    x0 = student(x_t, t),   and to continue:   x_s = alpha_s x0 + sigma_s eps   with new noise (Sauer et al. 2023, 2024)

This is multistep consistency sampling with c_skip = 0, so diffusers' LCMScheduler and FlowMatchLCMScheduler apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Clock, FrozenDenoiser, Method, Models, check_share
from stepdistill.methods.consistency import lcm_times, own_answers, sample_lcm
from stepdistill.methods.schedulers import lcm_scheduler
from stepdistill.schedules import Schedule, from_noise, match
from stepdistill.timegrid import Grid

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

ORIGIN = 40  # points of LCMScheduler's own grid; 1, 2, 4, 5 and 8 steps divide it evenly
SCALING = 10.0  # LCMScheduler's default: c_skip is below 1e-6 from t = 50 of 1000 on


@dataclass(frozen=True)
class Jumper(Method):
    """What the adversarial methods share.

    Args:
        student_steps: N, the number of times the student is trained at.
        curriculum_share: the share of the run over which the noisiest time's weight rises to `last_weight` (the
            student-time curriculum); 0 for no curriculum.
        last_weight: final probability of the noisiest time relative to each of the others.
        backward_simulation: the share of samples whose x_t is noised from the student's own one-step output instead of
            an image, as its second step will receive it (Yin et al. 2024). 0 in the papers.
        discriminator_warmup: initial updates that train the discriminator alone. Untrained heads would lead a
            well-initialised student astray.
        guidance: scale that a guidance-conditioned student (Flux) is trained and sampled with.

    Raises:
        InputError: a setting out of range.
    """

    student_steps: int = 4
    curriculum_share: float = 0.0
    last_weight: float = 1.0
    backward_simulation: float = 0.0
    discriminator_warmup: int = 0
    guidance: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.student_steps <= ORIGIN:
            raise InputError(f"student_steps: got {self.student_steps}; allowed: 1 to {ORIGIN}; the papers use 4")
        check_share("curriculum_share", self.curriculum_share, "0 is no curriculum")
        check_share("backward_simulation", self.backward_simulation, "0 is none, as the papers, try 0.5")
        if self.discriminator_warmup < 0:
            got = self.discriminator_warmup
            raise InputError(f"discriminator_warmup: got {got}; allowed: 0 or more; 0 is none, as the papers")
        if not 0 < self.last_weight < math.inf:
            raise InputError(f"last_weight: got {self.last_weight:g}; allowed: above 0; 1 is all times alike")
        if not 1 <= self.guidance < math.inf:
            raise InputError(f"guidance: got {self.guidance:g}; allowed: 1 or more; 1 means no guidance, try 4")

    @property
    def steps(self) -> int:
        """See Method."""
        return self.student_steps

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The discriminator, then the student; the discriminator alone in its warm-up."""
        return ("discriminator",) if clock.update < self.discriminator_warmup else ("discriminator", "student")

    def guidance_scale(self, student: Denoiser) -> float:
        """The scale to sample with: `guidance` for a guidance-conditioned student, else 1.0."""
        return self.guidance if student.takes_guidance else 1.0

    def times(self, schedule: Schedule, grid: Grid) -> Tensor:
        """The student's times, descending, (N,) float64."""
        return torch.tensor(lcm_times(schedule, self.student_steps, ORIGIN, grid.shift), dtype=torch.float64)

    def draw_times(self, draws: Draws, schedule: Schedule, grid: Grid, clock: Clock) -> Tensor:
        """One of the student's times for each sample, (B,) float64."""
        times = self.times(schedule, grid).to(draws.device, non_blocking=True)
        risen = min(1.0, clock.update / (self.curriculum_share * clock.total)) if self.curriculum_share else 1.0
        first = 1 + (self.last_weight - 1) * risen
        u = draws.uniform().double() * (first + len(times) - 1)  # the noisiest has [0, first), each other time one unit
        return times[(u - first + 1).floor().clamp(0, len(times) - 1).long()]

    def noised(self, schedule: Schedule, grid: Grid, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps; at the noisiest time pure noise, scaled as at the start of sampling."""
        top = t >= self.times(schedule, grid)[0].item()
        return torch.where(match(top, x0) > 0, from_noise(schedule, eps, t), schedule.add_noise(x0, eps, t))

    def drawn(self, batch: Batch, models: Models, clock: Clock) -> tuple[Tensor, Tensor, Cond, Tensor]:
        """The student's input: x_t, t, and the condition, with guidance if the student is guidance-conditioned; and
        whether x_t contains the batch's own image, (B,) bool."""
        schedule, grid, draws = models.teacher.schedule, models.teacher.grid, batch.draws
        t = self.draw_times(draws, schedule, grid, clock)
        eps = draws.normal(*batch.x0.shape[1:]).to(batch.x0.dtype)
        cond = self.with_guidance(models.student, batch.cond, len(t), batch.x0.device)
        top = self.times(schedule, grid)[0].item()
        x0, known = batch.x0, t < top
        if self.backward_simulation:
            first = torch.full_like(t, top)

            def answer(x_T: Tensor) -> Tensor:
                return models.student(x_T, first, cond, kind="x0")

            x0, simulated = own_answers(x0, self.backward_simulation, draws, schedule, top, answer)
            known = known & ~simulated
        return self.noised(schedule, grid, x0, eps, t), t, cond, known

    def with_guidance(self, denoiser: Denoiser | FrozenDenoiser, cond: Cond, size: int, device: torch.device) -> Cond:
        """The condition of a batch, with guidance - 1 added for a guidance-conditioned network."""
        if not denoiser.takes_guidance:
            return cond
        return cond | {"guidance": torch.full((size,), self.guidance - 1, device=device)}

    def sample(self, student: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws) -> Tensor:
        """Jumps to the clean end, adds noise, repeats; with `guidance_scale` if guidance-conditioned."""
        cond = self.with_guidance(student, cond, len(x_T), x_T.device)
        steps = min(steps, ORIGIN)
        return sample_lcm(student, x_T, cond, steps=steps, draws=draws, original_steps=ORIGIN, timestep_scaling=SCALING)

    def scheduler(self, teacher: Teacher):
        """diffusers' LCMScheduler on the teacher's betas, or FlowMatchLCMScheduler with its shift."""
        return lcm_scheduler(teacher, solver_steps=ORIGIN, timestep_scaling=SCALING)
