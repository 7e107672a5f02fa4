"""BK-SDM's sizes, and its loss (Kim et al. 2023, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.baselines.architecture.prune import Shape, origin
from stepdistill.baselines.architecture.unets import UNets, dropped, noised
from stepdistill.baselines.base import Batch, Objective
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.errors import InputError
from stepdistill.hooks import capture
from stepdistill.methods.base import Clock, Loss

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
