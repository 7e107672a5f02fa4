"""Word-level distillation and the control's cross-entropy, computed token by token."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import tiny_decoder, tokenizer

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language.cross_entropy import CrossEntropy
from stepdistill.baselines.language.forward_kl import ForwardKL
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import pair_up
from stepdistill.draws import Draws
from stepdistill.methods.base import Clock

CLOCK = Clock(3, 10)
PAIRS = [Pair("the cat", " sees red hats."), Pair("a dog likes the old", " owl.")]


def batch() -> Batch:
    """A batch padded on both sides, in which completions count and prompts do not."""
    rows = pair_up(PAIRS, tokenizer(), prompt=12, completion=9)
    return Batch(rows.batch([0, 1]), Draws.at(0, 0, 2))


def teacher_student() -> TeacherStudent:
    return TeacherStudent(*(tiny_decoder("gpt2", seed=seed).network.double() for seed in (1, 2)))


@torch.no_grad()
def by_hand(models: TeacherStudent, temperature: float) -> tuple[float, float]:
    """KL(teacher at T || student at T) and -log S(token), in nats per token that counts."""
    rows = batch()
    s, t = (logits(m, rows["ids"], rows["attention"]) for m in (models.student, models.teacher))
    soft, hard = [], []
    for b, i in rows["counts"].nonzero().tolist():
        p, q = ((x[b, i - 1] / temperature).softmax(-1) for x in (t, s))
        soft.append((p * (p / q).log()).sum().item())
        hard.append(-s[b, i - 1].softmax(-1)[rows["ids"][b, i]].log().item())
    return sum(soft) / len(soft), sum(hard) / len(hard)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_term_has_the_square_of_the_temperature_and_each_its_own_weight(temperature):
    models = teacher_student()
    loss = ForwardKL(temperature, 0.7, 0.2).loss("student", batch(), models, CLOCK)
    soft, hard = by_hand(models, temperature)
    terms = {name: value.item() for name, value in loss.terms.items()}
    assert terms == pytest.approx({"forward_kl": temperature**2 * soft, "cross_entropy": hard}, rel=1e-10)
    assert loss.total.item() == pytest.approx(0.7 * temperature**2 * soft + 0.2 * hard, rel=1e-10)


def test_the_controls_loss_is_the_cross_entropy_with_what_counts():
    models = teacher_student()
    loss = CrossEntropy().loss("student", batch(), TeacherStudent(models.bare), CLOCK)
    hard = by_hand(models, 1.0)[1]
    assert loss.total.item() == loss.terms["cross_entropy"].item() == pytest.approx(hard, rel=1e-10)


def test_gradients_reach_the_student_alone():
    models = teacher_student()
    ForwardKL(2.0, 0.5, 0.5).loss("student", batch(), models, CLOCK).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in models.bare.parameters())
    assert all(p.grad is None for p in models.teacher.parameters())
