"""One training loop for everything: distilled pipelines and the baselines.

    class Trainer(Loop): ...        # defines a batch, and what is made from a trained student
    Trainer(...).fit()              # the same call, or command, again resumes

Every random number is determined by a sample's position in the run, so the loop has no random state: a run that was
interrupted, or is spread over more processes at the same global batch size, continues with the same numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import files, holds
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss
from stepdistill.training import checkpoint, folder, sharding, trackers
from stepdistill.training.averages import Averages
from stepdistill.training.config import LoopConfig
from stepdistill.training.optim import build_optimizer, learning_rate_at
from stepdistill.training.processes import PATIENCE, StopSignal, agree, on_cpu, room


class Learned(Protocol):
    """What a loop requires of a run's networks.

    Attributes:
        trained: the trainable parameters by role, and by name.
        others: networks besides the student, by role.
        averages, exported: moving averages of the student's weights, if any.
    """

    trained: dict[str, dict[str, nn.Parameter]]
    others: dict[str, nn.Module]
    averages: Averages | None
    exported: Averages | None

    def only(self, role: str) -> AbstractContextManager:
        """Context in which gradients reach the parameters of one role only."""

    def after_update(self) -> None:
        """Called after each update."""


class Objective(Protocol):
    """What a loop requires of a method: what is trained in an update, and with which loss."""

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The roles trained in this update, in order."""

    def loss(self, phase: str, batch, models, clock: Clock) -> Loss:
        """The loss of one phase."""


class Loop:
    """Updates, checkpoints and logs of a run.

    Args:
        method: the loss and its roles.
        config: see LoopConfig.

    Attributes:
        models: the networks, set by subclasses before `_start`.
        update: updates done. seconds: time they took, earlier runs of the command included.

    Raises:
        InputError: `config.out` holds another run, or a setting is out of range.
    """

    models: Learned

    def __init__(self, method: Objective, config: LoopConfig) -> None:
        config.check()
        self.method, self.config = method, config
        self.out = Path(config.out)
        AcceleratorState._reset_state()  # a second run in one process may have another precision
        # autocast's cache would keep casts of all weights, whole where these are sharded, until a call ends
        handlers = [AutocastKwargs(cache_enabled=False), InitProcessGroupKwargs(timeout=PATIENCE)]
        with sharding.kept_from_accelerate():
            self.accelerator = Accelerator(
                cpu=on_cpu(), mixed_precision=config.mixed_precision, log_with=list(config.trackers) or None,
                gradient_accumulation_steps=config.gradient_accumulation, project_dir=self.out,
                kwargs_handlers=handlers,
            )  # fmt: skip
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        folder.claim(config, self.accelerator.num_processes, write=main and not config.dry_run)
        torch.manual_seed(config.seed)
        self.update, self.seconds = 0, 0.0
        self._sums: dict[str, Tensor] = {}

    def _start(self) -> None:
        """Builds the optimizers, and wraps the networks for the device, the processes and the precision."""
        self.optimizers = {
            role: build_optimizer(list(group.values()), self.config.of(role))
            for role, group in self.models.trained.items()
        }
        self._prepare()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Scales the losses in fp16, of all roles alike."""
        return getattr(self.accelerator, "scaler", None)

    # -------------------------------------------------------------------------------------- for subclasses to implement

    @property
    def target(self) -> Path:
        """The folder, or file, that the run produces."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Wraps the networks."""
        raise NotImplementedError

    def _wrapped(self) -> Iterable[nn.Module]:
        """The trained networks, wrapped."""
        raise NotImplementedError

    def batch(self, number: int):
        """This process's share of the run's batch `number`."""
        raise NotImplementedError

    def _finish(self) -> Path:
        """Writes the result from the trained student; returns `target`."""
        raise NotImplementedError

    def _validate(self, metrics: trackers.Metrics) -> None:
        """Validates the student, every `validate_every` updates."""

    def _facts(self) -> dict[str, object]:
        """What must be the same in all processes before the first update, by name."""
        return {"update": self.update}

    def _could_recompute(self) -> bool:
        """Whether --gradient-checkpointing would save memory."""
        return getattr(self.config, "gradient_checkpointing", None) is False

    def _before_step(self, role: str) -> None:
        """Called on a role before its gradients are clipped."""

    def _done_before(self, done: Path) -> None:
        """Called if the run turns out to be finished already."""

    def _done(self) -> None:
        """Marks the run as finished; its last write."""
        done = {"update": self.update, "seconds": round(self.seconds, 1)}
        files.write(self.out / "done.json", json.dumps(done) + "\n")

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Path:
        """Trains to `max_train_steps` and writes the result.

        Returns:
            `target`.

        Raises:
            InputError: the loss is not finite; the disk or the device is full; all checkpoints are broken; another
                process trains in the same folder; the run's processes do not share one folder.
            KeyboardInterrupt: a stop signal was received; the run is saved.
        """
        if (done := folder.finished(self.config, self.target)) is not None:
            self.accelerator.print(f"already done: {done}")
            self._done_before(done)
            return done
        writes = self.accelerator.is_main_process and not self.config.dry_run
        with (
            holds.claimed(self.out) if writes else nullcontext(),
            room(self.out, self.device, self.config.batch_size, self._could_recompute()),
        ):
            return self._fit()

    def _fit(self) -> Path:
        config = self.config
        self._resume()
        agree(**self._facts())
        if config.dry_run:
            self.step()
            self.accelerator.print(json.dumps(config.record(), indent=2))
            return self.target
        metrics = trackers.Metrics(self.out, self.accelerator, config.record(), self.update)
        first, before, started = self.update, self.seconds, time.time()
        bar = tqdm(
            total=config.max_train_steps, initial=first, desc=type(self.method).__name__, dynamic_ncols=True,
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        with closing(metrics), StopSignal(self.accelerator) as stop, bar:
            while self.update < config.max_train_steps and not stop.asked():
                self.step()
                bar.update()
                self.seconds = before + time.time() - started
                if self.update % config.log_every == 0 or self.update == config.max_train_steps:
                    bar.set_postfix(self._log(metrics, (self.seconds - before) / (self.update - first)))
                if config.validate_every and self.update % config.validate_every == 0:
                    self._validate(metrics)
                if self.update % config.checkpoint_every == 0 or self.update == config.max_train_steps:
                    self._save()
            if self.update < config.max_train_steps:
                self._save()
        if self.update < config.max_train_steps:
            self.accelerator.print(f"stopped at update {self.update}; the same command resumes")
            raise KeyboardInterrupt
        return self._finish()

    def step(self) -> dict[str, Tensor]:
        """One update: every phase of the method, over `gradient_accumulation` batches. Returns the mean named terms.

        Nothing here synchronises with the device.
        """
        config, clock = self.config, Clock(self.update, self.config.max_train_steps)
        for role, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(self.update, config.of(role))
        terms: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation):
            batch = self.batch(self.update * config.gradient_accumulation + micro)
            with self.accelerator.accumulate(*self._wrapped()):
                for phase in self.method.phases(clock):
                    with self.models.only(phase):
                        loss = self.method.loss(phase, batch, self.models, clock)
                        self._backward(phase, loss.total)
                        self._apply(phase)
                    for name, value in loss.terms.items():
                        terms[name] = terms.get(name, 0) + value.detach().float() / config.gradient_accumulation
        if self.scaler is not None:  # not after each role: gradients of the next are still accumulating at this scale
            self.scaler.update()
        self.models.after_update()
        self.update += 1
        for name, value in terms.items():
            self._note(name, value, torch.ones_like(value))
        return terms

    def _note(self, name: str, value: Tensor, count: Tensor) -> None:
        """Adds a scalar, which counts once or not at all, to the sums that the log's means are of."""
        pair = torch.stack([torch.where(count > 0, value, 0), count]).detach()
        self._sums.setdefault(name, torch.zeros_like(pair)).add_(pair)

    def _note_norm(self, role: str, norm: Tensor) -> None:
        """Notes the norm of a role's gradients; those that are not finite, whose step fp16 skips, do not count."""
        self._note(f"grad_norm_{role}", norm, torch.isfinite(norm).to(norm.dtype))

    def _backward(self, role: str, loss: Tensor) -> None:
        """Adds the gradients of one role's loss on one batch."""
        self.accelerator.backward(loss)

    def _apply(self, role: str) -> None:
        """Takes the optimizer step of one role; of accumulated batches, only after the last."""
        if not self.accelerator.sync_gradients:
            return
        optimizer = self.optimizers[role]
        self._before_step(role)
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.models.trained[role].values(), self.config.max_grad_norm)
        self._note_norm(role, sharding.whole(norm))
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------------------------------------- around the loop

    def _buffers(self) -> dict[str, dict[str, Tensor]]:
        """The buffers of networks besides the student."""
        return {role: dict(module.named_buffers()) for role, module in self.models.others.items()}

    def _state(self) -> dict:
        """Everything that a run resumes from, on the main process; sharded tensors are gathered there."""
        averages = {"averages": self.models.averages, "exported": self.models.exported}
        state = {
            "trained": {role: {k: p.detach() for k, p in group.items()} for role, group in self.models.trained.items()},
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "buffers": self._buffers(),
            **{name: a.values if a else {} for name, a in averages.items()},
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }
        return sharding.gather(state, self.accelerator.is_main_process)

    def _save(self) -> None:
        weights = [sharding.own(p.detach()) for group in self.models.trained.values() for p in group.values()]
        total = torch.stack([w.float().sum() for w in weights]).sum()
        if not math.isfinite(self.accelerator.reduce(total, "sum").item()):
            raise InputError(
                f"weights: got a value that is not finite at update {self.update}; the last checkpoint is kept; lower "
                "--learning-rate, or use --mixed-precision bf16 or no"
            )
        state = self._state()
        if self.accelerator.is_main_process:
            checkpoint.save(self.out / "checkpoints", self.update, state)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _resume(self) -> None:
        found = checkpoint.load_latest(self.out / "checkpoints", self.accelerator.print)
        if found is None:
            return
        self.update, state = found
        self.seconds = state["seconds"]
        places = [(group, state["trained"][role]) for role, group in self.models.trained.items()]
        places += [(buffers, state["buffers"][role]) for role, buffers in self._buffers().items()]
        places += [
            (a.values, state[n])
            for n, a in (("averages", self.models.averages), ("exported", self.models.exported))
            if a
        ]
        for tensors, saved in places:
            for name, tensor in tensors.items():
                tensor.copy_(sharding.like(saved[name], tensor))
        for role, optimizer in self.optimizers.items():
            saved = state["optimizers"][role]
            sharding.spread(saved["state"], list(self.models.trained[role].values()))
            optimizer.load_state_dict(saved)
        if state["scaler"] and self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"resuming from update {self.update}")

    def _log(self, metrics: trackers.Metrics, seconds: float) -> dict[str, str]:
        """Writes the means since the last line, which synchronises with the device."""
        sums = {name: self.accelerator.reduce(pair, "sum").tolist() for name, pair in self._sums.items()}
        self._sums = {}
        values = {name: total / count for name, (total, count) in sums.items() if count}
        if not all(math.isfinite(v) for v in values.values()):
            got = ", ".join(f"{k} = {v}" for k, v in values.items())
            raise InputError(
                f"loss: got {got} at update {self.update}; the last checkpoint is kept; lower --learning-rate, or use "
                "--mixed-precision bf16 or no"
            )
        rate = learning_rate_at(self.update - 1, self.config)
        metrics.log(self.update, values | {"learning_rate": rate, "seconds_per_update": round(seconds, 4)})
        return {name: f"{value:.4f}" for name, value in values.items() if not name.startswith("grad_norm")}
