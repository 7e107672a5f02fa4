"""TinyBERT's losses (Jiao et al. 2020, section 3.1): on embeddings, hidden states, attention scores before the softmax,
which no transformers network returns, and the teacher's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.baselines.base import Batch, Objective, TeacherStudent
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.hooks import capture
from stepdistill.methods.base import Clock, Loss


@dataclass(frozen=True)
class Seen:
    """Activations of a call of an encoder with L layers.

    Attributes:
        hidden: L + 1 tensors (B, S, D): embeddings, and the output of each layer. scores: L tensors (B, heads, S, S).
    """

    hidden: list[Tensor]
    scores: list[Tensor]


def look(body: nn.Module, call: nn.Module, ids: Tensor, attention: Tensor) -> Seen:
    """Calls an encoder and returns the activations of its layers.

    Args:
        body: a transformers encoder with the structure of BERT. call: the same, as wrapped by the trainer.
        ids, attention: (B, S), tokens and attention mask.
    """
    count, heads = body.config.num_hidden_layers, body.config.num_attention_heads
    layers = [f"encoder.layer.{i}" for i in range(count)]
    queries, keys = ([f"{layer}.attention.self.{what}" for layer in layers] for what in ("query", "key"))
    with capture(body, ["embeddings", *layers, *queries, *keys]) as captured:
        call(input_ids=ids, attention_mask=attention.long())
    hidden = [captured[name] for name in ("embeddings", *layers)]
    return Seen(hidden, [scores(captured[q], captured[k], heads) for q, k in zip(queries, keys, strict=True)])


def scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Q Kᵀ / √d of each head, before mask and softmax: (B, S, heads d) twice to (B, heads, S, S)."""
    q, k = (wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def layer_map(student: int, teacher: int) -> list[int]:
    """g(m) for m = 0, the embeddings, to the student's last layer: k m, if the teacher has k times the layers.

    Raises:
        ValueError: its layers are not a multiple of the student's.
    """
    if student < 1 or teacher % student:
        raise ValueError(f"layers: got {student} of a student and {teacher} of its teacher; allowed: divisors of those")
    return [teacher // student * m for m in range(student + 1)]


def hidden_loss(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Mean squared difference of (B, S, D) over attended tokens."""
    return masked_mean((wide(student) - wide(teacher)).square().mean(-1), attention)


def attention_loss(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Mean squared difference of scores (B, heads, S, S), over pairs of attended tokens."""
    pairs = attention[:, :, None] & attention[:, None, :]
    return masked_mean((wide(student) - wide(teacher)).square().mean(1), pairs)


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean of -Σ p log q for logits (B, classes), p the teacher's and q the student's softmax at the temperature."""
    p, q = (wide(x) / temperature for x in (teacher, student))
    return masked_mean(-(p.softmax(-1) * q.log_softmax(-1)).sum(-1))


def attended(batch: Batch) -> Tensor:
    """The number of attended tokens, and of pairs of them within a text."""
    lengths = batch["attention"].sum(1)
    return torch.stack([lengths.sum(), lengths.square().sum()])


class Projections(nn.Module):
    """W_e and W_h, which map the student's embeddings and hidden states to the teacher's width; layers share W_h.

    Args:
        student, teacher: their widths.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.embeddings, self.hidden = (nn.Linear(student, teacher, bias=False) for _ in range(2))

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """Projects the embeddings and each layer's output."""
        first, *rest = map(wide, hidden)
        return [self.embeddings(first), *map(self.hidden, rest)]


@dataclass(frozen=True)
class Layers(Objective):
    """Σ over the student's layers m: embeddings (m = 0), hidden states and attention against the teacher's g(m).

    The projections are trained with the same forward, in a separate phase.
    """

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The student, then the projections."""
        return ("student", "projections")

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student, or of the projections."""
        attention = batch["attention"]
        student, teacher = batch.once("seen", lambda: self._look(batch, models))
        places = layer_map(len(student.scores), len(teacher.scores))
        hidden = student.hidden if phase == "student" else [x.detach() for x in student.hidden]
        projected = models.projections(hidden)
        parts = [hidden_loss(x, teacher.hidden[place], attention) for x, place in zip(projected, places, strict=True)]
        tokens, pairs = batch.weight(attended)
        terms = {"embeddings": tokens * parts[0], "hidden": tokens * sum(parts[1:])}
        if phase == "projections":
            return Loss(sum(terms.values()), {})
        each = zip(student.scores, places[1:], strict=True)
        terms["attention"] = pairs * sum(attention_loss(x, teacher.scores[place - 1], attention) for x, place in each)
        return Loss(sum(terms.values()), terms)

    def _look(self, batch: Batch, models: TeacherStudent) -> tuple[Seen, Seen]:
        items = batch["ids"], batch["attention"]
        with torch.no_grad():
            teacher = look(models.teacher, models.teacher, *items)
        return look(models.bare, models.student, *items), teacher


@dataclass(frozen=True)
class Answers(Objective):
    """The teacher's softened outputs on the task."""

    temperature: float

    def loss(self, phase: str, batch: Batch, models: TeacherStudent, clock: Clock) -> Loss:
        """The loss of the student."""
        items = batch["ids"], batch["attention"]
        with torch.no_grad():
            answers = models.teacher(*items)
        value = prediction_loss(models.student(*items), answers, self.temperature)
        return Loss(value, {"prediction": value})
