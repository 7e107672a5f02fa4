"""Trains a few-step student of a pipeline: its batches, its networks and its export.

    Trainer(method, teacher, data, config).fit()    # the same call, or command, again resumes

Updates, checkpoints and logs are in loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.conditioning.base import Cond, expand, to
from stepdistill.denoiser.load import Teacher, move_coders
from stepdistill.draws import Draws, mix
from stepdistill.errors import InputError
from stepdistill.methods.base import Batch, Method
from stepdistill.training import sharding, trackers, zero
from stepdistill.training.config import TrainConfig
from stepdistill.training.export import export, push_rest
from stepdistill.training.loop import Loop
from stepdistill.training.order import sample_indices
from stepdistill.training.roles import Models, full_models, lora_models
from stepdistill.training.validation import encoded, grid, prompts_for


class Trainer(Loop):
    """Trains a student.

    Args:
        method: the loss and its roles: `config.method()`, since the export records the configuration.
        teacher: what the student learns from. A LoRA is added to it in place; with mixed precision its backbone is
            cast. Its text encoders and autoencoder move to the CPU, and take no device memory in training: text and
            latents are cached.
        data: a LatentCache, or anything with len, batch(indices) -> (x0, cond), uncond and captions.
        config: see TrainConfig.
        models: the networks, on their device; by default built from the teacher according to `config.lora`.
        target: the export folder; by default `<out>/export`.

    Raises:
        InputError: `config.out` holds another run, a setting is out of range, or the method is not the configuration's.
    """

    config: TrainConfig
    method: Method

    def __init__(
        self, method: Method, teacher: Teacher, data, config: TrainConfig, models: Models | None = None,
        target: Path | None = None,
    ) -> None:  # fmt: skip
        check_method(method, config)
        sharded, stage = sharding.check(config), zero.check(config)
        if len(data) < 1:
            raise InputError("data: got no samples; allowed: one or more")
        super().__init__(method, config)
        self.teacher, self.data = teacher, data
        self._target = target or self.out / "export"
        several = self.accelerator.num_processes > 1
        self.sharded, self.stage = sharded and several, stage if several else 0
        # while the text encoders are where they were loaded, since one thread of a CPU takes minutes for a large one
        networks = method.networks(teacher) if models is None else {}
        self._shown = self._encoded()
        if teacher is not None:
            teacher.denoiser.to("cpu" if self.divided else self.device)
            move_coders(teacher, "cpu")
        divide = self._divide if self.divided else None
        self.models = models or build_models(method, teacher, config, networks, divide=divide)
        for module in self.models.others.values():
            module.to(self.device)
        self.backbone = self.models.student.backbone  # before it is wrapped
        if config.gradient_checkpointing:
            self.models.enable_checkpointing()
        if config.compile:
            self.backbone.compile(dynamic=False)
        self._start()
        self.drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.backbone.modules())
        self.uncond = to(data.uncond, self.device)
        self.seconds = config.spent_before  # training time of what the student starts from

    @property
    def target(self) -> Path:
        """The export folder; by default `<out>/export`."""
        return self._target

    @property
    def divided(self) -> bool:
        """Whether trained weights are sharded over the processes, not only frozen ones."""
        return self.sharded and not self.config.lora

    def _divide(self, network: nn.Module) -> None:
        sharding.divide(network, self.device, adapted=self.config.lora)

    def _prepare(self) -> None:
        """Wraps networks and optimizers for the device, the processes and the precision.

        Autocast wraps each call of a network, not the loss, which is computed in float32.
        """
        models, own = self.models, self.sharded or self.stage > 0
        models.student.backbone = self.accelerator.prepare_model(self.backbone, evaluation_mode=own)
        if self.sharded and not self.divided:
            self._divide(self.backbone)
        trained = {role: module for role, module in models.others.items() if role in models.trained}
        if self.stage:
            models.student.backbone = self._engine("student", models.student.backbone)
            models.wrapped = {role: self._engine(role, module) for role, module in trained.items()}
        else:
            models.wrapped = {role: self.accelerator.prepare(module) for role, module in trained.items()}

    def _engine(self, role: str, network: nn.Module) -> nn.Module:
        """A network with its optimizer in a DeepSpeed engine."""
        engine = zero.engine(network, self.optimizers[role], self.stage, self.config)
        self.optimizers[role] = zero.ShardedOptimizer(engine, list(self.models.trained[role].values()))
        return engine

    def _wrapped(self) -> Iterable[nn.Module]:
        return () if self.stage else (self.models.student.backbone, *self.models.wrapped.values())

    def _backward(self, role: str, loss: Tensor) -> None:
        if self.stage:
            self.optimizers[role].backward(loss)
        else:
            super()._backward(role, loss)

    def _apply(self, role: str) -> None:
        if not self.stage:
            super()._apply(role)
        elif (norm := self.optimizers[role].step()) is not None:
            self._note_norm(role, norm)

    def _facts(self) -> dict[str, object]:
        return super()._facts() | {"data": getattr(self.data, "key", None)}

    def _before_step(self, role: str) -> None:
        if self.sharded and not self.divided and role == "student":  # FSDP averages what is sharded
            sharding.average_gradients(self.models.trained[role].values())

    def _done_before(self, done: Path) -> None:
        if self.accelerator.is_main_process:
            push_rest(self.config, done)

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
        """Moves named tensors to the device, from pinned memory so that the copy is asynchronous."""
        if self.device.type == "cuda":
            cond = {key: value.pin_memory() for key, value in cond.items()}
        return to(cond, self.device)

    def _validate(self, metrics: trackers.Metrics) -> None:
        picture = self._painted()
        if picture is not None and self.accelerator.is_main_process:
            path = self.out / "validation"
            path.mkdir(exist_ok=True)
            picture.save(path / f"{self.update:08d}.png")
            metrics.picture(self.update, "validation", picture)
        self.accelerator.wait_for_everyone()

    def _encoded(self) -> tuple[Cond, int] | None:
        """The conditions of the validation prompts, and their number; None in a process that generates no grid. Of
        sharded weights, all must generate it, else only the main one."""
        if self.teacher is None or not (self.sharded or self.accelerator.is_main_process):
            return None
        prompts = prompts_for(self.config, self.data.captions)
        return to(encoded(self.teacher, prompts), "cpu"), len(prompts)

    def _painted(self) -> Image.Image | None:
        """The validation grid; None if this process generates none, or the device has no room for it."""
        if self._shown is None:
            return None
        try:
            with self.models.shown() as student:
                return grid(self.method, self.teacher, student, *self._shown, self.config.seed)
        except torch.OutOfMemoryError:
            if self.sharded:  # the other processes would wait for this one
                raise
            self.accelerator.print(f"validation: left out; {self.device} has no room for it beside the training")
            return None

    def fit(self) -> Path:
        """See Loop.fit."""
        try:
            return super().fit()
        finally:
            for optimizer in self.optimizers.values() if self.stage else ():
                optimizer.engine.destroy()  # DeepSpeed would keep its network, a chain's next one beside it

    def _finish(self) -> Path:
        self.models.student.backbone = self.backbone
        target, picture = self.target, self._painted()
        main = self.accelerator.is_main_process
        with self.models.shown():
            if self.divided:
                self.models.student.backbone = sharding.gathered(self.backbone, main)
            if main and self.teacher is not None:
                export(
                    self.method, self.teacher, self.models, self.config, target, self.data.captions, self.seconds,
                    picture,
                )  # fmt: skip
                self._done()
        self.models.student.backbone = self.backbone  # after a gathered copy was exported
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"done: {target}")
        if main and self.teacher is not None:
            push_rest(self.config, target)
        return target


def check_method(method: Method, config: TrainConfig) -> None:
    """Raises InputError if a method is not the one that a configuration describes."""
    wanted = config.method()
    if method == wanted:
        return
    got = f"a {type(method).__name__}"
    if type(method) is type(wanted):
        differ = {key: value for key, value in vars(method).items() if value != vars(wanted)[key]}
        got = ", ".join(f"{key} = {value!r} (config: {vars(wanted)[key]!r})" for key, value in differ.items())
    raise InputError(
        f"method: got {got}; allowed: the {type(wanted).__name__} of config.method(), since the export records the "
        "config; change the config"
    )


def build_models(
    method: Method, teacher: Teacher, config: TrainConfig, networks: dict[str, nn.Module],
    start: dict[str, Tensor] | None = None, divide: Callable[[nn.Module], None] | None = None,
) -> Models:  # fmt: skip
    """Builds the networks of a method from its teacher, with a LoRA or a full student.

    Args:
        networks: the method's own, from `Method.networks`.
        start: LoRA weights that student and teacher start from; with `config.begin_with()`, only the student does.
        divide: see full_models.
    """
    common = {
        "student_kind": method.student_kind(teacher.denoiser.kind), "others": networks,
        "target_decay": config.target_decay, "export_decay": config.export_ema, "dtype": config.half_type,
    }  # fmt: skip
    if config.lora:
        return lora_models(
            teacher.denoiser, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules,
            dropout=config.lora_dropout, start=start or config.begin_with(), teacher_starts=start is not None, **common,
        )  # fmt: skip
    return full_models(teacher.denoiser, embed_guidance=method.embed_guidance, divide=divide, **common)
