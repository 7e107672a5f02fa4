"""The networks of a run, with one copy of the weights wherever one suffices.

A LoRA student is the teacher's own network with an adapter on; with it off, it is the teacher again, bit-identically. A
full student is a copy. A target is the student's network with averaged weights swapped in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill import features
from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.errors import InputError
from stepdistill.export.folder import ADAPTER
from stepdistill.prediction import Kind
from stepdistill.schedules import Time
from stepdistill.training.adapter import LORA_TARGETS, adaptable, adapter_layers, restore, settings_of
from stepdistill.training.averages import Averages
from stepdistill.training.lora import Switch, make_lean
from stepdistill.training.networks import Networks, trainable

GUIDANCE_WIDTH = 256

Context = Callable[[], AbstractContextManager]


class View:
    """A denoiser called within a context: the teacher with its adapter off, the target with averaged weights.

    The call and `raw` are those of Denoiser, without gradients. Only through `features` do gradients reach the input.
    """

    def __init__(self, denoiser: Denoiser, context: Context = nullcontext) -> None:
        self._denoiser = denoiser
        self._context = context
        for name in ("schedule", "kind", "sample_shape", "needs", "takes_guidance", "grid"):
            setattr(self, name, getattr(denoiser, name))

    @torch.no_grad()
    def raw(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """See Denoiser.raw."""
        with self._context():
            return self._denoiser.raw(x_t, t, cond)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, kind: Kind = "x0") -> Tensor:
        """See Denoiser.forward."""
        with self._context():
            return self._denoiser(x_t, t, cond, kind=kind)

    @property
    def backbone(self) -> nn.Module | None:
        """The network behind the view; None for a closed form."""
        return self._denoiser.backbone

    def features(self, x_t: Tensor, t: Time, cond: Cond | None, blocks: Sequence[str]) -> list[Tensor]:
        """See features.read; by default for the four blocks of `features.check_blocks`."""
        with self._context():
            return features.read(self._denoiser, x_t, t, cond, blocks or self._spread)

    @cached_property
    def _spread(self) -> tuple[str, ...]:
        return features.check_blocks(self.backbone, ())


class Models(Networks):
    """Teacher, student and target of a run, and the method's own networks.

    Args:
        switch: the adapter switch of a LoRA student; off for the teacher.
        from_adapter: the teacher is not the bare network but has the adapter that the student starts from.
        target_decay: decay of the target's moving average; 0 makes the student its own target.
        export_decay: decay of the average used for validation and export; 0 for the student's own weights.
        others: see Networks.

    Attributes:
        teacher, target: views without gradients.
        student: the trained denoiser; its `backbone` is what accelerate prepares.
        averages: the target's weights; None if the target is the student itself.
        exported: the weights used for validation and export; None for the student's own.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        switch: Switch | None = None,
        from_adapter: bool = False,
        target_decay: float = 0.95,
        export_decay: float = 0.0,
        others: dict[str, nn.Module] | None = None,
    ) -> None:
        for flag, decay in (("target_ema", target_decay), ("export_ema", export_decay)):
            if not 0 <= decay < 1:
                raise InputError(f"{flag}: got {decay:g}; allowed: 0 (no average) to below 1; try 0.95")
        super().__init__(student.backbone, others)
        self.student, self._plain = student, plain(student)
        self.averages = Averages(self.trained["student"], target_decay) if target_decay else None
        self.exported = Averages(self.trained["student"], export_decay) if export_decay else None
        average = self.averages.in_place if self.averages else nullcontext
        self._average = self.exported.in_place if self.exported else nullcontext
        self._switch = switch or Switch()
        first = Averages(self.trained["student"], 0.0) if from_adapter else None
        before = (lambda: _both(first.in_place(), self._switch.quiet())) if first else self._switch.off
        self.teacher = View(teacher, before)
        self.target = View(self._plain, lambda: _both(average(), self._switch.quiet()))

    def enable_checkpointing(self) -> None:
        """Recomputes activations in the backward instead of keeping them: the student's, and those of a teacher that
        gradients pass through. Adapters are switched as in the first pass, since by then they may be switched the other
        way."""

        def run(function, *inputs):
            on = self._switch.on

            def once_more(*inputs):
                with nullcontext() if on else self._switch.off():
                    return function(*inputs)

            return checkpoint(once_more, *inputs, use_reentrant=False)

        for backbone in {self.student.backbone, self.teacher.backbone} - {None}:
            backbone.enable_gradient_checkpointing(run)

    @contextmanager
    def shown(self) -> Iterator[Denoiser]:
        """Context with the student as validated and exported: averaged if configured, without dropout or gradients, and
        never wrapped: a wrapped network would wait for the other processes."""
        with torch.no_grad(), self._average(), self._switch.quiet():
            yield self._plain


@contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield


def plain(denoiser: Denoiser) -> Denoiser:
    """Another denoiser around the same backbone, which stays unwrapped when the first one's is wrapped."""
    twin = copy.copy(denoiser)
    twin._modules = dict(denoiser._modules)
    return twin


def keep_in(dtype: torch.dtype | None, module: nn.Module) -> None:
    """Casts the weights of a module, if a dtype is given."""
    for tensor in (*module.parameters(), *module.buffers()):
        if dtype is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def check_embeds_guidance(backbone: nn.Module) -> None:
    """Raises InputError if a copy of a network cannot be conditioned on guidance."""
    if "time_cond_proj_dim" not in backbone.config:
        raise InputError(
            f"embed_guidance: got a teacher with a {type(backbone).__name__}; allowed: UNet2DConditionModel; give "
            "--no-embed-guidance"
        )


def lora_models(
    teacher: Denoiser,
    *,
    rank: int = 64,
    alpha: float | None = None,
    target_modules: tuple[str, ...] = LORA_TARGETS,
    dropout: float = 0.0,
    start: dict[str, Tensor] | None = None,
    teacher_starts: bool = False,
    student_kind: Kind | None = None,
    target_decay: float = 0.95,
    export_decay: float = 0.0,
    others: dict[str, nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> Models:
    """Adds a LoRA (Hu et al. 2021) to the teacher's backbone, in place, and returns the roles that share it.

    Args:
        start: weights of an adapter, by parameter, that the student starts from. teacher_starts: so does the teacher.
        student_kind: the student's prediction type; None for the teacher's.
        alpha: the adapter's scale is alpha / rank; None for alpha = rank.
        target_modules: endings of module names.
        dtype: that the frozen weights are cast to; None leaves them. The adapter is float32.

    Raises:
        InputError: rank below 1, alpha or dropout out of range; or see `adaptable`.
    """
    from peft import inject_adapter_in_model

    if rank < 1:
        raise InputError(f"rank: got {rank}; allowed: 1 or more; the papers use 64")
    if alpha is not None and not alpha > 0:
        raise InputError(f"alpha: got {alpha:g}; allowed: above 0; leave it out for alpha = rank")
    if not 0 <= dropout < 1:
        raise InputError(f"lora_dropout: got {dropout:g}; allowed: 0 to below 1")
    backbone = teacher.backbone
    known = adaptable(backbone, target_modules)
    keep_in(dtype, backbone.requires_grad_(False))
    settings = settings_of(rank, known, alpha, dropout)
    if hasattr(backbone, "add_adapter"):
        backbone.add_adapter(settings, adapter_name=ADAPTER)
    else:  # PixArt and pixel UNets: their pipelines load no LoRA, but peft does
        inject_adapter_in_model(settings, backbone, adapter_name=ADAPTER)
    for parameter in trainable(backbone).values():
        parameter.data = parameter.data.float()
    if start is not None:
        restore(trainable(backbone), start)
    switch = make_lean(adapter_layers(backbone), ADAPTER)
    frozen = plain(teacher)
    teacher.kind = student_kind or teacher.kind
    return Models(
        frozen, teacher, switch=switch, from_adapter=teacher_starts, others=others,
        target_decay=target_decay, export_decay=export_decay,
    )  # fmt: skip


def full_models(
    teacher: Denoiser,
    *,
    embed_guidance: bool = False,
    student_kind: Kind | None = None,
    target_decay: float = 0.95,
    export_decay: float = 0.0,
    others: dict[str, nn.Module] | None = None,
    dtype: torch.dtype | None = None,
    divide: Callable[[nn.Module], None] | None = None,
) -> Models:
    """A student copied from the teacher, all its weights trained in float32; with `embed_guidance`, conditioned on w.

    Args:
        student_kind: the student's prediction type; None for the teacher's.
        dtype: that the teacher's weights are cast to; None leaves them.
        divide: applied to both networks before their parameters are collected.
    """
    backbone = copy.deepcopy(teacher.backbone)
    if embed_guidance and not teacher.takes_guidance:
        check_embeds_guidance(backbone)
        # "_use_default_values" would override the new width
        config = {k: v for k, v in backbone.config.items() if not k.startswith("_")}
        student = type(backbone).from_config(config | {"time_cond_proj_dim": GUIDANCE_WIDTH})
        missing, unexpected = student.load_state_dict(backbone.state_dict(), strict=False)
        new = "time_embedding.cond_proj.weight"
        if unexpected or missing != [new] * (backbone.config.time_cond_proj_dim is None):
            raise InputError(
                f"embed_guidance: got a teacher whose weights do not fit ({missing[:2]}, {unexpected[:2]}); allowed: "
                "one without time_cond_proj_dim; leave it out"
            )
        if missing:
            nn.init.zeros_(student.get_parameter(new))  # starts as the teacher, for any w
        backbone = student.to(next(backbone.parameters()).device)
    backbone.float().requires_grad_(True).train()
    student = type(teacher)(backbone, teacher.schedule, student_kind or teacher.kind)
    student.sample_shape, student.grid = teacher.sample_shape, teacher.grid
    keep_in(dtype, teacher.backbone.requires_grad_(False))
    if divide is not None:
        divide(teacher.backbone)
        divide(backbone)
    return Models(teacher, student, others=others, target_decay=target_decay, export_decay=export_decay)
