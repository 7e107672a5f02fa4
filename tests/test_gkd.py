"""GKD: on whose text the divergence is taken, and over which tokens."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny_decoders import sentences, tiny_decoder, tokenizer

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language.generate import coin, sample
from stepdistill.baselines.language.gkd import GKD, GKDConfig
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.tokens import Tokens, pack
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock

PROMPT, BLOCK = 4, 12
CLOCK = Clock(3, 10)


def data() -> Tokens:
    return pack(sentences(30), tokenizer(), BLOCK, prompt=PROMPT)


def batch() -> Batch:
    return Batch(data().batch([0, 1, 2]), Draws.at(7, 0, 3))


def teacher_student() -> TeacherStudent:
    """In float64, so that losses equal what is computed by hand."""
    return TeacherStudent(tiny_decoder(seed=1).network.double(), tiny_decoder(seed=2).network.double())


def objective(**changes) -> GKD:
    settings = {"lmbda": 1.0, "beta": 0.3, "temperature": 1.0, "prompt": PROMPT, "eos": 2, "pad": 0, "seed": 0}
    return GKD(**settings | changes)


@torch.no_grad()
def jsd_by_hand(models: TeacherStudent, ids, attention, counts, beta: float) -> list[float]:
    """The divergence of each token that counts, in float64."""
    s, t = (logits(m, ids, attention).double().softmax(-1) for m in (models.student, models.teacher))
    values = []
    for b, i in counts.nonzero().tolist():
        p, q = t[b, i - 1], s[b, i - 1]
        m = beta * p + (1 - beta) * q
        values.append((beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()).item())
    return values


def test_on_policy_the_mean_is_over_what_the_student_said_up_to_its_first_end():
    models, given = teacher_student(), batch()
    loss = objective().loss("student", given, models, CLOCK)
    generated = sample([(models.bare, 1.0)], given["ids"][:, :PROMPT], given["attention"][:, :PROMPT],
                       Draws.at(7, 0, 3), new=BLOCK - PROMPT, eos=2, pad=0)  # fmt: skip
    values = jsd_by_hand(models, generated.ids, generated.attention, generated.counts, 0.3)
    assert loss.total.item() == pytest.approx(sum(values) / len(values), abs=1e-10)
    assert set(loss.terms) == {"jsd_own"} and not generated.counts[:, :PROMPT].any()


def test_over_other_tokens_than_those_said_it_is_another_number():
    """The usual mistakes: counting the prompt, counting all after the end, or dividing the sum by every position."""
    models, given = teacher_student(), batch()
    models.teacher.load_state_dict(tiny_decoder(seed=4).network.state_dict())
    first = sample([(models.bare, 1.0)], given["ids"][:, :PROMPT], given["attention"][:, :PROMPT], Draws.at(7, 0, 3),
                   new=BLOCK - PROMPT, eos=-1, pad=0)  # fmt: skip
    end = first.ids[0, PROMPT + 2].item()  # a token that one of them generates early
    loss = objective(eos=end).loss("student", given, models, CLOCK).total.item()
    generated = sample([(models.bare, 1.0)], given["ids"][:, :PROMPT], given["attention"][:, :PROMPT],
                       Draws.at(7, 0, 3), new=BLOCK - PROMPT, eos=end, pad=0)  # fmt: skip
    values = jsd_by_hand(models, generated.ids, generated.attention, generated.counts, 0.3)
    assert generated.counts.sum().item() < 3 * (BLOCK - PROMPT)
    assert loss == pytest.approx(sum(values) / len(values), abs=1e-10)
    everything = torch.ones_like(generated.counts)
    everything[:, 0] = False
    behind = everything.clone()
    behind[:, :PROMPT] = False
    for counts in (everything, behind):
        wrong = jsd_by_hand(models, generated.ids, generated.attention, counts, 0.3)
        assert abs(sum(wrong) / len(wrong) - loss) > 1e-3 * loss
    assert abs(sum(values) / (3 * (BLOCK - 1)) - loss) > 0.1 * loss


def test_where_the_end_of_text_pads_the_first_end_counts_and_no_other():
    """As for GPT-2, whose padding is known by its place alone."""
    models, given = teacher_student(), batch()
    whole = sample([(models.bare, 1.0)], given["ids"][:, :PROMPT], given["attention"][:, :PROMPT], Draws.at(7, 0, 3),
                   new=BLOCK - PROMPT, eos=-1, pad=0)  # fmt: skip
    end = whole.ids[0, PROMPT + 2].item()  # a token that one of them generates early
    loss = objective(eos=end, pad=end).loss("student", given, models, CLOCK).total.item()
    ids, counts = whole.ids.clone(), torch.zeros_like(whole.counts)
    for row in range(3):
        ends = [i for i in range(PROMPT, BLOCK) if ids[row, i] == end][:1] or [BLOCK]
        counts[row, PROMPT : ends[0] + 1] = True
        ids[row, ends[0] :] = end
    attention = counts.clone()
    attention[:, :PROMPT] = given["attention"][:, :PROMPT]
    values = jsd_by_hand(models, ids, attention, counts, 0.3)
    assert len(values) < 3 * (BLOCK - PROMPT)
    assert loss == pytest.approx(sum(values) / len(values), abs=1e-10)


def test_the_temperature_is_of_what_the_student_says_and_not_of_the_divergence():
    models, given = teacher_student(), batch()
    loss = objective(temperature=0.2).loss("student", given, models, CLOCK).total.item()
    prompts = given["ids"][:, :PROMPT], given["attention"][:, :PROMPT]
    cold, warm = (
        sample([(models.bare, 1.0)], *prompts, Draws.at(7, 0, 3), new=BLOCK - PROMPT, eos=2, pad=0, temperature=t)
        for t in (0.2, 1.0)
    )
    values, others = (jsd_by_hand(models, text.ids, text.attention, text.counts, 0.3) for text in (cold, warm))
    assert loss == pytest.approx(sum(values) / len(values), abs=1e-10)
    assert abs(sum(others) / len(others) - loss) > 1e-4 * loss


def test_lambda_is_the_share_of_updates_on_the_students_own_text():
    models = teacher_student()
    for lmbda in (0.0, 0.4, 1.0):
        terms = [
            next(iter(objective(lmbda=lmbda).loss("student", batch(), models, Clock(u, 20)).terms)) for u in range(20)
        ]
        assert terms == ["jsd_own" if coin(0, u) < lmbda else "jsd_text" for u in range(20)]


def test_off_policy_every_token_of_the_text_but_the_first_counts():
    models, given = teacher_student(), batch()
    loss = objective(lmbda=0.0).loss("student", given, models, CLOCK)
    values = jsd_by_hand(models, given["ids"], given["attention"], given["counts"], 0.3)
    assert len(values) == 3 * (BLOCK - 1)
    assert loss.total.item() == pytest.approx(sum(values) / len(values), abs=1e-10)


def test_gradients_reach_the_student_alone():
    models = teacher_student()
    objective().loss("student", batch(), models, CLOCK).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in models.bare.parameters())
    assert all(p.grad is None for p in models.teacher.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    models = TeacherStudent(*(tiny_decoder(seed=1).network.double() for _ in range(2)))
    assert objective().loss("student", batch(), models, CLOCK).total.item() == pytest.approx(0, abs=1e-12)


def test_without_trl_its_trainer_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"trainer: got trl, but trl is not installed; pip install 'stepdistill\[trl\]'"
    with pytest.raises(InputError, match=message):
        GKDConfig(trainer="trl").check()


@pytest.mark.parametrize(
    "changes", [{"lmbda": 1.5}, {"beta": -0.1}, {"temperature": 0.0}, {"prompt": 64}, {"stride": 256}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}: got"):
        GKDConfig(**changes).check()
