"""MiniLLM, Gu et al. (2024): the reverse divergence KL(student ‖ teacher) of whole texts, by a policy gradient on texts
sampled from a mixture of teacher and student.

stepdistill baselines run minillm --quick
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.memory import Rollouts
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.policy import MiniLLM
from stepdistill.baselines.language.run import QUICK, DecoderConfig


@dataclass(frozen=True)
class MiniLLMConfig(DecoderConfig):
    """Flags of `minillm`.

    The defaults are for tiny models. For real ones: train_scripts/configs/baselines/gpt2_dolly.yaml, GPT-2-XL to GPT-2
    on instructions, both fine-tuned on these first, as in the paper; gpt2_lab.yaml and qwen_lab.yaml, on text.
    """

    out: Path = Path("out/minillm")
    """Output folder. Run the same command again to resume."""
    mix: float = 0.2
    """The teacher's share of the mixture that texts are sampled from."""
    clip: float = 0.2
    """How far the likelihood ratio may move from 1 before a token has no more gradient."""
    reuse: int = 4
    """Updates on the same texts."""
    corpus_weight: float = 1.0
    """Weight of L_PT: cross-entropy on the task's own completions (the paper's is on a pretraining corpus)."""

    NAME: ClassVar[str] = "minillm"
    QUICK: ClassVar[Mapping[str, object]] = QUICK
    SWEEP: ClassVar[tuple[str, tuple]] = ("corpus_weight", (0.0, 0.5, 1.0))

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("mix", "clip", above=0, below=1, fix="the paper uses 0.2")
        self.require("reuse", least=1, fix="the authors use 4")
        self.require("corpus_weight", least=0, fix="the paper uses 1")

    def objective(self, teacher: Decoder, corpus: Corpus) -> MiniLLM:
        """The loss of the student."""
        return MiniLLM(self.mix, self.clip, self.reuse, self.corpus_weight, self.prompt, teacher.eos, teacher.pad)

    def others(self, corpus: Corpus) -> dict[str, nn.Module]:
        """See DecoderConfig.others."""
        from accelerate import PartialState

        rows = self.batch_size * self.gradient_accumulation * PartialState().num_processes
        return {"rollouts": Rollouts(rows, self.block)}
