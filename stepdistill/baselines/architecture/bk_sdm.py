"""Kim et al. (2023), *BK-SDM*: a Stable Diffusion whose UNet has fewer blocks, distilled from the whole one.

stepdistill baselines run bk_sdm --quick
stepdistill baselines run bk_sdm --size tiny
stepdistill baselines run bk_sdm --config train_scripts/configs/baselines/sd15_bk_sdm.yaml --data my/images
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.baselines.architecture.config import ArchitectureConfig
from stepdistill.baselines.architecture.contest import Contest
from stepdistill.baselines.architecture.prune import Shape, origin
from stepdistill.baselines.architecture.unets import UNets, Untaught, dropped, noised
from stepdistill.baselines.base import Batch, Objective
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.baselines.results import Results
from stepdistill.errors import InputError
from stepdistill.hooks import capture
from stepdistill.methods.base import Clock, Loss

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

Size = Literal["base", "small", "tiny"]
Pairs = tuple[tuple[str, str], ...]  # names of modules: the student's, the teacher's


def shape_of(whole: Shape, size: Size) -> Shape:
    """Returns what is left of a UNet (section 3.1).

    base    the first residual-attention pair of each down stage; the first and the last of each up stage
    small   base without the middle block
    tiny    small without the innermost stage

    It applies to any number of stages. A UNet with one pair per stage, as the embedded teacher's, is its own base.

    Raises:
        InputError: nothing would be removed; or tiny would leave one stage, which neither down- nor upsamples.
    """
    shape = dataclasses.replace(whole, pairs=(1,) * whole.stages)
    if size == "small":
        shape = dataclasses.replace(shape, mid=False)
    if size == "tiny":
        if whole.stages < 3:
            raise InputError(
                f"size: got tiny for a UNet of {whole.stages} stages, of which one would be left, that neither down- "
                "nor upsamples; allowed: base, small; or a teacher of 3 stages or more"
            )
        shape = shape.without_innermost()
    if shape == whole:
        why = "has one pair a stage" + ("" if size == "base" else " and no middle block")
        raise InputError(f"size: got {size} for a UNet that {why} already; allowed: {_left(whole)}")
    return shape


def _left(whole: Shape) -> str:
    sizes = (["small"] if whole.mid else []) + (["tiny"] if whole.stages > 2 else [])
    return ", ".join(sizes) or "a larger teacher"


def feature_pairs(whole: Shape, shape: Shape) -> Pairs:
    """Returns the modules whose outputs are compared (section 3.2): all down and up stages.

    Without the innermost stage the up stages shift, and the student's last down stage lacks the downsampling that the
    teacher's output includes: there the last attention's projection, or residual block, of both is compared instead.
    """
    names = [f"down_blocks.{i}" for i in range(shape.stages)] + [f"up_blocks.{i}" for i in range(shape.stages)]
    pairs = {name: origin(name, whole, shape) for name in names}
    if shape.stages < whole.stages:
        last = shape.stages - 1
        del pairs[f"down_blocks.{last}"]
        block = "attentions.{}.proj_out" if shape.down[last] else "resnets.{}"
        own, theirs = (f"down_blocks.{last}." + block.format(s.pairs[last] - 1) for s in (shape, whole))
        pairs[own] = theirs
    return tuple(pairs.items())


def feature_distance(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], pairs: Pairs) -> Tensor:
    """The sum over pairs of the mean squared difference, scalar."""
    return torch.stack([masked_mean((wide(own[a]) - wide(theirs[b])).square()) for a, b in pairs]).sum()


@dataclass(frozen=True)
class BlockRemoval(Objective):
    """task_weight |y - y*|² + output_weight |y - y_T|² + feature_weight Σ |f - f_T|², all means, the last summed over
    blocks (section 3.2). y* is the target from the data in the teacher's prediction type, eps or v."""

    pairs: Pairs
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    caption_dropout: float = 0.0

    def loss(self, phase: str, batch: Batch, models: UNets, clock: Clock) -> Loss:
        """The loss of the student."""
        student = models.denoiser("student")
        x_t, t, target = noised(batch["x0"], batch.draws, student.schedule, student.kind)
        cond = dropped(batch, self.caption_dropout)
        with capture(models.bare, [a for a, _ in self.pairs]) as own:
            y = student.raw(x_t, t, cond)
        task = masked_mean((y - target).square())
        with torch.no_grad(), capture(models.teacher, [b for _, b in self.pairs]) as theirs:
            answer = models.denoiser("teacher").raw(x_t, t, cond)
        output, feature = masked_mean((y - answer).square()), feature_distance(own, theirs, self.pairs)
        total = self.task_weight * task + self.output_weight * output + self.feature_weight * feature
        return Loss(total, {"task": task, "output": output, "feature": feature})


@dataclass(frozen=True)
class BKSDMConfig(ArchitectureConfig):
    """Flags of `bk_sdm`.

    For Stable Diffusion 1.5: train_scripts/configs/baselines/sd15_bk_sdm.yaml.
    """

    out: Path = Path("out/bk-sdm")
    """Output folder. Run the same command again to resume."""
    size: Size = "tiny"
    """base: one residual-attention pair of each down stage, two of each up stage; small: also no middle block; tiny:
    also no innermost stage. The embedded teacher is its own base."""
    task_weight: float = 1.0
    """Weight of the error against the data. It is the control's only loss, with weight 1."""
    output_weight: float = 1.0
    """Weight of the distance to the teacher's output."""
    feature_weight: float = 1.0
    """Weight of the summed distances to the teacher's block outputs."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "limit": 128, "held_out": 32, "pictures": 0, "max_train_steps": 8, "batch_size": 8, "lr_warmup": 2
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("size", ("small", "tiny"))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "control": ("task_weight", "output_weight", "feature_weight")
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        weights = (self.task_weight, self.output_weight, self.feature_weight)
        if min(weights) < 0 or not max(weights[1:]):
            got = ", ".join(f"{w:g}" for w in weights)
            raise InputError(
                f"task, output and feature weight: got {got}; allowed: 0 or more, one of the teacher's two above 0"
            )

    def check_teacher(self, teacher: Teacher) -> None:
        """See ArchitectureConfig.check_teacher; something of the UNet must also be removable."""
        super().check_teacher(teacher)
        shape_of(Shape.of(teacher.denoiser.backbone), self.size)

    def run(self) -> Results:
        """Trains a control and a student for each seed, each exported as a pipeline to <out>/ROLE-SEED/export."""
        self.check()
        teacher = self.open_teacher()
        whole = Shape.of(teacher.denoiser.backbone)
        shape = shape_of(whole, self.size)
        taught = BlockRemoval(
            feature_pairs(whole, shape), self.task_weight, self.output_weight, self.feature_weight, self.caption_dropout
        )
        contest = Contest(
            self, "bk_sdm", self.size, teacher, shape, *self.open_samples(teacher),
            figure="fd" if self.pictures else "denoising_loss", steps=self.sample_steps,
            scheduler=copy.deepcopy(teacher.source.scheduler),
            card=f"Stable Diffusion with fewer blocks ({self.size}), distilled with stepdistill.",
        )  # fmt: skip
        return contest.run({"control": Untaught(self.caption_dropout), "student": taught})
