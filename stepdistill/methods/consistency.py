"""Latent consistency distillation, LCM and LCM-LoRA (Luo et al. 2023a, 2023b).

The student learns the map f from any point of a teacher's guided ODE path to the path's clean end. The loss requires
neighbouring points of a path to have the same end:

    x_t = alpha_t x0 + sigma_t eps                          a noised image
    x_s = DDIM(teacher guided by g, x_t, t -> s)            its neighbour, k = T / solver_steps timesteps below
    L   = d(f_student(x_t, t), f_target(x_s, s))

with f(x, t) = c_skip x + c_out x0_hat, which is x itself at the clean end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.methods.base import Batch, Clock, Loss, Method, Models, Role, check_share, huber
from stepdistill.methods.schedulers import lcm_scheduler
from stepdistill.schedules import AlphaBar, RectifiedFlow, Schedule, Time, from_noise, match
from stepdistill.solvers import ddim_step
from stepdistill.timegrid import inference_times

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


def boundary_scalings(
    t: Tensor, schedule: Schedule, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of Song et al. (2023), as LCM uses them: with tau = timestep_scaling t,

        c_skip = sigma_data² / (tau² + sigma_data²),    c_out = tau / sqrt(tau² + sigma_data²).

    On AlphaBar t is the timestep index, as in diffusers' LCMScheduler; elsewhere tau is measured from the clean end, in
    thousandths of the schedule's range, so that the two agree. On RectifiedFlow x0_hat = x_t - t flow already
    equals x_t at the clean end, and FlowMatchLCMScheduler applies no scaling: c_out is 1 everywhere else.

    Returns:
        float64, the shape of t.
    """
    t = t.to(torch.float64)
    if isinstance(schedule, RectifiedFlow):
        c_skip = (t <= schedule.t_min).to(torch.float64)
        return c_skip, 1 - c_skip
    if isinstance(schedule, AlphaBar):
        index = t.clamp(min=0)
    else:
        index = 1000 * (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    tau = timestep_scaling * index
    return sigma_data**2 / (tau**2 + sigma_data**2), tau / (tau**2 + sigma_data**2).sqrt()


def consistency(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, timestep_scaling: float) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x0_hat: (B, ...) float32 (float64 if x_t is)."""
    c_skip, c_out = boundary_scalings(t, denoiser.schedule, timestep_scaling=timestep_scaling)
    return match(c_skip, x_t) * x_t + match(c_out, x_t) * denoiser(x_t, t, cond, kind="x0")


def lcm_times(schedule: Schedule, steps: int, original_steps: int = 50, shift: float = 1.0) -> list[float]:
    """The times of diffusers' LCMScheduler: `steps` of the `original_steps` points, evenly spaced from the noisy end.

    On a flow they are evenly spaced in t, then moved by the resolution shift. Flux's pipeline requests these times;
    Stable Diffusion 3's and Sana's need them passed as `sigmas`, since the last of their default times is 1/1000.

    Args:
        original_steps: number of points on the teacher's path that the student was trained at.
        shift: resolution shift of the pipeline's grid; unused on AlphaBar.

    Raises:
        InputError: more steps than points, or more points than AlphaBar has timesteps.
    """
    if isinstance(schedule, AlphaBar) and not 1 <= original_steps <= schedule.t_max + 1:
        count = int(schedule.t_max) + 1
        raise InputError(f"original_steps: got {original_steps}; allowed: 1 to {count} on {schedule}; try 50")
    if not 1 <= steps <= original_steps:
        points = f"1 to {original_steps}, the points the student was trained at"
        raise InputError(f"steps: got {steps}; allowed: {points}; try 4")
    if isinstance(schedule, AlphaBar):
        k = (int(schedule.t_max) + 1) // original_steps
        origin = [(i + 1) * k - 1 for i in range(original_steps)]
        return [origin[::-1][i * original_steps // steps] for i in range(steps)]
    return inference_times(schedule, steps, shift=shift)[:-1].tolist()


@torch.no_grad()
def sample_lcm(
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Cond,
    *,
    steps: int,
    draws: Draws | None = None,
    noises: Sequence[Tensor] | None = None,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Tensor:
    """Multistep consistency sampling (Luo et al. 2023a, algorithm 3): jump to the clean end, add noise, repeat.

    Args:
        x_T: (B, C, H, W) unit normal.
        cond: conditions, batch size B; with `guidance` (B,) = scale - 1 for a w-conditioned student.
        draws: random numbers for re-noising; or `noises`, one (B, C, H, W) for each step except the last.
        original_steps, timestep_scaling: the student's training settings (`solver_steps`, `timestep_scaling`).

    Returns:
        x0 (B, C, H, W) float32.

    Raises:
        InputError: steps out of range, or several steps without `draws` or enough `noises`.
    """
    schedule = denoiser.schedule
    times = lcm_times(schedule, steps, original_steps, denoiser.grid.shift)
    if steps > 1 and draws is None and (noises is None or len(noises) < steps - 1):
        got = f"{len(noises or ())} noises for {steps} steps"
        raise InputError(f"noise: got {got}; allowed: {steps - 1}, or draws; pass draws")
    x = from_noise(schedule, x_T, times[0])
    for i, t in enumerate(times):
        t_batch = torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
        x0 = consistency(denoiser, x, t_batch, cond, timestep_scaling)
        if i + 1 == steps:
            break
        eps = noises[i] if noises is not None else draws.normal(*x.shape[1:])
        x = schedule.add_noise(x0, eps, float(times[i + 1]))
    return x0


@torch.no_grad()
def own_answers(
    x0: Tensor, share: float, draws: Draws, schedule: Schedule, t: Time, answer: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Replaces a share of clean images by a student's own one-step outputs, which multistep sampling continues from
    (backward distillation, Kohler et al. 2024; backward simulation, Yin et al. 2024).

    Args:
        x0: (B, ...). t: the noisiest time. answer: maps x_T (B, ...) at that time to x0.

    Returns:
        The images (B, ...), and which of them are the student's own, (B,) bool.
    """
    own = draws.uniform() < share
    x_T = from_noise(schedule, draws.normal(*x0.shape[1:]).to(x0.dtype), t)
    return torch.where(match(own, x0) > 0, answer(x_T).to(x0.dtype), x0), own


@lru_cache(maxsize=8)
def _points(schedule: Schedule, steps: int, shift: float) -> Tensor:
    """The clean end and the points of the teacher's path, (steps + 1,), ascending."""
    return inference_times(schedule, steps, shift=shift).flip(0)


@dataclass(frozen=True)
class LatentConsistency(Method):
    """Latent consistency distillation.

    Args:
        guidance_min, guidance_max: the teacher's guidance scale is drawn uniformly from this range for each sample
            (1 means none; the papers' w is one less). Equal ends fix it.
        solver_steps: points on the teacher's path; k = T / solver_steps.
        loss_type: "huber" or "l2".
        huber_c: c of the pseudo-Huber loss.
        weighting: "x0" compares the ends directly, as the papers do; "v" divides their difference by
            sigma_t / sqrt(alpha_t² + sigma_t²), the share of a v-predicting network's output in its x0. All times then
            move such a network equally, and learning at high noise does not degrade its predictions at low noise,
            where every multistep sample ends.
        backward_simulation: the share of samples whose x_t is noised from the target's own one-step output instead of
            an image, as in multistep sampling (Yin et al. 2024; backward distillation in Kohler et al. 2024). The
            teacher's path from there corrects the blur of the first step. 0 in the LCM papers.
        timestep_scaling: how fast c_skip falls with distance from the clean end.
        embed_guidance: the student takes w as an input through `time_cond_proj_dim` (full students only).

    Raises:
        InputError: a guidance below 1 or an empty range, or another setting out of range.
    """

    guidance_min: float = 4.0
    guidance_max: float = 16.0
    solver_steps: int = 50
    loss_type: str = "huber"
    huber_c: float = 1e-3
    weighting: str = "x0"
    backward_simulation: float = 0.0
    timestep_scaling: float = 10.0
    embed_guidance: bool = False

    name: ClassVar[str] = "lcm"
    roles: ClassVar[dict[str, Role]] = {"teacher": Role.FROZEN, "student": Role.TRAINED, "target": Role.TARGET}

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_min <= self.guidance_max < math.inf:
            got = f"{self.guidance_min:g} to {self.guidance_max:g}"
            raise InputError(f"guidance: got {got}; allowed: 1 or more, rising; 1 means no guidance, try 2")
        if self.solver_steps < 2:
            raise InputError(f"solver_steps: got {self.solver_steps}; allowed: 2 or more; the papers use 50")
        if self.loss_type not in ("huber", "l2"):
            raise InputError(f"loss: got {self.loss_type!r}; allowed: huber, l2")
        if not self.huber_c > 0:
            raise InputError(f"huber_c: got {self.huber_c:g}; allowed: above 0; the papers use 0.001")
        if self.weighting not in ("x0", "v"):
            raise InputError(f"weighting: got {self.weighting!r}; allowed: x0, v")
        check_share("backward_simulation", self.backward_simulation, "0 is none, as the papers, try 0.5")
        if not self.timestep_scaling > 0:
            raise InputError(f"timestep_scaling: got {self.timestep_scaling:g}; allowed: above 0; the papers use 10")

    def guidance_scale(self, student: Denoiser) -> float:
        """The scale to sample with: the middle of the range for a guidance-conditioned student, else 1.0."""
        return (self.guidance_min + self.guidance_max) / 2 if student.takes_guidance else 1.0

    def times(self, index: Tensor, schedule: Schedule, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """t and its lower neighbour s for path points 0 to solver_steps - 1, (B,) float64 each.

        On AlphaBar with T = 1000 and k = 20: t = 19, 39, ..., 999 and s = max(t - 20, 0). Elsewhere the points are
        those of the schedule's own sampling grid (evenly spaced in t, then moved by the teacher's resolution shift;
        Karras's on EDM), and s of the first is the clean end.
        """
        if isinstance(schedule, AlphaBar):
            count = int(schedule.t_max) + 1
            if self.solver_steps > count:
                raise InputError(f"solver_steps: got {self.solver_steps}; allowed: 2 to {count} on this teacher")
            k = count // self.solver_steps
            t = (index.to(torch.float64) + 1) * k - 1
            return t, (t - k).clamp(min=0)
        points = _points(schedule, self.solver_steps, shift).to(index.device, non_blocking=True)
        return points[index + 1], points[index]

    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """Mean Huber or L2 distance between the ends that student and target predict from x_t and x_s."""
        schedule, draws = models.teacher.schedule, batch.draws
        t, s = self.times(draws.integers(self.solver_steps), schedule, models.teacher.grid.shift)
        scale = self.guidance_min + (self.guidance_max - self.guidance_min) * draws.uniform()
        eps = draws.normal(*batch.x0.shape[1:]).to(batch.x0.dtype)
        cond = batch.cond | {"guidance": scale - 1} if models.student.takes_guidance else batch.cond

        with torch.no_grad():
            x_t = schedule.add_noise(self._begin(batch, models, cond), eps, t)
            fixed = self.guidance_min == self.guidance_max == 1
            teacher_x0 = guided(models.teacher, x_t, t, batch.cond, batch.uncond, 1.0 if fixed else scale, kind="x0")
            x_s = ddim_step(schedule, x_t, teacher_x0, t, s)
            target_x0 = consistency(models.target, x_s, s, cond, self.timestep_scaling)
        student_x0 = consistency(models.student, x_t, t, cond, self.timestep_scaling)

        difference = student_x0 - target_x0
        if self.weighting == "v":
            alpha, sigma = schedule.coeffs(t)
            difference = difference * match((alpha.square() + sigma.square()).sqrt() / sigma, difference)
        total = huber(difference, self.huber_c) if self.loss_type == "huber" else difference.float().square().mean()
        return Loss(total, {"consistency": total.detach()})

    def _begin(self, batch: Batch, models: Models, cond: Cond) -> Tensor:
        """The clean images that x_t is noised from: the batch's, or a share of them the target's output."""
        if not self.backward_simulation:
            return batch.x0
        schedule = models.teacher.schedule
        last = torch.full((len(batch.x0),), self.solver_steps - 1, device=batch.x0.device)
        t, _ = self.times(last, schedule, models.teacher.grid.shift)

        def answer(x_T: Tensor) -> Tensor:
            return consistency(models.target, x_T, t, cond, self.timestep_scaling)

        return own_answers(batch.x0, self.backward_simulation, batch.draws, schedule, t, answer)[0]

    def sample(self, student: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws) -> Tensor:
        """Multistep consistency sampling; guidance-conditioned students, at the middle of the range."""
        if student.takes_guidance:
            w = self.guidance_scale(student) - 1
            cond = cond | {"guidance": torch.full((len(x_T),), w, device=x_T.device)}
        own = {"original_steps": self.solver_steps, "timestep_scaling": self.timestep_scaling}
        return sample_lcm(student, x_T, cond, steps=min(steps, self.solver_steps), draws=draws, **own)

    def scheduler(self, teacher: Teacher):
        """diffusers' LCMScheduler on the teacher's betas, or FlowMatchLCMScheduler with its shift."""
        return lcm_scheduler(teacher, solver_steps=self.solver_steps, timestep_scaling=self.timestep_scaling)
