"""One training loop for every method.

    Trainer(method, teacher, data, config).fit()    # the same call, or command, again resumes

Everything drawn belongs to a sample's place in the run, so there is no random state in the loop: a run that was cut, or
spread over more processes at the same global batch, goes on with the same numbers.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import files
from stepdistill.conditioning.base import Cond, expand, to
from stepdistill.denoiser.load import Teacher, move_coders
from stepdistill.draws import Draws, mix
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Clock, Method
from stepdistill.training import checkpoint, folder, sharding, trackers
from stepdistill.training.config import TrainConfig
from stepdistill.training.export import export, push_rest
from stepdistill.training.optim import build_optimizer, learning_rate_at
from stepdistill.training.order import sample_indices
from stepdistill.training.processes import StopSignal, on_cpu, room
from stepdistill.training.roles import Models, full_models, lora_models
from stepdistill.training.validation import grid

HALF = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """Trains a student.

    Args:
        method: the loss and its roles.
        teacher: what it learns from. A LoRA is added to it in place; with mixed precision its backbone is cast. Its
            text encoders and autoencoder wait on the CPU: text and latents are cached.
        data: a LatentCache, or anything with len, batch(indices) -> (x0, cond), uncond and captions.
        config: see TrainConfig.
        models: the networks, on their device; made from the teacher by `config.lora` where not given.
        target: the export folder; `<out>/export` where not given.

    Raises:
        InputError: `config.out` holds another run, or a setting is out of range.
    """

    def __init__(
        self, method: Method, teacher: Teacher, data, config: TrainConfig, models: Models | None = None,
        target: Path | None = None,
    ) -> None:  # fmt: skip
        config.check()
        sharded = sharding.check(config.lora)
        if len(data) < 1:
            raise InputError("data: got no samples; allowed: one or more")
        self.method, self.teacher, self.data, self.config = method, teacher, data, config
        self.out = Path(config.out)
        self.target = target or self.out / "export"
        AcceleratorState._reset_state()  # a second run in one process may have another precision
        with sharding.kept_from_accelerate():
            self.accelerator = Accelerator(
                cpu=on_cpu(), mixed_precision=config.mixed_precision, log_with=list(config.trackers) or None,
                gradient_accumulation_steps=config.gradient_accumulation, project_dir=self.out,
            )  # fmt: skip
        self.sharded = sharded and self.accelerator.num_processes > 1
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        folder.claim(config, self.accelerator.num_processes, write=main and not config.dry_run)
        torch.manual_seed(config.seed)
        if teacher is not None:
            teacher.denoiser.to(self.device)
            move_coders(teacher, "cpu")
        self.models = models or build_models(method, teacher, config)
        for module in self.models.others.values():
            module.to(self.device)
        self.backbone = self.models.student.backbone  # as it is, before it is wrapped
        if config.gradient_checkpointing:
            self.models.enable_checkpointing()
        if config.compile:
            self.backbone.compile(dynamic=False)
        self.optimizers = {
            role: build_optimizer(list(group.values()), config.of(role)) for role, group in self.models.trained.items()
        }
        self._prepare()
        self.drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.backbone.modules())
        self.uncond = to(data.uncond, self.device)
        # updates done, and the time they and what the student began with took, earlier runs of the command included
        self.update, self.seconds = 0, config.spent_before
        self._sums: dict[str, Tensor] = {}

    def _prepare(self) -> None:
        """Wraps networks and optimizers for the device, the processes and the precision.

        Autocast goes around each call of a network, not around the loss: it keeps its casts of weights until it ends,
        and would hand the student those of the averaged weights that the target was called with.
        """
        models = self.models
        models.student.backbone = self.accelerator.prepare_model(self.backbone, evaluation_mode=self.sharded)
        if self.sharded:
            sharding.divide(self.backbone, self.device)
        models.wrapped = {
            role: self.accelerator.prepare(module) for role, module in models.others.items() if role in models.trained
        }
        self.optimizers = {role: self.accelerator.prepare(optimizer) for role, optimizer in self.optimizers.items()}

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Path:
        """Trains to `max_train_steps` and exports.

        Returns:
            The export folder, `<out>/export`.

        Raises:
            InputError: the loss is no longer finite; the disk or the device is full; all checkpoints are broken.
            KeyboardInterrupt: a stop signal came; the run is saved.
        """
        if (done := folder.finished(self.config, self.target)) is not None:
            self.accelerator.print(f"done already: {done}")
            if self.accelerator.is_main_process:
                push_rest(self.config, done)
            return done
        with room(self.out, self.device, self.config.batch_size):
            return self._fit()

    def _fit(self) -> Path:
        config = self.config
        self._resume()
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
            while self.update < config.max_train_steps and not stop.asked(agree=self.update % config.log_every == 0):
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
            self.accelerator.print(f"stopped at update {self.update}; the same command resumes")
            raise KeyboardInterrupt
        return self._finish()

    def step(self) -> dict[str, Tensor]:
        """One update: every phase of the method, over `gradient_accumulation` batches. Returns the mean named terms.

        Nothing here waits for the device.
        """
        config, clock = self.config, Clock(self.update, self.config.max_train_steps)
        for role, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(self.update, config.of(role))
        terms: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation):
            batch = self.batch(self.update * config.gradient_accumulation + micro)
            with self.accelerator.accumulate(self.models.student.backbone, *self.models.wrapped.values()):
                for phase in self.method.phases(clock):
                    with self.models.only(phase):
                        loss = self.method.loss(phase, batch, self.models, clock)
                        self.accelerator.backward(loss.total)
                        self._apply(phase)
                    for name, value in loss.terms.items():
                        terms[name] = terms.get(name, 0) + value.detach().float() / config.gradient_accumulation
        self.models.after_update()
        self.update += 1
        for name, value in terms.items():
            self._sums.setdefault(name, value.new_zeros(2)).add_(torch.stack([value, torch.ones_like(value)]))
        return terms

    def _apply(self, role: str) -> None:
        """The optimizer's step of one role; of accumulated batches, the last alone takes it."""
        if self.accelerator.sync_gradients:
            if self.sharded and role == "student":
                sharding.average_gradients(self.models.trained[role].values())
            self.accelerator.clip_grad_norm_(list(self.models.trained[role].values()), self.config.max_grad_norm)
        self.optimizers[role].step()
        self.optimizers[role].zero_grad(set_to_none=True)

    def batch(self, number: int) -> Batch:
        """This process's share of the run's batch `number`."""
        size, count, seed = self.config.batch_size, self.accelerator.num_processes, self.config.seed
        first = (number * count + self.accelerator.process_index) * size
        if self.drops:
            torch.manual_seed(mix(~seed, first))
        x0, cond = self.data.batch(sample_indices(seed, first, size, len(self.data)))
        draws = Draws.at(seed, first, size, self.device)
        return Batch(self._send({"": x0})[""], self._send(cond), expand(self.uncond, size), draws)

    def _send(self, cond: Cond) -> Cond:
        """To the device; from pinned memory, so that the copy is waited for by nobody."""
        if self.device.type == "cuda":
            cond = {key: value.pin_memory() for key, value in cond.items()}
        return to(cond, self.device)

    # ---------------------------------------------------------------------------------------------- around the loop

    def _state(self) -> dict:
        averages = {"averages": self.models.averages, "exported": self.models.exported}
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "trained": {role: {k: p.detach() for k, p in group.items()} for role, group in self.models.trained.items()},
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "buffers": {role: dict(self.models.others[role].named_buffers()) for role in self.models.wrapped},
            **{name: a.values if a else {} for name, a in averages.items()},
            "seconds": self.seconds,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def _save(self) -> None:
        weights = [p.detach().float().sum() for group in self.models.trained.values() for p in group.values()]
        if not math.isfinite(torch.stack(weights).sum().item()):
            raise InputError(
                f"weights: got a value that is not finite at update {self.update}; the last checkpoint is kept; lower "
                "--learning-rate, or use --mixed-precision bf16 or no"
            )
        if self.accelerator.is_main_process:
            checkpoint.save(self.out / "checkpoints", self.update, self._state())
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _resume(self) -> None:
        found = checkpoint.load_latest(self.out / "checkpoints", self.accelerator.print)
        if found is None:
            return
        self.update, state = found
        self.seconds = state["seconds"]
        places = [(group, state["trained"][role]) for role, group in self.models.trained.items()]
        places += [(dict(self.models.others[r].named_buffers()), state["buffers"][r]) for r in self.models.wrapped]
        places += [
            (a.values, state[n])
            for n, a in (("averages", self.models.averages), ("exported", self.models.exported))
            if a
        ]
        for tensors, saved in places:
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][role])
        if state["scaler"] and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"resuming at update {self.update}")

    def _log(self, metrics: trackers.Metrics, seconds: float) -> dict[str, str]:
        """Writes the means since the last line; the one place where the loop waits for the device."""
        sums = {name: self.accelerator.reduce(pair, "sum").tolist() for name, pair in self._sums.items()}
        self._sums = {}
        values = {name: total / count for name, (total, count) in sums.items()}
        if not all(math.isfinite(v) for v in values.values()):
            got = ", ".join(f"{k} = {v}" for k, v in values.items())
            raise InputError(
                f"loss: got {got} at update {self.update}; the last checkpoint is kept; lower --learning-rate, or use "
                "--mixed-precision bf16 or no"
            )
        rate = learning_rate_at(self.update - 1, self.config)
        metrics.log(self.update, values | {"learning_rate": rate, "seconds_per_update": round(seconds, 4)})
        return {name: f"{value:.4f}" for name, value in values.items()}

    def _validate(self, metrics: trackers.Metrics) -> None:
        picture = self._painted()
        if picture is not None and self.accelerator.is_main_process:
            path = self.out / "validation"
            path.mkdir(exist_ok=True)
            picture.save(path / f"{self.update:08d}.png")
            metrics.picture(self.update, "validation", picture)
        self.accelerator.wait_for_everyone()

    def _painted(self) -> Image.Image | None:
        """The grid of the student as it is shown; of divided weights, all processes must paint it, else one."""
        if self.teacher is None or not (self.sharded or self.accelerator.is_main_process):
            return None
        with self.models.shown() as student:
            return grid(self.method, self.teacher, student, self.config, self.data.captions)

    def _finish(self) -> Path:
        self.models.student.backbone = self.backbone
        target, picture = self.target, self._painted()
        if self.accelerator.is_main_process and self.teacher is not None:
            with self.models.shown():
                export(
                    self.method, self.teacher, self.models, self.config, target, self.data.captions, self.seconds,
                    picture,
                )  # fmt: skip
            done = {"update": self.update, "seconds": round(self.seconds, 1)}
            files.write(self.out / "done.json", json.dumps(done) + "\n")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"done: {target}")
        if self.accelerator.is_main_process and self.teacher is not None:
            push_rest(self.config, target)
        return target


def build_models(
    method: Method, teacher: Teacher, config: TrainConfig, start: dict[str, Tensor] | None = None
) -> Models:
    """The networks of a method as LoRA or full, from its teacher.

    Args:
        start: of a LoRA, that the teacher begins with too; the student alone begins with `config.begin_with()`.
    """
    common = {
        "student_kind": method.student_kind(teacher.denoiser.kind), "others": method.networks(teacher),
        "target_decay": config.target_ema if "target" in method.roles else 0.0, "export_decay": config.export_ema,
        "dtype": HALF[config.mixed_precision],
    }  # fmt: skip
    if config.lora:
        return lora_models(
            teacher.denoiser, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules,
            dropout=config.lora_dropout, start=start or config.begin_with(), teacher_starts=start is not None, **common,
        )  # fmt: skip
    return full_models(teacher.denoiser, embed_guidance=method.embed_guidance, **common)
