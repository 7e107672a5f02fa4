"""Progressive distillation as a chain of runs: the flags, and what each halving passes to the next.

    <out>/steps-32/ ... steps-1/     the export of each: a LoRA, or a whole pipeline
    <out>/runs/steps-32/ ...         metrics and validation grids of each, and checkpoints of the unfinished one

A halving starts from the previous export, read from disk, and from nothing else, so an interrupted chain continues as
an uninterrupted one would. Optimizer, learning rate and averages start anew in each.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepdistill.errors import InputError
from stepdistill.methods.progressive import Progressive, halving_times
from stepdistill.training import folder
from stepdistill.training.export import push_rest
from stepdistill.training.guided import GuidedConfig
from stepdistill.training.noisiest import check_noisiest
from stepdistill.training.run import begin, open_samples, open_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.base import Denoiser
    from stepdistill.denoiser.load import Teacher
    from stepdistill.prediction import Kind


@dataclass(frozen=True)
class ProgressiveConfig(GuidedConfig):
    """Flags of progressive distillation."""

    start_steps: int = 32
    """Step count of the first halving's teacher: a power of two."""
    end_steps: int = 1
    """Step count of the last student: a power of two. If equal to the start steps, only guidance is distilled."""
    max_train_steps: int = 1000
    """Updates per halving."""
    final_factor: float = 2.0
    """Factor by which the halvings to 2 and to 1 step are longer."""
    guide_updates: int = 0
    """Updates of the first stage, which distils guidance at the start steps; 0 for max-train-steps."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate in each halving after the warm-up; linear and cosine fall to 0."""

    student_prediction: Literal["v", "x0", "eps"] = "v"
    """Prediction type of an eps-predicting teacher's student; other students keep their teacher's."""
    weighting: Literal["truncated_snr", "snr+1"] = "truncated_snr"
    """Weight of the error of x0: max(SNR, 1), or SNR + 1, the error of v."""
    teacher_solver: Literal["ddim", "heun"] = "ddim"
    """Solver of the teacher's two steps."""
    backward_simulation: float = 0.0
    """Share of samples that start where a step of the student's own ended, as its later steps do, not at an image."""

    @property
    def extendable(self) -> bool:
        """See LoopConfig.extendable; later stages start from a finished export."""
        return False

    def check(self) -> None:
        """Raises InputError if a setting is out of range, or needs a package that is not installed."""
        super().check()
        for name in ("start_steps", "end_steps"):
            steps = getattr(self, name)
            if steps < 1 or steps & (steps - 1):
                near = 1 << max(0, steps - 1).bit_length()
                raise InputError(f"{name}: got {steps}; allowed: a power of two, as each halving needs; try {near}")
        if self.end_steps > self.start_steps:
            got = f"{self.end_steps} from start_steps {self.start_steps}"
            raise InputError(f"end_steps: got {got}; allowed: no more than those; try 1")
        if self.guide_updates < 0:
            raise InputError(f"guide_updates: got {self.guide_updates}; allowed: 0 or more; 0 is max-train-steps")
        if not self.final_factor > 0:
            raise InputError(f"final_factor: got {self.final_factor:g}; allowed: above 0; the paper's is 2")

    def method(self) -> Progressive:
        """The method of the last stage: a halving, or with `end_steps` at the start steps the one that guides."""
        return self._method(self.end_steps, "guide" if self.end_steps == self.start_steps else "halve")

    def methods(self, denoiser: Denoiser) -> list[Progressive]:
        """The stages of the chain for this teacher, in order.

        The first distils guidance, and switches from eps to the students' prediction type. It is omitted if neither is
        needed. A guidance-conditioned teacher, such as Flux-dev, passes its conditioning on from halving to halving.
        """
        guided = (self.guidance[-1] > 1 or self.embed_guidance) and not denoiser.takes_guidance
        changed = self.method().student_kind(denoiser.kind) != denoiser.kind
        first = [self._method(self.start_steps, "guide")] if guided or changed else []
        return first + [self._method(steps) for steps in self.halvings]

    def _method(self, steps: int, stage: Literal["guide", "halve"] = "halve") -> Progressive:
        low, high = self.guidance_range
        return Progressive(
            steps=steps, stage=stage, guidance_min=low, guidance_max=high, weighting=self.weighting,
            solver=self.teacher_solver, eps_student=self.student_prediction, embed_guidance=self.embed_guidance,
            backward_simulation=self.backward_simulation,
        )  # fmt: skip

    @property
    def halvings(self) -> list[int]:
        """The students' step counts, descending."""
        ratio = self.start_steps // self.end_steps
        return [self.start_steps >> i for i in range(1, ratio.bit_length())]

    def run(self, steps: int) -> ProgressiveConfig:
        """The configuration of one stage's run. `end_steps` is the stage's own, so a chain can be extended later."""
        updates = self.max_train_steps
        if steps == self.start_steps:
            updates = self.guide_updates or updates
        elif steps <= 2:
            updates = max(1, round(self.final_factor * updates))
        return dataclasses.replace(
            self, out=Path(self.out) / "runs" / f"steps-{steps}", end_steps=steps, max_train_steps=updates,
            push_to_hub=self.push_to_hub if steps == self.end_steps else None,
        )  # fmt: skip

    def target(self, steps: int) -> Path:
        """The export folder of the student with this step count."""
        return Path(self.out) / f"steps-{steps}"

    def check_teacher(self, teacher: Teacher) -> None:
        """Raises InputError if a teacher cannot be distilled with these flags."""
        super().check_teacher(teacher)
        denoiser = teacher.denoiser
        if not self.methods(denoiser):
            got = f"{self.end_steps}, the start steps, without guidance to distil"
            raise InputError(f"end_steps: got {got}; allowed: fewer; try 1")
        first = halving_times(denoiser.schedule, self.start_steps, denoiser.grid)[0]
        pure_noise = denoiser.schedule.coeffs(first)[0].item() == 0
        check_noisiest(teacher, first, self.mixed_precision)
        if denoiser.kind == self.student_prediction == "eps" and self.end_steps == 1:
            raise InputError(
                f"student_prediction: got eps for one step with {teacher.path}, which predicts eps: where all is noise "
                "that says next to nothing of x0; allowed: v or x0, or --end-steps 2; leave it out for v"
            )
        if pure_noise and self.teacher_solver == "heun" and denoiser.schedule.straight == (0.0, 1.0):
            raise InputError(
                f"teacher_solver: got heun with {teacher.path}, whose schedule ends in pure noise; allowed: ddim there"
            )


def distil_chain(config: ProgressiveConfig) -> Path:
    """Runs all stages, each from the export of the one before; finished ones are skipped.

    Returns:
        The last student's export folder.

    Raises:
        InputError: a flag, the teacher, the data or a folder is unsuitable.
    """
    from stepdistill.training.processes import release

    state = begin(config)
    for steps in (config.start_steps, *config.halvings):
        folder.claim(config.run(steps), state.num_processes, write=False)
    folder.claim(config, state.num_processes, write=False)
    last, target = config.run(config.end_steps), config.target(config.end_steps)
    if folder.finished(last, target) is not None:
        state.print(f"already done: {target}")
        if state.is_main_process:
            push_rest(last, target)
        return target
    with tempfile.TemporaryDirectory() as beside:
        teacher = open_teacher(config, state.device)
        kind, methods = teacher.denoiser.kind, config.methods(teacher.denoiser)
        if config.guide_updates and methods[0].stage != "guide":
            state.print(f"guide_updates: {config.guide_updates} not used; this chain starts with its first halving")
        data = open_samples(config, teacher, Path(beside))
        del teacher  # each stage loads its own
        # teacher and data are suitable: only now is anything written
        folder.claim(config, state.num_processes, write=state.is_main_process and not config.dry_run)
        previous = None
        for method in methods:
            run, target = config.run(method.steps), config.target(method.steps)
            if folder.finished(run, target) is None:
                state.print(f"{method.stage}: {target}")
                _train(method, run, target, data, state.device, previous, method.student_kind(kind))
                release()
            if config.dry_run:
                break
            if state.is_main_process:  # the next stage reads the export alone
                shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
            previous = config.run(method.steps), target
    return target


def _train(
    method: Progressive, run: ProgressiveConfig, target: Path, data, device,
    previous: tuple[ProgressiveConfig, Path] | None, kind: Kind,
) -> None:  # fmt: skip
    """Trains one stage.

    Args:
        previous: the run before and its export; None for the first.
        kind: the students' prediction type.
    """
    from stepdistill.training.trainer import Trainer, build_models

    teacher, start = open_stage(run, device, previous[1] if previous else None, kind)
    models = build_models(method, teacher, run, method.networks(teacher), start) if start else None
    trainer = Trainer(method, teacher, data, run, models=models, target=target)
    if previous:  # a student's time includes its chain's
        trainer.seconds = json.loads((previous[0].out / "done.json").read_text())["seconds"]
    trainer.fit()
    trainer.accelerator.free_memory()


def open_stage(
    run: ProgressiveConfig, device, export: Path | None, kind: Kind
) -> tuple[Teacher, dict[str, Tensor] | None]:
    """The teacher of a stage, and the weights of its adapter if it has one.

    Args:
        export: of the stage before; None for the chain's first teacher.
        kind: prediction type of that export.
    """
    from stepdistill.export.adapters import trained_weights

    if export is None:
        return open_teacher(run, device), None
    if not run.lora:
        return open_teacher(dataclasses.replace(run, teacher=str(export), variant=None, revision=None), device), None
    teacher = open_teacher(run, device)
    teacher.denoiser.kind = kind
    return teacher, trained_weights(export)
