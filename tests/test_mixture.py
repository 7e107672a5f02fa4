"""A whole LCM run held against the truth: eight modes in the plane, whose teacher and ODE are known exactly."""

from __future__ import annotations

import math

import torch
from plane import MODES, OneDraw, Plane, ring

from stepdistill.methods.base import Batch, Clock
from stepdistill.methods.consistency import LatentConsistency, consistency
from stepdistill.schedules import Cosine
from stepdistill.training.roles import Models


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
