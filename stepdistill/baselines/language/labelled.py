"""Texts with classes, and an encoder that predicts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.language.masked import Lines
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Labelled:
    """N texts and their classes.

    Attributes:
        lines: the texts' tokens. labels: (N,) int64. classes: their names.
    """

    lines: Lines
    labels: Tensor
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """`ids` and `attention`, see Lines, and `labels`."""
        return self.lines.batch(indices) | {"labels": self.labels[indices]}

    def spread(self, count: int | None) -> Labelled:
        """Returns `count` evenly spaced texts, from first to last, as files may be sorted by class; None for all.

        Raises:
            InputError: there are fewer, or those returned would have one class.
        """
        if count is None:
            return self
        if count > len(self):
            raise InputError(f"--labelled: got {count}; allowed: up to {len(self)}, the training texts of the task")
        places = torch.arange(count) * len(self) // count
        lines = Lines(self.lines.ids[places], self.lines.attention[places])
        if len(self.labels[places].unique()) < 2:
            raise InputError(f"--labelled: got {count}, all of one class; allowed: texts of two or more; raise it")
        return Labelled(lines, self.labels[places], self.classes)


class Classifier(nn.Module):
    """An encoder with a linear head on the mean over attended tokens.

    Args:
        body: a transformers encoder without a head. classes: of the logits.
    """

    def __init__(self, body: PreTrainedModel, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(body.config.hidden_size, classes)

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """(B, S) tokens and attention mask to logits (B, classes)."""
        hidden = self.body(input_ids=ids, attention_mask=attention.long()).last_hidden_state
        weights = attention[..., None].to(hidden)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy with the classes: the loss of task teachers and controls."""

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The mean over the texts."""
        logits = models.student(batch["ids"], batch["attention"])
        value = masked_mean(nn.functional.cross_entropy(wide(logits), batch["labels"], reduction="none"))
        return Loss(value, {"hard": value})


@torch.no_grad()
def classification_metrics(network: Classifier, held: Labelled, batch: int = 64) -> dict[str, float]:
    """`nll`, nats per text, and `accuracy`."""
    device = next(network.parameters()).device
    nll, correct = 0.0, 0
    for first in tqdm(range(0, len(held), batch), "measuring", leave=False, dynamic_ncols=True):
        items = {k: v.to(device) for k, v in held.batch(list(range(first, min(first + batch, len(held))))).items()}
        logits = network(items["ids"], items["attention"]).float()
        nll += nn.functional.cross_entropy(logits, items["labels"], reduction="sum").item()
        correct += (logits.argmax(-1) == items["labels"]).sum().item()
    return {"nll": nll / len(held), "accuracy": correct / len(held)}
