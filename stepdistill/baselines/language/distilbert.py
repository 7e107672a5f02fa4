"""Sanh et al. (2019), *DistilBERT*: an encoder that starts as half its teacher's layers, and a triple loss.

stepdistill baselines run distilbert --quick
stepdistill baselines sweep distilbert            # starting from the teacher's layers, or from random weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from stepdistill.baselines.base import TeacherStudent
from stepdistill.baselines.exports import refresh
from stepdistill.baselines.language.encoder_run import EncoderConfig
from stepdistill.baselines.language.encoders import MaskedLM, shape
from stepdistill.baselines.language.masked import MaskedModelling, cut_lines, masked_lm_metrics
from stepdistill.baselines.language.saved import save
from stepdistill.baselines.language.students import copy_layers, evenly
from stepdistill.baselines.language.texts import joined, open_texts
from stepdistill.baselines.language.triple import DistilBert
from stepdistill.baselines.learner import learn
from stepdistill.baselines.results import Results, Role, Row, count_parameters
from stepdistill.errors import InputError


@dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """Flags of `distilbert`. For BERT itself: train_scripts/configs/baselines/distilbert_bert.yaml.

    A teacher with a trained head for masked tokens takes --teacher-steps 0.
    """

    out: Path = Path("out/distilbert")
    """Output folder. Run the same command again to resume."""
    test: str | None = None
    """For a data file: the held-out file; by default its own last tenth."""
    held_out: int = 500
    """Held-out pieces at most."""
    mask_rate: float = 0.15
    """Share of the tokens that are masked and have to be predicted."""

    layers: tuple[int, ...] = ()
    """Layers of the teacher, counted from 0, that the student has; by default every other, the first and last included:
    0 2 4 7 9 11 of 12."""
    init: Literal["layers", "random"] = "layers"
    """Initial weights of student and control: those layers and everything around them, or random."""
    temperature: float = 2.0
    """T, the temperature that softens the outputs of both."""
    kl_weight: float = 5.0
    """Weight of T² times the divergence from the teacher's softened outputs."""
    mlm_weight: float = 2.0
    """Weight of the loss on masked tokens. It is the control's only loss."""
    cosine_weight: float = 1.0
    """Weight of the cosine distance between the last hidden states."""
    kl_on: Literal["all", "masked"] = "all"
    """Tokens at which outputs are compared: all, as the authors do, or the masked ones, which is cheaper."""

    max_train_steps: int = 1000
    """Updates of student and control."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    lr_warmup: int = 50
    """Updates over which the learning rate rises."""

    QUICK: ClassVar[Mapping[str, object]] = {
        "teacher": "tiny", "limit": 1000, "held_out": 200, "teacher_steps": 300, "max_train_steps": 60, "lr_warmup": 10,
    }  # fmt: skip
    SWEEP: ClassVar[tuple[str, tuple]] = ("init", ("layers", "random"))
    IRRELEVANT_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "teacher": ("layers", "init", "temperature", "kl_weight", "mlm_weight", "cosine_weight", "kl_on",
                    "max_train_steps", "learning_rate"),
        "control": ("temperature", "kl_weight", "mlm_weight", "cosine_weight", "kl_on"),
    }  # fmt: skip

    def check(self) -> None:
        """See LoopConfig.check."""
        super().check()
        self.require("kl_weight", "mlm_weight", "cosine_weight", least=0)
        if not self.kl_weight + self.mlm_weight + self.cosine_weight:
            raise InputError("kl_weight, mlm_weight, cosine_weight: got 0 for all; allowed: one above 0; raise it")
        self.require("held_out", least=1)
        self.require("temperature", above=0, fix="try 2")
        self.require("mask_rate", above=0, below=1, fix="try 0.15")
        self.require("teacher_steps", least=0)

    def run(self) -> Results:
        """Trains the teacher first if it needs it; then a control and a student for each seed."""
        from stepdistill.training.processes import world

        self.check()
        opened = self.open(self.mask_rate)
        encoder, train, masking = opened.teacher, opened.text, opened.masking
        if encoder.untrained and not self.teacher_steps:
            raise InputError(
                f"teacher: got {self.teacher}, which has not been trained to predict masked tokens; give "
                "--teacher-steps, 1000 say"
            )
        kept = self._kept(encoder.network.config.num_hidden_layers)
        test = joined(open_texts(self.data, "test", test=self.test))
        held = cut_lines(test, encoder.tokenizer, self.length, self.held_out)
        state = world()
        teacher = MaskedLM(encoder.network).to(state.device)
        seconds = self.pretrain(teacher, opened) if self.teacher_steps else None

        results = Results("distilbert", "masked_nll", False, f"{len(held):,} pieces of held-out text")

        def add(role: Role, network: MaskedLM, seconds: float | None = None, seed: int | None = None) -> None:
            if self.dry_run:
                return
            figures = masked_lm_metrics(network, held, masking)
            name = shape(network.network)
            results.rows.append(Row(role, name, figures, count_parameters(network), seconds, seed))

        add("teacher", teacher, seconds)
        weights = (self.temperature, self.kl_weight, self.mlm_weight, self.cosine_weight)
        objectives = {"control": MaskedModelling(masking), "student": DistilBert(masking, *weights, self.kl_on)}
        for seed in self.seeds:
            add("before", self._begin(teacher, kept, seed), seed=seed)
            for role, objective in objectives.items():
                network, part = self._begin(teacher, kept, seed), self.part(f"{role}-{seed}", seed=seed)
                models = TeacherStudent(network, teacher if role == "student" else None)
                add(role, network, learn(objective, models, train, part), seed)
                if not self.dry_run and state.is_main_process:
                    refresh(part.out / "model", part.out, partial(save, network.network, encoder.tokenizer))
        return results

    def _kept(self, count: int) -> list[int]:
        """The teacher's layers that the student has."""
        kept = list(self.layers) or evenly(max(count // 2, 1), count)
        if sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= count:
            raise InputError(f"layers: got {kept}; allowed: rising numbers from 0 to {count - 1}, the teacher's")
        return kept

    def _begin(self, teacher: MaskedLM, kept: list[int], seed: int) -> MaskedLM:
        student = copy_layers(teacher.network, kept)
        if self.init == "random":
            torch.manual_seed(seed)
            student = type(student)(student.config)
        return MaskedLM(student).to(next(teacher.parameters()).device)
