"""What a distillation method is: the roles it needs, the order they are trained in, and a pure loss.

A method is a frozen dataclass. It holds no network, optimizer, device or state: what changes during training it reads
from the clock, and every random number comes from the batch's draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.prediction import Kind
from stepdistill.schedules import Schedule, Time
from stepdistill.timegrid import Grid

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

Cond = dict[str, Tensor]


class Role(Enum):
    """How a network takes part: frozen, trained by the loss, or following the student by a moving average."""

    FROZEN = "frozen"
    TRAINED = "trained"
    TARGET = "target"


@dataclass(frozen=True)
class Clock:
    """Which update this is, of how many. Never counts micro-batches."""

    update: int
    total: int


@dataclass(frozen=True)
class Batch:
    """B training samples.

    Attributes:
        x0: (B, C, H, W) clean latents or pictures.
        cond, uncond: conditions of batch B.
        draws: the samples' own random numbers.
    """

    x0: Tensor
    cond: Cond
    uncond: Cond
    draws: Draws


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise, and its named parts for the log (detached scalars)."""

    total: Tensor
    terms: Mapping[str, Tensor]


class FrozenDenoiser(Protocol):
    """A denoiser that is not trained: `raw` and a call answer without gradients."""

    schedule: Schedule
    kind: Kind
    grid: Grid
    takes_guidance: bool

    def raw(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """See Denoiser.raw."""

    def __call__(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, kind: Kind = "x0") -> Tensor:
        """See Denoiser.forward."""

    def features(self, x_t: Tensor, t: Time, cond: Cond | None, blocks: Sequence[str]) -> list[Tensor]:
        """Token maps of some blocks, through which gradients reach x_t; of four where none is named. See
        features.read."""


class Models(Protocol):
    """The networks of a run by role. The method's own, from `Method.networks`, are attributes too."""

    teacher: FrozenDenoiser
    student: Denoiser
    target: FrozenDenoiser


class Method(ABC):
    """A distillation method: a frozen dataclass with a pure loss, and how what it makes is sampled.

    Attributes:
        name: in the registry, and of its exports.
        roles: how each network takes part.
        embed_guidance: a full student is told its guidance.
        steps: that users sample its students at, as the card says.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    embed_guidance: bool = False
    steps: int = 4

    def student_kind(self, teacher_kind: Kind) -> Kind:
        """What the student predicts; as its teacher where not overridden."""
        return teacher_kind

    def networks(self, teacher: Teacher) -> dict[str, nn.Module]:
        """The networks besides teacher, student and target, by role: say a discriminator. Made anew at each call."""
        return {}

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The roles trained in this update, in order; the student alone where not overridden."""
        return ("student",)

    def stamp(self, models: Models) -> dict[str, str]:
        """What else fixes a result, for the export's config.json and card."""
        return {}

    @abstractmethod
    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """The loss of one phase."""

    def guidance_scale(self, student: Denoiser) -> float:
        """What users pass when they sample the student; 1.0 where guidance is in its weights."""
        return 1.0

    @abstractmethod
    def sample(self, student: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws) -> Tensor:
        """The student's samples (B, C, H, W) from unit noise x_T, as users will sample it."""

    @abstractmethod
    def scheduler(self, teacher: Teacher):
        """The diffusers scheduler that is exported with a student of this teacher."""


def huber(difference: Tensor, c: float) -> Tensor:
    """mean(sqrt(d² + c²) - c), the pseudo-Huber loss of Song and Dhariwal (2023), section 3.3. Scalar float32."""
    return (torch.sqrt(difference.float().square() + c * c) - c).mean()
