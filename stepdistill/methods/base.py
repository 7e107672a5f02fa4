"""The interface of a distillation method: its roles, the order in which they are trained, and a pure loss.

A method is a frozen dataclass. It holds no network, optimizer, device or state: anything that changes during training
is read from the clock, and every random number comes from the batch's draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stepdistill.conditioning.base import Cond
from stepdistill.denoiser.base import Denoiser
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.prediction import Kind
from stepdistill.schedules import Schedule, Time
from stepdistill.timegrid import Grid

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

T = TypeVar("T")


class Role(Enum):
    """How a network takes part: frozen, trained by the loss, or a moving average of the student."""

    FROZEN = "frozen"
    TRAINED = "trained"
    TARGET = "target"


@dataclass(frozen=True)
class Clock:
    """The current update and the total number of updates; micro-batches are not counted."""

    update: int
    total: int


@dataclass(frozen=True)
class Remembers:
    """A batch that keeps what several phases of an update need."""

    _made: dict[str, object] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make`, called in the first phase of an update that needs it: one forward serves all phases."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass(frozen=True)
class Batch(Remembers):
    """B training samples.

    Attributes:
        x0: (B, C, H, W) clean latents or images.
        cond, uncond: conditions, batch size B.
        draws: per-sample random numbers.
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
    """A denoiser that is not trained: `raw` and a call return outputs without gradients."""

    schedule: Schedule
    kind: Kind
    grid: Grid
    takes_guidance: bool

    def raw(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """See Denoiser.raw."""

    def __call__(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, kind: Kind = "x0") -> Tensor:
        """See Denoiser.forward."""

    def features(self, x_t: Tensor, t: Time, cond: Cond | None, blocks: Sequence[str]) -> list[Tensor]:
        """Token maps of the named blocks (four by default), with gradients to x_t. See features.read."""


class Models(Protocol):
    """The networks of a run by role; those from `Method.networks` are attributes too."""

    teacher: FrozenDenoiser
    student: Denoiser
    target: FrozenDenoiser


class Method(ABC):
    """A distillation method: a frozen dataclass with a pure loss, and the way its students are sampled.

    Attributes:
        name: its name in the registry and in exports.
        roles: how each network takes part.
        embed_guidance: whether a full student takes the guidance scale as an input.
        steps: step count that the model card gives for its students.
    """

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, Role]]
    embed_guidance: bool = False
    steps: int = 4

    def student_kind(self, teacher_kind: Kind) -> Kind:
        """The student's prediction type; by default the teacher's."""
        return teacher_kind

    def networks(self, teacher: Teacher) -> dict[str, nn.Module]:
        """Creates the networks other than teacher, student and target, such as a discriminator, by role."""
        return {}

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The roles trained in this update, in order; by default the student alone."""
        return ("student",)

    def stamp(self, models: Models) -> dict[str, str]:
        """Further facts that determine a result, for the export's config.json and model card."""
        return {}

    @abstractmethod
    def loss(self, phase: str, batch: Batch, models: Models, clock: Clock) -> Loss:
        """The loss of one phase."""

    def guidance_scale(self, student: Denoiser) -> float:
        """The guidance scale to sample the student with; 1.0 if guidance is distilled into its weights."""
        return 1.0

    @abstractmethod
    def sample(self, student: Denoiser, x_T: Tensor, cond: Cond, *, steps: int, draws: Draws) -> Tensor:
        """Generates (B, C, H, W) from unit noise x_T, as users will sample the student."""

    @abstractmethod
    def scheduler(self, teacher: Teacher):
        """Returns the diffusers scheduler exported with a student of this teacher."""


def check_share(name: str, value: float, fix: str) -> None:
    """Raises InputError if a setting is not a share."""
    if not 0 <= value <= 1:
        raise InputError(f"{name}: got {value:g}; allowed: 0 to 1; {fix}")


def huber(difference: Tensor, c: float) -> Tensor:
    """mean(sqrt(d² + c²) - c), the pseudo-Huber loss of Song and Dhariwal (2023), section 3.3. Scalar float32."""
    return (torch.sqrt(difference.float().square() + c * c) - c).mean()
