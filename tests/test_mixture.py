"""A whole LCM run held against the truth: eight modes in the plane, whose teacher and ODE are known exactly."""

from __future__ import annotations

import math

import torch
from torch import nn

from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.consistency import LatentConsistency, consistency
from stepdistill.schedules import Cosine
from stepdistill.training.roles import Models

MODES = 8
STD = 0.15


class Plane(Denoiser):
    """A small network on points of the plane, given sin and cos of its clock; predicts v."""

    def __init__(self, schedule, width: int = 192) -> None:
        layers = [nn.Linear(2 + 8, width), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.SiLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(width, 2)), schedule, "v")
        self.sample_shape = (2,)

    def evaluate(self, x_t, clock, cond):
        angle = clock[:, None] * (math.pi / 2) * 2.0 ** torch.arange(4)
        return self.backbone(torch.cat([x_t, angle.sin(), angle.cos()], 1))


def ring(schedule) -> GaussianMixtureDenoiser:
    angle = torch.arange(MODES) * 2 * math.pi / MODES
    means = torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2)
    return GaussianMixtureDenoiser(means, STD, None, schedule)


def test_the_one_step_student_reaches_the_exact_ode_map_in_all_modes():
    schedule = Cosine()
    teacher = ring(schedule)
    torch.manual_seed(0)
    student = Plane(schedule)
    models = Models(teacher, student, target_decay=0.95)
    method = LatentConsistency(guidance_min=1.0, guidance_max=1.0, solver_steps=25, huber_c=0.1)
    updates, size = 5000, 512
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - update / updates)
        x0 = teacher.sample(size, torch.Generator().manual_seed(update))
        seeds = torch.Generator().manual_seed(update + 10**6)
        batch = Batch(x0, {}, {}, OneDraw(seeds, size))
        method.loss("student", batch, models, Clock(update, updates)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        models.after_update()

    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(7))
    start = torch.full((4000,), schedule.t_max)
    exact = teacher.flow(noise, schedule.t_max, schedule.t_min, tolerance=1e-6)
    with torch.no_grad(), models.averages.in_place():
        ours = consistency(student, noise, start, {}, method.timestep_scaling)
    error = (ours - exact).norm(dim=1).median().item()
    spread = teacher.sample(20000, torch.Generator().manual_seed(1)).std().item()
    assert error < spread / 10, f"median error {error:.4f} of a spread of {spread:.4f}"
    counts = torch.bincount((ours[:, None] - teacher.means).norm(dim=2).argmin(1), minlength=MODES)
    share = counts / counts.sum()
    deviation = math.sqrt(1 / MODES * (1 - 1 / MODES) / len(ours))
    assert (share - 1 / MODES).abs().max() < 4 * deviation, share


class OneDraw(Draws):
    """Draws from one generator for the batch: this test needs speed, not resumability."""

    def __init__(self, generator: torch.Generator, size: int) -> None:
        self.generators, self.device, self.generator = [generator] * size, torch.device("cpu"), generator

    def normal(self, *shape):
        return torch.randn(len(self), *shape, generator=self.generator)

    def uniform(self):
        return torch.rand(len(self), generator=self.generator)

    def integers(self, high):
        return torch.randint(high, (len(self),), generator=self.generator)
