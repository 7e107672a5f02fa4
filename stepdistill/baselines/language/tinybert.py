"""Jiao et al. (2020), *TinyBERT*: a smaller and narrower encoder follows its teacher layer by layer, first on any text,
then on a task, and finally learns the teacher's answers to that task.

stepdistill baselines run tinybert --quick
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from stepdistill.baselines.base import TeacherStudent
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.language.encoder_run import EncoderConfig, Opened
from stepdistill.baselines.language.encoders import MaskedLM, shape, smaller
from stepdistill.baselines.language.labelled import Classifier, Classify, Labelled, classification_metrics
from stepdistill.baselines.language.layers import Answers, Layers, Projections
from stepdistill.baselines.language.masked import Lines, MaskedModelling
from stepdistill.baselines.language.saved import save_classifier
from stepdistill.baselines.language.tasks import open_task
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results, Role, Row, count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LAST = {"control": "task", "student": "answers"}  # the last training of each


@dataclass(frozen=True)
class TinyBertConfig(EncoderConfig):
    """Flags of `tinybert`. For BERT itself: train_scripts/configs/baselines/tinybert_bert.yaml. The paper's third part,
    task texts augmented by masked words, is omitted; `labelled` serves its purpose, texts without a known class.

    --teacher-steps are those of a tiny teacher; others come pretrained.
    """

    out: Path = Path("out/tinybert")
    """Output folder. Run the same command again to resume."""
    task: str = "avatars"
    """Task of the second stage: avatars, a .tsv file of class and text, or a `datasets` name with label and text."""
    task_test: str | None = None
    """For a .tsv file: the held-out file; by default a tenth of it."""
    task_limit: int | None = 1000
    """Training texts of the task at most; None for all."""
    labelled: int | None = None
    """Of these, the number with a known class, spread evenly; None for all. Teacher and control learn from these only,
    the student from the teacher on all."""
    label: str = "right clothes"
    """For the embedded set: the attribute that is the class."""
    held_out: int = 1000
    """Held-out texts of the task at most."""
    task_steps: int = 300
    """Updates of the teacher on the task."""
    task_learning_rate: float = 1e-3
    """Peak learning rate of these; a tenth or less for a real encoder."""

    layers: int = 2
    """Layers of the student; the teacher has a multiple of them."""
    width: int = 32
    """Width of the student's hidden states; a multiple of the teacher's heads."""
    intermediate: int = 64
    """Width of the student's feed-forward layers."""
    general_steps: int = 1000
    """Updates of the first stage, on text. The control predicts masked tokens in them."""
    intermediate_steps: int = 500
    """Updates of the second stage's first part: layers, on the task's texts. The control learns classes in these and
    all that follow."""
    temperature: float = 1.0
    """Temperature of the answers in the second stage's second part."""

    max_train_steps: int = 300
    """Updates of the second stage's second part: the teacher's answers."""
    learning_rate: float = 1e-3
    """Peak learning rate of each stage."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "limit": 1000, "task_limit": 300, "teacher_steps": 250, "task_steps": 60, "general_steps": 60,
        "intermediate_steps": 60, "max_train_steps": 60, "held_out": 300, "lr_warmup": 10,
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("layers", (1, 2, 4))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("layers", "width", "intermediate", "general_steps", "intermediate_steps", "temperature", "task",
                    "task_test", "task_limit", "label", "task_steps", "task_learning_rate", "max_train_steps",
                    "learning_rate"),
        "task": ("layers", "width", "intermediate", "general_steps", "intermediate_steps", "temperature",
                 "max_train_steps", "learning_rate"),
        "control": ("temperature",),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("layers", "width", "intermediate", "general_steps", "intermediate_steps", "task_steps",
                     "teacher_steps", "held_out", "task_limit", "labelled", least=1)  # fmt: skip
        self.require("temperature", above=0, fix="try 1")

    def run(self) -> Results:
        """Trains the teacher and its task classifier; then a control and a student for each seed, stage by stage."""
        from stepdistill.training.processes import world

        self.check()
        opened = self.open(mask_rate=0.15)
        tokenizer, teacher, text = opened.teacher.tokenizer, opened.teacher.network, opened.text
        self._small(teacher, self.seed)
        sizes = {"limit": self.task_limit, "held_out": self.held_out}
        task, held = open_task(self.task, tokenizer, self.length, label=self.label, test=self.task_test,
                               seed=self.seed, **sizes)  # fmt: skip
        known = task.spread(self.labelled)
        spent = self.pretrain(MaskedLM(teacher), opened) if opened.teacher.untrained == "all" else 0.0
        torch.manual_seed(self.seed)
        tutor = Classifier(copy.deepcopy(teacher.base_model), len(task.classes))
        part = self.part("task", max_train_steps=self.task_steps, learning_rate=self.task_learning_rate)
        spent += learn(Classify(), TeacherStudent(tutor), known, part)

        of = f"{len(held):,} held-out texts of {self.task_test or self.task}, {len(task.classes)} classes"
        results = Results("tinybert", "nll", False, of)

        def add(role: Role, network: Classifier, seconds: float, seed: int | None = None) -> None:
            if self.dry_run:
                return
            name, figures = shape(network.body), classification_metrics(network, held)
            results.rows.append(Row(role, name, figures, count_parameters(network), seconds, seed))
            if seed is not None and world().is_main_process:
                place = self.out / f"{role}-{seed}"
                write = partial(save_classifier, network, tokenizer, task.classes)
                refresh(place / "model", place / LAST[role], write)

        add("teacher", tutor, spent)
        for seed in self.seeds:
            add("control", *self._control(opened, known, seed), seed)
            add("student", *self._student(teacher, tutor, text, task, seed), seed)
        return results

    def _control(self, opened: Opened, known: Labelled, seed: int) -> tuple[Classifier, float]:
        """As large as the student and trained for as long: on masked tokens of the text, then on the task's classes."""
        small = self._small(opened.teacher.network, seed)
        control = Classifier(small.base_model, len(known.classes))
        part = self.part(f"control-{seed}/text", seed=seed, max_train_steps=self.general_steps)
        seconds = learn(MaskedModelling(opened.masking), TeacherStudent(MaskedLM(small)), opened.text, part)
        steps = self.intermediate_steps + self.max_train_steps
        part = self.part(f"control-{seed}/task", seed=seed, max_train_steps=steps)
        return control, seconds + learn(Classify(), TeacherStudent(control), known, part)

    def _student(
        self, teacher: PreTrainedModel, tutor: Classifier, text: Lines, task: Labelled, seed: int
    ) -> tuple[Classifier, float]:
        """Trained on the teacher's layers on text, then on the classifier's layers and on its answers on the task."""
        student = Classifier(self._small(teacher, seed).base_model, len(task.classes))
        beside = {"projections": Projections(self.width, teacher.config.hidden_size)}
        part = self.part(f"student-{seed}/text", seed=seed, max_train_steps=self.general_steps)
        seconds = learn(Layers(), TeacherStudent(student.body, teacher.base_model, **beside), text, part)
        part = self.part(f"student-{seed}/layers", seed=seed, max_train_steps=self.intermediate_steps)
        seconds += learn(Layers(), TeacherStudent(student.body, tutor.body, **beside), task, part)
        part = self.part(f"student-{seed}/answers", seed=seed)
        return student, seconds + learn(Answers(self.temperature), TeacherStudent(student, tutor), task, part)

    def _small(self, teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
        """A student with random weights and a head for masked tokens."""
        return smaller(teacher, layers=self.layers, width=self.width, intermediate=self.intermediate, seed=seed)
