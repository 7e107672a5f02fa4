"""Li et al. (2023), *SnapFusion*: a UNet without the blocks it can spare, trained to take one step for two.

stepdistill baselines run snapfusion --quick
stepdistill baselines run snapfusion --saving 0.2 --steps 8
stepdistill baselines run snapfusion --config train_scripts/configs/baselines/sd15_snapfusion.yaml --data my/images
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tqdm import tqdm

from stepdistill.baselines.architecture import blocks
from stepdistill.baselines.architecture.cfg_aware import CFGAware
from stepdistill.baselines.architecture.config import ArchitectureConfig
from stepdistill.baselines.architecture.contest import Contest
from stepdistill.baselines.architecture.measure import call_times, held_out
from stepdistill.baselines.architecture.paths import Paths
from stepdistill.baselines.architecture.prune import Shape, pruned
from stepdistill.baselines.architecture.unets import Samples, Untaught
from stepdistill.baselines.base import first_word
from stepdistill.baselines.results import Results
from stepdistill.errors import InputError
from stepdistill.methods.progressive import Progressive, halving_times

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher


@dataclass(frozen=True)
class SnapFusionConfig(ArchitectureConfig):
    """Flags of `snapfusion`.

    For Stable Diffusion 1.5: train_scripts/configs/baselines/sd15_snapfusion.yaml.
    """

    out: Path = Path("out/snapfusion")
    """Output folder. Run the same command again to resume."""
    saving: float = 0.25
    """Share of the milliseconds of a call to save by removing blocks; 0 removes none."""
    judged: int = 64
    """Held-out samples on which blocks are judged."""
    steps: int = 8
    """Step count of the student; its teacher takes twice as many."""
    cfg_range: tuple[float, float] = (2.0, 14.0)
    """Range of the guidance scale of teacher and student."""
    cfg_probability: float = 0.1
    """Share of the updates in which they are guided."""
    original_weight: float = 0.2
    """gamma, the weight of the usual diffusion loss. It is the control's only loss, with weight 1."""
    balanced: bool = True
    """Scale that loss to the size of the distillation loss before weighting it."""
    learning_rate: float = 5e-5
    """Peak learning rate: lower than if blocks that matter were removed."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "limit": 128, "held_out": 32, "judged": 16, "pictures": 0, "max_train_steps": 6, "batch_size": 4,
        "lr_warmup": 2, "steps": 4,
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("cfg_probability", (0.0, 0.1, 0.5, 1.0))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "control": ("cfg_range", "cfg_probability", "original_weight", "balanced"),
        "blocks": ("cfg_range", "cfg_probability", "original_weight", "balanced", "steps", "control_init",
                   "caption_dropout", "max_train_steps", "batch_size", "learning_rate", "lr_scheduler", "lr_warmup",
                   "weight_decay", "max_grad_norm"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("saving", least=0, below=1, fix="try 0.25")
        self.require("cfg_probability", least=0, most=1, fix="the paper's is 0.1")
        self.require("judged", "steps", least=1)
        self.require("original_weight", least=0)
        if not 1 <= self.cfg_range[0] <= self.cfg_range[1] < math.inf:
            got = " to ".join(f"{g:g}" for g in self.cfg_range)
            raise InputError(f"cfg_range: got {got}; allowed: 1 or more, rising; the paper's is 2 to 14")

    def part(self, name: str, **changes: object) -> SnapFusionConfig:
        """See BaselineConfig.part; a control has one loss, which is balanced with none."""
        return super().part(name, **({"balanced": False} if first_word(name) == "control" else {}) | changes)

    @property
    def FREE(self) -> frozenset[str]:  # noqa: N802
        """See LoopConfig; the sizes of two losses are compared within a batch, so splitting it changes the update."""
        return super().FREE - ({"batch_size", "gradient_accumulation"} if self.balanced else set())

    def run(self) -> Results:
        """Chooses the blocks, then trains a control and a student for each seed, each exported as a pipeline to
        <out>/ROLE-SEED/export. The costs of removals are in <out>/blocks.json."""
        self.check()
        teacher = self.open_teacher()
        like = teacher.denoiser
        if like.kind == "eps":
            raise InputError(
                f"teacher: got {self.teacher}, which predicts eps and so has no say in x0 where there is noise alone; "
                "allowed: one that predicts v; make it one with train_scripts/train_progressive.py --no-lora"
            )
        halving_times(like.schedule, 2 * self.steps, like.grid)
        train, held = self.open_samples(teacher)
        contest = Contest(
            self, "snapfusion", "efficient", teacher, self.efficient(teacher, held), train, held,
            figure="fd" if self.pictures else "path_error", steps=self.steps, teacher_steps=2 * self.steps,
            teacher_scheduler="ddim", scheduler=Progressive(self.steps).scheduler(teacher),
            card=f"A smaller Stable Diffusion for {self.steps} steps, distilled with stepdistill.",
            extra=Paths(like, held, self.steps, self.guidance).errors,
            note=f"path_error and step_error compare {self.steps} steps, the teacher's included, with the teacher's "
            f"{2 * self.steps}; its images take {2 * self.steps} steps.",
        )  # fmt: skip
        taught = CFGAware(
            self.steps, self.cfg_range, self.cfg_probability, self.original_weight, self.balanced, self.caption_dropout
        )
        return contest.run({"control": Untaught(self.caption_dropout), "student": taught})

    def efficient(self, teacher: Teacher, held: Samples) -> Shape:
        """The shape without the blocks that can be spared, as chosen when the run first started."""
        from accelerate import PartialState

        like, whole = teacher.denoiser, Shape.of(teacher.denoiser.backbone)
        if not self.saving:
            return whole
        judged = Samples(held.cache, held.first, min(self.judged, held.count))

        def measure(shape: Shape) -> blocks.Cost:
            bar.update()
            unet = pruned(like.backbone, shape).eval()
            fastest = call_times(like, unet, judged, repeats=40)[0]  # other load can only add to it
            return blocks.Cost(fastest, held_out(like, unet, judged)["distance_to_teacher"])

        settings = {"teacher": self.teacher, "data": self.samples, "saving": self.saving, "judged": judged.count}
        choose = partial(blocks.evolve, whole, measure, self.saving)
        state = PartialState()
        bar = tqdm(desc="measuring blocks", unit=" UNets", dynamic_ncols=True, disable=not state.is_local_main_process)
        with bar:
            rounds = choose() if self.dry_run else blocks.kept_rounds(self.out / "blocks.json", settings, choose)
        blocks.show(rounds)
        return rounds[-1].shape
