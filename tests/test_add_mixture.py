"""A whole ADD run held against the truth: the one-step student paints the data, all eight modes of it."""

from __future__ import annotations

import math

import torch
from plane import MODES, OneDraw, Plane, energy_distance, ring
from torch import Tensor, nn

from stepdistill.methods.adversarial import Adversarial, Discriminator
from stepdistill.methods.base import Batch, Clock
from stepdistill.schedules import Cosine
from stepdistill.training.roles import Models

COUNT = 250  # samples in a set


class Waves(nn.Module):
    """A frozen feature network of the plane: one map of random waves, 16 tokens of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("direction", 0.6 * torch.randn(2, 256, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(256, generator=generator))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        return [torch.cos(x @ self.direction + self.phase).unflatten(1, (16, 16))], x


def test_the_one_step_student_reaches_the_data_in_all_modes():
    schedule, updates, size, rate = Cosine(), 1500, 256, 5e-4
    teacher = ring(schedule)
    torch.manual_seed(0)
    student = Plane(schedule)
    others = {"discriminator": Discriminator([16]), "trunk": Waves(), "decoder": nn.Identity()}
    models = Models(teacher, student, target_decay=0.0, export_decay=0.995, others=others)
    method = Adversarial(
        feature_network="efficientnet_lite2", student_steps=1, condition_on_image=False, guidance=1.0, augmentation=0.0,
        adversarial_loss="softplus", r1_weight=1.0, distillation_weight=0.3,
    )  # fmt: skip
    optimizers = {
        role: torch.optim.Adam(group.values(), lr=rate * faster, betas=(0.0, 0.99))
        for (role, group), faster in zip(models.trained.items(), (1, 4), strict=True)
    }
    rates = {role: optimizer.param_groups[0]["lr"] for role, optimizer in optimizers.items()}
    for update in range(updates):
        x0 = teacher.sample(size, torch.Generator().manual_seed(update))
        clock = Clock(update, updates)
        batch = Batch(x0, {}, {}, OneDraw(torch.Generator().manual_seed(update + 10**6), size))
        for phase in method.phases(clock):
            with models.only(phase):
                method.loss(phase, batch, models, clock).total.backward()
            optimizers[phase].param_groups[0]["lr"] = rates[phase] * (1 - update / updates)
            optimizers[phase].step()
            optimizers[phase].zero_grad()
        models.after_update()

    def painted(seed: int) -> Tensor:
        noise = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(seed))
        with models.shown():
            return method.sample(student, noise, {}, steps=1, draws=OneDraw(torch.Generator(), COUNT))

    fresh = [teacher.sample(COUNT, torch.Generator().manual_seed(10**7 + i)) for i in range(16)]
    ours = [painted(i) for i in range(8)]
    distance = sum(energy_distance(a, b) for a, b in zip(ours, fresh[:8], strict=True)) / 8
    between = sum(energy_distance(a, b) for a, b in zip(fresh[:8], fresh[8:], strict=True)) / 8
    assert distance < 2 * between, f"{distance:.4f}, and {between:.4f} between two sets of data"
    share = torch.cat(ours)[:, None].sub(teacher.means).norm(dim=2).argmin(1).bincount(minlength=MODES) / (8 * COUNT)
    assert share.min() > 0.7 / MODES and share.max() < 1.3 / MODES, share
