"""The distillation that step distillation grew out of: classifiers, language models, and a diffusion model's network.

    stepdistill baselines list
    stepdistill baselines run hinton --quick

Every baseline trains a student by a teacher and, at the same budget, a control without one, and ends with a table of
teacher, control and student. What all share: base.py (a run and its networks), reduce.py (one masked mean), hooks.py
(what layers say) and results.py (the table, and how much of the gap was closed).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from stepdistill.errors import InputError


@dataclass(frozen=True)
class Baseline:
    """A method by name: where its flags are, and what it is in a line."""

    flags: str
    paper: str
    what: str

    @property
    def config(self) -> type:
        """The class of its flags, whose `run` runs it."""
        module, name = self.flags.split(":")
        return getattr(import_module(f"stepdistill.baselines.{module}"), name)


BASELINES: dict[str, Baseline] = {
    "hinton": Baseline("classifier.hinton:HintonConfig", "Hinton et al. 2015", "a classifier learns a larger one's"
                       " softened answers"),
    "bk_sdm": Baseline("architecture.bk_sdm:BKSDMConfig", "Kim et al. 2023", "a diffusion model's UNet loses blocks and"
                       " learns from the whole one"),
    "snapfusion": Baseline("architecture.snapfusion:SnapFusionConfig", "Li et al. 2023", "a diffusion model's UNet"
                           " loses the blocks it can spare and learns to take one guided step for two"),
    "prune_then_steps": Baseline("architecture.prune_then_steps:PruneThenStepsConfig", "Kim 2023, Luo 2023", "bk_sdm,"
                                 " then LCM or LADD of what it made: fewer blocks and fewer steps on one plot"),
}  # fmt: skip


def get(name: str) -> Baseline:
    """A baseline by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in BASELINES:
        raise InputError(f"baseline: got {name!r}; allowed: {', '.join(BASELINES)}; see stepdistill baselines list")
    return BASELINES[name]
