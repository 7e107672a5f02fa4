"""The flags common to both adversarial methods."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from stepdistill.errors import InputError
from stepdistill.export.folder import export_in, read_record
from stepdistill.training.adapter import adapter_like, check_fits
from stepdistill.training.config import TrainConfig
from stepdistill.training.noisiest import check_noisiest

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class AdversarialConfig(TrainConfig):
    """Flags of a student that jumps to the clean end, and of the discriminator it is trained against."""

    FULL_RATE: ClassVar[float] = 5e-6

    start: Path | None = None
    """Export of an earlier run on the same teacher, such as LCM, that the student starts from; by default the teacher.
    Its rank must be the same."""
    student_steps: int = 4
    """Number of times the student is trained at: those that sampling with this step count visits."""
    curriculum_share: float = 0.0
    """Share of the run over which the noisiest time reaches its last weight; 0 for no curriculum."""
    last_weight: float = 1.0
    """Final probability of the noisiest time relative to each of the others."""
    backward_simulation: float = 0.0
    """Share of samples noised from the student's own one-step output, as in multistep sampling, not from an image."""
    discriminator_warmup: int = 0
    """Initial updates that train the discriminator alone: untrained heads would lead a good student astray."""
    adversarial_loss: Literal["hinge", "softplus", "bce"] = "hinge"
    """Loss of the discriminator and the student. softplus and bce are one: binary cross-entropy on logits."""
    discriminator_learning_rate: float = 1e-4
    """Peak learning rate of the discriminator."""
    discriminator_betas: tuple[float, float] = (0.0, 0.99)
    """Adam betas of the discriminator."""
    guidance: float = 4.0
    """Guidance scale for data that the teacher generates (prompts only), and for guidance-conditioned networks."""

    @property
    def extendable(self) -> bool:
        """See LoopConfig.extendable; the curriculum is a share of the run."""
        return super().extendable and not self.curriculum_share

    def check(self) -> None:
        """Raises InputError if a setting is out of range, or needs a package that is not installed."""
        super().check()
        if self.start and not self.lora:
            raise InputError(f"start: got {self.start} with --no-lora; allowed: with a LoRA; leave one of them out")
        if self.discriminator_warmup >= self.max_train_steps:
            got = f"{self.discriminator_warmup} of {self.max_train_steps} updates"
            raise InputError(f"discriminator_warmup: got {got}; allowed: fewer than all; try a tenth")
        if not 0 < self.discriminator_learning_rate < math.inf:
            got = f"{self.discriminator_learning_rate:g}"
            raise InputError(f"discriminator_learning_rate: got {got}; allowed: above 0; try 1e-4")
        if not all(0 <= beta < 1 for beta in self.discriminator_betas):
            default = type(self).discriminator_betas
            got = f"{self.discriminator_betas}; allowed: 0 to below 1; try {default}"
            raise InputError(f"discriminator_betas: got {got}")

    @property
    def data_guidance(self) -> float:
        """The value of --guidance."""
        return self.guidance

    def of(self, role: str) -> TrainConfig:
        """The discriminator's optimizer has its own learning rate and betas."""
        if role != "discriminator":
            return self
        return dataclasses.replace(
            self, learning_rate=self.discriminator_learning_rate, adam_betas=self.discriminator_betas
        )

    def begin_with(self) -> dict[str, Tensor] | None:
        """The weights of `start`, by parameter.

        Raises:
            InputError: it does not exist, or holds no readable weights.
        """
        from stepdistill.export.adapters import trained_weights

        if self.start and not self._start.is_dir():
            raise InputError(
                f"start: got {self.start}, which does not exist; allowed: the folder of a finished run on this "
                "teacher; train it first, or leave it out"
            )
        return trained_weights(self._start) if self.start else None

    @property
    def spent_before(self) -> float:
        """Training seconds of the run of `start`, as recorded in its export."""
        return read_record(self._start / "config.json").get("train_seconds") or 0.0 if self.start else 0.0

    @property
    def _start_kind(self) -> str | None:
        """Prediction type of the student of `start`, from its scheduler; None if that does not name one."""
        from stepdistill.denoiser.families import KINDS

        file = self._start / "scheduler" / "scheduler_config.json"
        return KINDS.get(read_record(file).get("prediction_type"))

    @property
    def _start(self) -> Path:
        return Path(export_in(str(self.start)))

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be distilled with these flags."""
        from stepdistill.export.kohya import read_lora

        super().check_teacher(teacher)
        denoiser, start = teacher.denoiser, self.begin_with()
        if start is not None:
            check_fits(adapter_like(denoiser.backbone, self.rank, self.target_modules), start)
            if (alpha := read_lora(self._start)[1]["lora_alpha"]) != (self.alpha or self.rank):
                raise InputError(
                    f"alpha: got {self.alpha or self.rank:g} with --start {self.start}, whose adapter's is {alpha:g}; "
                    f"allowed: the same; give --alpha {alpha:g}"
                )
        if start is not None and (kind := self._start_kind) not in (None, denoiser.kind):
            raise InputError(
                f"start: got {self.start}, whose student predicts {kind}, for a teacher that predicts {denoiser.kind}; "
                "allowed: one that predicts as the teacher does; leave it out"
            )
        check_noisiest(teacher, denoiser.schedule.t_max, self.mixed_precision)
