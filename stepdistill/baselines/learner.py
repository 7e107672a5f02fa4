"""The trainer's loop around a baseline's loss: a student trained in place, resumed, or loaded if it is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from stepdistill.baselines.base import Batch, Data, Objective, TeacherStudent
from stepdistill.baselines.exports import updates
from stepdistill.baselines.less_memory import halved, recompute, recomputes
from stepdistill.draws import Draws, mix
from stepdistill.errors import InputError
from stepdistill.files import replacing
from stepdistill.training import folder, sharding, zero
from stepdistill.training.config import LoopConfig
from stepdistill.training.loop import Loop
from stepdistill.training.order import sample_indices
from stepdistill.training.processes import world

ONLY_LOADING: ContextVar[bool] = ContextVar("only_loading", default=False)  # nothing is trained while it is set


class Learner(Loop):
    """Trains `models.student` in place; its weights go to `<out>/weights/student.safetensors`.

    Args:
        objective: the loss. data: see Data. config: see LoopConfig.
    """

    models: TeacherStudent

    def __init__(self, objective: Objective, models: TeacherStudent, data: Data, config: LoopConfig) -> None:
        if sharding.asked_for() or zero.asked_for():
            raise InputError(
                "accelerate: got FSDP2 or DeepSpeed; allowed: one process, or several with all weights each"
            )
        if len(data) < 1:
            raise InputError("data: got no samples; allowed: one or more")
        super().__init__(objective, config)
        self.models, self.data = models, data
        self._ahead: dict[str, object] = {}  # what the batches of an update share
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
        if number % self.config.gradient_accumulation == 0:
            self._ahead = {}
        return self._batch(number)

    def _batch(self, number: int) -> Batch:
        size, seed, first = self.config.batch_size, self.config.seed, self._first(number)
        items = self.data.batch(sample_indices(seed, first, size, len(self.data)))
        items, draws = {k: v.to(self.device) for k, v in items.items()}, Draws.at(seed, first, size, self.device)
        split = self.config.gradient_accumulation
        update, place = range(number // split * split, (number // split + 1) * split), number % split
        batches = split * self.accelerator.num_processes
        return Batch(items, draws, lambda: [self._batch(each) for each in update], place, batches, _ahead=self._ahead)

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


def learn(objective: Objective, models: TeacherStudent, data: Data | Callable[[], Data], config: LoopConfig) -> float:
    """Trains `models.student` in place, resuming an earlier run of the same command. It ends in evaluation mode, full
    precision and on the run's device, as it does if its weights are only loaded.

    Args:
        data: the data, or a function that makes it if that takes long; called only if there is something to train.

    Returns:
        The seconds of training, earlier runs included; 0 for a dry run.

    Raises:
        InputError: see Loop; or fewer updates are asked for than the run has, or ONLY_LOADING and it is not finished.
    """
    config.check()
    done = folder.finished(config, Path(config.out) / "weights")
    check_may_train(config, done)
    if done is None:
        found = data() if callable(data) else data  # the teacher may have to generate it
        with halved(models.teacher, config.mixed_precision):
            Learner(objective, models, found, config).fit()
    else:
        folder.claim(config, world().num_processes, write=False)
        _check_not_fewer(config)
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


def check_may_train(config: LoopConfig, done: Path | None) -> None:
    """Raises InputError if nothing may be trained, and what a run has made, `done`, is not there."""
    if done is None and ONLY_LOADING.get():
        raise InputError(
            f"baselines eval: got {config.out}, which is not trained to the end; allowed: a finished run; run it again"
        )


def _check_not_fewer(config: LoopConfig) -> None:
    if (trained := updates(Path(config.out) / "done.json")) > config.max_train_steps:
        raise InputError(
            f"max_train_steps: got {config.max_train_steps} for {config.out}, which was trained for {trained}; "
            f"allowed: {trained} or more; give another --out"
        )


def unwrap(network: nn.Module) -> None:
    """Restores a network's own forward, in full precision, as if accelerate had never prepared it, so that a student
    which is a teacher next can be prepared again, and one that is dropped leaves the device at once."""
    extract_model_from_parallel(network, keep_fp32_wrapper=False)
    vars(network).pop("_is_accelerate_prepared", None)
    vars(network).pop("forward", None)  # left by accelerate: the class's without its decorators, bound to the network
