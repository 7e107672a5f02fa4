"""A baseline's run: its flags, the inputs of its losses, and the trainer's loop around them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from stepdistill.baselines.results import Results
from stepdistill.draws import Draws
from stepdistill.errors import InputError, check_seed
from stepdistill.methods.base import Clock, Loss, Remembers
from stepdistill.training.config import LoopConfig
from stepdistill.training.networks import Networks

T = TypeVar("T")


@dataclass(frozen=True)
class BaselineConfig(LoopConfig):
    """Flags common to all baselines."""

    out: Path = Path("out/baseline")
    """Output folder. Run the same command again to resume."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of student and control, one pair for each; --seed is that of the teacher and the data."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    quick: bool = False
    """Small defaults for all flags that are not given, to see the method run."""

    FREE: ClassVar[frozenset[str]] = LoopConfig.FREE | {"seeds"}  # no part depends on the others' seeds
    QUICK: ClassVar[Mapping[str, object]] = {}  # defaults under --quick
    SWEEP: ClassVar[tuple[str, tuple]] = ("seed", (0, 1, 2))  # flag and values that `sweep` covers by default
    MEASURED: ClassVar[tuple[str, ...]] = ()  # flags that change only the measurement, which `eval` takes
    DRAWN: ClassVar[tuple[str, ...]] = ()  # folders of measurements, which `eval` removes first
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # by kind of part: the flags it does not depend on

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        if not self.seeds:
            raise InputError("seeds: got none; allowed: one or more; give --seeds 0, or leave it out")
        for seed in self.seeds:
            check_seed(seed)
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: got {' '.join(map(str, self.seeds))}; allowed: each once; drop the repeated one")

    def run(self) -> Results:
        """Trains what is not trained yet and returns the measured results; each baseline implements it."""
        raise NotImplementedError

    def part(self, name: str, **changes: object) -> BaselineConfig:
        """The flags of one training within the run, in its own folder; those it does not depend on are default."""
        irrelevant = (*self.MEASURED, *self.IRRELEVANT_FLAGS.get(first_word(name), ()))
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in irrelevant}
        return dataclasses.replace(self, out=self.out / name, **defaults | changes)

    @property
    def shared(self) -> BaselineConfig:
        """The flags that parts of teacher and controls derive from; all, unless a baseline overrides this."""
        return self


def first_word(name: str) -> str:
    """The kind of a part: "control" for "control-0/text"."""
    return re.split("[-./]", name)[0]


def check_unused(flag: str, test: str | Path | None, source: str) -> None:
    """Raises InputError if a held-out file is given for a source that has its own held-out part."""
    if test is not None:
        raise InputError(f"{flag}: got {test} with {source}, which has a held-out part; allowed: none; leave it out")


class Data(Protocol):
    """Training samples: `batch(indices)` returns tensors by name, each (B, ...)."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns the samples at these indices."""


@dataclass(frozen=True)
class Batch(Remembers):
    """B training samples: tensors by name, and the samples' random numbers.

    Attributes:
        siblings: makes this process's batches of the same update anew, this one included; None if it is the only one.
        place: its index among these. batches: of the update, over all processes.
    """

    items: Mapping[str, Tensor]
    draws: Draws
    siblings: Callable[[], list[Batch]] | None = field(default=None, repr=False, compare=False)
    place: int = 0
    batches: int = 1
    _ahead: dict[str, object] = field(default_factory=dict, repr=False, compare=False)  # shared by the siblings

    def __getitem__(self, name: str) -> Tensor:
        return self.items[name]

    def ahead(self, name: str, make: Callable[[Batch], T]) -> T:
        """The result of `make` for this batch. The first batch of an update that needs it has it made for all."""
        if name not in self._ahead:
            self._ahead[name] = [make(each) for each in (self.siblings() if self.siblings else [self])]
        return self._ahead[name][self.place]

    def weight(self, count: Callable[[Batch], Tensor]) -> Tensor:
        """The factor of a mean over this batch's tokens that makes it a share of the mean over the whole update's.

        The loop averages over batches and processes, in which tokens of a batch that has few would count for more.
        Summed over processes once per update.

        Args:
            count: the number of tokens in a batch, of any shape; each number has its own weight. 1 if it is the only
                batch.
        """
        own = self.ahead("counted", count)
        if "total" not in self._ahead:
            self._ahead["total"] = reduce(torch.stack(self._ahead["counted"]).sum(0), "sum")
        return own * self.batches / self._ahead["total"].clamp(min=1)


class Objective:
    """A baseline's loss: a frozen dataclass without network, optimizer, device or state."""

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """Returns the roles trained in this update, in order."""
        return ("student",)

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """Returns the loss of one phase."""
        raise NotImplementedError


class TeacherStudent(Networks):
    """A student, its frozen teacher, and other networks trained with it, such as projections.

    Attributes:
        student: as wrapped by the trainer; `bare` is the network itself.
        teacher: in evaluation mode, its parameters frozen; None for a control.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, **others: nn.Module) -> None:
        super().__init__(student, others)
        self.student = self.bare = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Moves all networks, in place."""
        for module in (self.bare, self.teacher, *self.others.values()):
            if module is not None:
                module.to(device)
