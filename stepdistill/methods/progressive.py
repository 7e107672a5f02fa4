"""Progressive distillation (Salimans and Ho 2022), of guided teachers too (Meng et al. 2023).

A student of N steps learns to do in one DDIM step what its teacher does in two. For three neighbours t, m, s on the
teacher's grid of 2N steps, of which t and s are neighbours on the student's:

    x_t = alpha_t x0 + sigma_t eps                                     pure noise at the noisiest t
    x_m = step(teacher, x_t, t -> m),   x_s = step(teacher, x_m, m -> s)
    x0~ = (x_s - k x_t) / (alpha_s - k alpha_t),   k = sigma_s / sigma_t   (appendix G: one step to x0~ lands on x_s)
    L   = w(t) |x0_student(x_t, t) - x0~|²

Then the student becomes the next teacher, and N is halved. Before the first halving, a guided teacher's guidance and
its eps prediction are distilled away at the times of the grid (x0~ is then the guided teacher's own x0): at pure noise,
eps carries no information about x0.

The paper obtains x_t by noising images. In sampling, later steps start where the student's earlier ones ended, which is
elsewhere. A share of the samples can start there instead, at the end of one step of the student from the time before
(as in backward simulation, Yin et al. 2024, and in imitation learning, Ross et al. 2011).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill import solvers
from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.guidance import guided
from stepdistill.methods.base import Batch, Clock, FrozenDenoiser, Loss, Method, Models, Role, check_share
from stepdistill.methods.schedulers import ddim_scheduler
from stepdistill.prediction import Kind, convert
from stepdistill.schedules import EDM, RectifiedFlow, Schedule, Time, from_noise, match
from stepdistill.solvers import Denoise, ddim_step
from stepdistill.timegrid import Grid, inference_times, shifted

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

WEIGHTINGS = ("truncated_snr", "snr+1")
RHO = 7.0  # of Karras et al. 2022, equation 5


def in_thousandths(schedule: Schedule, grid: Grid) -> bool:
    """Whether the student is sampled on a flow with DPMSolverMultistepScheduler, see `ddim_scheduler`."""
    return isinstance(schedule, RectifiedFlow) and grid.spacing == "linspace"


@lru_cache(maxsize=16)
def halving_times(schedule: Schedule, steps: int, grid: Grid | None = None) -> Tensor:
    """The times visited in `steps` steps: every other one of those visited in twice as many.

    Evenly spaced in t from the noisy end to the clean one, then moved by the grid's resolution shift. On EDM evenly in
    sigma^(1/7), as Karras's, but to reach sigma_min after N steps, not N - 1, where the clean end stands instead: his
    grid has no points in common with that of 2N. Flows that diffusers samples with DPMSolverMultistepScheduler start
    at 999/1000, as it does.

    Returns:
        (steps + 1,) float64 on the CPU, descending; the last is the clean end.

    Raises:
        InputError: steps below 1, or more than AlphaBar has timesteps.
    """
    if isinstance(schedule, EDM):
        ends = (level ** (1 / RHO) for level in (schedule.t_max, schedule.sigma_min))
        times = torch.linspace(*ends, steps + 1, dtype=torch.float64) ** RHO
        return torch.cat([times[:-1], times.new_zeros(1)])
    grid = grid or Grid()
    times = inference_times(schedule, steps, spacing="trailing")
    if in_thousandths(schedule, grid):
        times = (1 - 1e-3) * times
    return shifted(schedule, times, grid.shift)


def x0_of(
    denoiser: Denoiser | FrozenDenoiser,
    x_t: Tensor,
    t: Time,
    cond: Cond | None,
    uncond: Cond | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """The guided x0 at (x_t, t), as computed with diffusers' scheduler.

    On a flow DPMSolverMultistepScheduler truncates 1000 t to an integer for the network, but uses the coefficients of t
    itself. On every other grid this is `guided`.

    Args:
        scale: a float or (B,); an input of a guidance-conditioned network. See `guided`.
    """
    clock = t
    if in_thousandths(denoiser.schedule, denoiser.grid):
        clock = (1000 * torch.as_tensor(t, dtype=torch.float64) + 1e-6).floor() / 1000
    y = guided(denoiser, x_t, clock, cond, uncond, scale, kind=denoiser.kind)
    return convert(y, x_t, t, denoiser.schedule, src=denoiser.kind, dst="x0")


def one_step_x0(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Time, s: Time) -> Tensor:
    """The x0 whose DDIM step from x_t lands on x_s (Salimans and Ho 2022, appendix G); x_s itself at the clean end.

    Args:
        x_t, x_s: (B, ...). t, s: floats, () or (B,).

    Returns:
        (B, ...), float32 (float64 if x_t is).
    """
    alpha_t, sigma_t = schedule.coeffs(t)
    alpha_s, sigma_s = schedule.coeffs(s)
    k = sigma_s / sigma_t
    share = alpha_s - k * alpha_t
    return match(1 / share, x_t) * x_s - match(k / share, x_t) * x_t


def two_step_x0(
    teacher: Denoiser | FrozenDenoiser,
    x_t: Tensor,
    times: tuple[Tensor, Tensor, Tensor],
    cond: Cond | None,
    uncond: Cond | None = None,
    scale: float | Tensor = 1.0,
    *,
    solver: str = "ddim",
) -> Tensor:
    """The x0 whose DDIM step ends where the guided teacher's two steps end.

    Args:
        times: t, m and s, (B,) each. scale: see `x0_of`.
    """
    t, m, s = times
    schedule, step = teacher.schedule, solvers.get(solver)
    denoise = Denoise(lambda x, time: x0_of(teacher, x, time, cond, uncond, scale), schedule)
    return one_step_x0(schedule, x_t, step(denoise, step(denoise, x_t, t, m), m, s), t, s)


def on_grid(schedule: Schedule, x0: Tensor, eps: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """x_t at the times points[index]; at the noisiest, pure noise, as at the start of sampling.

    If the schedule's noisy end still contains a trace of the image (alpha = 0.07 for Stable Diffusion), a student
    trained on it would rely on a trace that sampling lacks.
    """
    noise = from_noise(schedule, eps, points[0])
    return torch.where(match(index == 0, eps) > 0, noise, schedule.add_noise(x0, eps, points[index]))


@dataclass(frozen=True)
class Progressive(Method):
    """One stage of progressive distillation.

    Args:
        steps: N, the student's step count.
        stage: "halve": the teacher's two steps in one. "guide": the guided teacher's x0 in one forward, in the
            student's prediction type, at the times of N steps.
        guidance_min, guidance_max: the scale is drawn uniformly from this range for each sample (1 means none), in the
            stage "guide" and, for a guidance-conditioned network, in both.
        weighting: w(t). "truncated_snr": max(SNR, 1), the larger of the errors of x0 and eps. "snr+1": the error of v,
            if alpha² + sigma² = 1.
        solver: solver of the teacher's two steps: "ddim" or "heun".
        eps_student: prediction type of an eps teacher's student: "v", "x0" or "eps"; others keep their teacher's.
        backward_simulation: of the samples past the first step, the share that start where a step of the student's own
            ended, as they do in sampling (Yin et al. 2024). 0 in the papers.
        embed_guidance: the student takes the scale as an input through `time_cond_proj_dim` (full students only).

    Raises:
        InputError: a setting out of range.
    """

    steps: int = 1
    stage: Literal["guide", "halve"] = "halve"
    guidance_min: float = 1.0
    guidance_max: float = 1.0
    weighting: str = "truncated_snr"
    solver: str = "ddim"
    eps_student: Kind = "v"
    backward_simulation: float = 0.0
    embed_guidance: bool = False

    name: ClassVar[str] = "progressive"
    roles: ClassVar[dict[str, Role]] = {"teacher": Role.FROZEN, "student": Role.TRAINED}

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: got {self.steps}; allowed: 1 or more; try 4")
        if not 1 <= self.guidance_min <= self.guidance_max < math.inf:
            got = f"{self.guidance_min:g} to {self.guidance_max:g}"
            raise InputError(f"guidance: got {got}; allowed: 1 or more, rising; 1 means no guidance, try 2")
        check_share("backward_simulation", self.backward_simulation, "0 is none, as the paper, try 0.5")
        named = {"stage": ("guide", "halve"), "weighting": WEIGHTINGS, "solver": ("ddim", "heun"),
                 "eps_student": ("v", "x0", "eps")}  # fmt: skip
        for setting, allowed in named.items():
            if getattr(self, setting) not in allowed:
                raise InputError(f"{setting}: got {getattr(self, setting)!r}; allowed: {', '.join(allowed)}")

    def student_kind(self, teacher_kind: Kind) -> Kind:
        """The student's prediction type: `eps_student` for an eps teacher, else the teacher's."""
        return self.eps_student if teacher_kind == "eps" else teacher_kind

    def guidance_scale(self, student: Denoiser) -> float:
        """The scale to sample with: the middle of the range for a guidance-conditioned student, else 1.0."""
        return (self.guidance_min + self.guidance_max) / 2 if student.takes_guidance else 1.0

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """w(t), the weight of the squared error of x0 (section 4): float64, the shape of t."""
        alpha, sigma = schedule.coeffs(t)
        snr = (alpha / sigma).square()
        return snr + 1 if self.weighting == "snr+1" else snr.clamp(min=1)

    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """Weighted mean squared error of the student's x0 against the x0 of the teacher's steps."""
        schedule, grid, draws = models.teacher.schedule, models.teacher.grid, batch.draws
        stride = 2 if self.stage == "halve" else 1
        points = halving_times(schedule, stride * self.steps, grid).to(draws.device, non_blocking=True)
        index = stride * draws.integers(self.steps)
        t = points[index]
        scale = self.guidance_min + (self.guidance_max - self.guidance_min) * draws.uniform()
        eps = draws.normal(*batch.x0.shape[1:]).to(batch.x0.dtype)
        x_t = on_grid(schedule, batch.x0, eps, points, index)

        with torch.no_grad():
            if self.backward_simulation and self.steps > 1:
                before = (index - stride).clamp(min=0)
                x_b, b = on_grid(schedule, batch.x0, eps, points, before), points[before]
                x0 = x0_of(models.student, x_b, b, batch.cond, scale=guidance_input(models.student, scale))
                simulated = (draws.uniform() < self.backward_simulation) & (index > 0)
                x_t = torch.where(match(simulated, x_t) > 0, ddim_step(schedule, x_b, x0, b, t).to(x_t.dtype), x_t)
            if self.stage == "guide":
                fixed = self.guidance_min == self.guidance_max == 1
                target_x0 = x0_of(models.teacher, x_t, t, batch.cond, batch.uncond, 1.0 if fixed else scale)
            else:
                m, s = points[index + 1], points[index + 2]
                teacher_scale = guidance_input(models.teacher, scale)
                target_x0 = two_step_x0(
                    models.teacher, x_t, (t, m, s), batch.cond, scale=teacher_scale, solver=self.solver
                )
        student_x0 = x0_of(models.student, x_t, t, batch.cond, scale=guidance_input(models.student, scale))

        error = (student_x0 - target_x0).float().square()
        total = (match(self.weight(schedule, t), error) * error).mean()
        return Loss(total, {"distillation": total.detach()})

    @torch.no_grad()
    def sample(self, student: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws) -> Tensor:
        """DDIM on the grid of `steps`; guidance-conditioned students, at the middle of the range."""
        schedule = student.schedule
        times = halving_times(schedule, steps, student.grid)
        scale = guidance_input(student, self.guidance_scale(student))
        denoise = Denoise(lambda x, t: x0_of(student, x, t, cond, scale=scale), schedule)
        return solvers.integrate(solvers.ddim, denoise, from_noise(schedule, x_T, times[0]), times)

    def scheduler(self, teacher: Teacher):
        """Returns a diffusers scheduler that takes DDIM steps on the same grid."""
        return ddim_scheduler(teacher, kind=self.student_kind(teacher.denoiser.kind), steps=self.steps)


def guidance_input(denoiser: Denoiser | FrozenDenoiser, scale: float | Tensor) -> float | Tensor:
    """The scale for a guidance-conditioned network; 1.0 for any other, which has its guidance in its weights."""
    return scale if denoiser.takes_guidance else 1.0
