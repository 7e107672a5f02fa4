"""What every training run can be told, and how YAML files and flags make it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_origin, get_type_hints

import torch

from stepdistill import embedded
from stepdistill.errors import InputError
from stepdistill.training.processes import HALF
from stepdistill.training.roles import LORA_TARGETS, adaptable
from stepdistill.typed import built, read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.load import Teacher
    from stepdistill.methods.base import Method


def launcher_precision() -> str:
    """What `accelerate launch --mixed_precision` was told; "no" without it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


@dataclass(frozen=True)
class LoopConfig:
    """Flags of everything that trains.

    Attributes:
        FREE: what may change when a run is taken up again; batch size and accumulation as long as samples_per_update
            stays.
    """

    FREE: ClassVar[frozenset[str]] = frozenset({
        "config", "out", "checkpoint_every", "validate_every", "validation_prompts", "log_every", "trackers",
        "push_to_hub", "dry_run", "batch_size", "gradient_accumulation", "gradient_checkpointing", "compile",
    })  # fmt: skip

    out: Path = Path("out/student")
    """Folder for checkpoints, logs and what is made. Run the same command again to resume."""
    config: Path | None = None
    """YAML file of defaults for any of these flags; flags win."""
    seed: int = 0
    """Seed of everything drawn."""

    max_train_steps: int = 1000
    """Updates."""
    batch_size: int = 16
    """Samples a process takes in one forward."""
    gradient_accumulation: int = 1
    """Forwards to an update."""
    learning_rate: float = 1e-4
    """At the plateau."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    lr_warmup: int = 0
    """Updates over which the learning rate rises."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """8-bit AdamW needs the extra `quant`."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the mean gradient and of its mean square."""
    adam_epsilon: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled, as AdamW has it."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm."""

    mixed_precision: Literal["no", "fp16", "bf16"] = field(default_factory=launcher_precision)
    """Of the networks; frozen weights are kept in it. Losses, trained weights and optimizer stay float32. That of
    `accelerate launch` where not given."""
    checkpoint_every: int = 500
    """Updates between checkpoints."""
    validate_every: int = 0
    """Updates between looks at the student; 0 for none before the end."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides metrics.jsonl; from the extra `trackers`."""
    dry_run: bool = False
    """Print the resolved configuration, do one update on a few samples without saving, and stop."""

    def check(self) -> None:
        """Raises InputError where a setting is out of range, or needs a package that is not installed."""
        self.require("max_train_steps", "batch_size", "gradient_accumulation", "learning_rate", "checkpoint_every",
                     "log_every", "max_grad_norm", above=0, fix="raise it")  # fmt: skip
        self.require("lr_warmup", "validate_every", "weight_decay", "adam_epsilon", least=0, fix="0 is none")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise InputError(f"adam_betas: got {self.adam_betas}; allowed: 0 to below 1; try {LoopConfig.adam_betas}")
        if self.mixed_precision not in ("no", "fp16", "bf16"):
            got = f"{self.mixed_precision}, from `accelerate launch`"
            raise InputError(f"mixed_precision: got {got}; allowed: no, fp16, bf16; give --mixed-precision")
        for tracker in self.trackers:
            _check_installed("trackers", tracker, tracker, "trackers")
        if self.optimizer == "adamw8bit":
            _check_installed("optimizer", "adamw8bit", "bitsandbytes", "quant")

    def require(
        self, *names: str, least: float | None = None, above: float | None = None, most: float = math.inf,
        below: float = math.inf, fix: str = "",
    ) -> None:  # fmt: skip
        """Raises InputError where a setting is not finite, or not within bounds; one that is None is.

        Args:
            names: of settings. least, most: bounds that it may be. above, below: those that it may not. fix: of the
                message.
        """
        low = (least if above is None else above) or 0
        begin = f"{low:g}" if above is None else f"above {low:g}"
        end = " or more" * (above is None)
        if most < math.inf:
            end = f" to {most:g}"
        elif below < math.inf:
            end = f" to below {below:g}" if above is None else f", below {below:g}"
        for name in names:
            value = getattr(self, name)
            if value is not None and not (low <= value <= most and value < below and value != above):
                raise InputError(f"{name}: got {value:g}; allowed: {begin}{end}" + f"; {fix}" * bool(fix))

    @property
    def half_type(self) -> torch.dtype | None:
        """What networks compute in; None for float32."""
        return HALF[self.mixed_precision]

    def of(self, role: str) -> LoopConfig:
        """The settings of a role's optimizer; methods with several may give each its own."""
        return self

    def record(self) -> dict:
        """The configuration as JSON holds it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass(frozen=True)
class PipelineConfig(LoopConfig):
    """Flags of what trains by a diffusion pipeline and pictures."""

    teacher: str = "avatars"
    """Pipeline folder, hub id, or an embedded teacher: "avatars", or "avatars-flow", a rectified flow."""
    variant: str | None = None
    """Of the teacher's weight files, as "fp16"."""
    revision: str | None = None
    """Of the teacher's hub repository."""
    data: str | None = None
    """Image folder with metadata.jsonl, `datasets` name, webdataset shards, cache folder, prompts (.txt), "avatars";
    may be left out for an embedded teacher alone."""
    resolution: int | None = None
    """Side of the pictures in pixels; the teacher's own where not given."""
    half: bool = False
    """Keep the encoded latents and text in float16: half the disk."""

    @property
    def samples(self) -> str:
        """What --data names.

        Raises:
            InputError: nothing, for a teacher that is not embedded.
        """
        return embedded.data_for(self.teacher, self.data)

    @property
    def frozen_type(self) -> torch.dtype | None:
        """What the weights of the teacher's network are loaded in; None for float32."""
        return None

    def record(self) -> dict:
        """See LoopConfig.record; the embedded set by its name."""
        known = self.data is not None or self.teacher in embedded.TEACHERS
        return super().record() | ({"data": self.samples} if known else {})

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be used as the flags say, before its data are encoded."""


@dataclass(frozen=True)
class TrainConfig(PipelineConfig):
    """Flags of every training script that distils a pipeline into fewer steps."""

    lora: bool = True
    """Train an adapter; --no-lora trains every weight."""
    rank: int = 64
    """Of the adapter."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; the rank where not given."""
    target_modules: tuple[str, ...] = LORA_TARGETS
    """Endings of the names of adapted layers."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    export_ema: float = 0.0
    """Decay of the average that is shown and exported; 0 for the trained weights themselves."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    compile: bool = False
    """torch.compile the backbone."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts of the grids; a few of the data's where not given."""
    push_to_hub: str | None = None
    """Hub repository to upload the export to."""

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        for name in ("export_ema", "lora_dropout"):
            self.require(name, least=0, below=1, fix=f"try {getattr(type(self), name)}")
        if self.lora:
            self.require("rank", least=1, fix="the papers use 64")
            self.require("alpha", above=0, fix="leave it out for alpha = rank")

    def method(self) -> Method:
        """The method these flags describe; each method's flags say."""
        raise NotImplementedError

    @property
    def target_decay(self) -> float:
        """Of the target's moving average; 0 where the student is its own target, or the method has none."""
        return 0.0

    @property
    def frozen_type(self) -> torch.dtype | None:
        """bfloat16 under an adapter of a run in it, which keeps them so; a full student begins with float32 ones.

        Those of a run in float16 are cast later: what is painted goes by the weights as bfloat16 rounds them.
        """
        return torch.bfloat16 if self.lora and self.mixed_precision == "bf16" else None

    @property
    def data_guidance(self) -> float:
        """The teacher's guidance scale where the data are its own pictures."""
        return 1.0

    def check_teacher(self, teacher: Teacher) -> None:
        """See PipelineConfig.check_teacher; and that an adapter fits it."""
        if self.lora:
            adaptable(teacher.denoiser.backbone, self.target_modules)

    def begin_with(self) -> dict[str, Tensor] | None:
        """Weights of the adapter that the student begins with, by parameter; None for a new one."""
        return None

    @property
    def spent_before(self) -> float:
        """Seconds that went into what the student begins with."""
        return 0.0


def _check_installed(flag: str, value: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        fix = f"pip install 'stepdistill[{extra}]', or leave it out"
        raise InputError(f"{flag}: got {value}, but {package} is not installed; {fix}")


C = TypeVar("C", bound=LoopConfig)


def from_yaml(path: Path, kind: type[C]) -> C:
    """The configuration a YAML file describes. Names may have hyphens, as flags do; one value does for a list of one.

    Raises:
        InputError: no such file, no mapping in it, an unknown name (with the nearest valid one), or a bad value.
    """
    told, kinds = read_yaml(Path(path), "--config"), get_type_hints(kind)
    if isinstance(told, dict):
        told = {str(name).replace("-", "_"): value for name, value in told.items()}
        for name, value in told.items():
            if get_origin(kinds.get(name)) is tuple and not isinstance(value, list):
                told[name] = [value]
    return built(kind, told, f"--config {path}")
