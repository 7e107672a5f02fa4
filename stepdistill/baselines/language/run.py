"""A run of a baseline for language models: teacher, control and student on one corpus, and their generated texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from accelerate import PartialState
from torch import nn

from stepdistill.baselines.base import Objective, TeacherStudent
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.language import measure
from stepdistill.baselines.language.answers import lacks_completions
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.cross_entropy import CrossEntropy
from stepdistill.baselines.language.flags import DecoderFlags
from stepdistill.baselines.language.models import TINY, Decoder, check_length, open_decoder
from stepdistill.baselines.language.prune import pruned
from stepdistill.baselines.language.saved import save
from stepdistill.baselines.language.students import make_student, without_dropout
from stepdistill.baselines.language.table import Table
from stepdistill.baselines.language.texts import joined, open_texts
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results
from stepdistill.errors import InputError
from stepdistill.training.processes import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUICK: dict[str, object] = {
    "limit": 1000, "teacher_steps": 300, "max_train_steps": 60, "test_tokens": 5000, "shown": 8, "batch_size": 8
}  # fmt: skip

CALIBRATION = 64  # training samples on whose activations a teacher is pruned


@dataclass(frozen=True)
class DecoderConfig(DecoderFlags):
    """A baseline for decoder language models: its loss, and what differs in its student."""

    NAME: ClassVar[str] = ""  # in BASELINES

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

    def run(self) -> Results:
        """Trains the teacher once, and a control and a student for each seed; the primary figure is held-out nll."""
        self.check()
        if self.beside is not None and not self.beside.is_dir():
            raise InputError(f"beside: got {self.beside}, which is no folder; allowed: another run's; run that first")
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
        corpus, rows = self.open_corpus(*texts, teacher), teacher.network.config.vocab_size
        needed = max(self.block, 0 if corpus.text is None else self.windows["window"] + len(corpus.first))
        for network in (self.make_student(teacher, corpus, self.seeds[0]), teacher.network):
            check_length(network, needed, "block, window")
        if any([lacks_completions(part, teacher) for part in texts]) and not self.dry_run:
            corpus = self.open_corpus(*self.answered(texts, teacher, self.shared.out), teacher)
        steps = self.teacher_steps if self.teacher in TINY else self.correction_steps
        if not steps:
            return teacher, corpus, None
        rate = self.teacher_learning_rate or self.learning_rate
        size = teacher.network.config.vocab_size  # a student with fewer rows has cut it: another teacher
        name = "teacher" if size == rows else f"teacher-{size}"
        part = self.shared.part(name, max_train_steps=steps, learning_rate=rate)
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
            refresh(part.out / "model", part.out, partial(save, network, table.teacher.tokenizer))
