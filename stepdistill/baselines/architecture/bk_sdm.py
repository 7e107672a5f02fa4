"""Kim et al. (2023), *BK-SDM*: a Stable Diffusion whose UNet has fewer blocks, distilled from the whole one.

stepdistill baselines run bk_sdm --quick
stepdistill baselines run bk_sdm --size tiny
stepdistill baselines run bk_sdm --config train_scripts/configs/baselines/sd15_bk_sdm.yaml --data my/images
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from stepdistill.baselines.architecture.block_removal import BlockRemoval, Size, feature_pairs, shape_of
from stepdistill.baselines.architecture.config import ArchitectureConfig
from stepdistill.baselines.architecture.contest import Contest
from stepdistill.baselines.architecture.prune import Shape
from stepdistill.baselines.architecture.unets import Untaught
from stepdistill.baselines.results import Results
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


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
        self.require("task_weight", "output_weight", "feature_weight", least=0)
        if not self.output_weight + self.feature_weight:
            raise InputError("output_weight, feature_weight: got 0 and 0; allowed: one of them above 0; raise it")

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
