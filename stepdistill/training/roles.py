"""The networks of a run: one copy of the weights wherever one will do.

A LoRA student is the teacher's own network with an adapter on; switched off, it is the teacher again, bit for bit. A
full student is a copy. A target is the student's network with averaged weights in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from stepdistill.denoiser.base import Cond, Denoiser
from stepdistill.errors import InputError
from stepdistill.prediction import Kind
from stepdistill.schedules import Time
from stepdistill.training.averages import Averages

ADAPTER = "default"
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
GUIDANCE_WIDTH = 256


class View:
    """A denoiser seen through a context: the teacher with its adapter off, the target with averaged weights.

    Answers without gradients, and as a Denoiser does: call it, or ask for `raw`.
    """

    def __init__(self, denoiser: Denoiser, context: Callable[[], AbstractContextManager] = nullcontext) -> None:
        self._denoiser = denoiser
        self._context = context
        self.schedule, self.kind, self.sample_shape = denoiser.schedule, denoiser.kind, denoiser.sample_shape

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


class Models:
    """Teacher, student and target of a run.

    Attributes:
        teacher, target: views without gradients.
        student: the denoiser that is trained; its `backbone` is what accelerate prepares.
        trained: the student's trainable parameters by name.
        averages: the target's moving average; None where the target is the student itself.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        *,
        adapter_off: Callable[[], AbstractContextManager] = nullcontext,
        target_decay: float = 0.95,
    ) -> None:
        if not 0 <= target_decay < 1:
            raise InputError(f"target_ema: got {target_decay:g}; allowed: 0 (no average) to below 1; try 0.95")
        self.student = student
        self.trained = {name: p for name, p in student.backbone.named_parameters() if p.requires_grad}
        self.averages = Averages(self.trained, target_decay) if target_decay else None
        self.teacher = View(teacher, adapter_off)
        self.target = View(plain(student), self.averages.in_place if self.averages else nullcontext)

    def after_update(self) -> None:
        """What follows an optimizer step."""
        if self.averages:
            self.averages.update()


def plain(denoiser: Denoiser) -> Denoiser:
    """Another denoiser around the same backbone, which stays as it is when the first one's is wrapped."""
    twin = copy.copy(denoiser)
    twin._modules = dict(denoiser._modules)
    return twin


def adapter_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]


def lora_models(
    teacher: Denoiser,
    *,
    rank: int = 64,
    alpha: float | None = None,
    target_modules: tuple[str, ...] = LORA_TARGETS,
    dropout: float = 0.0,
    target_decay: float = 0.95,
) -> Models:
    """Adds a LoRA (Hu et al. 2021) to the teacher's backbone, in place, and returns the roles that share it.

    Args:
        alpha: scale of the adapter is alpha / rank; None is alpha = rank.
        target_modules: endings of module names; those that match nothing are left out as long as some other matches.

    Raises:
        InputError: rank below 1, or names that match no layer.
    """
    from peft import LoraConfig

    if rank < 1:
        raise InputError(f"rank: got {rank}; allowed: 1 or more; the papers use 64")
    if not 0 <= dropout < 1:
        raise InputError(f"lora_dropout: got {dropout:g}; allowed: 0 to below 1")
    backbone = teacher.backbone
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in backbone.named_modules() if isinstance(module, kinds)]
    known = [e for e in target_modules if any(n == e or n.endswith(f".{e}") for n in names)]
    unknown = [e for e in target_modules if e not in known]
    if unknown and (not known or target_modules is not LORA_TARGETS):
        last = sorted({n.split(".")[-1] if not n.split(".")[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in names})
        raise InputError(f"target modules: got {', '.join(unknown)}, which match no layer; allowed: endings such as "
                         f"{', '.join(last[:12])}")  # fmt: skip
    backbone.requires_grad_(False)
    backbone.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=known, lora_dropout=dropout, init_lora_weights="gaussian"),
        adapter_name=ADAPTER,
    )
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters train in float32 whatever the base is kept in
    layers = adapter_layers(backbone)

    @contextmanager
    def adapter_off() -> Iterator[None]:
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters` would also turn the adapter's gradients off
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    return Models(plain(teacher), teacher, adapter_off=adapter_off, target_decay=target_decay)


def full_models(teacher: Denoiser, *, embed_guidance: bool = False, target_decay: float = 0.95) -> Models:
    """A student that is a copy of the teacher, all its weights trained; with `embed_guidance`, told its w as well."""
    backbone = copy.deepcopy(teacher.backbone)
    if embed_guidance:
        if "time_cond_proj_dim" not in backbone.config:
            raise InputError(f"embed_guidance: got {type(backbone).__name__}; allowed: UNet2DConditionModel; leave it out")
        config = dict(backbone.config) | {"time_cond_proj_dim": GUIDANCE_WIDTH}
        student = type(backbone).from_config(config)
        missing, unexpected = student.load_state_dict(backbone.state_dict(), strict=False)
        new = "time_embedding.cond_proj.weight"
        if unexpected or missing not in ([], [new]):
            raise InputError(f"embed_guidance: the teacher's weights do not fit ({missing[:2]}, {unexpected[:2]})")
        if missing:
            nn.init.zeros_(student.get_parameter(new))  # starts as the teacher, whatever w
        backbone = student.to(next(backbone.parameters()).device)
    backbone.float().requires_grad_(True).train()
    student = type(teacher)(backbone, teacher.schedule, teacher.kind)
    return Models(teacher, student, target_decay=target_decay)
