"""Eight modes in the plane, whose teacher and ODE are known exactly, and a small network that learns of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.denoiser.analytic import GaussianMixtureDenoiser
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws

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
    """The exact teacher: modes on a circle of radius sqrt(2)."""
    angle = torch.arange(MODES) * 2 * math.pi / MODES
    means = torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2)
    return GaussianMixtureDenoiser(means, STD, None, schedule)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets (n, D) (Székely and Rizzo 2013); above 0 for two of one law."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


class OneDraw(Draws):
    """Draws from one generator for the batch: these tests need speed, not resumability."""

    def __init__(self, generator: torch.Generator, size: int) -> None:
        self.generators, self.device, self.generator = [generator] * size, torch.device("cpu"), generator

    def normal(self, *shape):
        return torch.randn(len(self), *shape, generator=self.generator)

    def uniform(self):
        return torch.rand(len(self), generator=self.generator)

    def integers(self, high):
        return torch.randint(high, (len(self),), generator=self.generator)
