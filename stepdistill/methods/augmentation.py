"""Differentiable augmentation of a discriminator's input (Zhao et al. 2020): colour, translation and cutout.

Real and generated images are augmented alike, so that a small set of real images is not memorised.
Random numbers are per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.draws import Draws

SHIFT = 1 / 8  # of the side, at most
HOLE = 1 / 2  # of the side


def augment(pictures: Tensor, draws: Draws, probability: float) -> Tensor:
    """Augments each image (B, C, H, W) in [-1, 1] with this probability; at 0, returns the images without drawing
    any random number."""
    if not probability:
        return pictures
    on = draws.uniform() < probability
    changed = cutout(translated(coloured(pictures, draws), draws), draws)
    return torch.where(on[:, None, None, None], changed, pictures)


def coloured(x: Tensor, draws: Draws) -> Tensor:
    """Brightness + U(-1/2, 1/2), saturation * U(0, 2), contrast * U(1/2, 3/2)."""
    brightness, saturation, contrast = (draws.uniform()[:, None, None, None] for _ in range(3))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    level = x.mean((1, 2, 3), keepdim=True)
    return level + (contrast + 0.5) * (x - level)


def translated(x: Tensor, draws: Draws) -> Tensor:
    """Shifts by up to an eighth of each side, filling with 0."""
    for dim in (2, 3):
        side = x.shape[dim]
        most = round(side * SHIFT)
        offset = draws.integers(2 * most + 1) - most
        source = torch.arange(side, device=x.device) - offset[:, None]  # (B, side)
        inside = (source >= 0) & (source < side)
        shape = [len(x), 1, 1, 1]
        shape[dim] = side
        moved = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x))
        x = moved * inside.view(shape)
    return x


def cutout(x: Tensor, draws: Draws) -> Tensor:
    """Sets a rectangle of half the sides, centred anywhere, to 0."""
    hit = []
    for dim in (2, 3):
        side = x.shape[dim]
        size = round(side * HOLE)
        first = draws.integers(side + 1 - size % 2) - size // 2
        place = torch.arange(side, device=x.device)
        hit.append((place >= first[:, None]) & (place < first[:, None] + size))
    return x * ~(hit[0][:, None, :, None] & hit[1][:, None, None, :])
