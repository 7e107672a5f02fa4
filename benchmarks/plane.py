"""Eight modes in the plane, whose teacher and ODE are known exactly, and small networks that learn from them.

Defines what benchmarks/mixture.py records and tests assert: each method's run, and the errors of its student.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor, nn

from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.methods.adversarial import Adversarial
from stepdistill.methods.adversarial import Discriminator as PictureDiscriminator
from stepdistill.methods.base import Batch, Clock, Method
from stepdistill.methods.consistency import LatentConsistency
from stepdistill.methods.latent_adversarial import Discriminator, LatentAdversarial
from stepdistill.methods.progressive import Progressive
from stepdistill.schedules import Cosine
from stepdistill.training.roles import Models

MODES = 8
STD = 0.15
EVERY = 100  # updates between measurements


class Plane(Denoiser):
    """A small network on points in the plane, with sin and cos features of its clock; predicts v."""

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
    """Returns the exact teacher: modes on a circle of radius sqrt(2)."""
    angle = torch.arange(MODES) * 2 * math.pi / MODES
    means = torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2)
    return GaussianMixtureDenoiser(means, STD, None, schedule)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of sets (n, D) (Székely and Rizzo 2013); above 0 even for equal laws."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


class OneDraw(Draws):
    """Draws from one generator for the whole batch: these runs need speed, not resumability."""

    def __init__(self, generator: torch.Generator, size: int) -> None:
        self.generators, self.device, self.generator = [generator] * size, torch.device("cpu"), generator

    def normal(self, *shape):
        return torch.randn(len(self), *shape, generator=self.generator)

    def uniform(self):
        return torch.rand(len(self), generator=self.generator)

    def integers(self, high):
        return torch.randint(high, (len(self),), generator=self.generator)


class Waves(nn.Module):
    """A frozen feature network on the plane: one map of random Fourier features, 16 tokens of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("direction", 0.6 * torch.randn(2, 256, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(256, generator=generator))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Maps points (B, 2) to the feature map, and returns them unchanged as the embedding."""
        return [torch.cos(x @ self.direction + self.phase).unflatten(1, (16, 16))], x


Watch = Callable[[int, Callable[[Tensor], Tensor]], None]
"""Called every EVERY updates and at the end, with the update count and the student: unit noise (n, 2) to samples."""


def _quietly(update: int, student: Callable[[Tensor], Tensor]) -> None:
    pass


def learn(
    method: Method, models: Models, *, updates: int, size: int, rates: dict[str, float], watch: Watch = _quietly,
    before: int = 0, betas: tuple[float, float] = (0.9, 0.999),
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Trains on fresh points of the ring, with learning rates falling to zero; returns the student as in `Watch`."""
    exact = ring(models.student.schedule)
    optimizers = {
        role: torch.optim.Adam(models.trained[role].values(), lr=rate, betas=betas) for role, rate in rates.items()
    }

    def student(noise: Tensor) -> Tensor:
        with models.shown() as shown, models.averages.in_place() if models.averages else nullcontext():
            return method.sample(shown, noise, {}, steps=1, draws=OneDraw(torch.Generator(), len(noise)))

    for update in range(updates):
        clock = Clock(update, updates)
        x0 = exact.sample(size, torch.Generator().manual_seed(update))
        batch = Batch(x0, {}, {}, OneDraw(torch.Generator().manual_seed(update + 10**6), size))
        for phase in method.phases(clock):
            with models.only(phase):
                method.loss(phase, batch, models, clock).total.backward()
            optimizers[phase].param_groups[0]["lr"] = rates[phase] * (1 - update / updates)
            optimizers[phase].step()
            optimizers[phase].zero_grad()
        models.after_update()
        if (update + 1) % EVERY == 0 or update + 1 == updates:
            watch(before + update + 1, student)
    return student


def lcm(watch: Watch = _quietly) -> Callable[[Tensor], Tensor]:
    """Consistency distillation of the exact teacher."""
    schedule = Cosine()
    torch.manual_seed(0)
    method = LatentConsistency(guidance_min=1.0, guidance_max=1.0, solver_steps=25, huber_c=0.1)
    models = Models(ring(schedule), Plane(schedule), target_decay=0.95)
    return learn(method, models, updates=5000, size=512, rates={"student": 2e-3}, watch=watch)


def progressive(watch: Watch = _quietly) -> Callable[[Tensor], Tensor]:
    """Progressive distillation from 16 steps to 1, four halvings of a small network; DDIM in 16 steps is 0.03 off."""
    schedule, done = Cosine(), 0
    torch.manual_seed(0)
    teacher, network = ring(schedule), Plane(schedule)
    for steps, updates in ((8, 1500), (4, 400), (2, 400), (1, 800)):
        method, models = Progressive(steps=steps), Models(teacher, network, target_decay=0)
        settings = {"updates": updates, "size": 256, "rates": {"student": 4e-3}, "before": done}
        student = learn(method, models, watch=watch, **settings)
        teacher, done = copy.deepcopy(network), done + updates
    return student


def add(watch: Watch = _quietly) -> Callable[[Tensor], Tensor]:
    """Adversarial distillation through random Fourier features, with a distillation term from the exact teacher."""
    schedule = Cosine()
    torch.manual_seed(0)
    student = Plane(schedule)
    others = {"discriminator": PictureDiscriminator([16]), "trunk": Waves(), "decoder": nn.Identity()}
    models = Models(ring(schedule), student, target_decay=0.0, export_decay=0.995, others=others)
    method = Adversarial(
        feature_network="efficientnet_lite2", student_steps=1, condition_on_image=False, guidance=1.0, augmentation=0.0,
        adversarial_loss="softplus", r1_weight=1 / 256, distillation_weight=0.3,
    )  # fmt: skip
    rates = {"student": 5e-4, "discriminator": 2e-3}
    return learn(method, models, updates=1500, size=256, rates=rates, betas=(0.0, 0.99), watch=watch)


def ladd(watch: Watch = _quietly, updates: int = 4000) -> Callable[[Tensor], Tensor]:
    """Latent adversarial distillation through a network trained on the exact teacher's velocities, whose layers supply
    the features. Modes are 0.15 wide, so they are distinguishable only at low noise.

    With networks half as wide, or few updates of the first and a larger R1, the samples form a broad ring; with half of
    the student's updates some modes are too wide.
    """
    schedule = Cosine()
    exact = ring(schedule)
    torch.manual_seed(0)
    network = Plane(schedule)
    optimizer, looks, size = torch.optim.Adam(network.parameters(), lr=2e-3), 2000, 512
    for update in range(looks):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / looks)
        generator = torch.Generator().manual_seed(update)
        x0, t = exact.sample(size, generator), torch.rand(size, generator=generator).double()
        x_t = schedule.add_noise(x0, torch.randn(size, 2, generator=generator), t)
        (network(x_t, t, {}, kind="v") - exact(x_t, t, kind="v")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    student = copy.deepcopy(network)
    others = {"discriminator": Discriminator([192, 192])}
    models = Models(network.requires_grad_(False), student, target_decay=0.0, export_decay=0.998, others=others)
    method = LatentAdversarial(
        student_steps=1, blocks=("3", "7"), logit_mean=-2.0, adversarial_loss="softplus", r1_weight=0.005
    )
    rates = {"student": 5e-4, "discriminator": 1e-3}
    return learn(method, models, updates=updates, size=256, rates=rates, betas=(0.0, 0.99), watch=watch)


@lru_cache
def _paths(count: int) -> tuple[Tensor, Tensor]:
    """Returns unit noise (n, 2), and the ends of the exact ODE's paths from it."""
    exact = ring(Cosine())
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(7))
    return noise, exact.flow(noise, exact.schedule.t_max, exact.schedule.t_min, tolerance=1e-6)


def off_the_map(student: Callable[[Tensor], Tensor], count: int = 4000) -> tuple[float, Tensor]:
    """Returns the median distance of one-step samples from the ends of the exact ODE's paths from the same noise, over
    the spread of the data; and the samples."""
    noise, ends = _paths(count)
    spread = ring(Cosine()).sample(20_000, torch.Generator().manual_seed(1)).std()
    with torch.no_grad():
        ours = student(noise)
    return ((ours - ends).norm(dim=1).median() / spread).item(), ours


@torch.no_grad()
def from_the_data(student: Callable[[Tensor], Tensor], count: int = 250, sets: int = 8) -> tuple[float, Tensor]:
    """Returns the energy distance of sets of samples to fresh data, over that between fresh data; and the samples.

    The distance between fresh sets of n points falls as 1/n, so larger sets reveal smaller errors.
    """
    exact = ring(Cosine())
    noises = [torch.randn(count, 2, generator=torch.Generator().manual_seed(i)) for i in range(sets)]
    ours = [student(noise) for noise in noises]
    fresh = [exact.sample(count, torch.Generator().manual_seed(10**7 + i)) for i in range(2 * sets)]
    far, alike = (sum(map(energy_distance, each, fresh[:sets])) / sets for each in (ours, fresh[sets:]))
    return far / alike, torch.cat(ours)
