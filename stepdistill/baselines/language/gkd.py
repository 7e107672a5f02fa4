"""GKD, Agarwal et al. (2024), *On-Policy Distillation of Language Models*: the teacher corrects the student on the
student's own text in a share λ of the updates, and on the corpus in the others, with a generalised Jensen-Shannon
divergence. Its mean is over the generated tokens of an update, ends of text included.

stepdistill baselines run gkd --quick
stepdistill baselines sweep gkd --over lmbda=0,0.5,1
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.generate import TokenBatch, coin, sample
from stepdistill.baselines.language.models import Decoder, logits
from stepdistill.baselines.language.run import QUICK, DecoderConfig
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GKD(Objective):
    """D_β(teacher, student) on the student's own text with probability λ, else on the batch's; no gradient passes
    through sampling. All texts of an update are generated before its first batch, which has to know their lengths.

    Attributes:
        lmbda: λ; 1 is on-policy. beta: see losses.generalized_jsd. temperature: of sampling, not of D.
        prompt: tokens of a sample that the student continues. eos, pad: tokens. seed: of the choice.
    """

    lmbda: float
    beta: float
    temperature: float
    prompt: int
    eos: int
    pad: int
    seed: int

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student."""
        on_policy = coin(self.seed, clock.update) < self.lmbda

        def read(each: Batch) -> TokenBatch:
            ids, attention = each["ids"], each["attention"]
            if not on_policy:
                return TokenBatch(ids, attention, each["counts"])
            return sample(
                [(models.bare, 1.0)], ids[:, : self.prompt], attention[:, : self.prompt], each.draws,
                new=ids.shape[1] - self.prompt, eos=self.eos, pad=self.pad, temperature=self.temperature,
            )  # fmt: skip

        text = batch.ahead("text", read)
        weight = batch.weight(lambda each: losses.predicted(each.ahead("text", read).counts))
        with torch.no_grad():
            teacher_logits = logits(models.teacher, text.ids, text.attention)[:, :-1]
        student_logits, _, mask = losses.shift(logits(models.student, text.ids, text.attention), text.ids, text.counts)
        value = weight * losses.generalized_jsd(student_logits, teacher_logits, mask, beta=self.beta)
        return Loss(value, {"jsd_own" if on_policy else "jsd_text": value})


@dataclass(frozen=True)
class GKDConfig(DecoderConfig):
    """Flags of `gkd`.

    The defaults are for tiny models. For real ones: train_scripts/configs/baselines/gkd_qwen.yaml, Qwen2.5-7B-Instruct
    to 0.5B-Instruct on prompts, which the teacher answers first; gpt2_lab.yaml and qwen_lab.yaml, on text.
    """

    out: Path = Path("out/gkd")
    """Output folder. Run the same command again to resume."""
    lmbda: float = 0.5
    """λ: the share of updates on the student's own text; 1 is on-policy, 0 the text alone."""
    beta: float = 0.5
    """β: 0 is KL(teacher || student), 1 is KL(student || teacher)."""
    temperature: float = 1.0
    """Sampling temperature of the student."""
    trainer: Literal["own", "trl"] = "own"
    """own: this package's loop. trl: its GKDTrainer, from the extra `trl`, which resumes from its last checkpoint."""

    NAME: ClassVar[str] = "gkd"
    QUICK: ClassVar[Mapping[str, object]] = QUICK
    SWEEP: ClassVar[tuple[str, tuple]] = ("lmbda", (0.0, 0.5, 1.0))

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("lmbda", "beta", least=0, most=1, fix="try 0.5")
        self.require("temperature", above=0, fix="try 1")
        if self.trainer == "trl" and importlib.util.find_spec("trl") is None:
            raise InputError("trainer: got trl, but trl is not installed; pip install 'stepdistill[trl]', or take own")

    @property
    def FREE(self) -> frozenset[str]:  # noqa: N802
        """See LoopConfig; trl divides by the tokens of a batch, so splitting an update differently changes it."""
        return super().FREE - ({"batch_size", "gradient_accumulation"} if self.trainer == "trl" else set())

    def objective(self, teacher: Decoder, corpus: Corpus) -> GKD:
        """The loss of the student."""
        return GKD(self.lmbda, self.beta, self.temperature, self.prompt, teacher.eos, teacher.pad, self.seed)

    def teach(self, teacher: Decoder, student: PreTrainedModel, corpus: Corpus) -> float:
        """See DecoderConfig.teach."""
        if self.trainer == "own":
            return super().teach(teacher, student, corpus)
        from stepdistill.baselines.language.gkd_trl import teach

        return teach(self, teacher, student, corpus.train)
