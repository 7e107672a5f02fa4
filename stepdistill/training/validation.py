"""Validation images of the student: a grid of prompts by step counts, always with the adapter on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import nn

from stepdistill.conditioning.base import Cond, to
from stepdistill.denoiser.base import Denoiser
from stepdistill.denoiser.load import Teacher
from stepdistill.draws import Draws
from stepdistill.methods.base import Method
from stepdistill.training.config import TrainConfig

STEPS = (1, 2, 4, 8)


def prompts_for(config: TrainConfig, captions: list[str]) -> list[str]:
    """The prompts of validation grids: those configured, or four of the data's captions."""
    return list(config.validation_prompts) or captions[:4]


def tile(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    """Arranges images of one size in rows, small ones enlarged without smoothing."""
    width, height = rows[0][0].size
    zoom = max(1, 128 // width)
    width, height = width * zoom, height * zoom
    sheet = Image.new("RGB", ((width + gap) * len(rows[0]) - gap, (height + gap) * len(rows) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            resized = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(resized, (x * (width + gap), y * (height + gap)))
    return sheet


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Converts (B, 3 or 1, H, W) in [-1, 1] to PIL images."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze() if p.shape[-1] == 1 else p) for p in pixels]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context in eval mode; restores each part's mode (with an adapter, only its dropout is in train mode)."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.no_grad()
def encoded(teacher: Teacher, prompts: list[str]) -> Cond:
    """The conditions of prompts, encoded where the text encoders are."""
    return teacher.conditioner.encode(prompts, size=teacher.image_size)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for another batch size
def grid(method: Method, teacher: Teacher, student: Denoiser, cond: Cond, count: int, seed: int) -> Image.Image:
    """A grid with a row per prompt and a column for each of 1, 2, 4 and 8 steps; the same noise within a row.

    Sampled by the method from the student that `Models.shown` yields, adapters on; decoded image by image.

    Args:
        cond: of `count` prompts, from `encoded`.
    """
    device = next(student.parameters()).device
    cond = to(cond, device)
    columns = []
    with evaluating(student.backbone):
        for steps in STEPS:
            draws = Draws.at(seed, 0, count, device)
            columns.append(method.sample(student, draws.normal(*student.sample_shape), cond, steps=steps, draws=draws))
    with teacher.vae_on(device):
        rows = [[to_pictures(teacher.decode(column[i : i + 1]))[0] for column in columns] for i in range(count)]
    return tile(rows)
