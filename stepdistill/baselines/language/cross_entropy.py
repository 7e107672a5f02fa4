"""Cross-entropy of the next token."""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.models import logits
from stepdistill.methods.base import Clock, Loss


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log S(next token): the loss of controls, and of teachers."""

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student."""
        student_logits = logits(models.student, batch["ids"], batch["attention"])
        value = losses.cross_entropy(*losses.shift(student_logits, batch["ids"], batch["counts"]))
        value = batch.weight(lambda each: losses.predicted(each["counts"])) * value
        return Loss(value, {"cross_entropy": value})
