"""Flags common to distillations of a diffusion model's architecture, and how they open teacher and data."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from stepdistill.baselines.architecture.prune import Shape
from stepdistill.baselines.architecture.unets import Samples
from stepdistill.baselines.base import BaselineConfig
from stepdistill.errors import InputError
from stepdistill.training.config import PipelineConfig

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher
    from stepdistill.processes import Processes

DRY = 4  # samples of a dry run


@dataclass(frozen=True)
class ArchitectureConfig(BaselineConfig, PipelineConfig):
    """Flags of the baselines that make a pipeline's UNet smaller."""

    limit: int | None = None
    """Training samples at most; None for all."""
    held_out: int = 256
    """Samples at the end of the data that are held out to measure with."""
    caption_dropout: float = 0.1
    """Share of the samples trained without their caption, so that guidance keeps working."""
    control_init: Literal["kept", "random"] = "kept"
    """Initial weights of the control: the teacher's kept blocks, as for the student, or random."""

    pictures: int = 500
    """Images generated with each network for the Frechet distance and the attributes; 0 for none."""
    protocol: str = "avatars-2k"
    """Benchmark protocol: a name, or a .yaml file."""
    sample_steps: int = 16
    """Step count of the generated images."""
    guidance: float = 3.5
    """Guidance scale of the generated images; 1 means no guidance."""

    max_train_steps: int = 1000
    """Updates of student and control."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    lr_warmup: int = 50
    """Updates over which the learning rate rises."""

    MEASURED: ClassVar[tuple[str, ...]] = ("pictures", "protocol", "sample_steps", "guidance")
    DRAWN: ClassVar[tuple[str, ...]] = ("bench",)

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("held_out", "sample_steps", "guidance", least=1)
        self.require("pictures", least=0)
        self.require("limit", least=1, fix="leave it out for all")
        self.require("caption_dropout", least=0, below=1, fix="try 0.1")
        if self.pictures == 1:
            raise InputError("pictures: got 1; allowed: 0 for none, or 2 and more; hundreds give steady figures")
        if self.pictures:
            from stepdistill.evaluation.protocols import load_protocol

            protocol = load_protocol(self.protocol)
            if places := [p for p in (protocol.prompts, protocol.reference) if p.startswith("--")]:
                raise InputError(
                    f"protocol: got {self.protocol}, which leaves {' and '.join(places)} to the user; allowed: a .yaml "
                    "file with the paths in it, as its prompts and reference; or --pictures 0, and stepdistill bench "
                    "afterwards"
                )

    def check_teacher(self, teacher: Teacher) -> None:
        """See PipelineConfig.check_teacher; its network must be a UNet that can be pruned, guided by two calls."""
        Shape.of(teacher.denoiser.backbone)
        if teacher.denoiser.takes_guidance:
            raise InputError(
                f"teacher: got {self.teacher}, which takes its guidance as an input; allowed: one guided by two calls"
            )

    def open_teacher(self) -> Teacher:
        """See training.run.open_teacher; on the run's device."""
        from stepdistill.training.processes import world
        from stepdistill.training.run import open_teacher

        _ = self.samples  # raises if there are none
        return open_teacher(self, world().device)

    def team(self) -> Processes:
        """The processes that share the encoding of the data; in a dry run each encodes its own few samples."""
        from stepdistill.processes import Processes
        from stepdistill.training.processes import world

        return Processes() if self.dry_run else Processes.found(world().device.type)

    def files(self, path: str) -> dict[str, str | None]:
        """Selects a pipeline's files: --variant and --revision apply to the teacher's only."""
        return {"variant": self.variant, "revision": self.revision} if path == self.teacher else {}

    def open_samples(self, teacher: Teacher) -> tuple[Samples, Samples]:
        """Returns the training samples and the held-out ones.

        Raises:
            InputError: there are too few.
        """
        from stepdistill.data.cache import open_data

        held = min(self.held_out, DRY) if self.dry_run else self.held_out
        count = DRY if self.dry_run else self.limit
        with tempfile.TemporaryDirectory() if self.dry_run else nullcontext() as beside:
            cache = open_data(
                self.samples, teacher, resolution=self.resolution, cache_dir=beside, seed=self.seed,
                synthetic_guidance=self.guidance, limit=None if count is None else count + held,
                half=self.half, precision=self.half_type, team=self.team(),
            )  # fmt: skip
        rest = len(cache) - held
        if rest < 1:
            raise InputError(
                f"--data: got {len(cache)} samples, {held} of them held out; allowed: more, or --held-out 1"
            )
        return Samples(cache, 0, min(rest, count or rest)), Samples(cache, rest, held)

    @property
    def draws(self) -> bool:
        """Whether images are generated."""
        return bool(self.pictures) and not self.dry_run

    def measured_over(self) -> str:
        """What the figures are measured over, in words."""
        drawn = f"; {self.pictures:,} pictures at guidance {self.guidance:g}" if self.pictures else ""
        return f"{self.held_out:,} held-out samples{drawn}"
