"""Hinton et al. (2015), *Distilling the Knowledge in a Neural Network*: a classifier learns another's softened outputs.

stepdistill baselines run hinton --quick
stepdistill baselines sweep hinton                # the temperatures 1, 2, 4, 8 and 16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from stepdistill.baselines.base import BaselineConfig, Batch, Objective, TeacherStudent
from stepdistill.baselines.classifier.data import Labelled, open_labelled, view
from stepdistill.baselines.classifier.measure import measure
from stepdistill.baselines.classifier.networks import build, save
from stepdistill.baselines.divergence import softened_kl
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.learner import learn
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.baselines.results import Results, Row, count_parameters
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss
from stepdistill.training.processes import world


@dataclass(frozen=True)
class Hinton(Objective):
    """soft_weight T² KL(teacher_T ‖ student_T) + hard_weight cross-entropy; the control uses only the latter."""

    temperature: float
    soft_weight: float
    hard_weight: float
    flip: bool

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student. Teacher and student see the same view."""
        pixels = view(batch["pixels"], batch.draws, self.flip)
        logits = models.student(pixels)
        hard = masked_mean(nn.functional.cross_entropy(wide(logits), batch["labels"], reduction="none"))
        if not self.soft_weight:
            return Loss(self.hard_weight * hard, {"hard": hard})
        with torch.no_grad():
            answers = models.teacher(pixels)
        soft = masked_mean(softened_kl(logits, answers, self.temperature))
        return Loss(self.soft_weight * soft + self.hard_weight * hard, {"hard": hard, "soft": soft})


@dataclass(frozen=True)
class HintonConfig(BaselineConfig):
    """Flags of `hinton`."""

    out: Path = Path("out/hinton")
    """Output folder. Run the same command again to resume."""
    data: str = "avatars"
    """avatars, cifar10, or a folder with a subfolder for each class."""
    test: Path | None = None
    """For a data folder: the folder of test images, if it is not the subfolder test/."""
    label: tuple[str, ...] = ("left hair color", "right hair color")
    """For the embedded set: the attributes whose combination is the class."""
    resolution: int | None = None
    """Side of the images in pixels: they are resized and centre-cropped to it. By default their own, if all are squares
    of one size."""
    limit: int | None = None
    """Training images at most; None for all. A teacher trained on few of them memorises them, and then has little to
    teach."""
    teacher: str = "resnet20"
    """A network: resnet8, resnet20, ... as for CIFAR, a torchvision name, or timm:NAME."""
    student: str = "resnet8"
    """A network, named in the same way."""
    temperature: float = 4.0
    """T, the temperature that softens the outputs of both."""
    soft_weight: float = 0.9
    """Weight of T² times the divergence from the teacher's softened outputs."""
    hard_weight: float = 0.1
    """Weight of the cross-entropy with the labels. It is the control's only loss, with weight 1."""
    teacher_steps: int = 2000
    """Updates of the teacher."""

    max_train_steps: int = 800
    """Updates of student and control."""
    batch_size: int = 64
    """Images per process in one forward."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    lr_warmup: int = 50
    """Updates over which the learning rate rises."""
    weight_decay: float = 0.05
    """Decoupled weight decay, as in AdamW."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of student and control, one pair for each."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "limit": 1000, "teacher_steps": 120, "max_train_steps": 60, "seeds": (0,)
    }  # fmt: skip
    # Batch normalisation computes with the statistics of a batch, so splitting it differently changes the update.
    FREE: ClassVar[frozenset[str]] = BaselineConfig.FREE - {"batch_size", "gradient_accumulation"}
    SWEEP: ClassVar[tuple[str, tuple]] = ("temperature", (1.0, 2.0, 4.0, 8.0, 16.0))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("student", "max_train_steps", "temperature", "soft_weight", "hard_weight"),
        "control": ("teacher", "teacher_steps", "temperature", "soft_weight", "hard_weight"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("temperature", above=0, fix="try 4")
        self.require("soft_weight", "hard_weight", least=0)
        if not self.soft_weight + self.hard_weight:
            raise InputError("soft_weight, hard_weight: got 0 and 0; allowed: one of them above 0; raise it")
        self.require("limit", least=2, fix="None is all")
        self.require("batch_size", least=2, fix="batch normalisation needs several images")
        self.require("resolution", least=1, fix="leave it out for the images' own")

    def run(self) -> Results:
        """Trains the teacher once, and a control and a student for each seed; measures accuracy on the test split."""
        self.check()
        data = partial(open_labelled, self.data, label=self.label, test=self.test, seed=self.seed,
                       resolution=self.resolution)  # fmt: skip
        train, held = data("train", limit=self.limit), data("test", limit=None)
        if list(train.classes) != list(held.classes):
            raise InputError(f"--test: got classes other than the training pictures'; allowed: {len(train.classes)}")
        side, other, classes = train.pixels.shape[-1], held.pixels.shape[-1], len(train.classes)
        if side != other:
            raise InputError(f"--test: got pictures of {other} pixels; allowed: {side}, as to train; give --resolution")
        results = Results("hinton", "accuracy", True, f"{len(held):,} test pictures, {classes} classes")

        plain = Hinton(self.temperature, 0.0, 1.0, train.flip)
        build(self.student, classes, side, seed=0)  # reports a wrong name before anything is trained
        teacher = build(self.teacher, classes, side, seed=self.seed)
        config = self.part("teacher", max_train_steps=self.teacher_steps)
        seconds = learn(plain, TeacherStudent(teacher), train, config)
        results.rows.append(_row("teacher", self.teacher, teacher, seconds, held))
        objectives = {
            "control": plain,
            "student": dataclasses.replace(plain, soft_weight=self.soft_weight, hard_weight=self.hard_weight),
        }
        for seed in self.seeds:
            for role, objective in objectives.items():
                network = build(self.student, classes, side, seed=seed)
                models = TeacherStudent(network, teacher if role == "student" else None)
                part = self.part(f"{role}-{seed}", seed=seed)
                seconds = learn(objective, models, train, part)
                results.rows.append(_row(role, self.student, network, seconds, held, seed))
                if not self.dry_run and world().is_main_process:
                    write = partial(save, network, name=self.student, classes=train.classes, side=side)
                    refresh(part.out / "model", part.out, write)
        return results


def _row(role: str, name: str, network: nn.Module, seconds: float, held: Labelled, seed: int | None = None) -> Row:
    return Row(role, name, measure(network, held), count_parameters(network), seconds, seed)
