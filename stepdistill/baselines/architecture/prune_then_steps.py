"""Fewer blocks, then fewer steps: BK-SDM (Kim et al. 2023), then LCM or LADD applied to the smaller pipeline.

stepdistill baselines run prune_then_steps --quick
stepdistill baselines run prune_then_steps --size small tiny --distiller lcm --steps 1 2 4 8
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from accelerate import PartialState

from stepdistill.baselines.architecture.bk_sdm import BKSDMConfig
from stepdistill.baselines.architecture.block_removal import Size
from stepdistill.baselines.architecture.contest import exported
from stepdistill.baselines.architecture.fewer_steps import CHAIN, fewer_steps, settings
from stepdistill.baselines.architecture.measure import pictures
from stepdistill.baselines.results import Results, Row
from stepdistill.data.cache import make_cache
from stepdistill.errors import InputError
from stepdistill.evaluation.spec import ModelSpec

if TYPE_CHECKING:
    from stepdistill.denoiser.load import Teacher

AFTER = ("size", "distiller", "lcm", "ladd", "step_updates", "steps", "plain_steps")  # flags of what follows pruning


@dataclass(frozen=True)
class PruneThenStepsConfig(BKSDMConfig):
    """Flags of `prune_then_steps`.

    For Stable Diffusion 1.5: train_scripts/configs/baselines/sd15_prune_then_steps.yaml.
    """

    out: Path = Path("out/prune-then-steps")
    """Output folder. Run the same command again to resume."""
    size: tuple[Size, ...] = ("small", "tiny")
    """See bk_sdm; all sizes are on one plot."""
    distiller: Literal["lcm", "ladd"] = "lcm"
    """Step distillation method; ladd starts from the student of lcm."""
    lcm: Path | None = None
    """YAML of train_lcm_lora.py's flags, or a name that ships; by default the settings for the embedded teacher."""
    ladd: Path | None = None
    """The same for train_ladd.py."""
    step_updates: int = 500
    """Updates of each step distillation, for teacher, control and student alike."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts at which distilled pipelines are measured."""
    plain_steps: tuple[int, ...] = (4, 8, 16)
    """Step counts at which undistilled pipelines are measured."""

    QUICK: ClassVar[Mapping[str, object]] = {
        **BKSDMConfig.QUICK, "size": ("tiny",), "max_train_steps": 4, "step_updates": 2, "pictures": 8, "steps": (1, 4),
        "plain_steps": (4,),
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("distiller", ("lcm", "ladd"))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {"prune": AFTER, "data": AFTER}

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        if not self.pictures:
            raise InputError("pictures: got 0; allowed: 2 or more: quality by latency is what this run is for")
        if not self.size or len(set(self.size)) < len(self.size):
            got = ", ".join(self.size) or "none"
            raise InputError(f"size: got {got}; allowed: one or more of base, small, tiny, each once")
        if self.step_updates < 1 or min((*self.steps, *self.plain_steps), default=0) < 1 or not self.steps:
            got = f"{self.step_updates}, {self.steps}, {self.plain_steps}"
            raise InputError(f"step_updates, steps, plain_steps: got {got}; allowed: 1 or more each")
        for name in CHAIN[self.distiller]:
            settings(self, name, self.teacher, self.data, self.out, None).check()

    def check_teacher(self, teacher: Teacher) -> None:
        """See BKSDMConfig.check_teacher, for each size."""
        for size in self.size:
            self.pruning(size, self.data).check_teacher(teacher)

    def pruning(self, size: Size, data: str) -> BKSDMConfig:
        """The flags of the pruning to one size."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(BKSDMConfig)}
        return BKSDMConfig(
            **own | {"out": self.out / f"prune-{size}", "size": size, "data": data, "limit": None, "pictures": 0}
        )

    def run(self) -> Results:
        """Prunes, distils the steps of teacher, control and student, and measures all: <out>/pareto.png shows quality
        against latency, <out>/bench/report.html everything."""
        self.check()
        data = self._data()
        results = Results("prune_then_steps", f"fd_{self._decides}", False, f"{self.pictures:,} pictures")
        for size in self.size:
            config = self.pruning(size, data)
            pruned = config.run()
            results.note = f"fd_N is FD at N steps; other figures are at {self._decides}. {pruned.note}"
            for row in pruned.rows if not self.dry_run else ():
                if row.role in ("control", "student") or (row.role == "teacher" and size == self.size[0]):
                    results.rows.append(self._few(row, config))
        if results.rows and PartialState().is_main_process:
            self._plot()
        return results

    def _few(self, row: Row, pruning: BKSDMConfig) -> Row:
        """Distils a network's steps and returns its row; all step counts, before and after, are on the plot."""
        if row.role == "teacher":
            name, path, out = "teacher", self.teacher, "steps-teacher-0"
        else:
            name = row.name + ", untaught" * (row.role == "control") + f", seed {row.seed}" * (len(self.seeds) > 1)
            path = str(exported(pruning.out, row.role, row.seed))
            out = f"steps-{row.name}-{row.role}-{row.seed}"
        few, seconds = fewer_steps(self, path, pruning.data, self.out / out, row.seed or 0)
        whole = ModelSpec(path, name, guidance=self.guidance, scheduler="ddim", **self.files(path))
        self._drawn(whole, self.plain_steps)
        found = self._drawn(ModelSpec(str(few), f"{name} + {self.distiller}"), self.steps)
        figures = {f"fd_{n}{key[2:]}": found[n][key] for n in self.steps for key in found[n] if _of_distance(key)}
        figures |= {key: value for key, value in found[self._decides].items() if not _of_distance(key)}
        kind = "teacher" if row.role == "teacher" else row.name
        return dataclasses.replace(
            row, name=f"{kind} + {self.distiller}", figures=figures, seconds=seconds + (row.seconds or 0)
        )

    @property
    def _decides(self) -> int:
        return 4 if 4 in self.steps else max(self.steps)

    def _data(self) -> str:
        """The data, encoded once for all trainings if there is a limit on them."""
        if self.limit is None or self.dry_run or (Path(self.samples) / "manifest.json").is_file():
            return self.samples
        make_cache(
            self.samples, self.open_teacher(), self.out / "data", resolution=self.resolution, seed=self.seed,
            synthetic_guidance=self.guidance, limit=self.limit + self.held_out, half=self.half,
            precision=self.half_type, team=self.team(),
        )  # fmt: skip
        return str(self.out / "data")

    def _drawn(self, spec: ModelSpec, steps: tuple[int, ...]) -> dict[int, dict[str, float]]:
        """The figures of a pipeline by step count."""
        if not steps:
            return {}
        found = pictures(
            {spec.name: spec}, self.out / "bench", protocol=self.protocol, n=self.pictures, steps=steps, floor=True
        )
        return {n: found[spec.name, n] for n in steps}

    def _plot(self) -> None:
        """Writes the benchmark's report, and its plot of quality against latency."""
        from stepdistill.evaluation.report import write_report

        bench = self.out / "bench"
        write_report(bench, title="Architecture and step count")
        shutil.copy(bench / "latency.png", self.out / "pareto.png")
        print(f"plot: {self.out / 'pareto.png'}")


def _of_distance(key: str) -> bool:
    return key == "fd" or key.startswith("fd_")
