"""Inputs of the losses for a diffusion model's architecture: samples, and both UNets as denoisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.reduce import masked_mean
from stepdistill.conditioning.base import expand
from stepdistill.data.cache import LatentCache
from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.draws import Draws
from stepdistill.methods.base import Clock, Loss
from stepdistill.prediction import Kind, row
from stepdistill.schedules import Schedule, match
from stepdistill.timegrid import uniform
from stepdistill.training.roles import plain


@dataclass(frozen=True)
class Samples:
    """`count` samples of a cache, starting at `first`: `x0`, `cond.NAME` and `uncond.NAME`, each (B, ...)."""

    cache: LatentCache
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns the samples at these indices."""
        x0, cond = self.cache.batch([self.first + i for i in indices])
        uncond = expand(self.cache.uncond, len(indices))
        named = {"cond": cond, "uncond": uncond}
        return {"x0": x0} | {f"{kind}.{name}": v for kind, group in named.items() for name, v in group.items()}

    @property
    def captions(self) -> list[str]:
        """The captions, one per sample."""
        return self.cache.captions[self.first : self.first + self.count]


class UNets(TeacherStudent):
    """A student UNet and its teacher; a control has none.

    Args:
        like: the teacher, which defines how both are called and what their output means.
    """

    def __init__(self, like: Denoiser, student: nn.Module, *, alone: bool = False) -> None:
        super().__init__(student, None if alone else like.backbone)
        self._like = like

    def denoiser(self, role: Literal["teacher", "student"]) -> Denoiser:
        """One of the two, as wrapped by the trainer, behind the common call signature."""
        return around(self._like, getattr(self, role))


def around(like: Denoiser, backbone: nn.Module) -> Denoiser:
    """Returns a copy of a denoiser around another backbone."""
    twin = plain(like)
    twin.backbone = backbone
    return twin


def conditions(batch: Batch, kind: Literal["cond", "uncond"]) -> Cond:
    """The conditions of a batch, or the unconditional ones that guidance moves away from."""
    prefix = f"{kind}."
    return {name.removeprefix(prefix): v for name, v in batch.items.items() if name.startswith(prefix)}


def dropped(batch: Batch, share: float) -> Cond:
    """The conditions of a batch, unconditional in a share of the samples, so that guidance keeps working."""
    cond, uncond = (conditions(batch, kind) for kind in ("cond", "uncond"))
    gone = batch.draws.uniform() < share
    return {k: torch.where(gone.reshape(-1, *(1,) * (v.ndim - 1)), uncond[k], v) for k, v in cond.items()}


def noised(x0: Tensor, draws: Draws, schedule: Schedule, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """x_t at uniformly drawn times, the times (B,), and the target of this prediction type, shaped like x_t."""
    t = uniform(schedule)(draws)
    eps = draws.normal(*x0.shape[1:]).to(x0.dtype)
    p, q = row(kind, t, schedule)
    return schedule.add_noise(x0, eps, t), t, match(p, x0) * x0 + match(q, x0) * eps


def task_loss(student: Denoiser, batch: Batch, caption_dropout: float) -> Tensor:
    """|y - y*|², the mean squared error against the target from the data, at uniformly drawn times."""
    x_t, t, target = noised(batch["x0"], batch.draws, student.schedule, student.kind)
    return masked_mean((student.raw(x_t, t, dropped(batch, caption_dropout)) - target).square())


@dataclass(frozen=True)
class Untaught(Objective):
    """The usual training loss of a diffusion model, without a teacher: a control's."""

    caption_dropout: float

    def loss(self, phase: str, batch: Batch, models: UNets, clock: Clock) -> Loss:
        """The loss of the control."""
        task = task_loss(models.denoiser("student"), batch, self.caption_dropout)
        return Loss(task, {"task": task})
