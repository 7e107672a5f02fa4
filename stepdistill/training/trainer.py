"""One training loop for every method.

    Trainer(method, teacher, data, config).fit()    # the same call, or command, again resumes

Everything drawn belongs to a sample's place in the run, so there is no random state in the loop: a run that was cut, or
spread over more processes at the same global batch, goes on with the same numbers.
"""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stepdistill.conditioning.base import expand, to
from stepdistill.denoiser.load import Teacher
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Clock, Method
from stepdistill.training import checkpoint
from stepdistill.training.config import FREE, TrainConfig
from stepdistill.training.export import export
from stepdistill.training.optim import build_optimizer, learning_rate_at
from stepdistill.training.order import sample_indices
from stepdistill.training.roles import Models, full_models, lora_models
from stepdistill.training.validation import grid


class Trainer:
    """Trains a student.

    Args:
        method: the loss and its roles.
        teacher: what it learns from.
        data: a LatentCache, or anything with len, batch(indices) -> (x0, cond), uncond and captions.
        config: see TrainConfig.
        models: the networks; made from the teacher by `config.lora` where not given.

    Raises:
        InputError: `config.out` holds another run.
    """

    def __init__(self, method: Method, teacher: Teacher, data, config: TrainConfig, models: Models | None = None) -> None:
        config.check()
        self.method, self.teacher, self.data, self.config = method, teacher, data, config
        self.out = Path(config.out)
        precision = None if config.mixed_precision == "no" else config.mixed_precision
        self.accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=config.gradient_accumulation)
        self.device = self.accelerator.device
        if len(data) < 1:
            raise InputError("data: got no samples; allowed: one or more")
        self._claim_folder()
        torch.manual_seed(config.seed)
        if teacher is not None:
            teacher.to(self.device)
        self.models = models or self._build_models()
        self.optimizer = build_optimizer(list(self.models.trained.values()), config)
        student = self.models.student
        self.backbone = student.backbone  # as it is, before it is wrapped
        if config.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if config.compile:
            self.backbone.compile()
        student.backbone, self.optimizer = self.accelerator.prepare(self.backbone, self.optimizer)
        self.uncond = to(data.uncond, self.device)
        self.update = 0
        self._stop = False

    def _build_models(self) -> Models:
        config = self.config
        if config.lora:
            return lora_models(
                self.teacher.denoiser, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules,
                dropout=config.lora_dropout, target_decay=config.target_ema,
            )  # fmt: skip
        embed = getattr(self.method, "embed_guidance", False)
        return full_models(self.teacher.denoiser, embed_guidance=embed, target_decay=config.target_ema)

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Path:
        """Trains to `max_train_steps` and exports.

        Returns:
            The export folder, `<out>/export`.

        Raises:
            InputError: the loss is no longer finite; the disk is full; the checkpoints are broken.
        """
        config, target = self.config, self.out / "export"
        if (self.out / "done.json").exists() and json.loads((self.out / "done.json").read_text())["update"] >= config.max_train_steps:
            self.accelerator.print(f"done already: {target}")
            return target
        self._resume()
        first, started = self.update, time.time()
        bar = tqdm(
            total=config.max_train_steps, initial=first, desc=type(self.method).__name__, dynamic_ncols=True,
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip
        with self._signals(), bar:
            while self.update < config.max_train_steps and not self._stop:
                terms = self.step()
                bar.update()
                if self.update % config.log_every == 0 or self.update == config.max_train_steps:
                    bar.set_postfix(self._log(terms, (time.time() - started) / (self.update - first)))
                if config.dry_run:
                    self.accelerator.print(json.dumps(config.record(), indent=2))
                    return target
                if config.validate_every and self.update % config.validate_every == 0:
                    self._validate()
                if self.update % config.checkpoint_every == 0:
                    self._save()
        if self.update < config.max_train_steps:
            self._save()
            self.accelerator.print(f"stopped at update {self.update}; the same command resumes")
            raise KeyboardInterrupt
        return self._finish(time.time() - started)

    def step(self) -> dict[str, Tensor]:
        """One update: every phase of the method, over `gradient_accumulation` batches. Returns the last named terms."""
        config, clock = self.config, Clock(self.update, self.config.max_train_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.update, config)
        terms: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation):
            batch = self.batch(self.update * config.gradient_accumulation + micro)
            with self.accelerator.accumulate(self.models.student.backbone):
                for phase in self.method.phases(clock):
                    with self.accelerator.autocast():
                        loss = self.method.loss(phase, batch, self.models, clock)
                    self.accelerator.backward(loss.total)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.models.trained.values(), config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                    terms |= loss.terms
        self.models.after_update()
        self.update += 1
        return terms

    def batch(self, number: int) -> Batch:
        """This process's share of the run's batch `number`."""
        size, count = self.config.batch_size, self.accelerator.num_processes
        first = (number * count + self.accelerator.process_index) * size
        x0, cond = self.data.batch(sample_indices(self.config.seed, first, size, len(self.data)))
        draws = Draws.at(self.config.seed, first, size, self.device)
        return Batch(x0.to(self.device, non_blocking=True), to(cond, self.device), expand(self.uncond, size), draws)

    # ---------------------------------------------------------------------------------------------- around the loop

    def _claim_folder(self) -> None:
        """Writes config.json, or checks that the one there is of this run."""
        path, record = self.out / "config.json", self.config.record()
        if path.exists():
            there = json.loads(path.read_text())
            free = FREE | ({"max_train_steps"} if self.config.lr_scheduler == "constant" else set())
            differ = [k for k in record if k not in free and there.get(k, record[k]) != record[k]]
            if differ:
                key = differ[0]
                raise InputError(f"--out: got {self.out}, which holds a run with {key} = {there[key]} (now {record[key]}); "
                                 "allowed: the same settings, to resume it; give another --out")  # fmt: skip
        if self.accelerator.is_main_process and not self.config.dry_run:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=2) + "\n")
            except OSError as error:
                raise InputError(f"--out: got {self.out} ({error.strerror}); allowed: a folder that can be written") from error
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict:
        return {
            "trained": {k: p.detach() for k, p in self.models.trained.items()},
            "averages": self.models.averages.values if self.models.averages else {},
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(),
        }

    def _save(self) -> None:
        weights = list(self.models.trained.values())
        if not math.isfinite(torch.stack([p.detach().float().sum() for p in weights]).sum().item()):
            raise InputError(f"weights: got a value that is not finite at update {self.update}; the last checkpoint is kept; "
                             "lower --learning-rate, or use --mixed-precision bf16")  # fmt: skip
        if self.accelerator.is_main_process:
            checkpoint.save(self.out / "checkpoints", self.update, self._state())
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoint.load_latest(self.out / "checkpoints")
        if found is None:
            return
        self.update, state = found
        with torch.no_grad():
            for name, parameter in self.models.trained.items():
                parameter.copy_(state["trained"][name])
            if self.models.averages:
                for name, value in self.models.averages.values.items():
                    value.copy_(state["averages"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_random_state(state["random"])
        self.accelerator.print(f"resuming at update {self.update}")

    def _log(self, terms: dict[str, Tensor], seconds: float) -> dict[str, str]:
        values = {name: self.accelerator.reduce(value.float(), "mean").item() for name, value in terms.items()}
        if not all(math.isfinite(v) for v in values.values()):
            raise InputError(f"loss: got {values} at update {self.update}; the last checkpoint is kept; lower --learning-rate")
        if self.accelerator.is_main_process and not self.config.dry_run:
            row = {"update": self.update, **values, "learning_rate": learning_rate_at(self.update - 1, self.config),
                   "seconds_per_update": round(seconds, 4)}  # fmt: skip
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        return {name: f"{value:.4f}" for name, value in values.items()}

    def _validate(self) -> None:
        if self.accelerator.is_main_process and self.teacher is not None:
            folder = self.out / "validation"
            folder.mkdir(exist_ok=True)
            grid(self.teacher, self.models.student, self.config, self.data.captions).save(folder / f"{self.update:08d}.png")
        self.accelerator.wait_for_everyone()

    def _finish(self, seconds: float) -> Path:
        target = self.out / "export"
        self._save()
        if self.accelerator.is_main_process and self.teacher is not None:
            self.models.student.backbone = self.backbone
            export(self.method, self.teacher, self.models, self.config, target, self.data.captions)
            (self.out / "done.json").write_text(json.dumps({"update": self.update, "seconds": round(seconds, 1)}) + "\n")
        self.accelerator.wait_for_everyone()
        return target

    def _signals(self):
        """Within, SIGTERM and SIGINT let the update end, save and stop."""
        trainer = self

        class Signals:
            def __enter__(self) -> None:
                def stop(*_: object) -> None:
                    trainer._stop = True

                self.previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}

            def __exit__(self, *_: object) -> None:
                for number, handler in self.previous.items():
                    signal.signal(number, handler)

        return Signals()
