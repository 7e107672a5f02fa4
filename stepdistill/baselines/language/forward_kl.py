"""Word-level distillation, after Hinton et al. (2015) and Kim and Rush (2016): at each token of a text, the student
learns the teacher's whole next-token distribution.

stepdistill baselines run forward_kl --quick
stepdistill baselines run forward_kl --config train_scripts/configs/baselines/gpt2_lab.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.models import Decoder, logits
from stepdistill.baselines.language.run import QUICK, DecoderConfig
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss


@dataclass(frozen=True)
class ForwardKL(Objective):
    """soft_weight T² KL(teacher at T ‖ student at T) + hard_weight cross-entropy, over the tokens of the text."""

    temperature: float
    soft_weight: float
    hard_weight: float

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student."""
        ids, attention = batch["ids"], batch["attention"]
        with torch.no_grad():
            teacher_logits = logits(models.teacher, ids, attention)[:, :-1]
        student_logits, labels, mask = losses.shift(logits(models.student, ids, attention), ids, batch["counts"])
        weight = batch.weight(lambda each: losses.predicted(each["counts"]))
        divergence = losses.forward_kl(student_logits, teacher_logits, mask, temperature=self.temperature)
        soft = weight * (self.temperature**2 * divergence)
        hard = weight * losses.cross_entropy(student_logits, labels, mask)
        return Loss(self.soft_weight * soft + self.hard_weight * hard, {"forward_kl": soft, "cross_entropy": hard})


@dataclass(frozen=True)
class ForwardKLConfig(DecoderConfig):
    """Flags of `forward_kl`.

    The defaults are for tiny models. For real ones: train_scripts/configs/baselines/gpt2_lab.yaml, GPT-2-Medium to
    GPT-2 on WikiText-2, and qwen_lab.yaml, Qwen2.5-1.5B to 0.5B or Llama-3.2-3B to 1B on WikiText-103.
    """

    out: Path = Path("out/forward_kl")
    """Output folder. Run the same command again to resume."""
    temperature: float = 1.0
    """T, the temperature of both distributions."""
    soft_weight: float = 0.5
    """Weight of T² times the divergence from the teacher."""
    hard_weight: float = 0.5
    """Weight of the cross-entropy with the text. It is the control's only loss, with weight 1."""

    NAME: ClassVar[str] = "forward_kl"
    QUICK: ClassVar[Mapping[str, object]] = QUICK
    SWEEP: ClassVar[tuple[str, tuple]] = ("temperature", (1.0, 2.0, 4.0))

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("temperature", above=0, fix="try 1")
        self.require("soft_weight", "hard_weight", least=0)
        if not self.soft_weight + self.hard_weight:
            raise InputError("soft_weight, hard_weight: got 0 and 0; allowed: one of them above 0; raise it")

    def objective(self, teacher: Decoder, corpus: Corpus) -> ForwardKL:
        """The loss of the student."""
        return ForwardKL(self.temperature, self.soft_weight, self.hard_weight)
