"""Trains a smaller UNet with its teacher and, for as long, without; exports both and measures them beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stepdistill import embedded
from stepdistill.baselines.architecture.measure import call_times, held_out, pictures
from stepdistill.baselines.architecture.prune import Shape, fresh, pruned
from stepdistill.baselines.architecture.unets import Samples, UNets
from stepdistill.baselines.base import Objective
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results, Row, count_parameters
from stepdistill.denoiser.load import find
from stepdistill.evaluation.spec import ModelSpec
from stepdistill.export.card import model_card
from stepdistill.export.lora import save_pipeline

if TYPE_CHECKING:
    from stepdistill.baselines.architecture.config import ArchitectureConfig
    from stepdistill.denoiser.load import Teacher

BEGINS = {
    "kept": "Student and control start from the teacher's kept blocks.",
    "random": "The student starts from the teacher's kept blocks, the control from random weights.",
}
SHOWN = ("max_train_steps", "batch_size", "gradient_accumulation", "learning_rate", "data")


def exported(out: Path, role: str, seed: int) -> Path:
    """The folder of the exported pipeline of a student or control."""
    return out / f"{role}-{seed}" / "export"


@dataclass(frozen=True)
class Contest:
    """Teacher, control and student of a run.

    Attributes:
        method, name: of the baseline and of the smaller UNet. shape: of the smaller UNet.
        train, held: samples. figure: the primary figure.
        steps, teacher_steps: step counts of the generated images; a teacher_steps of 0 means `steps`.
        scheduler: of the exported pipelines. teacher_scheduler: for the teacher's images, as in a SPEC; None for its
            own. card: what the pipelines are, in a sentence. extra: further figures of a UNet. note: for the table.
    """

    config: ArchitectureConfig
    method: str
    name: str
    teacher: Teacher
    shape: Shape
    train: Samples
    held: Samples
    figure: str
    steps: int
    scheduler: Any
    card: str
    teacher_steps: int = 0
    teacher_scheduler: str | None = None
    extra: Callable[[nn.Module], dict[str, float]] = field(default=lambda unet: {})
    note: str = ""

    def run(self, objectives: Mapping[str, Objective]) -> Results:
        """Trains and measures, for each seed, a network with the objective of each role."""
        config, teacher = self.config, self.teacher
        results = Results(
            self.method,
            self.figure,
            False,
            config.measured_over(),
            note=f"{BEGINS[config.control_init]} {self.note}".strip(),
        )
        source = self._spec(config.teacher, "teacher", scheduler=self.teacher_scheduler, **config.files(config.teacher))
        whole = teacher.denoiser.backbone
        results.rows.append(self._row("teacher", config.teacher, whole, source, self.teacher_steps or self.steps))
        results.rows.append(self._row("before", self.name, pruned(whole, self.shape, config.seeds[0])))
        for seed in config.seeds:
            for role, objective in objectives.items():
                unet = self.start(role, seed)
                models = UNets(teacher.denoiser, unet, alone=role == "control")
                seconds = learn(objective, models, self.train, config.part(f"{role}-{seed}", seed=seed))
                place = exported(config.out, role, seed)
                if not config.dry_run:
                    self._export(unet, place, seconds)
                spec = self._spec(str(place), f"{role}-{seed}")
                results.rows.append(self._row(role, self.name, unet, spec, seconds=seconds, seed=seed))
        return results

    def start(self, role: str, seed: int) -> nn.Module:
        """The initial UNet of a student or a control; new weights, if there are any, are drawn from the seed."""
        whole = self.teacher.denoiser.backbone
        if role == "control" and self.config.control_init == "random":
            return fresh(whole, self.shape, seed).to(whole.device)
        return pruned(whole, self.shape, seed)

    def _spec(self, path: str, name: str, **more: Any) -> ModelSpec:
        return ModelSpec(path, name, guidance=self.config.guidance, **more)

    def _row(
        self, role: str, name: str, unet: nn.Module, spec: ModelSpec | None = None, steps: int = 0,
        seconds: float | None = None, seed: int | None = None,
    ) -> Row:  # fmt: skip
        """Measures a network, and the images of the pipeline that `spec` names."""
        config, like = self.config, self.teacher.denoiser
        figures = held_out(like, unet, self.held) | self.extra(unet)
        figures["latency_ms"] = statistics.median(call_times(like, unet, self.held))
        if spec is not None and config.draws:
            steps = steps or self.steps
            drawn = pictures(
                {spec.name: spec}, config.out / "bench", protocol=config.protocol, n=config.pictures, steps=(steps,)
            )
            figures |= {k: v for k, v in drawn[spec.name, steps].items() if k != "picture_ms"}
        return Row(role, name, figures, count_parameters(unet), seconds, seed)

    def _export(self, unet: nn.Module, out: Path, seconds: float) -> None:
        """Writes the teacher's pipeline with this UNet in it, unless it is already there, as trained as now."""
        from accelerate import PartialState

        config, state = self.config, PartialState()
        if state.is_main_process:
            record = config.record() | {"method": self.method, "train_seconds": round(seconds, 1)}
            card = model_card(
                method=self.method, teacher=config.teacher, out=str(out), scheduler=type(self.scheduler).__name__,
                lora=False, prompt=self.train.captions[0], settings={k: record[k] for k in SHOWN}, grid=None,
                what=self.card, guidance=config.guidance, steps=self.steps,
                base=find(config.teacher) if config.teacher in embedded.TEACHERS else config.teacher,
            )  # fmt: skip
            write = partial(save_pipeline, self.teacher, unet, scheduler=self.scheduler, config=record, card=card)
            refresh(out, out.parent, write)
        state.wait_for_everyone()
