"""What TinyBERT learns (Jiao et al. 2020, section 3.1): embeddings, hidden states, and attention scores before their
softmax, which no network of transformers returns; and its teacher's answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.baselines.base import Batch, Lesson, Pupils
from stepdistill.baselines.reduce import masked_mean, wide
from stepdistill.hooks import listening
from stepdistill.methods.base import Clock, Loss


@dataclass(frozen=True)
class Seen:
    """What a call of an encoder of L layers left.

    Attributes:
        hidden: L + 1 tensors (B, S, D): embeddings, and what each layer gives. scores: L tensors (B, heads, S, S).
    """

    hidden: list[Tensor]
    scores: list[Tensor]


def look(body: nn.Module, call: nn.Module, ids: Tensor, attention: Tensor) -> Seen:
    """Calls an encoder and keeps what its layers did.

    Args:
        body: an encoder of transformers, built as BERT is. call: the same, as the trainer wrapped it.
        ids, attention: (B, S), tokens and those attended to.
    """
    count, heads = body.config.num_hidden_layers, body.config.num_attention_heads
    layers = [f"encoder.layer.{i}" for i in range(count)]
    asked, offered = ([f"{layer}.attention.self.{what}" for layer in layers] for what in ("query", "key"))
    with listening(body, ["embeddings", *layers, *asked, *offered]) as heard:
        call(input_ids=ids, attention_mask=attention.long())
    hidden = [heard[name] for name in ("embeddings", *layers)]
    return Seen(hidden, [scores(heard[q], heard[k], heads) for q, k in zip(asked, offered, strict=True)])


def scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Q Kᵀ / √d of each head, before mask and softmax: (B, S, heads d) twice to (B, heads, S, S)."""
    q, k = (wide(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def layer_map(student: int, teacher: int) -> list[int]:
    """g(m) for m = 0, the embeddings, to the student's last layer: k m, where the teacher has k times the layers.

    Raises:
        ValueError: it has not.
    """
    if student < 1 or teacher % student:
        raise ValueError(f"layers: got {student} of a student and {teacher} of its teacher; allowed: divisors of those")
    return [teacher // student * m for m in range(student + 1)]


def hidden_loss(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Mean squared difference of (B, S, D) over what is attended to."""
    return masked_mean((wide(student) - wide(teacher)).square().mean(-1), attention)


def attention_loss(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """Mean squared difference of scores (B, heads, S, S), where both tokens are attended to."""
    pairs = attention[:, :, None] & attention[:, None, :]
    return masked_mean((wide(student) - wide(teacher)).square().mean(1), pairs)


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-Σ p log q of logits (B, classes), p the teacher's and q the student's softmax at the temperature: the mean."""
    p, q = (wide(x) / temperature for x in (teacher, student))
    return masked_mean(-(p.softmax(-1) * q.log_softmax(-1)).sum(-1))


class Projections(nn.Module):
    """W_e and W_h: embeddings and hidden states of the student, made as wide as the teacher's. W_h serves all layers.

    Args:
        student, teacher: their widths.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.embeddings, self.hidden = (nn.Linear(student, teacher, bias=False) for _ in range(2))

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """Embeddings, and what each layer gives."""
        first, *rest = map(wide, hidden)
        return [self.embeddings(first), *map(self.hidden, rest)]


@dataclass(frozen=True)
class Layers(Lesson):
    """Σ over the student's layers m: embeddings (m = 0), hidden states and attention against the teacher's g(m).

    Projections are trained by the same forward, in a phase of their own.
    """

    def phases(self, clock: Clock) -> tuple[str, ...]:
        """The student, then what makes it as wide as its teacher."""
        return ("student", "projections")

    def loss(self, phase: str, batch: Batch, models: Pupils, clock: Clock) -> Loss:
        """The loss of the student, or of the projections."""
        attention = batch["attention"]
        student, teacher = batch.once("seen", lambda: self._look(batch, models))
        places = layer_map(len(student.scores), len(teacher.scores))
        hidden = student.hidden if phase == "student" else [x.detach() for x in student.hidden]
        wide = models.projections(hidden)
        parts = [hidden_loss(x, teacher.hidden[place], attention) for x, place in zip(wide, places, strict=True)]
        terms = {"embeddings": parts[0], "hidden": sum(parts[1:])}
        if phase == "projections":
            return Loss(sum(terms.values()), {})
        pairs = zip(student.scores, places[1:], strict=True)
        terms["attention"] = sum(attention_loss(x, teacher.scores[place - 1], attention) for x, place in pairs)
        return Loss(sum(terms.values()), terms)

    def _look(self, batch: Batch, models: Pupils) -> tuple[Seen, Seen]:
        items = batch["ids"], batch["attention"]
        with torch.no_grad():
            teacher = look(models.teacher, models.teacher, *items)
        return look(models.bare, models.student, *items), teacher


@dataclass(frozen=True)
class Answers(Lesson):
    """The teacher's softened answers to the task."""

    temperature: float

    def loss(self, phase: str, batch: Batch, models: Pupils, clock: Clock) -> Loss:
        """The loss of the student."""
        items = batch["ids"], batch["attention"]
        with torch.no_grad():
            answers = models.teacher(*items)
        value = prediction_loss(models.student(*items), answers, self.temperature)
        return Loss(value, {"prediction": value})
