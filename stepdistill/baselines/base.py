"""A baseline's run: its flags, the inputs of its losses, and the trainer's loop around them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from stepdistill.baselines.less_memory import halved, recompute, recomputes
from stepdistill.baselines.results import Results
from stepdistill.draws import Draws, mix
from stepdistill.errors import InputError
from stepdistill.files import replacing
from stepdistill.methods.base import Clock, Loss
from stepdistill.training import folder, sharding, zero
from stepdistill.training.config import LoopConfig
from stepdistill.training.loop import Loop
from stepdistill.training.networks import Networks
from stepdistill.training.order import sample_indices
from stepdistill.training.processes import world

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

    # A batch is averaged over the tokens that count in it, so splitting it differently changes the update.
    FREE: ClassVar[frozenset[str]] = LoopConfig.FREE - {"batch_size", "gradient_accumulation"}
    QUICK: ClassVar[Mapping[str, object]] = {}  # defaults under --quick
    SWEEP: ClassVar[tuple[str, tuple]] = ("seed", (0, 1, 2))  # flag and values that `sweep` covers by default
    DRAWN: ClassVar[tuple[str, ...]] = ()  # folders of measurements, which `eval` removes first
    UNTOLD: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # by kind of part: the flags it does not depend on

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        if not self.seeds:
            raise InputError("seeds: got none; allowed: one or more; give --seeds 0, or leave it out")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: got {' '.join(map(str, self.seeds))}; allowed: each once; drop the repeated one")

    def run(self) -> Results:
        """Trains what is not trained yet and returns the measured results; each baseline implements it."""
        raise NotImplementedError

    def part(self, name: str, **changes: object) -> BaselineConfig:
        """The flags of one training within the run, in its own folder; those it does not depend on are default."""
        untold = self.UNTOLD.get(first_word(name), ())
        plain = {f.name: f.default for f in dataclasses.fields(self) if f.name in untold}
        return dataclasses.replace(self, out=self.out / name, **plain | changes)

    @property
    def shared(self) -> BaselineConfig:
        """The flags that parts of teacher and controls derive from; all, unless a baseline overrides this."""
        return self


def first_word(name: str) -> str:
    """The kind of a part: "control" for "control-0/text"."""
    return re.split("[-./]", name)[0]


class Data(Protocol):
    """Training samples: `batch(indices)` returns tensors by name, each (B, ...)."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Returns the samples at these indices."""


@dataclass(frozen=True)
class Batch:
    """B training samples: tensors by name, and the samples' random numbers.

    Attributes:
        siblings: makes this process's batches of the same update anew, this one included; None if it is the only one.
    """

    items: Mapping[str, Tensor]
    draws: Draws
    siblings: Callable[[], list[Batch]] | None = field(default=None, repr=False, compare=False)
    _made: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.items[name]

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make`, called in the first phase of an update that needs it: one forward serves all phases."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Lesson:
    """A baseline's loss: a frozen dataclass without network, optimizer, device or state."""

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """Returns the roles trained in this update, in order."""
        return ("student",)

    def loss(self, phase: str, batch: Batch, models: Pupils, clock: Clock) -> Loss:
        """Returns the loss of one phase."""
        raise NotImplementedError


class Pupils(Networks):
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


class Learner(Loop):
    """Trains `models.student` in place; its weights go to `<out>/weights/student.safetensors`.

    Args:
        lesson: the loss. data: see Data. config: see LoopConfig.
    """

    models: Pupils

    def __init__(self, lesson: Lesson, models: Pupils, data: Data, config: LoopConfig) -> None:
        if got := "FSDP2" * sharding.asked_for() or "DEEPSPEED" * bool(zero.asked_for()):
            raise InputError(f"accelerate: got {got}; allowed: one process, or several with all weights each")
        if len(data) < 1:
            raise InputError("data: got no samples; allowed: one or more")
        super().__init__(lesson, config)
        self.models, self.data = models, data
        models.to(self.device)
        models.bare.train()
        if getattr(config, "gradient_checkpointing", False):
            recompute(models.bare)
        self._start()

    @property
    def target(self) -> Path:
        """The folder of the weights."""
        return self.out / "weights"

    def _could_recompute(self) -> bool:
        return super()._could_recompute() and recomputes(self.models.bare)

    def _prepare(self) -> None:
        models = self.models
        models.student = self.accelerator.prepare_model(models.bare)
        if models.teacher is not None:
            models.teacher = self.accelerator.prepare_model(models.teacher, evaluation_mode=True)
        models.wrapped = {
            role: self.accelerator.prepare(module) for role, module in models.others.items() if role in models.trained
        }

    def _wrapped(self) -> Iterable[nn.Module]:
        return self.models.student, *self.models.wrapped.values()

    def _buffers(self) -> dict[str, dict[str, Tensor]]:
        return {"student": dict(self.models.bare.named_buffers())} | super()._buffers()

    def batch(self, number: int) -> Batch:
        """This process's share of batch `number` of the run, whose position also determines dropout and generation."""
        torch.manual_seed(mix(~self.config.seed, self._first(number)))
        return self._batch(number)

    def _batch(self, number: int) -> Batch:
        size, seed, first = self.config.batch_size, self.config.seed, self._first(number)
        items = self.data.batch(sample_indices(seed, first, size, len(self.data)))
        items, draws = {k: v.to(self.device) for k, v in items.items()}, Draws.at(seed, first, size, self.device)
        split = self.config.gradient_accumulation
        update = range(number // split * split, (number // split + 1) * split)
        return Batch(items, draws, lambda: [self._batch(each) for each in update])

    def _first(self, number: int) -> int:
        """The position, in the run, of the first sample of this process's share of batch `number`."""
        state = self.accelerator
        return (number * state.num_processes + state.process_index) * self.config.batch_size

    def _finish(self) -> Path:
        if self.accelerator.is_main_process:
            with replacing(self.target) as path:
                save_model(self.models.bare, str(path / "student.safetensors"))
                for role in self.models.wrapped:
                    save_model(self.models.others[role], str(path / f"{role}.safetensors"))
            self._done()
        self.accelerator.wait_for_everyone()
        return self.target


def learn(lesson: Lesson, models: Pupils, data: Data | Callable[[], Data], config: LoopConfig) -> float:
    """Trains `models.student` in place, resuming an earlier run of the same command. It ends in evaluation mode, full
    precision and on the run's device, as it does if its weights are only loaded.

    Args:
        data: the data, or a function that makes it if that takes long; called only if there is something to train.

    Returns:
        The seconds of training, earlier runs included; 0 for a dry run.

    Raises:
        InputError: see Loop.
    """
    config.check()
    done = folder.finished(config, Path(config.out) / "weights")
    if done is None:
        found = data() if callable(data) else data  # the teacher may have to generate it
        with halved(models.teacher, config.mixed_precision):
            Learner(lesson, models, found, config).fit()
    else:
        folder.claim(config, world().num_processes, write=False)
        load_model(models.bare, str(done / "student.safetensors"))
        for role in filter(lambda role: role in models.trained, models.others):
            load_model(models.others[role], str(done / f"{role}.safetensors"))
        models.to(world().device)
    models.student = models.bare.eval()
    for network in (models.student, models.teacher):
        if network is not None:
            unwrap(network)
    if config.dry_run:
        return 0.0
    return json.loads((Path(config.out) / "done.json").read_text())["seconds"]


def unwrap(network: nn.Module) -> None:
    """Restores a network's own forward, in full precision, as if accelerate had never prepared it, so that a student
    which is a teacher next can be prepared again, and one that is dropped leaves the device at once."""
    extract_model_from_parallel(network, keep_fp32_wrapper=False)
    vars(network).pop("_is_accelerate_prepared", None)
    vars(network).pop("forward", None)  # left by accelerate: the class's without its decorators, bound to the network
