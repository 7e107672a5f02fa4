"""DistilBERT's triple loss: outputs, masked tokens, hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.divergence import softened_kl
from stepdistill.baselines.language.masked import Masking
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.methods.base import Clock, Loss


def cosine_distance(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """1 - cos of hidden states (B, S, D): the mean over attended tokens."""
    return masked_mean(1 - nn.functional.cosine_similarity(wide(student), wide(teacher), dim=-1), attention)


@dataclass(frozen=True)
class DistilBert(Objective):
    """kl_weight T² KL(teacher_T ‖ student_T) + mlm_weight masked LM + cosine_weight (1 - cos of the last hidden
    states). First and last are means over attended tokens; the first, with kl_on "masked", over masked ones."""

    masking: Masking
    temperature: float
    kl_weight: float
    mlm_weight: float
    cosine_weight: float
    kl_on: str

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student. Both see the same masked tokens."""
        ids, attention = batch["ids"], batch["attention"]
        masked_ids, is_masked = self.masking.of_batch(batch)
        selected = attention if self.kl_on == "all" else is_masked
        all_share, masked_share = batch.weight(self._count)
        with torch.no_grad():
            teacher_hidden, teacher_logits = models.teacher(masked_ids, attention, selected)
        student_hidden, student_logits = models.student(masked_ids, attention, selected)
        divergence = softened_kl(student_logits, teacher_logits, self.temperature)
        masked_nll = nn.functional.cross_entropy(wide(student_logits), ids[selected], reduction="none")
        terms = {
            "kl": (all_share if self.kl_on == "all" else masked_share) * masked_mean(divergence),
            "masked": masked_share * masked_mean(masked_nll, is_masked[selected]),
            "cosine": all_share * cosine_distance(student_hidden, teacher_hidden, attention),
        }
        weights = {"kl": self.kl_weight, "masked": self.mlm_weight, "cosine": self.cosine_weight}
        return Loss(sum(weights[name] * value for name, value in terms.items()), terms)

    def _count(self, batch: Batch) -> Tensor:
        """The number of attended and of masked tokens."""
        return torch.stack([batch["attention"].sum(), self.masking.of_batch(batch)[1].sum()])
