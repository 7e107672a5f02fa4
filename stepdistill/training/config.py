"""The configuration of training runs: flags, their checks, and what they imply."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from stepdistill import embedded
from stepdistill.errors import InputError, check_seed
from stepdistill.training.adapter import LORA_TARGETS, adaptable
from stepdistill.training.processes import HALF

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.load import Teacher
    from stepdistill.methods.base import Method


def launcher_precision() -> str:
    """The value of `accelerate launch --mixed_precision`; "no" if it is not given."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


@dataclass(frozen=True)
class LoopConfig:
    """Flags common to all training runs.

    Attributes:
        FREE: settings that may change on resume; batch size and accumulation only if samples_per_update stays the same.
    """

    FREE: ClassVar[frozenset[str]] = frozenset({
        "config", "out", "checkpoint_every", "validate_every", "validation_prompts", "log_every", "trackers",
        "push_to_hub", "dry_run", "batch_size", "gradient_accumulation", "gradient_checkpointing", "compile",
    })  # fmt: skip

    out: Path = Path("out/student")
    """Folder for checkpoints, logs and results. Run the same command again to resume."""
    config: Path | None = None
    """YAML file of defaults for any of these flags, or the name of settings that ship; flags take precedence."""
    seed: int = 0
    """Seed of all random numbers."""

    max_train_steps: int = 1000
    """Number of updates."""
    batch_size: int = 16
    """Samples per process in one forward."""
    gradient_accumulation: int = 1
    """Forwards per update."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine fall to 0."""
    lr_warmup: int = 0
    """Updates of linear learning-rate warm-up."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """Optimizer; 8-bit AdamW needs the extra `quant`."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam betas: decay rates of the mean gradient and of the mean squared gradient."""
    adam_epsilon: float = 1e-8
    """Adam epsilon, added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    mixed_precision: Literal["no", "fp16", "bf16"] = field(default_factory=launcher_precision)
    """Precision of the networks and of frozen weights. Losses, trained weights and optimizer stay float32.
    Default: that of `accelerate launch`."""
    checkpoint_every: int = 500
    """Updates between checkpoints."""
    validate_every: int = 0
    """Updates between validations of the student; 0 for none before the end."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers besides metrics.jsonl; they need the extra `trackers`."""
    dry_run: bool = False
    """Print the resolved configuration, do one update on a few samples without saving, and stop."""

    def check(self) -> None:
        """Raises InputError if a setting is out of range, or needs a package that is not installed."""
        self.require("max_train_steps", "batch_size", "gradient_accumulation", "learning_rate", "checkpoint_every",
                     "log_every", "max_grad_norm", above=0, fix="raise it")  # fmt: skip
        check_seed(self.seed)
        self.require("lr_warmup", "validate_every", "weight_decay", least=0, fix="0 is none")
        self.require("adam_epsilon", above=0, fix="try 1e-8")
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
        """Raises InputError if a setting is not finite or out of bounds; None is allowed.

        Args:
            names: settings to check. least, most: inclusive bounds. above, below: exclusive bounds. fix: advice in the
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
    def extendable(self) -> bool:
        """Whether a run may be resumed with another `max_train_steps`: whether no update depends on it."""
        return self.lr_scheduler == "constant"

    @property
    def half_type(self) -> torch.dtype | None:
        """The dtype that networks compute in; None for float32."""
        return HALF[self.mixed_precision]

    @property
    def peak_rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate

    def of(self, role: str) -> LoopConfig:
        """The settings of a role's optimizer; by default the same for all roles."""
        return self

    def record(self) -> dict:
        """The configuration as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


@dataclass(frozen=True)
class PipelineConfig(LoopConfig):
    """Flags of runs on a diffusion pipeline and images."""

    teacher: str = "avatars"
    """Pipeline folder, hub id, or an embedded teacher: "avatars", or "avatars-flow", a rectified flow."""
    variant: str | None = None
    """Variant of the teacher's weight files, such as "fp16"."""
    revision: str | None = None
    """Revision of the teacher's hub repository."""
    data: str | None = None
    """Image folder with metadata.jsonl, `datasets` name, webdataset shards, cache folder, prompts (.txt) or "avatars".
    Optional only for an embedded teacher."""
    resolution: int | None = None
    """Side of the images in pixels; by default that of a cache folder, else the teacher's own."""
    half: bool = False
    """Cache latents and text embeddings in float16, which takes half the disk space."""

    @property
    def samples(self) -> str:
        """The data source: --data, or the embedded set for an embedded teacher.

        Raises:
            InputError: no --data for a teacher that is not embedded.
        """
        return embedded.data_for(self.teacher, self.data)

    @property
    def frozen_type(self) -> torch.dtype | None:
        """The dtype that the teacher's network is loaded in; None for float32."""
        return None

    def record(self) -> dict:
        """See LoopConfig.record; `data` is the resolved source."""
        known = self.data is not None or self.teacher in embedded.TEACHERS
        return super().record() | ({"data": self.samples} if known else {})

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be used with these flags; called before data are encoded."""


@dataclass(frozen=True)
class TrainConfig(PipelineConfig):
    """Flags of the training scripts that distil a pipeline into fewer steps.

    Attributes:
        LORA_RATE, FULL_RATE: default peak learning rates of a LoRA and of a full student.
    """

    LORA_RATE: ClassVar[float] = 1e-4
    FULL_RATE: ClassVar[float] = 1e-5

    learning_rate: float | None = None
    """Peak learning rate; by default 1e-4 for a LoRA and 1e-5 for a full student, 5e-6 with ADD and LADD."""
    lora: bool = True
    """Train a LoRA adapter; --no-lora trains all weights."""
    rank: int = 64
    """Rank of the adapter."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; by default alpha is the rank."""
    target_modules: tuple[str, ...] = LORA_TARGETS
    """Name endings of the adapted layers."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's inputs."""
    export_ema: float = 0.0
    """Decay of the weight average used for validation and export; 0 for the trained weights themselves."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward instead of keeping them."""
    compile: bool = False
    """Compile the backbone with torch.compile."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts of the validation grids; by default a few of the data's."""
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

    @property
    def peak_rate(self) -> float:
        """See LoopConfig.peak_rate."""
        return self.learning_rate or (self.LORA_RATE if self.lora else self.FULL_RATE)

    def record(self) -> dict:
        """See PipelineConfig.record; the learning rate is the one in use."""
        return super().record() | {"learning_rate": self.peak_rate}

    def method(self) -> Method:
        """The method these flags describe; subclasses override."""
        raise NotImplementedError

    @property
    def target_decay(self) -> float:
        """Decay of the target's moving average; 0 if the student is its own target, or the method has none."""
        return 0.0

    @property
    def frozen_type(self) -> torch.dtype | None:
        """bfloat16 for a LoRA trained in bfloat16, which keeps them so; a full student starts from float32 weights.

        A float16 run casts them later: generated data are keyed by the weights as rounded to bfloat16.
        """
        return torch.bfloat16 if self.lora and self.mixed_precision == "bf16" else None

    @property
    def data_guidance(self) -> float:
        """The guidance scale at which the teacher generates the data, if it does."""
        return 1.0

    def check_teacher(self, teacher: Teacher) -> None:
        """See PipelineConfig.check_teacher; also checks that an adapter fits."""
        if self.lora:
            adaptable(teacher.denoiser.backbone, self.target_modules)

    def begin_with(self) -> dict[str, Tensor] | None:
        """Weights of the adapter that the student starts from, by parameter; None for a new one."""
        return None

    @property
    def spent_before(self) -> float:
        """Training seconds of the run that the student starts from."""
        return 0.0


def _check_installed(flag: str, value: str, package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        fix = f"pip install 'stepdistill[{extra}]', or leave it out"
        raise InputError(f"{flag}: got {value}, but {package} is not installed; {fix}")
