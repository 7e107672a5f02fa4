"""What the flags of both adversarial methods have in common."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.training.config import TrainConfig
from stepdistill.training.roles import adapter_like, check_fits

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class AdversarialConfig(TrainConfig):
    """Flags of a student that jumps to the clean end, and of the discriminator it is trained against."""

    start: Path | None = None
    """Export of an earlier run on the same teacher that the student begins with, as one of LCM; the teacher where not
    given. Its rank must be the same."""
    student_steps: int = 4
    """Times the student is trained at, those an inference of as many steps visits."""
    warm_share: float = 0.0
    """Share of the run over which the noisiest time comes to its weight; 0 is no curriculum."""
    last_weight: float = 1.0
    """How likely the noisiest time is in the end against each of the others."""
    own_share: float = 0.0
    """Share of samples noised from the student's own one-step answer, as in multistep sampling, not a picture."""
    head_start: int = 0
    """Updates at first in which the discriminator alone learns: what knows nothing yet leads a good student astray."""
    adversarial_loss: Literal["hinge", "softplus"] = "hinge"
    """Of the discriminator and the student. softplus is binary cross-entropy (BCE) on logits, non-saturating."""
    discriminator_learning_rate: float = 1e-4
    """The heads', at the plateau."""
    discriminator_betas: tuple[float, float] = (0.0, 0.99)
    """The heads' Adam betas."""
    guidance: float = 4.0
    """The teacher's guidance scale where it paints the data (prompts only), and where networks are told theirs."""

    def check(self) -> None:
        """Raises InputError where a setting is out of range, or needs a package that is not installed."""
        super().check()
        if self.start and not self.lora:
            raise InputError(f"start: got {self.start} with --no-lora; allowed: with a LoRA; leave one of them out")
        if self.head_start >= self.max_train_steps:
            got = f"{self.head_start} of {self.max_train_steps} updates"
            raise InputError(f"head_start: got {got}; allowed: fewer than all; try a tenth")
        if not 0 < self.discriminator_learning_rate < math.inf:
            got = f"{self.discriminator_learning_rate:g}"
            raise InputError(f"discriminator_learning_rate: got {got}; allowed: above 0; try 1e-4")
        if not all(0 <= beta < 1 for beta in self.discriminator_betas):
            default = type(self).discriminator_betas
            got = f"{self.discriminator_betas}; allowed: 0 to below 1; try {default}"
            raise InputError(f"discriminator_betas: got {got}")

    @property
    def data_guidance(self) -> float:
        """The teacher's own."""
        return self.guidance

    def of(self, role: str) -> TrainConfig:
        """The discriminator's optimizer has a learning rate and betas of its own."""
        if role != "discriminator":
            return self
        return dataclasses.replace(
            self, learning_rate=self.discriminator_learning_rate, adam_betas=self.discriminator_betas
        )

    def begin_with(self) -> dict[str, Tensor] | None:
        """The weights of `start`, by parameter.

        Raises:
            InputError: it holds none that can be read.
        """
        from stepdistill.export.adapters import trained_weights

        return trained_weights(self._start) if self.start else None

    @property
    def spent_before(self) -> float:
        """What the run of `start` took, as its export says."""
        from stepdistill.evaluation.models import training_record
        from stepdistill.evaluation.spec import ModelSpec

        record = training_record(ModelSpec(str(self._start), "start")) if self.start else {}
        return record.get("train_seconds") or 0.0

    @property
    def _start_kind(self) -> str | None:
        """What the student of `start` predicts, as its scheduler says; None where that does not tell."""
        from stepdistill.denoiser.families import KINDS

        file = self._start / "scheduler" / "scheduler_config.json"
        said = json.loads(file.read_text()).get("prediction_type") if file.is_file() else None
        return KINDS.get(said)

    @property
    def _start(self) -> Path:
        from stepdistill.evaluation.places import export_in

        return Path(export_in(str(self.start)))

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError where a teacher cannot be distilled as the flags say."""
        super().check_teacher(teacher)
        denoiser, start = teacher.denoiser, self.begin_with()
        if start is not None:
            check_fits(adapter_like(denoiser.backbone, self.rank, self.target_modules), start)
        if start is not None and (kind := self._start_kind) not in (None, denoiser.kind):
            raise InputError(
                f"start: got {self.start}, whose student predicts {kind}, for a teacher that predicts {denoiser.kind}; "
                "allowed: one that predicts as the teacher does; leave it out"
            )
        alpha, _ = denoiser.schedule.coeffs(denoiser.schedule.t_max)
        if alpha == 0 and denoiser.kind == "eps":
            raise InputError(
                f"teacher: got {teacher.path}, which predicts eps on a schedule that ends in pure noise, where eps "
                "says nothing of x0; allowed: v, x0 or flow there; take a teacher of another prediction_type"
            )
