"""DistiLLM, Ko et al. (2024): a skewed divergence on the text, and on the student's own text only as far as the
validation loss calls for it; generated text is kept and reused.

stepdistill baselines run distillm --quick
stepdistill baselines sweep distillm --over alpha=0.05,0.1,0.3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.corpus import Corpus
from stepdistill.baselines.language.generate import TokenBatch, coin, evaluating, sample
from stepdistill.baselines.language.measure import mean_nll
from stepdistill.baselines.language.memory import Replay
from stepdistill.baselines.language.models import Decoder, logits
from stepdistill.baselines.language.run import QUICK, DecoderConfig
from stepdistill.baselines.language.tokens import Tokens
from stepdistill.methods.base import Clock, Loss


def turn(share: float, threshold: float, progress: float, full: bool) -> Literal["generate", "replay", "corpus"]:
    """What an update trains on: new text of the student, kept text of it, or the corpus.

    Args:
        share: uniform in [0, 1). threshold: the share of updates on the student's text. progress: of the run, 0 to 1;
            new text becomes rarer with it (the paper's decreasing replay ratio). full: whether no rows are free.
    """
    if share < threshold * (1 - progress) or (share < threshold and not full):
        return "generate"
    return "replay" if share < threshold else "corpus"


@dataclass(frozen=True)
class DistiLLM(Objective):
    """A skewed divergence, on the text or on the student's own, kept or new.

    Attributes:
        divergence: see losses. alpha: its skew. look_every: updates between measurements of the loss on `held`.
        prompt: tokens of a sample that the student continues. eos, pad: tokens. seed: of the choice.
    """

    divergence: Literal["skew_kl", "skew_reverse_kl"]
    alpha: float
    look_every: int
    held: Tokens
    prompt: int
    eos: int
    pad: int
    seed: int

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student; its text and the validation loss are kept in `models.replay`."""
        replay: Replay = models.replay
        if clock.update % self.look_every == 0 and replay.looked.item() != clock.update:
            with evaluating(models.bare):
                replay.look(mean_nll(models.bare, self.held), clock.update)
        full = replay.filled == len(replay.ids)
        state = coin(self.seed, clock.update), replay.threshold.item(), clock.update / clock.total
        mode = batch.ahead("turn", lambda _: turn(*state, full))  # for the whole update, whose texts may fill the rows

        def read(each: Batch) -> TokenBatch:
            ids, attention = each["ids"], each["attention"]
            if mode == "corpus":
                return TokenBatch(ids, attention, each["counts"])
            if mode == "replay":
                return replay.recall(each.draws)
            generated = sample(
                [(models.bare, 1.0)], ids[:, : self.prompt], attention[:, : self.prompt], each.draws,
                new=ids.shape[1] - self.prompt, eos=self.eos, pad=self.pad,
            )  # fmt: skip
            replay.keep(generated)
            return generated

        text = batch.ahead("text", read)
        weight = batch.weight(lambda each: losses.predicted(each.ahead("text", read).counts))
        with torch.no_grad():
            teacher_logits = logits(models.teacher, text.ids, text.attention)[:, :-1]
        student_logits, _, mask = losses.shift(logits(models.student, text.ids, text.attention), text.ids, text.counts)
        value = weight * getattr(losses, self.divergence)(student_logits, teacher_logits, mask, alpha=self.alpha)
        return Loss(value, {f"{self.divergence}_{mode}": value, "threshold": replay.threshold.detach().clone()})


@dataclass(frozen=True)
class DistiLLMConfig(DecoderConfig):
    """Flags of `distillm`.

    The defaults are for tiny models. For real ones: train_scripts/configs/baselines/gpt2_dolly.yaml, GPT-2-XL to GPT-2
    on instructions, both fine-tuned on these first, as in the paper; gpt2_lab.yaml and qwen_lab.yaml, on text.
    """

    out: Path = Path("out/distillm")
    """Output folder. Run the same command again to resume."""
    divergence: Literal["skew_kl", "skew_reverse_kl"] = "skew_reverse_kl"
    """The KL divergence of the teacher from the mixture, or of the student from it."""
    alpha: float = 0.1
    """The skew: the share, in the mixture, of the distribution that is compared with it."""
    threshold: float = 0.0
    """Initial share of updates on the student's own text; it rises by 0.1 if the validation loss has risen by that."""
    look_every: int = 50
    """Updates between measurements of the validation loss."""
    capacity: int = 1000
    """Rows of the student's text that are kept."""

    NAME: ClassVar[str] = "distillm"
    QUICK: ClassVar[Mapping[str, object]] = {**QUICK, "look_every": 20}
    SWEEP: ClassVar[tuple[str, tuple]] = ("alpha", (0.05, 0.1, 0.3))

    @property
    def extendable(self) -> bool:
        """See LoopConfig.extendable; new text becomes rarer with the share of the run that is done."""
        return False

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("alpha", above=0, below=1, fix="the paper uses 0.1")
        self.require("threshold", least=0, most=1, fix="the paper begins with 0")
        self.require("look_every", "capacity", least=1)

    def objective(self, teacher: Decoder, corpus: Corpus) -> DistiLLM:
        """The loss of the student."""
        return DistiLLM(self.divergence, self.alpha, self.look_every, corpus.validation, self.prompt, teacher.eos,
                        teacher.pad, self.seed)  # fmt: skip

    def others(self, corpus: Corpus) -> dict[str, nn.Module]:
        """See DecoderConfig.others."""
        return {"replay": Replay(self.capacity, self.block, self.threshold)}
