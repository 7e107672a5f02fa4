"""Muralidharan et al. (2024), *Compact Language Models via Pruning and Knowledge Distillation* (Minitron): a decoder
loses its least important parts, and learns from the whole one.

stepdistill baselines run minitron --quick
stepdistill baselines sweep minitron              # layers, the MLPs' width, or part of both
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stepdistill.baselines.language.forward_kl import ForwardKLConfig
from stepdistill.baselines.language.run import QUICK
from stepdistill.baselines.language.shares import Shares
from stepdistill.baselines.results import Results
from stepdistill.errors import InputError

MOST = 0.5  # of the parameters that one round may remove, according to the paper


@dataclass(frozen=True)
class MinitronConfig(ForwardKLConfig):
    """Flags of `minitron`: those of `forward_kl`, with a pruned teacher as the student, and no cross-entropy.

    Llamas, Qwen2 and GPT-2 can be pruned. For Llama 3 and Qwen2.5: train_scripts/configs/baselines/minitron_llama.yaml
    and minitron_qwen.yaml. A teacher trained on other text is fine-tuned on this one first, by --correction-steps.
    To remove more than half, prune a run's <out>/student-0/model again.
    """

    out: Path = Path("out/minitron")
    """Output folder. Run the same command again to resume."""
    student: str = "prune:layers=0.25,neurons=0.25"
    """prune: and the shares to remove of layers, heads, channels and neurons (the MLPs' width). Of 1,024 channels or
    neurons and more, a multiple of 64 stays."""
    soft_weight: float = 1.0
    """Weight of T² times the divergence from the teacher; the paper needs no other loss."""
    hard_weight: float = 0.0
    """Weight of the cross-entropy with the text. It is the control's only loss, with weight 1."""
    max_train_steps: int = 150
    """Updates of student and control; a pruned tiny teacher soon recovers."""

    NAME: ClassVar[str] = "minitron"
    QUICK: ClassVar[Mapping[str, object]] = QUICK
    SWEEP: ClassVar[tuple[str, tuple]] = (
        "student", ("prune:layers=0.5", "prune:neurons=0.75", "prune:layers=0.25,neurons=0.4")
    )  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        if not self.student.startswith("prune:"):
            raise InputError(f"student: got {self.student}; allowed: prune: and shares, as {MinitronConfig.student}")
        Shares.read(self.student)

    def run(self) -> Results:
        """See DecoderConfig.run."""
        results = super().run()
        sizes = {row.role: row.parameters for row in results.rows}
        if sizes and (gone := 1 - sizes["student"] / sizes["teacher"]) > MOST:
            results.note = (
                f"{results.note}; {gone:.0%} of the parameters were removed in one round; the paper advises at "
                f"most {MOST:.0%} per round, with training in between"
            ).strip()
        return results
