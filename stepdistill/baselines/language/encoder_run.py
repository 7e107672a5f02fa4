"""Flags common to the baselines for encoders, and how their runs begin: with a teacher, and text whose masked tokens it
can predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepdistill.baselines.base import BaselineConfig, TeacherStudent
from stepdistill.baselines.language import masked
from stepdistill.baselines.language.encoders import Encoder, MaskedLM, open_encoder
from stepdistill.baselines.language.masked import Lines, MaskedModelling, Masking
from stepdistill.baselines.language.models import check_length
from stepdistill.baselines.language.texts import joined, open_texts
from stepdistill.baselines.learner import learn


@dataclass(frozen=True)
class Opened:
    """A teacher, the training text in pieces, and how their tokens are masked."""

    teacher: Encoder
    text: Lines
    masking: Masking


@dataclass(frozen=True)
class EncoderConfig(BaselineConfig):
    """Flags of encoder, text and training."""

    teacher: str = "tiny"
    """An encoder: tiny, minilm, or a folder or hub id of a BERT or RoBERTa."""
    teacher_steps: int = 1000
    """Updates by which it first learns to predict masked tokens, if it has not; see above."""
    teacher_learning_rate: float = 3e-3
    """Peak learning rate of these; 1e-4 for a real encoder."""
    data: str = "avatars"
    """Training text: avatars (captions), a .txt or .jsonl file, wikitext, or a `datasets` name."""
    limit: int | None = 4000
    """Pieces of that text at most; None for all."""
    length: int = 64
    """Tokens of a piece, special ones included; longer lines are cut into several."""

    batch_size: int = 32
    """Pieces, or texts of a task, per process in one forward."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after the warm-up."""
    lr_warmup: int = 20
    """Updates over which the learning rate rises."""
    weight_decay: float = 0.01
    """Decoupled weight decay, as in AdamW."""

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("limit", least=1, fix="None is all")
        self.require("length", least=4)

    def open(self, mask_rate: float) -> Opened:
        """Opens teacher and text; `mask_rate` is the share of tokens that are masked.

        Raises:
            InputError: there is no such teacher or text, or the teacher has too few positions.
        """
        texts = joined(open_texts(self.data, "train"))
        teacher = open_encoder(self.teacher, texts, seed=self.seed)
        check_length(teacher.network, self.length, "length")
        text = masked.cut_lines(texts, teacher.tokenizer, self.length, self.limit)
        vocabulary = teacher.network.config.vocab_size
        return Opened(teacher, text, Masking.of(teacher.tokenizer, vocabulary, self.length, mask_rate))

    def pretrain(self, network: MaskedLM, opened: Opened) -> float:
        """Trains the teacher on masked tokens, in place; returns the seconds of training."""
        config = self.part("teacher", max_train_steps=self.teacher_steps, learning_rate=self.teacher_learning_rate)
        return learn(MaskedModelling(opened.masking), TeacherStudent(network), opened.text, config)
